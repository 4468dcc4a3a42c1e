"""Pairs in cells: the same as those of every comparison, but for a few."""

from __future__ import annotations

import numpy as np
import pytest

from index_tools import near


def found(rows, metric, scale, threshold, exhaustive):
    made = {}
    for a, b, values in near.pairs(rows, metric, scale, threshold, exhaustive=exhaustive):
        for i, j, value in zip(a.tolist(), b.tolist(), values.tolist(), strict=True):
            assert i < j and (i, j) not in made  # each pair once
            made[i, j] = value
    return made


def rows_of(rng, count, dim):
    rows = rng.standard_normal((count, dim))
    rows[: count // 4] = rows[count // 2 : count // 2 + count // 4]
    return rows + 0.2 * rng.standard_normal((count, dim))


@pytest.mark.parametrize("seed", range(3))
def test_cells_find_nearly_all_pairs(seed):
    rows = rows_of(np.random.default_rng(seed), 1200, 32).astype(np.float16)
    every = found(rows, "cosine", 1, 0.8, True)
    cells = found(rows, "cosine", 1, 0.8, False)
    assert len(every) >= 290 and len(set(every) & set(cells)) > 0.98 * len(every)
    assert set(cells) <= set(every)
    assert all(cells[pair] == pytest.approx(every[pair], abs=1e-5) for pair in cells)


def test_cells_find_mirrored_pictures():
    rng = np.random.default_rng(0)
    pictures = rng.random((400, 3, 4, 4))
    pictures[:50] = pictures[200:250, :, :, ::-1]
    rows = pictures.reshape(400, -1).astype(np.float16)
    every, cells = (found(rows, "nl2", 4, 0.9, exhaustive) for exhaustive in (True, False))
    assert len(every) == 50 and set(cells) == set(every)


def test_large_sets_are_divided(monkeypatch):
    monkeypatch.setattr(near, "EXHAUSTIVE", 100)
    rows = rows_of(np.random.default_rng(0), 200, 16).astype(np.float16)
    blocks = []
    list(near.pairs(rows, "cosine", 1, 0.8, progress=lambda *state: blocks.append(state[1])))
    assert blocks[-1] == round((near.VISITED * 200) ** 0.5)


def test_of_too_many_pairs_the_strongest_of_each_row_stay(monkeypatch):
    rng = np.random.default_rng(0)
    i, j = np.triu_indices(30, 1)
    values = rng.random(len(i)).astype(np.float32)
    parts = [(i[k : k + 50], j[k : k + 50], values[k : k + 50]) for k in range(0, len(i), 50)]
    a, b, _ = near.strongest(parts)
    assert (a == i).all() and (b == j).all()
    assert len(near.strongest([])[0]) == 0
    monkeypatch.setattr(near, "MOST_PAIRS", 60)
    monkeypatch.setattr(near, "FEW", 1)
    a, b, kept = near.strongest(parts)
    assert len(a) < 120
    for row in range(30):
        of_row = (i == row) | (j == row)
        assert values[of_row].max() in kept
