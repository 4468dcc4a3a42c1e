"""Small pictures for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def paint(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random RGB picture; `size` is (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size)


def fill(folder: Path, count: int, first: int = 0, prefix: str = "p") -> Path:
    """`count` PNG pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        paint(i).save(folder / f"{prefix}{i:03}.png")
    return folder
