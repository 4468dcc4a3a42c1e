"""Which edits of its own pictures would an index miss?

Stored pictures are edited, and checked as finished pictures are (`verdict`). It tells before a training
or a delivery where this index, with its descriptor and its pictures, is blind.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from amg_core.errors import AMGError
from amg_core.images import to_tensor

from .intervals import share
from .terminal import Progress

if TYPE_CHECKING:
    from amg_core.similarity.matcher import Matcher

Edit = Callable[[Image.Image], Image.Image]
NAMED = 3  # missed pictures that are named for each edit


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def _cropped(image: Image.Image, part: float) -> Image.Image:
    """The middle, of `part` of each side."""
    x, y = (round(n * (1 - part) / 2) for n in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


def _bordered(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, max(1, round(0.08 * max(image.size))), (40, 40, 40))


def _collage(image: Image.Image) -> Image.Image:
    """The upper left quarter of a grey sheet of the same size."""
    sheet = Image.new("RGB", image.size, (128, 128, 128))
    sheet.paste(image.resize((max(1, image.width // 2), max(1, image.height // 2))), (0, 0))
    return sheet


def _noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 25, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


EDITS: dict[str, Edit] = {
    "unedited": lambda image: image,
    "JPEG, quality 30": _jpeg,
    "a quarter of the size": lambda image: ImageOps.scale(image, max(0.25, 16 / min(image.size))),
    "blurred, 2 % of the side": lambda image: image.filter(
        ImageFilter.GaussianBlur(0.02 * min(image.size))
    ),
    "brightness x 0.6": lambda image: image.point(lambda value: int(value * 0.6)),
    "noise, sigma 0.1": _noisy,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
    "cropped to 90 %": partial(_cropped, part=0.9),
    "cropped to 70 %": partial(_cropped, part=0.7),
    "border of 8 %": _bordered,
    "turned by 5°": lambda image: image.rotate(5, Image.Resampling.BICUBIC, fillcolor="gray"),
    "a quarter of a collage": _collage,
}


@dataclass(frozen=True)
class Tried:
    """One edit of `count` pictures: the names of those that were not called copies."""

    edit: str
    count: int
    missed: list[str]

    def text(self) -> str:
        value, low, high = share(self.count - len(self.missed), self.count)
        shown = f"{value:5.1f} % [{low:.1f}, {high:.1f}]  {self.edit}"
        if not self.missed:
            return shown
        names = ", ".join(self.missed[:NAMED])
        more = len(self.missed) - NAMED
        return f"{shown}: missed {names}" + (f" and {more} more" if more > 0 else "")


def self_test(matcher: Matcher, count: int, progress: Progress | None = None) -> list[Tried]:
    """Edit `count` pictures of an index, evenly spaced, in every way, and check each.

    Excluded (muted) pictures are left out. AMGError if the index holds no pictures.
    """
    from amg_core.similarity.verdict import verdict

    index = matcher.index
    rows = [i for i in range(index.count) if i not in index.muted]
    if not rows:
        raise AMGError(f"All pictures of {index.name} are excluded: there is nothing to test.")
    chosen = [
        rows[k] for k in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    ]
    missed: dict[str, list[str]] = {edit: [] for edit in EDITS}
    total, done = len(chosen) * len(EDITS), 0
    for i in chosen:
        picture = index.thumbnail(i)
        for name, edit in EDITS.items():
            (found,) = verdict(matcher, to_tensor(edit(picture), matcher.searcher.device))
            if not found.copy:
                missed[name].append(index.source(i))
            done += 1
            if progress:
                progress(done, total, index.source(i))
    return [Tried(name, len(chosen), names) for name, names in missed.items()]
