"""Reads large pictures band by band, so that they are never in memory in full.

Pillow decodes a picture as a whole, with four bytes a pixel. The bands of a PNG are given to it as small
PNGs of their own: the rows of the file as they are, after the last row of the band above, because rows are
stored as differences from the row above them (PNG 1.2, §6). So every pixel is Pillow's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from .mending import CHANNELS, PNG, chunk, chunks

if TYPE_CHECKING:
    from PIL import Image

BAND_PIXELS = 1 << 18
BAND_BYTES = 32 * BAND_PIXELS  # about what a band of a PNG takes while it is decoded
INPUT = 1 << 12  # bytes that are inflated at once


@dataclass(frozen=True)
class Header:
    """What IHDR says, and the chunks that change how pixels look."""

    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool
    looks: tuple[tuple[bytes, bytes], ...]  # PLTE and tRNS
    exif: bytes


def header(data: bytes) -> Header | None:
    """The header of a PNG, or None if the bytes are no PNG or a damaged one."""
    if data[:8] != PNG:
        return None
    size, looks, exif = b"", [], b""
    for name, body, _ in chunks(data):
        if name == b"IHDR":
            size = body
        elif name in (b"PLTE", b"tRNS"):
            looks.append((name, body))
        elif name == b"eXIf":
            exif = body
    if len(size) != 13:
        return None
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", size)
    return Header(width, height, depth, colour, bool(interlaced), tuple(looks), exif)


def in_bands(png: Header) -> bool:
    """Whether `png_bands` can read it: 8 bits, or 16 bits in colour without a transparent colour."""
    if png.interlaced or png.colour not in CHANNELS:
        return False
    wide = png.depth == 16 and png.colour != 0 and not png.looks
    return png.depth == 8 or wide


def png_bands(data: bytes, png: Header, multiple: int) -> Iterator[Image.Image]:
    """The bands of a PNG from top to bottom, each loaded and as wide as the picture.

    All have a height that is a multiple of `multiple`, except the last. Of 16 bits the upper 8 are taken,
    as Pillow does.

    Raises
    ------
    zlib.error, OSError, SyntaxError
        The file is damaged or cut.
    """
    from PIL.PngImagePlugin import PngImageFile

    channels = CHANNELS[png.colour]
    row = 1 + png.width * channels * png.depth // 8
    most = max(1, BAND_PIXELS // png.width // multiple) * multiple
    above, left, stream, held = b"", png.height, _inflated(data), bytearray()
    while left:
        height = min(most, left)
        while len(held) < height * row:
            if (piece := next(stream, None)) is None:
                raise OSError("the file is cut")
            held += piece
        rows = bytes(held[: height * row])
        del held[: height * row]
        if png.depth == 16:
            rows = _upper_bytes(rows, row, channels)
        added = bool(above)
        packed = zlib.compress((b"\0" + above if added else b"") + rows, 0)
        size = struct.pack(">IIBBBBB", png.width, height + added, 8, png.colour, 0, 0, 0)
        before = [chunk(*part) for part in ((b"IHDR", size), *png.looks)]
        idat = [struct.pack(">I4s", len(packed), b"IDAT"), packed, bytes(4)]  # nobody reads its CRC
        with PngImageFile(BytesIO(b"".join([PNG, *before, *idat, chunk(b"IEND", b"")]))) as band:
            band.load()
            above = band.crop((0, height + added - 1, png.width, height + added)).tobytes()
            yield band.crop((0, added, png.width, height + added))
        left -= height


def _inflated(data: bytes) -> Iterator[bytes]:
    """The rows of a PNG with their filters, in pieces of at most 1,032 times INPUT bytes."""
    stream = zlib.decompressobj()
    for name, body, _ in chunks(data):
        if name == b"IDAT":
            for at in range(0, len(body), INPUT):
                yield stream.decompress(body[at : at + INPUT])


def _upper_bytes(rows: bytes, row: int, channels: int) -> bytes:
    """Rows of 16 bits as rows of 8 bits. The filters treat the two bytes of a value apart."""
    table = np.frombuffer(rows, np.uint8).reshape(-1, row)
    filters, values = table[:, :1], table[:, 1:].reshape(len(table), -1, channels, 2)
    return np.hstack([filters, values[..., 0].reshape(len(table), -1)]).tobytes()
