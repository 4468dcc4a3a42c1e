"""A folder of pictures: the files in it, with the captions beside them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...errors import AMGError
from ..picture import EXTENSIONS, UNSUPPORTED, read_file
from .base import Item, is_system, storable
from .captions import Captions


class FolderSource:
    """Every picture file below `path`, sorted by the code points of the relative path.

    Raises AMGError where the folder is absent, cannot be listed, or holds no picture file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.notes: list[str] = []
        self._files, self._left_out = list_pictures(self.path)
        self.skipped = list(self._left_out)

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
            with open(self.folder / path, "rb") as file:
                return file.read(limit)
        except IsADirectoryError:
            raise FileNotFoundError(path) from None

    def tables(self, at: str) -> list[str]:
        found = sorted(path.name for path in (self.folder / at).glob("*.[cC][sS][vV]"))
        return [at + name for name in found if not is_system(name)]

    def where(self, path: str) -> str:
        return str(self.folder / path)


def list_pictures(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """All picture files below `folder`, and what could not be looked into.

    Returns
    -------
    sources : list of str
        Relative POSIX paths, sorted by code point.
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
    for relative, reason in walk(folder):
        extension = posixpath.splitext(relative)[1].lower()
        if reason:
            if relative == "":
                raise AMGError(f"Picture folder {folder} cannot be listed ({reason}).")
            skipped.append((storable(relative), reason))
        elif extension in EXTENSIONS:
            sources.append(relative)
        elif extension in UNSUPPORTED:
            reason = f"{extension} files are not read: convert it to PNG"
            skipped.append((storable(relative), reason))
    if not sources:
        known = ", ".join(sorted(EXTENSIONS))
        other = f" ({len(skipped)} skipped: {skipped[0][0]}, {skipped[0][1]})" if skipped else ""
        raise AMGError(
            f"No picture files in {folder}{other}: put pictures there ({known}), "
            f"or give another folder."
        )
    return sorted(sources), sorted(skipped)


def walk(folder: Path, prefix: str = "", seen: set[str] | None = None) -> Iterator[tuple[str, str]]:
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
            yield from walk(folder, f"{prefix}{name}/", seen)
        else:
            yield prefix + name, ""


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
