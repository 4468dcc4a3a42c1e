"""Search against brute force, and independence of the batch."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from amg_core.errors import AMGError
from amg_core.index import Index
from amg_core.index import exact as module
from amg_core.index.search import Searcher
from tests.index.helpers import Stored


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def brute(rows: np.ndarray, query: np.ndarray, metric: str) -> np.ndarray:
    """(B, N) in float64."""
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    if metric == "cosine":
        return unit(query) @ unit(rows).T
    return np.sqrt(((query[:, None] - rows[None]) ** 2).sum(-1))


CASES = [(n, d, b, k) for n, d, b, k in [
    (1, 4, 1, 1), (1, 3, 2, 9), (2, 1, 1, 2), (3, 5, 2, 50), (130, 7, 3, 50), (300, 192, 4, 50),
    (127, 33, 1, 127), (128, 33, 1, 128), (129, 33, 5, 128), (700, 512, 3, 1), (50, 3072, 2, 5),
]]  # fmt: skip


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_brute_force(metric, wide, case, monkeypatch):
    count, dim, batch, k = case
    if not wide:
        monkeypatch.setattr(module, "FLOAT32_BYTES", 0)
        monkeypatch.setattr(module, "CHUNK_VALUES", 1000)
    rng = np.random.default_rng(count * 31 + dim)
    rows = rng.random((count, dim)) if metric == "nl2" else unit(rng.standard_normal((count, dim)))
    stored = Stored(rows, metric)
    near = stored._rows[rng.integers(0, count, batch)].astype(np.float64)
    query = torch.tensor(near + 0.02 * rng.standard_normal((batch, dim)), dtype=torch.float32)
    searcher = Searcher(stored)
    values, ids = searcher.nearest(query, 8, k)
    assert values.shape == ids.shape == (batch, min(k, count))
    assert values.dtype == torch.float32 and ids.dtype == torch.int64
    exact = brute(stored._rows, query.numpy(), metric)
    order = np.argsort(-exact if metric == "cosine" else exact, axis=1, kind="stable")
    found = np.take_along_axis(exact, ids.numpy(), 1)
    best = np.take_along_axis(exact, order[:, : min(k, count)], 1)
    np.testing.assert_allclose(values, found, atol=3e-6, rtol=1e-5)
    np.testing.assert_allclose(values, best, atol=3e-6, rtol=1e-5)
    for row in ids.tolist():
        assert len(set(row)) == len(row)
    steps = np.diff(values.numpy(), axis=1)
    assert (steps <= 0).all() if metric == "cosine" else (steps >= 0).all()
    for b in range(batch):
        one_values, one_ids = searcher.nearest(query[b : b + 1], 8, k)
        assert torch.equal(one_values[0], values[b]) and torch.equal(one_ids[0], ids[b])
    picked = searcher.rows(ids, 8)
    assert picked.shape == (*ids.shape, dim) and picked.dtype == torch.float32
    np.testing.assert_array_equal(picked.numpy(), stored._rows[ids.numpy()].astype(np.float32))


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_cancellation(metric):
    """Near neighbours far from the origin: the product form alone ranks them wrongly."""
    rng = np.random.default_rng(0)
    rows = 1 + 0.01 * rng.standard_normal((2000, 3072))
    stored = Stored(rows, metric)
    query = stored._rows[7].astype(np.float32)[None]
    values, ids = Searcher(stored).nearest(torch.tensor(query), 8, 20)
    exact = brute(stored._rows, query, metric)
    order = np.argsort(-exact[0] if metric == "cosine" else exact[0], kind="stable")[:20]
    assert ids[0, 0] == 7
    if metric == "nl2":
        assert values[0, 0] == 0
        assert ids[0].tolist() == order.tolist()
    np.testing.assert_allclose(values[0], exact[0, order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_batch_and_matmul_precision_change_nothing(metric, precision):
    rng = np.random.default_rng(1)
    rows = rng.random((1500, 192))
    rows[700:800] = rows[5]
    stored = Stored(unit(rows) if metric == "cosine" else rows, metric)
    query = torch.tensor(stored._rows[[5, 9, 1000, 5]] + 0.01 * rng.random((4, 192))).float()
    expected = Searcher(stored).nearest(query, 8, 30)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        searcher = Searcher(stored)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1], [2, 0], [0] * 17):
            values, ids = searcher.nearest(query[order], 8, 30)
            assert torch.equal(values, expected[0][order]) and torch.equal(ids, expected[1][order])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values, ids = searcher.nearest(query, 8, 30)
        assert torch.equal(values, expected[0]) and torch.equal(ids, expected[1])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_ties_go_to_the_lowest_id(metric):
    rows = np.zeros((600, 16))
    rows[:, 0] = 1
    rows[100:400, 1] = 0.5
    values, ids = Searcher(Stored(rows, metric)).nearest(torch.eye(2, 16)[:1], 8, 350)
    assert ids[0].tolist() == [*range(100), *range(400, 600), *range(100, 150)]
    assert len(values[0].unique()) == 2


def test_zero_vectors_have_no_direction():
    rows = np.eye(3, 4)
    rows[1] = 0
    values, ids = Searcher(Stored(rows, "cosine")).nearest(torch.zeros(1, 4), 8, 3)
    assert values.tolist() == [[0, 0, 0]] and ids.tolist() == [[0, 1, 2]]
    values, _ = Searcher(Stored(rows, "cosine")).nearest(torch.ones(1, 4), 8, 3)
    assert values.tolist() == [[0.5, 0.5, 0]]


def test_wrong_calls():
    searcher = Searcher(Stored(np.ones((3, 4)), "nl2"))
    for query, k in ((torch.ones(4), 1), (torch.ones(1, 5), 1), (torch.ones(1, 4), 0)):
        with pytest.raises(ValueError):
            searcher.nearest(query, 8, k)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AMGError, match="not finite"):
            searcher.nearest(torch.full((1, 4), bad), 8, 1)
    values, ids = searcher.nearest(torch.ones(0, 4), 8, 2)
    assert values.shape == ids.shape == (0, 2)


def test_inference_mode_and_graph_and_random_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    stored = Stored(np.eye(5), "cosine")
    with torch.inference_mode():
        searcher = Searcher(stored)
        values, ids = searcher.nearest(torch.eye(5)[2:3], 8, 2)
        rows = searcher.rows(ids, 8)
    assert not (values.is_inference() or ids.is_inference() or rows.is_inference())
    query = torch.eye(5)[2:3].requires_grad_()
    assert not searcher.nearest(query, 8, 1)[0].requires_grad
    (query * searcher.rows(ids[:, :1], 8)[:, 0]).sum().backward()
    assert query.grad[0, 2] == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_with_a_real_index(made, pixel):
    index = Index.open(made, pixel.spec)
    searcher = Searcher(index)
    for scale in pixel.spec.scales:
        query = torch.tensor(index.rows(scale)[[3, 1]]).float()
        values, ids = searcher.nearest(query, scale, 50)
        assert ids.shape == (2, 5) and ids[:, 0].tolist() == [3, 1]
        assert values[:, 0].tolist() == [0, 0] and values[0, 1] > 0
    index.close()
    assert searcher.nearest(query, 32, 1)[1].tolist() == [[3], [1]]
    with pytest.raises(ValueError, match="closed"):
        Searcher(index).nearest(query, 32, 1)


def test_other_device_kinds_are_named_not_probed():
    device = types.SimpleNamespace(type="mps")
    assert module._input_rounding(device) > 0


def test_an_accelerator_is_left_as_it_was():
    """The rows of a device other than the CPU are let go of, and come back when they are asked for."""
    searcher = Searcher(Stored(np.eye(5), "cosine"))
    before = searcher.nearest(torch.eye(5)[2:3], 8, 2)
    searcher.release()
    assert 8 in searcher._scales  # on a CPU they stay
    searcher.device = types.SimpleNamespace(type="cuda")
    searcher.release()
    assert searcher._scales == {}
    searcher.device = torch.device("cpu")
    assert torch.equal(searcher.nearest(torch.eye(5)[2:3], 8, 2)[0], before[0])
