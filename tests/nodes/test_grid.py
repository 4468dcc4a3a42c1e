"""Strength Grid: its lists of numbers and its sheet. That it draws: tests/host/test_grid.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def grid(pack):
    return pack.module("nodes.grid")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0, 0.5,1", [0, 0.5, 1]),
        ("1", [1]),
        ("2;1\n1 2", [2, 1]),
        (" .5 , 5e-1", [0.5]),
    ],
)
def test_numbers(grid, text, found):
    assert grid.numbers("strengths", text) == found


@pytest.mark.parametrize("text", ["", " , ", "one", "-1", "nan", "inf", "3.1", "0.5, x"])
def test_no_numbers(grid, pack, text):
    with pytest.raises(pack.module("amg_core.errors").AMGError, match=r"^strengths: "):
        grid.numbers("strengths", text, largest=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, unique=True))
def test_numbers_round_trip(grid, values):
    assert grid.numbers("x", ", ".join(map(repr, values))) == list(dict.fromkeys(values))


def test_settings(grid, pack):
    presets = pack.module("amg_core.presets")
    for preset in presets.PRESETS:
        for metric in ("nl2", "cosine"):
            plain = presets.settings(preset, metric)
            assert grid.settings_of(preset, metric, grid.ALL, 1, 1) == plain
            half = grid.settings_of(preset, metric, "dissimilarity", 0.5, 0.5)
            assert [way.strength for way in half.guidance] == [1, 1, 0.5]
            assert half.guidance[:2] == plain.guidance[:2]
            assert half.schedule(0.3) == pytest.approx(0.5 * plain.schedule(0.3))
            assert grid.settings_of(preset, metric, grid.ALL, 0, 1).off


def verdict(outcome: str) -> dict:
    return {
        "outcome": outcome, "similarity": -0.5, "score": 0.7, "zncc": 0.1, "source": "a.png",
        "copy": outcome == "copy", "words": "Words.",
    }  # fmt: skip


def test_sheet(grid):
    """Four pictures, two a line, each framed in the colour of its verdict, none over another."""
    shades = [0.2, 0.4, 0.6, 0.8]
    kinds = ["copy", "cannot_tell", "no_copy", None]
    cells = [
        grid.Cell(i, 1.0, torch.full((32, 64, 3), shade), kind and verdict(kind))
        for i, (shade, kind) in enumerate(zip(shades, kinds, strict=True))
    ]
    image = grid.sheet(cells, 2, "main · all three · seed 7")
    pixels = np.asarray(image)
    seen = []
    for shade in shades:
        at = np.argwhere((pixels == round(shade * 255)).all(axis=-1))
        top, left = at.min(axis=0)
        bottom, right = at.max(axis=0)
        # 64 × 32 enlarged four times, inside its frame.
        assert (bottom - top + 1, right - left + 1) == (128, 256)
        assert len(at) == 128 * 256
        seen.append((top, left, tuple(pixels[top - 1, left])))
    assert [colour for *_, colour in seen] == [grid.OUTCOMES[kind][1] for kind in kinds]
    assert seen[0][0] == seen[1][0] < seen[2][0] == seen[3][0]
    assert seen[0][1] == seen[2][1] < seen[1][1] == seen[3][1]


def test_table_and_words(grid):
    picture = torch.zeros(8, 8, 3)
    report = grid.Cell(0.5, 1.0, picture, verdict("copy")).to_row()
    assert report["copy"] and report["strength"] == 0.5 and report["judged"]
    unknown = grid.Cell(0.5, 2.0, picture, None).to_row()
    assert unknown == {"strength": 0.5, "threshold_scale": 2.0, "judged": False}
    assert grid._words([report, report | {"copy": False}]) == "1 of 2 pictures are copies"
    assert grid._words([report, unknown]) == "1 of 2 pictures could not be checked"
