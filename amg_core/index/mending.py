"""Repairs picture files that are truncated, or damaged outside their pixels, so that they can be decoded.

Hosts open such files: ComfyUI tries again with Pillow's LOAD_TRUNCATED_IMAGES. That is a setting of the
whole process, so here the bytes are repaired instead, with the same pixels as result. Missing pixels are
black (in a JPEG, whatever its decoder makes of them), and parts that do not affect pixels are removed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
CUT = "cut or damaged: what is missing of it is not guarded"
PIECE = 1 << 16
# Chunks that affect the pixels. The CRCs of the first kind must be right.
CRITICAL = (b"IHDR", b"PLTE")
ANCILLARY = (b"tRNS", b"eXIf")
LAST_FILTER = 4  # the filters of a PNG's rows are 0 to 4
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # for each colour type of a PNG
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
PLAIN = ("BMP", "DIB", "TIFF", "TGA", "PPM")  # formats that may store their pixels uncompressed
BITS = {  # bits of a pixel, by Pillow's names of raw modes
    "1": 1, "1;I": 1, "L": 8, "P": 8, "LA": 16, "BGRA;15": 16, "I;16": 16, "I;16B": 16,
    "RGB": 24, "BGR": 24, "RGBA": 32, "RGBX": 32, "BGRA": 32, "BGRX": 32, "CMYK": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Mended:
    """A picture file that can be decoded. `flaw` says what is wrong with its pixels, "" if nothing."""

    data: bytes
    flaw: str


def mend(data: bytes, formats: tuple[str, ...], most: int) -> Mended | None:
    """The repaired file, or None if it cannot be repaired.

    Parameters
    ----------
    data : bytes
        A picture file that cannot be decoded.
    formats : tuple of str
        The formats that Pillow may try.
    most : int
        Largest number of pixels of a picture that is repaired.
    """
    if data[:8] == PNG:
        return _png(data, most)
    if data[:3] == JPEG:
        return Mended(data + JPEG_END, CUT)
    return _raw(data, formats, most)


# ---------------------------------------------------------------- PNG


def _png(data: bytes, most: int) -> Mended | None:
    kept: list[bytes] = [PNG]
    packed: list[bytes] = []
    size = None
    for name, body, crc in chunks(data):
        if name == b"IHDR" and len(body) == 13:
            size = body
        if name in CRITICAL:
            kept.append(chunk(name, body, crc))
        elif name in ANCILLARY and not packed:
            kept.append(chunk(name, body))
        elif name == b"IDAT":
            packed.append(body)
    if size is None or not packed:
        return None
    stored = b"".join(packed)
    pixels = _whole(stored, size, most)
    if pixels is None:
        return None
    whole = b"".join([*kept, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])
    return Mended(whole, "" if pixels is stored else CUT)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes | None]]:
    """The chunks (name, body, CRC) up to IEND or the end of the file. The last one may be truncated."""
    at = len(PNG)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND" or not name.isalpha():
            return
        body = data[at + 8 : at + 8 + length]
        crc = data[at + 8 + length : at + 12 + length]
        yield name, body, crc if len(crc) == 4 else None
        at += 12 + length


def chunk(name: bytes, body: bytes, crc: bytes | None = None) -> bytes:
    """One chunk of a PNG, with its right CRC if none is given."""
    crc = crc or struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + crc


def _whole(packed: bytes, header: bytes, most: int) -> bytes | None:
    """The compressed pixels. Missing ones are filled up with zeros.

    None if not even one row is there.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if not 0 < width * height <= most or colour not in CHANNELS:
        return None
    bits = depth * CHANNELS[colour]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = []  # (number of rows, bytes of each with its filter)
    for x, y, dx, dy in passes:
        across, down = -(-(width - x) // dx), -(-(height - y) // dy)
        if across > 0 and down > 0:
            rows.append((down, 1 + -(-across * bits // 8)))
    total = sum(count * length for count, length in rows)
    if total > 4 * most:
        return None
    plain, sound = _inflated(packed, total)
    if sound and len(plain) == total:
        return packed
    held = _whole_rows(plain[: total - 1], rows)  # with a wrong checksum the last row is lost
    return zlib.compress(plain[:held] + bytes(total - held), 1) if held else None


def _whole_rows(plain: bytes, rows: list[tuple[int, int]]) -> int:
    """The number of bytes before the first row that is truncated or has an invalid filter."""
    held = 0
    for count, length in rows:
        for _ in range(count):
            if held + length > len(plain) or plain[held] > LAST_FILTER:
                return held
            held += length
    return held


def _inflated(packed: bytes, most: int) -> tuple[bytes, bool]:
    """The readable part of a deflate stream, at most `most` bytes, and whether the stream is intact."""
    stream, found, left = zlib.decompressobj(), [], most
    for at in range(0, len(packed), PIECE):
        before, piece = stream.copy(), packed[at : at + PIECE]
        try:
            found.append(stream.decompress(piece, left + 1))
        except zlib.error:
            found.append(_up_to_damage(before, piece))
            return b"".join(found)[:most], False
        left -= len(found[-1])
        if left < 0:
            break
    return b"".join(found)[:most], True


def _up_to_damage(stream: zlib._Decompress, piece: bytes) -> bytes:
    found = []
    try:
        for at in range(len(piece)):
            found.append(stream.decompress(piece[at : at + 1]))
    except zlib.error:
        pass
    return b"".join(found)


# ---------------------------------------------------------------- rows of plain pixels


def _raw(data: bytes, formats: tuple[str, ...], most: int) -> Mended | None:
    """Repair a file of a format in PLAIN, if its pixels are uncompressed."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=formats) as image:
            tiles, size = list(image.tile), image.size
            plain = image.format in PLAIN
    except Exception:  # decoders can raise anything on damaged files
        return None
    cut = end = len(data)
    if not plain or not tiles or size[0] * size[1] > most:
        return None
    for name, extents, offset, how in tiles:
        left, top, right, bottom = extents or (0, 0, *size)
        length = _row_bytes(how or "", right - left) if name == "raw" else 0
        if not length:
            return None
        end = max(end, offset + length * (bottom - top))
        if offset < len(data) < offset + length * (bottom - top):
            cut = offset + (len(data) - offset) // length * length
    some = end > len(data) and cut > min(tile[2] for tile in tiles)
    return Mended(data[:cut] + bytes(end - cut), CUT) if some else None


def _row_bytes(how: str | tuple[str, int], width: int) -> int:
    """The number of bytes in a row of a raw tile, 0 if it is not known."""
    mode, stride = how if isinstance(how, str) else how[0], 0 if isinstance(how, str) else how[1]
    return stride or -(-BITS.get(mode, 0) * width // 8)
