"""Inpainting: the part of a picture that was given and kept is judged by itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from amg_core.images import cut, largest_box
from amg_core.messages import words
from amg_core.similarity.verdict import COPY, NO_COPY, SECOND, Verdict, kept_box, with_kept


def brute(free: torch.Tensor) -> int:
    """Cells of the largest rectangle of True."""
    height, width = free.shape
    return max(
        (bottom - top) * (right - left) * bool(free[top:bottom, left:right].all())
        for top, bottom in itertools.combinations(range(height + 1), 2)
        for left, right in itertools.combinations(range(width + 1), 2)
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_box_is_free_and_none_is_larger(seed):
    generator = torch.Generator().manual_seed(seed)
    free = torch.rand(6, 8, generator=generator) < 0.3 + seed / 30
    part = cut(free[None, None], largest_box(free))
    assert part.all() and part.numel() == brute(free)


def test_where_nothing_is_free_there_is_no_box():
    assert largest_box(torch.zeros(3, 4, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("drawn", "box"),
    [
        (slice(0, 3), (0, 3 / 16, 1, 1)),  # a border
        (slice(0, 13), None),  # too little is left
        (slice(0, 16), None),
        (slice(0, 0), None),  # all of it is judged anyway
    ],
)
def test_what_is_looked_at_besides(drawn, box):
    mask = torch.zeros(16, 16)
    mask[:, drawn] = 1
    assert kept_box(mask) == box


def test_a_kept_copy_is_said_where_the_whole_is_called_none():
    clean = Verdict(0.1, 0.4, 0.1, 0.1, 0.6, 0, "a.png", "", NO_COPY)
    copy = replace(clean, outcome=COPY, source="b.png", checks=(SECOND,))
    found = with_kept(clean, copy)
    assert found.copy and found.source == "b.png" and found.kept
    assert words(found.message()) == (
        "A copy of b.png: only composition says so. Compare the two yourself. "
        "This is about the part of your picture that was kept"
    )
    assert with_kept(copy, copy) is copy
    assert with_kept(clean, clean) is clean and with_kept(clean, None) is clean
