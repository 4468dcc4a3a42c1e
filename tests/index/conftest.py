"""A folder of pictures and an index made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from amg_core.descriptors import create
from amg_core.index import build
from tests.index.helpers import fill


@pytest.fixture
def pixel():
    return create("pixel")


@pytest.fixture
def pictures(tmp_path) -> Path:
    return fill(tmp_path / "pictures", 5)


@pytest.fixture
def made(tmp_path, pictures, pixel) -> Path:
    """An index of five pictures."""
    build(pictures, tmp_path / "index", pixel)
    return tmp_path / "index"
