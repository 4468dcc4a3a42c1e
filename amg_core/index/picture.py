"""Decodes one picture, from the bytes of a file or from pixels, to upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import brief, open_regular, read_bounded
from .bands import BAND_BYTES, BAND_PIXELS, header, in_bands, png_bands
from .mending import JPEG, PNG, mend

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

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
MAX_PIXELS = 250_000_000
# Most pixels of four bytes that are decoded as a whole, where a format allows nothing else. It is Pillow's
# own limit, repeated here because hosts switch it off.
WHOLE = 89_478_485
PARTS = 32_000_000  # pixels from which a PNG is decoded in bands
MAX_FILE_BYTES = 1 << 30
# Pictures whose shorter side is at least twice this are reduced. No descriptor uses more than 512 px.
ENOUGH = 640
REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes of which Pillow averages pixels
KEPT = 4_000_000  # pixels; long strips with more are reduced further


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
    picture is reduced by a whole number, so that its shorter side keeps at least ENOUGH pixels, and that
    `KEPT` pixels are not passed: a JPEG while it is decoded, at 1/2, 1/4 or 1/8 of its size (libjpeg's
    scaled inverse DCT), all others by averages of squares. `Picture.width` and `height` are those of the
    file.

    Files that ComfyUI opens are read, up to the sizes below, and smaller ones with the same pixels. Large
    colour profiles and damaged text do not matter. Of a truncated file the part that is there is used
    (`mending`).

    At any time, pictures of at most WHOLE pixels are being decoded, whatever the number of threads. Others
    wait (`room`). A PNG of more than PARTS pixels is decoded in bands (`bands`), unless it is interlaced.

    Parameters
    ----------
    data : bytes, or (H, W, 3) uint8
        A picture file, or RGB pixels, which are not converted.
    source : str
        Becomes `Picture.source`.

    Raises
    ------
    Unreadable
        It is damaged, of another format, or larger than MAX_PIXELS or MAX_FILE_BYTES. Or it has to be
        decoded as a whole and has more than WHOLE pixels (four times as many of one byte each, twice as
        many in a progressive JPEG).
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or not data.size:
            raise Unreadable(f"not RGB pixels: {data.dtype} of shape {data.shape}")
        height, width = data.shape[:2]
        return Picture(source, data, pixel_hash(data), width, height)
    if len(data) > MAX_FILE_BYTES:
        raise Unreadable(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
    return _decode_file(data, source)


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
        mended = mend(data, _formats(), WHOLE)
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
    from PIL import UnidentifiedImageError

    try:
        png = header(data)
        if png and png.width * png.height > PARTS and in_bands(png):
            orientation, (width, height) = _orientation_of(png.exif), (png.width, png.height)
            _demand(width, height, 0)
            factor = _factor(width, height)
            with room.taken(BAND_BYTES):
                pixels = _averaged(png_bands(data, png, factor), width, height, factor)
        else:
            with _opened(data) as image:
                width, height = image.size
                image.draft(None, (ENOUGH, ENOUGH))  # changes image.size, of JPEGs only
                need = _need(image, width, height)
                _demand(width, height, need)
                with room.taken(need):
                    image.load()
                    orientation = _orientation(image)
                    factor = _factor(*image.size)
                    pixels = _averaged(_strips(image, factor), *image.size, factor)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(_unknown(data)) from None
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise Unreadable(f"damaged ({brief(error, 160)})") from None
    if orientation >= 5:  # lies on its side
        width, height = height, width
    return _upright(pixels, orientation), width, height


def _opened(data: bytes) -> ImageFile:
    """The picture before it is decoded.

    Pillow refuses pictures of more than twice a limit that belongs to the host. So PNG and JPEG, for which
    there are the limits of `_demand`, are opened without it then.
    """
    from PIL import Image
    from PIL.JpegImagePlugin import jpeg_factory
    from PIL.PngImagePlugin import PngImageFile

    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        if data[:8] == PNG:
            return PngImageFile(io.BytesIO(data))
        if data[:3] == JPEG:
            return jpeg_factory(io.BytesIO(data))
        raise Unreadable(_too_large()) from None


def _need(image: ImageFile, width: int, height: int) -> int:
    """Bytes that decoding takes, where `draft` has been called, and width and height are those in full."""
    need = image.width * image.height * {"1": 1, "L": 1, "P": 1}.get(image.mode, 4)
    if image.info.get("progressive") and image.format in ("JPEG", "MPO"):
        need = max(need, 2 * width * height)  # its coefficients are all held before a pixel is made
    return need


def _demand(width: int, height: int, need: int) -> None:
    """Unreadable if a picture is too large, or decoding takes too many bytes."""
    if width * height > MAX_PIXELS or need > 4 * WHOLE:
        raise Unreadable(f"{width} x {height} is {_too_large()}")


def _too_large() -> str:
    return f"too large: shrink it below {WHOLE // 10**6} megapixels, or save it as JPEG"


def _factor(width: int, height: int) -> int:
    """By how much a picture is reduced."""
    enough = max(1, min(width, height) // ENOUGH)
    return max(enough, math.ceil(math.sqrt(width * height / KEPT)))


def _strips(image: Image.Image, factor: int) -> Iterator[Image.Image]:
    """A decoded picture in bands whose height is a multiple of `factor`, so that copies of it are small."""
    step = max(1, BAND_PIXELS // image.width // factor) * factor
    if image.mode in ("I", "F"):
        image.info["top"] = float(np.max(image.getextrema()))
    if image.height <= step:
        yield image
        return
    for top in range(0, image.height, step):
        yield image.crop((0, top, image.width, min(top + step, image.height)))


def _averaged(bands: Iterable[Image.Image], width: int, height: int, factor: int) -> np.ndarray:
    """Bands from top to bottom as RGB (H, W, 3) uint8, reduced by averages of squares."""
    pixels = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
    top = 0
    for band in bands:
        # Reducing first is faster. Pillow weighs colours with their opacity then.
        first = band.mode in REDUCIBLE and "transparency" not in band.info
        if factor == 1:
            small = np.asarray(_rgb(band))
        else:
            small = np.asarray(_rgb(band.reduce(factor)) if first else _rgb(band).reduce(factor))
        pixels[top : top + len(small)] = small
        top += len(small)
    return pixels


class Room:
    """Lets threads decode as long as their pictures need at most `size` bytes in sum. Others wait.

    A picture that needs more is decoded when no other is.
    """

    def __init__(self, size: int) -> None:
        self._size, self._used, self._changed = size, 0, threading.Condition()

    @contextmanager
    def taken(self, need: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + need <= self._size)
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


room = Room(4 * WHOLE)


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
        return _turn(image.getexif())
    except Exception:
        return 1


def _orientation_of(block: bytes) -> int:
    """The same of an EXIF block."""
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(block)
        return _turn(exif)
    except Exception:
        return 1


def _turn(exif: Image.Exif) -> int:
    value = exif.get(0x0112, 1)
    return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels (H, W, 3) with their EXIF orientation applied."""
    if orientation == 1:
        return pixels
    from PIL import Image
    from PIL.Image import Transpose as T

    turns = (
        *(T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE),
        *(T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90),
    )
    return np.array(Image.fromarray(pixels).transpose(turns[orientation - 2]))


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, with transparency composited on white."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        top = image.info.get("top", 0.0)
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode, top)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        plain = image.convert("LA") if image.mode == "La" else image
        rgba = plain if plain.mode == "RGBA" else plain.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str, top: float) -> np.ndarray:
    """Grey of more than 8 bits -> uint8. 16 bits are divided by 257, others scaled by their range.

    `top` is the largest value of the whole picture.
    """
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise Unreadable("has values that are not finite")
    if mode.startswith("I;16"):
        scale = 257.0
    elif mode == "F" and top <= 1:
        scale = 1 / 255
    elif top <= 255:
        scale = 1.0
    else:
        scale = 257.0 if top <= 65535 else top / 255
    return (grey / scale).round().clip(0, 255).astype(np.uint8)
