"""A folder of pictures, read: which files there are, their pixels, their captions."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AMGError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
# Pictures this code does not read. They are reported as skipped: a file that is silently left out
# is a picture that is silently not guarded.
UNSUPPORTED = frozenset(
    {".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".exr", ".dng", ".cr2", ".nef"}
)
# What Pillow may try, whatever the file is called. No format that starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit, kept here because hosts switch that one off
MAX_FILE_BYTES = 1 << 30
MAX_CAPTION_BYTES = 1 << 16
FILE_KEYS = ("file_name", "file", "filename", "path", "image")
TEXT_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Picture:
    """One decoded picture. `pixels`: (H, W, 3) uint8 RGB, upright, alpha composited on white."""

    source: str
    pixels: np.ndarray
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


class Unreadable(Exception):
    """A picture that cannot be used; the message is the reason, in a few words."""


def list_pictures(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """All picture files below `folder`, and what could not be looked into.

    Returns
    -------
    sources : list of str
        Relative POSIX paths, sorted by code point: the row ids of an index.
    skipped : list of (source, reason)
        Folders that cannot be listed, and pictures in formats that are not read.

    Raises
    ------
    AMGError
        `folder` is absent, not a folder, not listable, or holds no picture file.
    """
    if not folder.exists():
        raise AMGError(f"Picture folder {folder} does not exist: check the path.")
    if not folder.is_dir():
        raise AMGError(f"{folder} is a file: give the folder that holds the pictures.")
    sources: list[str] = []
    skipped: list[tuple[str, str]] = []
    for relative, reason in _walk(folder, "", set()):
        extension = posixpath.splitext(relative)[1].lower()
        if reason:
            if relative == "":
                raise AMGError(f"Picture folder {folder} cannot be listed ({reason}).")
            skipped.append((relative, reason))
        elif extension in EXTENSIONS:
            sources.append(relative)
        elif extension in UNSUPPORTED:
            skipped.append((relative, f"{extension} files are not read: convert it to PNG"))
    if not sources:
        known = ", ".join(sorted(EXTENSIONS))
        other = f" ({len(skipped)} skipped: {skipped[0][0]}, {skipped[0][1]})" if skipped else ""
        raise AMGError(
            f"No picture files in {folder}{other}: put pictures there ({known}), "
            f"or give another folder."
        )
    return sorted(sources), sorted(skipped)


def _walk(folder: Path, prefix: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """(relative path, "") of every file, (relative path, reason) of every unlistable folder."""
    place = os.path.realpath(folder / prefix)
    if place in seen:  # a link back to a folder already visited
        return
    seen.add(place)
    try:
        with os.scandir(folder / prefix) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        yield prefix.rstrip("/"), error.strerror or str(error)
        return
    for name, is_folder in found:
        if is_folder:
            yield from _walk(folder, f"{prefix}{name}/", seen)
        else:
            yield prefix + name, ""


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def load_picture(path: Path, source: str = "") -> Picture:
    """Decode one picture file.

    EXIF orientation is applied, alpha composited on white, the first frame of an animation taken,
    16-bit grey scaled to 8 bits, CMYK and palettes converted.

    Raises
    ------
    Unreadable
        Damaged, of another format, larger than MAX_PIXELS or MAX_FILE_BYTES, or unreadable.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Unreadable(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Unreadable(f"{width} x {height} is too large: shrink it below 89 megapixels")
            image.load()
            pixels = np.array(_upright(_rgb(image), _orientation(image)))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not a picture of a known format" if data else "empty file") from None
    except Image.DecompressionBombError:
        raise Unreadable("too large: shrink it below 89 megapixels") from None
    except Exception as error:  # decoders raise nearly everything on damaged files
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise Unreadable(f"damaged ({reason})") from None
    return Picture(source or path.name, pixels, hashlib.sha256(data).hexdigest())


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where the EXIF block is absent or damaged. Ask after load()."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is meant to be seen."""
    from PIL.Image import Transpose as T

    turns = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE)
    turns += (T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)
    return image if orientation == 1 else image.transpose(turns[orientation - 2])


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency composited on white."""
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
    """Grey of more than 8 bits -> uint8. 16 bits: /257; floats and 32 bits: by the range in use."""
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


class Captions:
    """Captions of the pictures of a folder, asked for in sorted order.

    A ``.txt`` file beside the picture wins over ``metadata.jsonl``, which wins over ``*.csv``;
    a nearer folder's file wins over a farther one's. File names in jsonl and csv are relative to
    the folder of that file. `notes` collects what was wrong with such files, for the report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._tables: dict[str, tuple[dict[str, str], dict[str, str]]] = {}

    def get(self, source: str) -> str:
        """Caption of the picture at relative POSIX path `source`, "" where there is none."""
        sidecar = self.folder / (posixpath.splitext(source)[0] + ".txt")
        if caption := self._sidecar(sidecar):
            return caption
        above = _ancestors(source)
        self._tables = {at: tables for at, tables in self._tables.items() if at in above}
        for at in above:
            if at not in self._tables:
                self._tables[at] = (self._jsonl(at), self._csv(at))
        for kind in (0, 1):
            for at in above:
                key = _key(source[len(at) :])
                if caption := self._tables[at][kind].get(key, ""):
                    return caption
        return ""

    def _sidecar(self, path: Path) -> str:
        try:
            with open(path, "rb") as file:
                return _clean(_decode(file.read(MAX_CAPTION_BYTES)))
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.notes.append(f"{path}: {error.strerror or error}")
            return ""

    def _jsonl(self, at: str) -> dict[str, str]:
        """{file name: caption} of metadata.jsonl in folder `at` ("" or "a/b/")."""
        path = self.folder / at / "metadata.jsonl"
        table: dict[str, str] = {}
        bad = 0
        for line in self._lines(path):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict):
                bad += 1
                continue
            _enter(table, {str(key).lower(): value for key, value in entry.items()})
        if bad:
            self.notes.append(f"{path}: {bad} lines are not JSON objects and were ignored")
        return table

    def _csv(self, at: str) -> dict[str, str]:
        """{file name: caption} of all csv files in folder `at`; the first in name order wins."""
        table: dict[str, str] = {}
        for path in sorted((self.folder / at).glob("*.[cC][sS][vV]")):
            text = "\n".join(self._lines(path))
            header = text.split("\n", 1)[0]
            try:
                rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
                for row in rows:
                    _enter(table, {(key or "").strip().lower(): row[key] for key in row})
            except csv.Error as error:
                self.notes.append(f"{path}: {error}")
        return table

    def _lines(self, path: Path) -> list[str]:
        try:
            text = _decode(path.read_bytes()) if path.is_file() else ""
            return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except OSError as error:
            self.notes.append(f"{path}: {error.strerror or error}")
            return []


def _ancestors(source: str) -> list[str]:
    """'a/b/c.png' -> ['a/b/', 'a/', '']."""
    parts = source.split("/")[:-1]
    return ["".join(part + "/" for part in parts[:n]) for n in range(len(parts), -1, -1)]


def _enter(table: dict[str, str], entry: dict) -> None:
    """Put one record's caption under its file name, unless one is there."""
    name = next((entry[key] for key in FILE_KEYS if isinstance(entry.get(key), str)), "")
    text = next((entry[key] for key in TEXT_KEYS if isinstance(entry.get(key), str)), "")
    if name and _clean(text):
        table.setdefault(_key(name), _clean(text))


def _key(name: str) -> str:
    """File names as tables spell them, made comparable: slashes, './', composed accents."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))


def _decode(data: bytes) -> str:
    """Text of a file whose encoding nobody stated: UTF-16 with a mark, UTF-8, else Western."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _clean(text: str) -> str:
    """No outer blanks, no NUL, nothing that UTF-8 cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


def storable(source: str) -> str:
    """A file name as text that a database can hold: bytes that are not UTF-8 become escapes."""
    return source.encode("utf-8", "backslashreplace").decode()
