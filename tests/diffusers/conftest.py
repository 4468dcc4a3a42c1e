"""A tokenizer for pipelines of diffusers, and an index of pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from amg_core.descriptors import create
from amg_core.index import build


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from .tiny import letters

    return letters(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 24 pictures of random rectangles."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(5)
    for number in range(24):
        picture = np.full((48, 48, 3), draw.integers(0, 255, 3), np.uint8)
        for _ in range(6):
            (top, left), (high, wide) = draw.integers(0, 40, 2), draw.integers(4, 30, 2)
            picture[top : top + high, left : left + wide] = draw.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("ab cd")
    return folder


@pytest.fixture(scope="session")
def index(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    build(pictures, folder, create("compact"))
    return folder
