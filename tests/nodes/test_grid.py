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


@pytest.mark.parametrize("scale", [1, 0.5, 1.6])
@pytest.mark.parametrize("term", [0, 1, 2, 3])
def test_use_draws_with_the_same_settings(grid, pack, term, scale):
    """What is filled into the nodes means what was drawn, as far as their widgets can say it."""
    presets, sampling = pack.module("amg_core.presets"), pack.module("nodes.sampling")
    term = (grid.ALL, *grid.TERMS)[term]
    for preset in presets.PRESETS:
        for metric in ("nl2", "cosine"):
            for strength in (0, 0.5, 1, 2, 3):
                wanted = grid.settings_of(preset, metric, term, strength, scale)
                use = grid.use_of(preset, metric, term, strength, scale, {"seed": 7})
                assert ("AMG_Sampler" in use) == (scale == 1)
                assert ("AMG_Apply" in use) == (scale == 1 or not wanted.own_units)
                for node, widgets in use.items():
                    slots = {each.id: each for each in pack.nodes[node].define_schema().inputs}
                    assert widgets.keys() <= slots.keys()
                    assert widgets["strength"] <= slots["strength"].max
                    given = {name: widgets[name] for name in (*grid.TERMS, "strength")}
                    if widgets.get("thresholds") == "custom":
                        given["schedule"] = sampling.custom_schedule(
                            widgets["schedule"],
                            widgets["threshold_start"],
                            widgets["threshold_end"],
                        )
                    assert presets.settings(preset, metric, **given) == wanted


def verdict(outcome: str) -> dict:
    return {
        "outcome": outcome, "similarity": -0.5, "score": 0.7, "zncc": 0.1, "source": "a.png",
        "copy": outcome == "copy", "words": "Words.", "likeness": 0.7, "composition": 0.06, "near": False,
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
    assert unknown == {
        "strength": 0.5, "threshold_scale": 2.0, "same_as": None, "judged": False,
    }  # fmt: skip
    assert said(grid, [report, report | {"copy": False}]) == ["1 of 2 pictures are copies"]
    assert said(grid, [report, unknown]) == ["1 of 2 pictures could not be checked"]
    read = grid.as_text([report | {"picture": 1}, unknown | {"picture": 2, "same_as": 0.5}])
    lines = read.splitlines()
    assert len({len(line) for line in lines}) == 1  # as plain text, too, it is a table
    assert [[text.strip() for text in line.strip("|").split("|")] for line in lines[2:]] == [
        ["1", "x 1", "0.5", "0.70", "0.06", "COPY", "a.png"],
        ["2", "x 2", "0.5", "", "", "not checked (same picture as strength 0.5)", ""],
    ]


def said(grid, table: list[dict]) -> list[str]:
    from amg_core.messages import message, words

    lines = grid.sentences(table)
    return [words([message(each.code, **each.values) for each in line]) for line in lines]


def test_a_row_of_one_picture_is_said(grid):
    """Drawings are compared with the others of their row only."""
    light, dark = torch.ones(8, 8, 3), torch.zeros(8, 8, 3)
    cells = [
        grid.Cell(strength, scale, picture, verdict("copy"))
        for scale, pictures in ((1.0, (light, light, light)), (2.0, (light, dark, dark)))
        for strength, picture in zip((0.0, 1.0, 2.0), pictures, strict=True)
    ]
    made = grid.compared(cells)
    assert [cell.same_as for cell in made] == [None, 0.0, 0.0, None, None, 1.0]
    table = [cell.to_row() | {"picture": 1} for cell in made]
    assert said(grid, table)[1:] == [
        "threshold × 1: all strengths draw the same picture, because the guard did not act. "
        "Smaller thresholds guard more"
    ]
    assert [line for line in map(str, grid._framed(made[1]).lines) if "same picture" in line]
