"""One picture file in, upright RGB out."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, features

from amg_core.descriptors import create
from amg_core.images import to_tensor
from amg_core.index import bands
from amg_core.index import picture as module
from amg_core.index.mending import CHANNELS, PNG, chunk
from amg_core.index.picture import Unreadable, decode, load_picture, pixel_hash, read_file
from tests.index.helpers import PATIENCE, encoded, paint

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
    monkeypatch.setattr(module, "WHOLE", 1_500_000)
    jpeg = encoded(paint(1, (1500, 1500)), "JPEG")
    assert decode(jpeg, "").size == (750, 750)  # too large in full
    assert decode(encoded(paint(1, (2600, 1500)).convert("L"), "PNG"), "").size == (1300, 750)
    for image, kind, options in (
        (paint(1, (1500, 1500)), "PNG", {}),
        (paint(1, (2000, 1600)), "JPEG", {"progressive": True}),  # it holds its coefficients
        (paint(1, (3000, 700)), "JPEG", {}),  # nothing to reduce
    ):
        with pytest.raises(Unreadable, match=r"\d x \d+ is too large"):
            decode(encoded(image, kind, **options), "")
    monkeypatch.setattr(module, "PARTS", 1_000_000)
    assert decode(encoded(paint(1, (1500, 1500)), "PNG"), "").size == (750, 750)  # in bands
    monkeypatch.setattr(module, "MAX_PIXELS", 2_000_000)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(Unreadable, match="1500 x 1500 is too large"):
            decode(encoded(paint(1, (1500, 1500)), kind), "")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(Unreadable, match="file larger"):
        decode(jpeg, "")


def test_the_hosts_limit_counts_only_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses more than twice as many
    for kind in ("PNG", "JPEG"):
        assert decode(encoded(paint(1), kind), "").size == (40, 30)
    with pytest.raises(Unreadable, match="too large"):
        decode(encoded(paint(1), "BMP"), "")


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((1279, 1300), (1279, 1300)),
        ((1281, 1290), (641, 645)),
        ((2000, 2600), (667, 867)),
        ((9000, 500), (4500, 250)),  # a long strip
    ],
)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("BMP", "RGB"), ("WEBP", "RGB")],
)
def test_large_pictures_of_every_format_are_reduced(size, read, kind, mode):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 4), dtype=np.uint8), "RGBA")
    whole = coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)
    picture = decode(encoded(whole, kind, **({"lossless": True} if kind == "WEBP" else {})), "")
    assert picture.size == read and (picture.width, picture.height) == size
    white = Image.new("RGBA", size, "white")
    white.alpha_composite(whole.convert("RGBA"))
    factor = -(-size[0] // read[0])
    assert distance(picture, white.convert("RGB").reduce(factor)) < 1


def test_reduced_pictures_of_several_bands_are_whole(monkeypatch):
    grey = np.random.default_rng(0).integers(0, 60_000, (1400, 1300))
    for values, mode in ((grey.astype(np.uint16), "I;16"), (grey.astype(np.int32), "I"),
                         (grey.astype(np.float32) / 60_000, "F")):  # fmt: skip
        data = encoded(Image.fromarray(values), "TIFF")
        monkeypatch.setattr(module, "BAND_PIXELS", 1 << 30)
        once = decode(data, "")
        monkeypatch.setattr(module, "BAND_PIXELS", 1300 * 10)
        np.testing.assert_array_equal(decode(data, "").pixels, once.pixels, err_msg=mode)
        assert once.size == (650, 700) and once.pixels.std() > 10


def test_pictures_wait_for_room():
    room, order = module.Room(100), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with room.taken(60):
            inside.set()
            leave.wait(PATIENCE)
            order.append("first")

    def second(need: int) -> None:
        with room.taken(need):
            order.append(need)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(PATIENCE)
    second(40)  # fits beside it
    threads += [threading.Thread(target=second, args=(need,)) for need in (41, 500)]
    for thread in threads[1:]:
        thread.start()
    leave.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert order[:2] == [40, "first"] and set(order[2:]) == {41, 500}


# --- PNGs in bands -----------------------------------------------------------------------------


def png(size, colour: int, depth: int, seed: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of random samples, whose rows are random filters' codes."""
    rng, channels = np.random.default_rng(seed), CHANNELS[colour]
    rows = rng.integers(0, 256, (size[1], 1 + size[0] * channels * depth // 8), dtype=np.uint8)
    rows[:, 0] = rng.integers(0, 5, size[1])
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    packed = zlib.compress(rows.tobytes())
    cut = len(packed) // 3
    parts = [(b"IHDR", header), *more, (b"IDAT", packed[:cut]), (b"IDAT", packed[cut:])]
    return PNG + b"".join(chunk(*part) for part in (*parts, (b"IEND", b"")))


COLOURS = bytes(np.random.default_rng(9).integers(0, 256, 768, dtype=np.uint8))


@pytest.mark.parametrize(
    ("colour", "depth", "more"),
    [
        (0, 8, []),
        (0, 8, [(b"tRNS", b"\0\x07")]),
        (2, 8, []),
        (2, 8, [(b"tRNS", b"\0\1\0\2\0\3")]),
        (3, 8, [(b"PLTE", COLOURS)]),
        (3, 8, [(b"PLTE", COLOURS), (b"tRNS", COLOURS[:256])]),
        (4, 8, []),
        (6, 8, []),
        (2, 16, []),
        (4, 16, []),
        (6, 16, []),
    ],
)
def test_bands_hold_the_pixels_of_the_whole(monkeypatch, colour, depth, more):
    data = png((37, 53), colour, depth, 1, *more)
    whole = decode(data, "").pixels
    read = counted(monkeypatch)
    monkeypatch.setattr(module, "PARTS", 0)
    for pixels in (1, 37 * 7, 37 * 52, 37 * 53):
        monkeypatch.setattr(bands, "BAND_PIXELS", pixels)
        np.testing.assert_array_equal(decode(data, "").pixels, whole)
    assert len(read) == 4
    monkeypatch.setattr(module, "ENOUGH", 12)
    small = decode(data, "").pixels
    monkeypatch.setattr(bands, "BAND_PIXELS", 37 * 4)
    np.testing.assert_array_equal(decode(data, "").pixels, small)
    monkeypatch.setattr(module, "PARTS", 10**9)
    np.testing.assert_array_equal(decode(data, "").pixels, small)
    assert small.shape == (18, 13, 3)


def counted(monkeypatch) -> list[bytes]:
    read = []
    monkeypatch.setattr(
        module, "png_bands", lambda data, *more: read.append(data) or bands.png_bands(data, *more)
    )
    return read


def test_pngs_that_cannot_be_read_in_bands_are_read_whole(monkeypatch):
    read = counted(monkeypatch)
    for data in (
        png((37, 53), 0, 16, 2),
        png((37, 53), 2, 16, 2, (b"tRNS", b"\0\1\0\2\0\3")),
        encoded(paint(1).convert("1"), "PNG"),
        encoded(paint(1), "BMP"),
    ):
        whole = decode(data, "").pixels
        monkeypatch.setattr(module, "PARTS", 0)
        np.testing.assert_array_equal(decode(data, "").pixels, whole)
    assert not read


def test_orientation_of_a_png_in_bands(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(paint(1), "PNG", exif=exif)
    whole = decode(data, "")
    monkeypatch.setattr(module, "PARTS", 0)
    read = counted(monkeypatch)
    picture = decode(data, "")
    np.testing.assert_array_equal(picture.pixels, whole.pixels)
    assert read and (picture.width, picture.height) == whole.size == (30, 40)
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    assert block in data
    broken = data.replace(block, bytes(len(block)))
    assert decode(broken, "").size == (40, 30)


def test_a_cut_png_in_bands_is_mended(monkeypatch):
    data = png((37, 53), 2, 8, 3)
    cut = data[: len(data) // 2]
    whole = decode(cut, "")
    monkeypatch.setattr(module, "PARTS", 0)
    monkeypatch.setattr(bands, "BAND_PIXELS", 37 * 7)
    picture = decode(cut, "")
    np.testing.assert_array_equal(picture.pixels, whole.pixels)
    assert picture.flaw == whole.flaw != ""


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
