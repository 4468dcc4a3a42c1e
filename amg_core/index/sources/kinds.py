"""The kind of a file among pictures, by its name, or else by its first bytes."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence

from ..picture import EXTENSIONS, UNSUPPORTED
from .base import TARS, is_system

HEAD = 64  # bytes that tell
TEXTS = (".txt", ".caption", ".json")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
ARCHIVES = (".zip", ".cbz", ".rar", ".cbr", ".7z", ".tar.zst", ".tzst", ".tar.lz4")
GROUPS, NAMES = 6, 3  # kinds of left-out files, and names of each, that a note gives

_STARTS = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"8BPS"),
    *(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n", b"\x01\xda"),
    # and pictures that are not read, so that they are reported
    *(b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n", b"qoif", b"DDS \x7c\0\0\0", b"\x76\x2f\x31\x01"),
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


def extension(name: str) -> str:
    """Of a path, in lower case, with its dot."""
    return posixpath.splitext(name)[1].lower()


def is_picture_name(name: str) -> bool:
    """Whether a file is a picture by its name, be it one that is not read."""
    return extension(name) in EXTENSIONS | UNSUPPORTED and not is_system(name)


def is_other_name(name: str) -> bool:
    """Whether a file is no picture by its name: words, a table, an archive, a system's own."""
    return name.lower().endswith((*TEXTS, *TABLES, *TARS, *ARCHIVES)) or is_system(name)


def refusal_of_name(name: str) -> str:
    """Why a file holds pictures that cannot be used, "" where it can be tried."""
    if extension(name) in UNSUPPORTED:
        return f"{extension(name)} files are not read: convert it to PNG"
    if name.lower().endswith(ARCHIVES):
        return "an archive among the pictures is not opened: give it as a source of its own, or unpack it"
    return ""


def refusal_in_archive(name: str) -> str:
    """`refusal_of_name` of a member of an archive."""
    if name.lower().endswith(TARS):
        return "an archive in an archive is not opened: unpack it"
    return refusal_of_name(name)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins like this (HEAD bytes, fewer at its end) is a picture."""
    if head.startswith(_STARTS):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _BRANDS
    if head[:2] == b"BM":
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n" and len(head) > 9


def beside_none(texts: Sequence[str], pictures: Iterable[str]) -> list[str]:
    """The .txt and .caption files among `texts` that are called as none of the pictures, sorted.

    A .json may be about other things.
    """
    names: set[str] = set()
    for picture in pictures:
        names.update((posixpath.splitext(picture)[0].casefold(), picture.casefold()))
    words = (text for text in texts if extension(text) != ".json")
    return sorted(text for text in words if posixpath.splitext(text)[0].casefold() not in names)


class LeftOut:
    """Files that are neither pictures nor captions: how many of each extension, and a few names."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, name: str) -> None:
        kind = extension(name) or "without extension"
        count, names = self._kinds.get(kind, (0, []))
        self._kinds[kind] = count + 1, names + [name] * (count < NAMES)

    def notes(self) -> list[str]:
        """One note on them; none where there are no such files."""
        if not self._kinds:
            return []
        found = sorted(self._kinds.items(), key=lambda kind: (-kind[1][0], kind[0]))
        groups = [
            f"{count} {kind} ({', '.join(names)}{', …' if count > NAMES else ''})"
            for kind, (count, names) in found[:GROUPS]
        ]
        total = sum(count for _, (count, _) in found)
        files = "1 file is" if total == 1 else f"{total} files are"
        more = ", …" if len(found) > GROUPS else ""
        return [f"{files} left out, being no picture: {', '.join(groups)}{more}"]
