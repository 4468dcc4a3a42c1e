"""A folder of pictures: the files in it, with the captions beside them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import AMGError
from ...files import open_regular, read_bounded
from ..picture import EXTENSIONS, UNSUPPORTED, read_file
from .base import TARS, Item, is_system, storable
from .captions import MAX_TABLE_BYTES, Captions


class FolderSource:
    """Every picture file below `path`, sorted by the code points of the relative path.

    Raises AMGError where the folder is absent, cannot be listed, or holds no picture file. `found`
    is what `find(path)` gave, where that is known.
    """

    def __init__(self, path: str | os.PathLike, found: Found | None = None) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.notes: list[str] = []
        found = found or find(self.path)
        _demand_pictures(self.path, found)
        self._files, self._left_out = found.pictures, found.skipped
        self.skipped = list(found.skipped)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Item]:
        self.notes.clear()
        self.skipped[:] = self._left_out
        captions = Captions(FolderTree(self.path), self.notes)
        for file in self._files:
            yield Item(storable(file), captions.get(file), partial(read_file, self.path / file))


class FolderTree:
    """The files of a folder, for `Captions`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: str, limit: int = -1) -> bytes:
        try:
            if limit < 0:
                return read_bounded(self.folder / path, MAX_TABLE_BYTES)
            with open_regular(self.folder / path) as file:
                return file.read(limit)
        except IsADirectoryError:
            raise FileNotFoundError(path) from None

    def tables(self, at: str) -> list[str]:
        found = sorted(path.name for path in (self.folder / at).glob("*.[cC][sS][vV]"))
        return [at + name for name in found if not is_system(name)]

    def where(self, path: str) -> str:
        return str(self.folder / path)


@dataclass(frozen=True)
class Found:
    """What lies below a folder: relative POSIX paths, sorted by code point.

    `skipped`: folders that cannot be listed, and pictures in formats that are not read, with the
    reason.
    """

    pictures: list[str]
    tars: list[str]
    parquets: list[str]
    skipped: list[tuple[str, str]]


def find(folder: Path) -> Found:
    """Look through a folder. Raises AMGError where it is absent, no folder, or not listable."""
    if not folder.exists():
        raise AMGError(f"Picture folder {folder} does not exist: check the path.")
    if not folder.is_dir():
        raise AMGError(f"{folder} is a file: give the folder that holds the pictures.")
    found = Found([], [], [], [])
    for relative, reason in _walk(folder):
        name = relative.lower()
        extension = posixpath.splitext(name)[1]
        if extension in UNSUPPORTED:
            reason = f"{extension} files are not read: convert it to PNG"
        elif extension == ".zip":
            reason = "an archive in a folder is not opened: give it as a source of its own"
        if reason:
            if relative == "":
                raise AMGError(f"Picture folder {folder} cannot be listed ({reason}).")
            found.skipped.append((storable(relative), reason))
        elif extension in EXTENSIONS:
            found.pictures.append(relative)
        elif name.endswith(TARS):
            found.tars.append(relative)
        elif extension == ".parquet":
            found.parquets.append(relative)
    for each in (found.pictures, found.tars, found.parquets, found.skipped):
        each.sort()
    return found


def _demand_pictures(folder: Path, found: Found) -> None:
    if found.pictures:
        return
    known = ", ".join(sorted(EXTENSIONS))
    n = len(found.skipped)
    other = f" ({n} skipped: {found.skipped[0][0]}, {found.skipped[0][1]})" if n else ""
    raise AMGError(
        f"No picture files in {folder}{other}: put pictures there ({known}), "
        f"or give another folder."
    )


def _walk(
    folder: Path, prefix: str = "", seen: set[str] | None = None
) -> Iterator[tuple[str, str]]:
    """(relative path, "") of every file, (relative path, reason) of every unlistable folder."""
    seen = set() if seen is None else seen
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
        if is_system(name):
            continue
        if is_folder:
            yield from _walk(folder, f"{prefix}{name}/", seen)
        else:
            yield prefix + name, ""


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
