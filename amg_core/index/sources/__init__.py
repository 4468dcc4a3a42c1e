"""The sources of pictures for an index: folders, archives, lists, memory.

docs/sources.md says what is read, and how captions are found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import AMGError
from ...files import there
from .archive import TarSource, ZipSource
from .base import TARS, Item, Names, Source
from .folder import FolderSource, Found, demand_pictures, find, is_picture_file
from .kinds import LeftOut
from .memory import Pictures
from .table import LISTS, TableSource

__all__ = ["Chain", "Item", "Pictures", "Source", "open_source", "open_sources"]


def open_source(path: str | os.PathLike[str]) -> Source:
    """The pictures at `path`: a folder of pictures or tar shards, a picture, a zip, a tar, or a list.

    Raises
    ------
    AMGError
        There is no source of pictures, or it cannot be read.
    """
    path = Path(path)
    name = path.name.lower()
    if not there(path):
        raise AMGError(f"{path} does not exist: check the path.")
    if path.is_dir():
        return _open_folder(path)
    if name.endswith(".zip"):
        return ZipSource(path)
    if name.endswith(TARS):
        return TarSource([("", path)], str(path))
    if name.endswith(LISTS):
        return TableSource(path)
    if is_picture_file(path):
        return FolderSource(path.parent, Found([path.name], [], [], [], LeftOut(), []))
    raise AMGError(
        f"{path} is a file that holds no pictures: give a folder of pictures, a picture, a .zip, a "
        f".tar, or a list ({', '.join(LISTS)})."
    )


def open_sources(paths: Sequence[str | os.PathLike[str]]) -> Source:
    """Several sources in sequence.

    Names begin with the last part of the source's path, "photos/a.png". If two paths end alike, the second
    is called "photos#2". A single path gives `open_source(path)`.
    """
    if len(paths) == 1:
        return open_source(paths[0])
    if not paths:
        raise AMGError("No pictures were given: name a folder, a .zip, a .tar or a list.")
    names = Names()
    return Chain([(f"{names(Path(p).name or 'pictures')}/", open_source(p)) for p in paths])


class Chain:
    """Sources in sequence. Names of pictures, also skipped ones, get the prefix of their source.

    `skipped` and `notes` are further entries for the attributes of that name.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, Source]],
        name: str = "",
        skipped: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.name = name or ", ".join(source.name for _, source in parts)
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._parts, self._skipped, self._notes = list(parts), list(skipped), list(notes)

    def __len__(self) -> int:
        counts = [len(source) for _, source in self._parts]
        return sum(counts) if all(counts) else 0

    def __iter__(self) -> Iterator[Item]:
        self.notes[:] = self._notes
        self.skipped[:] = self._skipped
        for prefix, source in self._parts:
            for item in source:
                yield replace(item, source=prefix + item.source)
            self.notes += source.notes
            self.skipped += [(prefix + name, reason) for name, reason in source.skipped]


def _open_folder(path: Path) -> Source:
    """A folder's pictures and its tar shards, or its parquet files if it has neither."""
    found = find(path)
    parts: list[tuple[str, Source]] = []
    if found.pictures:
        parts.append(("", FolderSource(path, found)))
    if found.tars:
        parts.append(("", TarSource([(f"{tar}/", path / tar) for tar in found.tars], str(path))))
    if not parts:
        # TableSource checks each; with pictures about, a parquet file describes those.
        parts = [(f"{name}/", TableSource(path / name)) for name in found.parquets]
    if not parts:
        demand_pictures(path, found)
    if found.pictures:  # whose source says what was left out
        return parts[0][1] if len(parts) == 1 else Chain(parts, str(path))
    return Chain(parts, str(path), found.skipped, found.others.notes())
