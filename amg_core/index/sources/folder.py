"""A folder of pictures with captions beside them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import AMGError
from ...files import brief, open_regular, read_bounded, there
from ..picture import EXTENSIONS, Unreadable, read_file, read_head
from .base import TARS, Item, is_system, storable
from .captions import MAX_TABLE_BYTES, Captions
from .kinds import (
    HEAD,
    TEXTS,
    LeftOut,
    beside_none,
    is_other_name,
    is_picture,
    is_picture_name,
    refusal_of_name,
)

REMEMBERED = 16  # folders whose names are kept
WORDS = (*TEXTS, ".jsonl")


class FolderSource:
    """Every picture file below `path`, sorted by the code points of the relative path.

    Raises AMGError if the folder is missing, cannot be listed, or holds no picture file. `found` is the
    result of `find(path)`, if there is one already.
    """

    def __init__(self, path: str | os.PathLike[str], found: Found | None = None) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.notes: list[str] = []
        if found is None:
            demand_pictures(self.path, found := find(self.path))
        self._found = found
        self.skipped = list(found.skipped)

    def __len__(self) -> int:
        return len(self._found.pictures)

    def __iter__(self) -> Iterator[Item]:
        self.notes[:] = self._found.others.notes()
        self.skipped[:] = self._found.skipped
        captions = Captions(FolderTree(self.path), self.notes)
        for file in self._found.pictures:
            yield Item(storable(file), captions.get(file), partial(read_file, self.path / file))
        captions.finish(self._found.texts)


class FolderTree:
    """The files of a folder, for `Captions`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, dict[str, str]] = {}  # folder -> name in lower case -> name

    def read(self, path: str, limit: int = -1) -> bytes:
        try:
            if limit < 0:
                return read_bounded(self.folder / path, MAX_TABLE_BYTES)
            with open_regular(self.folder / path) as file:
                return file.read(limit)
        except IsADirectoryError:
            raise FileNotFoundError(path) from None

    def spelled(self, path: str) -> str | None:
        at, name = posixpath.split(path)
        if at not in self._names:
            if len(self._names) >= REMEMBERED:
                self._names.clear()
            self._names[at] = self._listed(at)
        there = self._names[at].get(name.casefold())
        return there and posixpath.join(at, there)

    def _listed(self, at: str) -> dict[str, str]:
        """The files in folder `at` that may hold captions."""
        try:
            names = sorted(os.listdir(self.folder / at), reverse=True)
        except OSError:
            return {}
        return {name.casefold(): name for name in names if name.lower().endswith(WORDS)}

    def tables(self, at: str) -> list[str]:
        found = sorted(path.name for path in (self.folder / at).glob("*.[cC][sS][vV]"))
        return [at + name for name in found if not is_system(name)]

    def where(self, path: str) -> str:
        return str(self.folder / path)


@dataclass(frozen=True)
class Found:
    """The files below a folder: relative POSIX paths, sorted by code point.

    `skipped` has folders and files that cannot be read, archives, and pictures in other formats, with the
    reason. `others` are files that are neither pictures nor captions. `texts` are caption files without a
    picture of that name.
    """

    pictures: list[str]
    tars: list[str]
    parquets: list[str]
    skipped: list[tuple[str, str]]
    others: LeftOut
    texts: list[str]


def find(folder: Path) -> Found:
    """List a folder with its subfolders. AMGError if it is missing, no folder, or cannot be listed."""
    if not there(folder):
        raise AMGError(f"Picture folder {folder} does not exist: check the path.")
    if not folder.is_dir():
        raise AMGError(f"{folder} is a file: give the folder that holds the pictures.")
    found = Found([], [], [], [], LeftOut(), [])
    for relative, reason in _walk(folder):
        if reason and relative == "":
            raise AMGError(
                f"Picture folder {folder} cannot be listed ({reason}): give one that you may read."
            )
        _sort(folder, relative, reason, found)
    found.texts[:] = beside_none(found.texts, found.pictures)
    for each in (found.pictures, found.tars, found.parquets, found.skipped):
        each.sort()
    return found


def _sort(folder: Path, relative: str, reason: str, found: Found) -> None:
    """Enter a file under what it is."""
    name = relative.lower()
    if reason := reason or refusal_of_name(relative):
        found.skipped.append((storable(relative), reason))
    elif is_picture_name(relative):
        found.pictures.append(relative)
    elif name.endswith(TARS):
        found.tars.append(relative)
    elif name.endswith(".parquet"):
        found.parquets.append(relative)
    elif name.endswith(TEXTS) and not is_system(relative):
        found.texts.append(relative)
    elif not is_other_name(relative):
        try:
            head = read_head(folder / relative, HEAD)
        except Unreadable as error:
            found.skipped.append((storable(relative), f"cannot be looked at ({error})"))
        else:
            if is_picture(head):
                found.pictures.append(relative)
            else:
                found.others.add(storable(relative))


def is_picture_file(path: Path) -> bool:
    """Whether it is called as a picture, or begins as one. False where it cannot be read."""
    if is_picture_name(path.name):
        return True
    try:
        return is_picture(read_head(path, HEAD))
    except Unreadable:
        return False


def demand_pictures(folder: Path, found: Found) -> None:
    """AMGError where a folder holds no picture file."""
    if found.pictures:
        return
    known = ", ".join(sorted(EXTENSIONS))
    n = len(found.skipped)
    other = f" ({n} skipped: {brief(found.skipped[0][0])}, {found.skipped[0][1]})" if n else ""
    other += f" ({notes[0]})" if (notes := found.others.notes()) else ""
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
