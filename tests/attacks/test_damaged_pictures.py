"""The index holds what ComfyUI's Load Image opens, pixel for pixel."""

from __future__ import annotations

import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

from amg_core.index import Index, build
from amg_core.index.picture import Unreadable, decode
from tests.index.helpers import encoded, fill

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8))


def leniently(function, argument):
    """As ComfyUI's node_helpers.pillow."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        return function(argument)
    except (OSError, UnidentifiedImageError, ValueError):
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        return function(argument)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def as_comfyui(data: bytes) -> np.ndarray:
    """What Load Image makes of an opaque picture of 8 bits: (H, W, 3) uint8."""
    image = leniently(Image.open, BytesIO(data))
    first = leniently(ImageOps.exif_transpose, next(iter(ImageSequence.Iterator(image))))
    return np.array(first.convert("RGB"))


def chunk(name: bytes, body: bytes, wrong: int = 0) -> bytes:
    crc = zlib.crc32(name + body) ^ wrong
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


PNG = encoded(NOISE, "PNG")
JPEG = encoded(NOISE, "JPEG")
BIG = zlib.compress(bytes(3 << 20))
ODD_PNG_CHUNKS = {
    "large profile": chunk(b"iCCP", b"x\0\0" + BIG),
    "large zTXt": chunk(b"zTXt", b"x\0\0" + BIG),
    "large iTXt": chunk(b"iTXt", b"x\0\1\0\0\0" + BIG),
    "damaged tEXt": chunk(b"tEXt", b"x\0hello", 1),
    "damaged iTXt": chunk(b"iTXt", b"x\0\1\0\0\0hello", 1),
    "short gAMA": chunk(b"gAMA", b"x"),
    "short pHYs": chunk(b"pHYs", b"x"),
}
SOUND = {name: PNG[:33] + odd + PNG[33:] for name, odd in ODD_PNG_CHUNKS.items()} | {
    "large zTXt at the end": PNG[:-12] + ODD_PNG_CHUNKS["large zTXt"] + PNG[-12:],
    "damaged tEXt at the end": PNG[:-12] + ODD_PNG_CHUNKS["damaged tEXt"] + PNG[-12:],
    "no IEND": PNG[:-12],
    "profile of many segments": encoded(NOISE, "JPEG", icc_profile=bytes(200_000)),
}


def halves():
    for name, data in {
        "png": PNG,
        "palette": encoded(NOISE.quantize(), "PNG"),
        "grey": encoded(NOISE.convert("L"), "PNG"),
        "bits": encoded(NOISE.convert("1"), "PNG"),
        "jpeg": JPEG,
        "progressive": encoded(NOISE, "JPEG", progressive=True),
        "bmp": encoded(NOISE, "BMP"),
        "tiff": encoded(NOISE, "TIFF"),
        "tga": encoded(NOISE, "TGA"),
        "ppm": encoded(NOISE, "PPM"),
    }.items():
        for left in (len(data) - 1, len(data) - 2, len(data) - 40, len(data) // 2):
            yield pytest.param(data[:left], id=f"{name} {left}")


@pytest.mark.parametrize("name", SOUND)
def test_what_is_not_pixels_does_not_matter(name):
    picture = decode(SOUND[name], name)
    assert np.array_equal(picture.pixels, as_comfyui(SOUND[name]))
    assert np.array_equal(picture.pixels, decode(JPEG if "segments" in name else PNG, "").pixels)
    assert picture.flaw == ""


@pytest.mark.parametrize("data", list(halves()))
def test_what_is_there_of_a_cut_file_is_taken(data):
    assert np.array_equal(decode(data, "").pixels, as_comfyui(data))


def interlaced(image) -> bytes:
    """An Adam7 PNG of an RGB picture; Pillow writes none."""
    pixels = np.asarray(image)
    rows = []
    for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4),
                         (1, 0, 2, 2), (0, 1, 1, 2)):  # fmt: skip
        rows += [b"\0" + row.tobytes() for row in pixels[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    body = zlib.compress(b"".join(rows))
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_interlaced():
    data = interlaced(NOISE)
    assert np.array_equal(decode(data, "").pixels, np.asarray(NOISE))
    for left in (len(data) - 40, len(data) // 2, len(data) // 8):  # Pillow resumes none of these
        pixels = decode(data[:left], "").pixels
        there = pixels.any(2)
        assert np.array_equal(pixels[there], np.asarray(NOISE)[there])
        assert 0.9 * left / len(data) < there.mean() < left / len(data) + 0.1


@pytest.mark.parametrize("place", [274_005, 275_005, 279_005, 254_005, 547_980])
def test_a_damaged_stream_is_read_up_to_the_damage(place):
    """Where the filter of a row or the checksum shows it."""
    spoiled = bytearray(encoded(NOISE.resize((640, 480)), "PNG"))
    spoiled[place * len(spoiled) // 548_011] ^= 0xFF
    spoiled = bytes(spoiled)
    picture = decode(spoiled, "")
    assert np.array_equal(picture.pixels, as_comfyui(spoiled)) and "cut or damaged" in picture.flaw


def test_what_nobody_can_open_is_refused():
    for data in (PNG[:29] + b"abcd" + PNG[33:], PNG[:40], JPEG[:100], b"\xff\xd8\xff", PNG[:8]):
        with pytest.raises(Unreadable):
            decode(data, "")


def test_a_cut_picture_that_says_it_is_enormous_takes_no_memory():
    for width, height in ((1 << 30, 1 << 30), (100_000, 100_000), (0, 5)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
        with pytest.raises(Unreadable):
            decode(data, "")


def test_no_setting_of_the_process_is_touched():
    """Other threads never see Pillow's lenient mode, which belongs to the host."""
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            seen.add(ImageFile.LOAD_TRUNCATED_IMAGES)

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(20):
        for data in (SOUND["large zTXt"], JPEG[:-2], PNG[: len(PNG) // 2]):
            decode(data, "")
    stop.set()
    thread.join()
    assert seen == {False}


@pytest.mark.parametrize("kind", ["TGA", "PPM", "JPEG2000", "PCX", "SGI"])
def test_further_formats_that_comfyui_opens(kind):
    data = encoded(NOISE, kind)
    assert np.array_equal(decode(data, "").pixels, as_comfyui(data))


def test_a_build_says_which_pictures_are_cut(tmp_path, pixel):
    folder = fill(tmp_path / "pictures", 2)
    (folder / "cut.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    (folder / "text.png").write_bytes(SOUND["large zTXt"])
    report = build(folder, tmp_path / "out", pixel)
    assert report.count == 4 and report.skipped == []
    assert [note for note in report.notes if "cut.jpg" in note and "not guarded" in note]
    assert not [note for note in report.notes if "text.png" in note]
    Index.open(tmp_path / "out").close()
