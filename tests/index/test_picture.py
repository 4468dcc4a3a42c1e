"""One picture file in, upright RGB out."""

from __future__ import annotations

import hashlib
import io
import random

import numpy as np
import pytest
from PIL import Image, features

from amg_core.descriptors import create
from amg_core.images import to_tensor
from amg_core.index import picture as module
from amg_core.index.picture import Unreadable, decode, load_picture, pixel_hash, read_file
from tests.index.helpers import encoded, paint

avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF codec")


def distance(picture, image: Image.Image) -> float:
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert picture.pixels.shape == expected.shape and picture.pixels.dtype == np.uint8
    return np.abs(picture.pixels - expected).mean()


KINDS = [
    *(("PNG", 0), ("JPEG", 4), ("WEBP", 6), ("GIF", 12), ("BMP", 0), ("TIFF", 0)),
    pytest.param("AVIF", 6, marks=avif),
]


@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
def test_formats(tmp_path, kind, tolerance):
    data = encoded(paint(1), kind)
    picture = decode(data, "x")
    assert distance(picture, paint(1)) <= tolerance
    assert (picture.source, picture.width, picture.height) == ("x", 40, 30)
    assert picture.size == (40, 30)
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    (tmp_path / "a.bin").write_bytes(data)
    loaded = load_picture(tmp_path / "a.bin")
    assert (loaded.source, loaded.sha256) == ("a.bin", picture.sha256)
    np.testing.assert_array_equal(loaded.pixels, picture.pixels)


@pytest.mark.parametrize(("kind", "tolerance"), [k for k in KINDS if k[0] not in ("JPEG", "BMP")])
def test_first_frame_of_an_animation(kind, tolerance):
    data = encoded(
        paint(1), kind, save_all=True, append_images=[paint(2), paint(3)], **(
            {"duration": 100} if kind != "TIFF" else {}
        )
    )  # fmt: skip
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert distance(decode(data, ""), paint(1)) <= tolerance


def test_transparency_is_white():
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.paste((200, 0, 0, 255), (0, 0, 2, 4))
    wanted = Image.new("RGB", (4, 4), "white")
    wanted.paste((200, 0, 0), (0, 0, 2, 4))
    for kind, options in {"PNG": {}, "WEBP": {"lossless": True}, "GIF": {}, "TIFF": {}}.items():
        assert distance(decode(encoded(half, kind, **options), ""), wanted) == 0, kind
    animated = encoded(half, "GIF", save_all=True, append_images=[paint(1, (4, 4))])
    assert distance(decode(animated, ""), wanted) == 0


def test_sixteen_bits():
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(8, 0)
    wanted = Image.fromarray((ramp / 257).round().astype(np.uint8))
    assert distance(decode(encoded(Image.fromarray(ramp), "PNG"), ""), wanted) == 0
    # RGB of 16 bits: Pillow cannot write it, so by hand
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    colours = np.stack([ramp, ramp[:, ::-1], ramp * 0], -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 64, 8, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    eight = Image.fromarray((colours / 257).round().astype(np.uint8))
    assert distance(decode(data, ""), eight) <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_tiny_pictures_and_strips(size, kind):
    picture = decode(encoded(paint(1, size), kind), "")
    assert picture.size == (picture.width, picture.height) == size
    pixel, tensor = create("pixel"), to_tensor(picture.pixels)
    assert all(pixel.embed(tensor, scale).isfinite().all() for scale in pixel.spec.scales)


# --- large ones --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((1279, 1279), (1279, 1279)),
        ((1280, 1281), (640, 641)),
        ((2600, 1280), (1300, 640)),
        ((2570, 2561), (643, 641)),
        ((3000, 900), (3000, 900)),
    ],
)
def test_large_jpegs_are_read_reduced(size, read):
    whole = paint(1, size)
    data = encoded(whole, "JPEG", quality=95)
    picture = decode(data, "")
    assert picture.size == read and (picture.width, picture.height) == size
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert distance(picture, whole.resize(read, Image.Resampling.BOX)) < 2


def test_orientation_of_a_reduced_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = paint(1, (2560, 1300))
    picture = decode(encoded(whole, "JPEG", exif=exif), "")
    assert (picture.width, picture.height) == (1300, 2560) and picture.size == (650, 1280)
    upright = whole.transpose(Image.Transpose.ROTATE_270).resize((650, 1280))
    assert distance(picture, upright) < 3


def test_cameras_jpegs_that_hold_several_pictures():
    data = encoded(paint(1, (1400, 1300)), "MPO", save_all=True, append_images=[paint(2, (64, 48))])
    picture = decode(data, "")
    assert picture.size == (700, 650)
    assert distance(picture, paint(1, (1400, 1300)).resize((700, 650))) < 3


def test_reduced_jpegs_of_all_modes():
    for mode in ("L", "CMYK", "RGB"):
        for progressive in (False, True):
            image = paint(1, (1400, 1300)).convert(mode)
            picture = decode(encoded(image, "JPEG", progressive=progressive, quality=95), "")
            assert picture.size == (700, 650)
            assert distance(picture, image.convert("RGB").resize((700, 650))) < 3


def test_too_large(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 1_500_000)
    jpeg = encoded(paint(1, (1500, 1500)), "JPEG")
    assert decode(jpeg, "").size == (750, 750)  # too large in full
    for image, kind in (
        (paint(1, (1500, 1500)), "PNG"),
        (paint(1, (2000, 1501)), "JPEG"),  # beyond the double
        (paint(1, (3000, 700)), "JPEG"),  # nothing to reduce
    ):
        with pytest.raises(Unreadable, match=r"\d x \d+ is too large"):
            decode(encoded(image, kind), "")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(Unreadable, match="file larger"):
        decode(jpeg, "")


# --- what cannot be read -----------------------------------------------------------------------


def test_reasons(tmp_path, monkeypatch):
    for data, reason in {
        b"": "empty file",
        b"hello": "not a picture of a known format",
        encoded(paint(1), "WEBP")[:200]: "damaged",
        b"\0\0\0\x18ftypheic" + bytes(100): "HEIC",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not a picture",
    }.items():
        with pytest.raises(Unreadable, match=reason):
            decode(data, "")
    monkeypatch.setattr(module, "_formats", lambda: module.FORMATS)
    with pytest.raises(Unreadable, match="pip install --upgrade pillow"):
        decode(b"\0\0\0\x1cftypavif" + bytes(100), "")
    with pytest.raises(Unreadable, match="No such file"):
        read_file(tmp_path / "absent.png")
    with pytest.raises(Unreadable, match="not a file"):
        read_file(tmp_path)
    with pytest.raises(Unreadable):
        read_file(tmp_path / "nul\0.png")


def test_pixels_are_taken_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = decode(pixels, "x")
    assert picture.pixels is pixels and picture.sha256 == pixel_hash(pixels)
    assert (picture.width, picture.height) == (7, 5)
    for wrong in (pixels[..., :2], pixels[0], pixels.astype(float), pixels[:0]):
        with pytest.raises(Unreadable, match="not RGB pixels"):
            decode(wrong, "x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_fuzzed_files_are_read_or_refused(kind):
    rng = random.Random(kind)
    data = encoded(paint(1), kind)
    read = 0
    for _ in range(150):
        broken = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        for _ in range(rng.randrange(1, 6)):
            if broken:
                broken[rng.randrange(min(len(broken), 300))] = rng.randrange(256)
        try:
            read += decode(bytes(broken), "").pixels.ndim == 3
        except Unreadable as error:
            assert str(error)
    assert read < 150
