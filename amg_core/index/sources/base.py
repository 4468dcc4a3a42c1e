"""The interface of sources of pictures, and functions that all of them need."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeAlias

import numpy as np

FILE_KEYS = (
    *("file_name", "file", "filename", "path", "image", "image_path", "filepath"),
    *("file_path", "image_file", "img", "img_path"),
)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
Fields: TypeAlias = dict[str, object]  # of a row of a list, or of a JSON object
TEXT_KEYS = ("text", "caption", "prompt", "captions")
# What operating systems leave between a person's pictures.
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".Trashes", ".thumbnails")
)
SYSTEM_FILES = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))


@dataclass(frozen=True)
class Item:
    """One picture that has not been read yet.

    Attributes
    ----------
    source : str
        POSIX-like name, unique within its Source: "a/b.png", "00000.tar/000000012.jpg". Text that
        UTF-8 can hold.
    caption : str
        "" if there is none.
    read : callable
        Returns the file's bytes, or (H, W, 3) uint8 RGB pixels. To be called once, from any thread. It
        may raise `Unreadable` with the reason.
    """

    source: str
    caption: str
    read: Callable[[], bytes | np.ndarray]


class Source(Protocol):
    """A source of pictures. It can be iterated several times, in the same order.

    Attributes
    ----------
    name : str
        For messages: the path.
    notes : list of str
        Problems with captions, and files that were left out. Filled while iterating.
    skipped : list of (source, reason)
        Pictures that cannot be listed. Filled while iterating.
    """

    name: str
    notes: list[str]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        """The number of pictures, for a progress bar, or 0 if it is unknown before the end."""

    def __iter__(self) -> Iterator[Item]:
        """The pictures. Clears the `notes` and `skipped` of an earlier iteration."""


class Names:
    """Makes names unique: the second "a.png" becomes "a.png#2"."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        count = self._seen[name] = self._seen.get(name, 0) + 1
        return name if count == 1 else self(f"{name}#{count}")


def is_system(name: str) -> bool:
    """Whether the operating system made this path: macOS' "._" files, thumbnail folders, trash."""
    *folders, last = name.split("/")
    own = last.startswith("._") or last in SYSTEM_FILES
    return own or not SYSTEM_FOLDERS.isdisjoint((*folders, last))


def inner(name: str) -> str:
    """A member's name in an archive as a relative POSIX path that stays inside the archive."""
    parts = name.replace("\\", "/").replace("\0", "").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def storable(source: str) -> str:
    """A file name as text that a database can hold: bytes that are not UTF-8 become escapes."""
    return source.encode("utf-8", "backslashreplace").decode()


def clean(text: str) -> str:
    """A caption without outer blanks, NUL characters and characters that UTF-8 cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


def decode_text(data: bytes) -> str:
    """The text of a file of unknown encoding: UTF-16 with a mark, UTF-8, or else Western."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def text_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of such a file (seekable), one at a time, each with its "\\n"."""
    wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    file.seek(0)
    errors = "replace" if wide else "surrogateescape"
    for line in io.TextIOWrapper(file, "utf-16" if wide else "utf-8-sig", errors):
        try:
            line.encode()
            yield line
        except UnicodeEncodeError:  # not UTF-8
            yield line.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def picture_name(record: Fields) -> str:
    """The file a record (keys in lower case) names, "" where it names none."""
    for key in FILE_KEYS:
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def caption_of(record: Fields) -> str:
    """The caption of a record (keys in lower case), of several the first; "" where it has none."""
    for key in TEXT_KEYS:
        value = record.get(key)
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and (caption := clean(text)):
                return caption
    return ""
