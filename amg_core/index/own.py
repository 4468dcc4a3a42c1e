"""The names of the files that this program writes into an index folder, and how they are removed.

Nothing else is ever deleted: files and folders with other names stay, and so does everything behind a
link.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ..errors import AMGError
from . import format as fmt

Tree: TypeAlias = Mapping[
    str, "Tree | None"
]  # pattern of a name -> contents of the folder; None: a file

LEFT_BY_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
ROWS = r"rows\.\d+\.f16\.npy"
MANIFEST_DRAFT = "manifest.tmp"
ORDER = "order.jsonl"  # the files of a build in progress
PARTS = "parts"  # the embedded pictures of a build in progress

_FILES = (fmt.META, fmt.HASHES, fmt.MANIFEST, MANIFEST_DRAFT, *sorted(LEFT_BY_SYSTEMS))
SHARD: Tree = {ROWS: None, **{re.escape(name): None for name in _FILES}}
SHARDS: Tree = {"[0-9a-f]{16}": SHARD}
LAYOUT: Tree = {r"(new|copy)\d+": SHARD}  # shards that are being written
EMBEDDED: Tree = {r"\d{8}": SHARD}
DRAFTS: Tree = {re.escape(fmt.MANIFEST): None, fmt.SHARDS: LAYOUT}  # files of a change
BUILD: Tree = {re.escape(ORDER): None, PARTS: EMBEDDED, **DRAFTS}

_JUNCTION = 0xA0000003  # Windows: a link to a folder that is no symbolic link


def is_link(path: Path) -> bool:
    """Whether `path` is a symbolic link or a junction. OSError if that cannot be found out."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(state.st_mode) or getattr(state, "st_reparse_tag", 0) == _JUNCTION


def refuse_links(index: Path) -> None:
    """AMGError if a folder that a change would write into or clear is a link."""
    build = index / fmt.BUILD
    for path in (index / fmt.SHARDS, build, build / PARTS, build / fmt.SHARDS):
        if is_link(path):
            raise AMGError(
                f"{path} is a link, and an index is not changed through links: put the folder "
                f"itself in its place, or copy the index with links resolved (cp -rL) and change the "
                f"copy."
            )


def clear(folder: Path, tree: Tree, kept: Collection[str] = ()) -> None:
    """Remove the files and folders that `tree` names from `folder`, except the names `kept`.

    Files that cannot be removed stay (on Windows: open files).
    """
    with suppress(OSError):
        if is_link(folder):
            return
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            pattern = next((p for p in tree if re.fullmatch(p, entry.name)), None)
            if pattern is not None and entry.name not in kept:
                _remove_entry(entry, tree[pattern])


def _remove_entry(entry: os.DirEntry[str], inside: Tree | None) -> None:
    path = Path(entry.path)
    with suppress(OSError):
        if is_link(path):
            return
        if inside is None and entry.is_file(follow_symlinks=False):
            os.unlink(path)
        elif inside is not None and entry.is_dir(follow_symlinks=False):
            remove(path, inside)


def remove(folder: Path, tree: Tree) -> None:
    """`clear` the folder, and remove it if it is then empty."""
    clear(folder, tree)
    with suppress(OSError):
        if not is_link(folder):
            os.rmdir(folder)


def size(folder: Path) -> int:
    """The size of all files below `folder` in bytes. Links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def make_way(folder: Path, tree: Tree) -> None:
    """`remove` a folder to put another in its place. AMGError if it holds other files."""
    remove(folder, tree)
    if os.path.lexists(folder):
        others = "" if is_link(folder) else ", ".join(_names(folder))
        raise AMGError(
            f"{folder} is in the way and is not from this program{f' ({others})' if others else ''}: "
            f"move it away, then try again."
        )


def _names(folder: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from sorted(os.listdir(folder))[:3]
