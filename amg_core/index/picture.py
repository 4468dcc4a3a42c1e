"""Decodes one picture, from the bytes of a file or from pixels, to upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import brief, open_regular, read_bounded
from .mending import mend

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .avif .bmp .dib .tif .tiff .tga .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .psd .pcx .sgi".split()
)
# Picture formats that cannot be read. They are reported as skipped, because a picture that was silently
# left out would silently be unprotected.
UNSUPPORTED = frozenset(
    ".heic .heif .hif .jxl .jxr .exr .hdr .ico .icns .dds .qoi .svg .xcf .kra .dng .cr2 .cr3 .nef "
    ".arw .orf .rw2 .raf .pef .srw".split()
)
# Formats that Pillow may try, whatever the name of the file. None of them starts another program, is
# decoded in Python pixel by pixel, or can hold a larger picture than it declares. TGA comes last because
# it has no signature.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "PSD", "PCX", "SGI", "TGA")
MAX_PIXELS = 89_478_485  # Pillow's own limit, repeated here because hosts switch it off
MAX_FILE_BYTES = 1 << 30
# JPEGs whose shorter side is at least twice this are decoded at 1/2, 1/4 or 1/8 of their size. No
# descriptor uses more than 512 px a side.
ENOUGH = 640
TOO_LARGE = "too large: shrink it below 89 megapixels"


class Unreadable(Exception):
    """A picture that cannot be used. The message is the reason in a few words."""


@dataclass(frozen=True)
class Picture:
    """One decoded picture.

    Attributes
    ----------
    source : str
        Its name.
    pixels : (H, W, 3) uint8
        RGB, upright, with alpha composited on white.
    sha256 : str
        Hash of the file's bytes, or of shape and pixels if there was no file.
    width, height : int
        Size of the upright picture in full, in pixels.
    flaw : str
        What is wrong with its pixels, "" if nothing.
    """

    source: str
    pixels: np.ndarray
    sha256: str
    width: int
    height: int
    flaw: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(W, H) of `pixels`."""
        return self.pixels.shape[1], self.pixels.shape[0]


def load_picture(path: Path, source: str = "") -> Picture:
    """Read and decode one file, see `decode`. Raises Unreadable."""
    return decode(read_file(path), source or path.name)


def read_file(path: Path) -> bytes:
    """The bytes of one picture file. Raises Unreadable."""
    return _read(path, -1)


def read_head(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file of any kind. Raises Unreadable."""
    return _read(path, size)


def _read(path: Path, size: int) -> bytes:
    try:
        if size < 0:
            return read_bounded(path, MAX_FILE_BYTES)
        with open_regular(path) as file:
            return file.read(size)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    except ValueError as error:  # a NUL in the name
        raise Unreadable(str(error)) from None


def decode(data: bytes | np.ndarray, source: str) -> Picture:
    """Decode one picture.

    EXIF orientation is applied, alpha composited on white, the first frame of an animation taken,
    16-bit grey scaled to 8 bits, CMYK and palettes converted. Colour profiles are ignored. A large
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled inverse DCT), so that its
    shorter side keeps at least ENOUGH pixels. `Picture.width` and `height` are those of the file.

    Every file that ComfyUI opens is read, with the same pixels. Large colour profiles and damaged text
    do not matter. Of a truncated file the part that is there is used (`mending`).

    Parameters
    ----------
    data : bytes, or (H, W, 3) uint8
        A picture file, or RGB pixels, which are not converted.
    source : str
        Becomes `Picture.source`.

    Raises
    ------
    Unreadable
        It is damaged, of another format, or larger than MAX_PIXELS (a JPEG: twice that) or
        MAX_FILE_BYTES.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or not data.size:
            raise Unreadable(f"not RGB pixels: {data.dtype} of shape {data.shape}")
        height, width = data.shape[:2]
        return Picture(source, data, pixel_hash(data), width, height)
    if len(data) > MAX_FILE_BYTES:
        raise Unreadable(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
    return _decode_file(data, source)


@dataclass(frozen=True)
class Stored:
    """The pixels of a file as they are stored: their SHA-256 (hex), and the size in pixels."""

    sha256: str
    width: int
    height: int


def stored_pixels(data: bytes) -> Stored:
    """Hash the pixels of a picture file in full, whatever its metadata. Unlike `decode` it mends nothing.

    The hash is that of the line "MODE WIDTHxHEIGHT" and the bytes of the pixels, row by row. A palette is
    hashed as RGBA. EXIF orientation is not applied, and of an animation the first frame counts.

    Raises
    ------
    Unreadable
        The file is damaged, of another format, or larger than MAX_PIXELS.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} is {TOO_LARGE}")
            image.load()
            whole = image.convert("RGBA") if image.mode in ("P", "PA") else image
            digest = hashlib.sha256(f"{whole.mode} {whole.width}x{whole.height}\n".encode())
            digest.update(whole.tobytes())
            return Stored(digest.hexdigest(), whole.width, whole.height)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(_unknown(data)) from None
    except Image.DecompressionBombError:
        raise Unreadable(TOO_LARGE) from None
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise Unreadable(f"damaged ({brief(error, 160)})") from None


def pixel_hash(pixels: np.ndarray) -> str:
    """SHA-256 (hex) of the shape and bytes, row by row, of a picture without a file."""
    digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode() + b"\n")
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _decode_file(data: bytes, source: str) -> Picture:
    flaw = ""
    try:
        pixels, width, height = _pixels(data)
    except Unreadable as error:
        mended = mend(data, _formats(), MAX_PIXELS)
        if mended is None:
            raise
        try:
            pixels, width, height = _pixels(mended.data)
        except Unreadable:
            raise error from None
        flaw = mended.flaw
    return Picture(source, pixels, hashlib.sha256(data).hexdigest(), width, height, flaw)


def _pixels(data: bytes) -> tuple[np.ndarray, int, int]:
    """(H, W, 3) uint8, and width and height in full. Raises Unreadable."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            image.draft(None, (ENOUGH, ENOUGH))  # changes image.size, of JPEGs only
            # A progressive JPEG needs memory for its full size, even if the result is smaller.
            if width * height > 2 * MAX_PIXELS or image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{width} x {height} is {TOO_LARGE}")
            image.load()
            orientation = _orientation(image)
            pixels = np.array(_upright(_rgb(image), orientation))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(_unknown(data)) from None
    except Image.DecompressionBombError:
        raise Unreadable(TOO_LARGE) from None
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise Unreadable(f"damaged ({brief(error, 160)})") from None
    if orientation >= 5:  # lies on its side
        width, height = height, width
    return pixels, width, height


@cache
def _formats() -> tuple[str, ...]:
    """FORMATS, and further ones for which this Pillow has a codec (AVIF: 11.3 and newer)."""
    from PIL import features

    avif = ["AVIF"] if importlib.util.find_spec("PIL._avif") else []
    jpeg2000 = ["JPEG2000"] if features.check_codec("jpg_2000") else []
    return (*avif, *jpeg2000, *FORMATS)


def _unknown(data: bytes) -> str:
    """The reason why these bytes cannot be decoded."""
    if not data:
        return "empty file"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF needs Pillow 11.3: pip install --upgrade pillow"
    if data[4:8] == b"ftyp":
        return "a video or HEIC file: convert it to PNG"
    return "not a picture of a known format"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, or 1 if the EXIF block is missing or damaged. To be called after load()."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture with its EXIF orientation applied."""
    from PIL.Image import Transpose as T

    turns = (
        *(T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE),
        *(T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90),
    )
    return image if orientation == 1 else image.transpose(turns[orientation - 2])


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, with transparency composited on white."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey of more than 8 bits -> uint8. 16 bits are divided by 257, others scaled by their range."""
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise Unreadable("has values that are not finite")
    top = float(grey.max())
    if mode.startswith("I;16"):
        scale = 257.0
    elif mode == "F" and top <= 1:
        scale = 1 / 255
    elif top <= 255:
        scale = 1.0
    else:
        scale = 257.0 if top <= 65535 else top / 255
    return (grey / scale).round().clip(0, 255).astype(np.uint8)
