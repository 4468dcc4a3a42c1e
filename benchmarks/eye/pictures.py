"""The pictures of the measurements: what is to be recognised, and what it lies among.

To be recognised are pictures that `compact` was not trained on: photographs, and the half of the
tuxpaint stamps that `training.pool.trained_on` leaves out. Around them in the index lie drawings and
the other half of the stamps, which it was trained on.

Letters, digits and notes among the stamps are left out: two of one fount are alike by design, and
are nobody's picture. Files that hold nearly one and the same picture (three sizes of a photograph,
its night version, a stamp and its mirror image, one apple in two collections) are one family: naming
any member is right, none is ever an unrelated picture to another, and one of them is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amg_core import limits
from amg_core.similarity import verifier
from training.pool import trained_on

from ..harness import to_tensor

SIDE = 640  # px of the longer side; every picture is reduced to it as it is loaded
MOST_PIXELS = 40e6
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
GLYPHS = ("alphabets", "math", "music")  # folders below "symbols" that hold no pictures
PHOTOGRAPH, STAMP, DRAWING = "photograph", "stamp", "drawing"
PHOTOGRAPHS_SHARE = 0.45  # of the queries, where there are enough of both
SAME = 0.93  # correlation of two pictures' grey thumbnails, or mirror images: from here on a family
MAYBE, LOOKED_AT = 0.5, 6  # from here on, and so many at most, if the second check says copy
THUMBNAIL = 32
VERSION = re.compile(r"([-_](d|l|dark|light|cold|warm|radioactive|mirror|flip|\d+x\d+))+(?=-|_|$)")


@dataclass(frozen=True)
class Picture:
    path: Path
    kind: str
    held_out: bool = False
    image: Image.Image | None = field(default=None, repr=False, compare=False)  # where it is kept

    def load(self) -> Image.Image:
        return load(self.path) if self.image is None else self.image


@dataclass(frozen=True)
class Library:
    """Everything that is measured on.

    Attributes
    ----------
    rows : list of Picture
        Of the index. Those held out come last, so that a tie never counts for them; they stay in
        memory.
    sources : list of int
        Rows that are to be recognised, one of a family.
    families : dict
        Of each held-out row, all rows that are that picture too, and itself.
    """

    rows: list[Picture]
    sources: list[int]
    families: dict[int, frozenset[int]]


def load(path: Path, side: int = SIDE) -> Image.Image:
    """RGB on white, at most `side` px. A JPEG is reduced by its decoder.

    Raises
    ------
    OSError, ValueError
        Not a picture, a damaged or a giant one.
    """
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is too large")
        image.draft("RGB", (side, side))
        clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        image = image.convert("RGBA" if clear else "RGB")
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2)
    if clear:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white.convert("RGB")
    return image


def library(
    photographs: list[Path], stamps: list[Path], drawings: list[Path], *, rows: int, queries: int,
    seed: int,
) -> Library:  # fmt: skip
    """Choose and read. `rows`: drawings in the index.

    Raises
    ------
    ValueError
        Too few pictures to make a collage of.
    """
    rng = np.random.default_rng(seed)
    stamped = [p for p in _files(stamps) if not _glyph(p)]
    drawn = _files(drawings)
    drawn = [drawn[i] for i in rng.permutation(len(drawn))[:rows]]
    wanted = [Picture(path, DRAWING) for path in drawn]
    wanted += [Picture(path, STAMP) for path in stamped if trained_on(path)]
    wanted += [Picture(path, STAMP, True) for path in stamped if not trained_on(path)]
    wanted += [Picture(path, PHOTOGRAPH, True) for path in _files(photographs)]
    kept, thumbnails = [], []
    for picture in wanted:
        try:
            image = picture.load()
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        kept.append(replace(picture, image=image) if picture.held_out else picture)
        thumbnails.append(_thumbnail(image))
    families = _families(kept, np.stack(thumbnails))
    sources = _sources(kept, families, queries, rng)
    return Library(kept, sources, families)


def _files(folders: list[Path]) -> list[Path]:
    return [p for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in ENDINGS]


def _glyph(path: Path) -> bool:
    parts = path.parts
    return any(a == "symbols" and b in GLYPHS for a, b in pairwise(parts))


def _thumbnail(image: Image.Image) -> np.ndarray:
    """Grey, (2, THUMBNAIL²): as it is and mirrored, each of mean 0 and length 1."""
    grey = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    grey = np.asarray(grey, dtype=np.float32)
    both = np.stack([grey, grey[:, ::-1]]).reshape(2, -1)
    both = both - both.mean(axis=1, keepdims=True)
    return both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-6)


def _families(rows: list[Picture], thumbnails: np.ndarray) -> dict[int, frozenset[int]]:
    """By thumbnails, by the second check, and by names that differ in the version of a picture alone.

    Two collections hold the same apple, moved and squeezed a little: it is no stranger to itself.
    """
    names = [(p.path.parent, VERSION.sub("", p.path.stem)) for p in rows]
    found = {}
    for row, picture in enumerate(rows):
        if picture.held_out:
            likeness = (thumbnails @ thumbnails[row, 0]).max(axis=1)
            alike = (likeness > SAME) | _copies(rows, row, likeness)
            named = [i for i, name in enumerate(names) if name == names[row]]
            found[row] = frozenset([*np.flatnonzero(alike).tolist(), *named, row])
    return found


def _copies(rows: list[Picture], row: int, likeness: np.ndarray) -> np.ndarray:
    """Which of the LOOKED_AT most alike rows the second check calls copies, a bool a row."""
    found = np.zeros(len(rows), dtype=bool)
    nearest = np.argsort(-likeness)[: LOOKED_AT + 1]
    asked = [i for i in nearest.tolist() if i != row and MAYBE < likeness[i] <= SAME]
    if asked:
        others = [_tensor(rows[i])[0] for i in asked]
        score = verifier.registered(_tensor(rows[row]), others).score
        found[asked] = (score > limits.REGISTERED).numpy()
    return found


def _tensor(picture: Picture) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return to_tensor(picture.load())


def _flat(picture: Picture) -> bool:
    """Nothing can be told of it, and the product says so."""
    return verifier.flat(_tensor(picture))


def _sources(rows, families, queries: int, rng: np.random.Generator) -> list[int]:
    """At most `queries` rows of those held out, of both kinds, no two of a family, none a flat tone."""
    kinds: dict[str, list[int]] = {PHOTOGRAPH: [], STAMP: []}
    taken: set[int] = set()
    for row in rng.permutation(sorted(families)).tolist():
        if row not in taken and not _flat(rows[row]):
            kinds[rows[row].kind].append(row)
            taken |= families[row]
    photographs = kinds[PHOTOGRAPH][: round(queries * PHOTOGRAPHS_SHARE)]
    stamps = kinds[STAMP][: queries - len(photographs)]
    if min(len(photographs), len(stamps)) < 4:
        raise ValueError("too few to measure on: at least 10 queries, 4 photographs and 4 stamps")
    return sorted(photographs + stamps)
