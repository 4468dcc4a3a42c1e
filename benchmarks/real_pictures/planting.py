"""The pictures of the measurement: a set, pictures held out of it, and edits of some of its own.

Files are copied into a work folder, links are left out. The larger folders give fewer of their files, so
that drawings in thousands do not hide the photographs.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..eye import edits
from ..eye.pictures import ENDINGS, load

EDITS = (
    "JPEG, quality 30", "resized to 25 %", "blurred, 2 % of the side", "brightness x 0.6",
    "contrast x 0.5", "noise, sigma 0.1", "cropped to 90 %", "cropped to 80 %", "border of 8 %",
    "text over it", "turned by 5°", "grey", "tinted", "mirrored",
)  # fmt: skip
QUALITY = 92  # of the JPEG that an edited picture is saved as
SIDE = 640  # px of the longer side of an edited picture
LEAST_DEVIATION = 12.0  # of the grey levels of 255: a flatter picture is not edited


@dataclass(frozen=True)
class Planted:
    """Where everything lies.

    Attributes
    ----------
    pictures : folder of the pictures that are indexed.
    strangers : folder of pictures of the same folders that are not indexed.
    copies : folder of the edited pictures.
    source : name of an edited picture -> name of the picture of the set that it was made of.
    edit : name of an edited picture -> one of EDITS.
    kind : name of a picture of the set -> the name of the folder it came from.
    """

    pictures: Path
    strangers: Path
    copies: Path
    source: dict[str, str]
    edit: dict[str, str]
    kind: dict[str, str]


def files(folders: Sequence[Path]) -> list[list[Path]]:
    """The pictures below each folder, by name, without links."""
    return [
        [
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in ENDINGS and path.is_file() and not path.is_symlink()
        ]
        for folder in folders
    ]


def shares(sizes: Sequence[int], most: int) -> list[int]:
    """How many to take of groups of these sizes: `most` together, the same number of all large ones."""
    taken = [0] * len(sizes)
    left = min(most, sum(sizes))
    while left:
        open_ = [i for i, size in enumerate(sizes) if taken[i] < size]
        each = max(1, left // len(open_))
        for i in open_:
            more = min(each, sizes[i] - taken[i], left)
            taken[i] += more
            left -= more
    return taken


def plant(
    folders: Sequence[Path], work: Path, *, most: int, sources: int, strangers: int, seed: int,
    processes: int,
) -> Planted:  # fmt: skip
    """Copy the set, hold some pictures out, and edit some of the set.

    Raises
    ------
    ValueError
        The folders hold too few pictures.
    """
    rng = np.random.default_rng(seed)
    found = [[group[i] for i in rng.permutation(len(group))] for group in files(folders)]
    counts = shares([len(group) for group in found], most + strangers)
    if sum(counts) < 2 * (sources + strangers):
        raise ValueError(f"{sum(counts)} pictures are too few: give more folders.")
    held = shares([count // 4 for count in counts], strangers)
    asked = shares([count - out for count, out in zip(counts, held, strict=True)], sources)
    out = [work / name for name in ("set", "strangers", "copies")]
    for folder in out:
        folder.mkdir(parents=True)
    kind, chosen = {}, []
    for number, (group, count, away, wanted) in enumerate(
        zip(found, counts, held, asked, strict=True)
    ):
        for path in group[:away]:
            shutil.copyfile(path, out[1] / _name(number, path))
        usable = 0
        for path in group[away:count]:
            name = _name(number, path)
            shutil.copyfile(path, out[0] / name)
            kind[name] = folders[number].name
            if usable < wanted and _shows_something(path):
                chosen.append(name)
                usable += 1
    source, edit = {}, {}
    for name in chosen:
        for number, one in enumerate(EDITS):
            source[_copy(name, number)], edit[_copy(name, number)] = name, one
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(partial(_edit, out[0], out[2], seed), chosen))
    return Planted(*out, source, edit, kind)


def _name(number: int, path: Path) -> str:
    """A name that no other file has, and that tells the original."""
    return f"{number}-{zlib.crc32(str(path.parent).encode()):08x}-{path.name}"


def _copy(name: str, number: int) -> str:
    return f"{number:02}-{name}.jpg"


def _shows_something(path: Path) -> bool:
    try:
        return float(np.asarray(load(path, 128).convert("L")).std()) > LEAST_DEVIATION
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def _edit(pictures: Path, copies: Path, seed: int, name: str) -> None:
    image = load(pictures / name, SIDE)
    key = (seed, zlib.crc32(name.encode()))
    for number, one in enumerate(EDITS):
        edited = edits.apply(one, image, [], key)
        edited.save(copies / _copy(name, number), "JPEG", quality=QUALITY)
