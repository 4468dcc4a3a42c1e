"""Search by codes against exact search: the same rows and, bit for bit, the same values."""

from __future__ import annotations

import os
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amg_core.errors import AMGError
from amg_core.index import Index, build, codes, exact, mute, pq4
from amg_core.index import search as module
from amg_core.index.search import Searcher
from tests.index.helpers import Stored, fill

pytest.importorskip("faiss")


def joined(*indexes: Stored) -> Stored:
    both = Stored(np.concatenate([one._rows for one in indexes]), indexes[0].spec.metric)
    both.members, start = indexes, 0
    for one in indexes:
        both.muted |= {start + i: reason for i, reason in one.muted.items()}
        start += len(one._rows)
    return both


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Codes from 64 rows on, and few looked at, so that small indexes take every path."""
    for name, value in (
        ("SCAN", 128), ("FIRST", 64), ("LEAST", 24), ("PIECE", 96), ("REHEARSALS", 8),
    ):  # fmt: skip
        monkeypatch.setattr(codes, name, value)


def some(count: int, dim: int, metric: str, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Clustered rows with duplicates and a zero, and queries near them, between them and far off."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, dim))
    rows = centres[rng.integers(0, 5, count)] + rng.standard_normal((count, dim))
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[count // 2 : count // 2 + count // 8] = rows[0]
    rows[count // 3] = 0
    rows = rows.astype("<f2")
    near = rows[rng.integers(0, count, 3)].astype(np.float32)
    queries = [rows[0], near[0], near[1] + 0.3 * near[2], rng.standard_normal(dim), np.zeros(dim)]
    return rows, torch.tensor(np.stack(queries), dtype=torch.float32)


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def looked_up(monkeypatch) -> list[int]:
    """How many times exact search over all rows was asked instead."""
    calls, plain = [], exact.nearest
    monkeypatch.setattr(pq4.exact, "nearest", lambda *a: calls.append(1) or plain(*a))
    return calls


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 700), dim=st.integers(1, 40), k=st.sampled_from([1, 2, 50, 900]),
    metric=st.sampled_from(["cosine", "nl2"]), seed=st.integers(0, 99),
    muted=st.sets(st.integers(0, 699), max_size=40), cut=st.integers(0, 700),
)  # fmt: skip
def test_equals_exact_search(count, dim, k, metric, seed, muted, cut):
    rows, queries = some(count, dim, metric, seed)
    muted = {i for i in muted if i < count - 1}
    cut = min(cut, count)
    halves = (
        (rows[:cut], {i for i in muted if i < cut}),
        (rows[cut:], {i - cut for i in muted if i >= cut}),
    )
    index = joined(*(Stored(r, metric, muted=m) for r, m in halves if len(r)))
    expected = Searcher(index, engine="exact").nearest(queries, 8, k)
    found = Searcher(index, engine="pq4").nearest(queries, 8, k)
    assert found[0].shape == (len(queries), min(k, count - len(muted)))
    assert not set(found[1].ravel().tolist()) & muted
    assert same(found, expected)


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("dim", [130, 300])
def test_codes_suffice_where_there_is_something_to_find(metric, dim, monkeypatch):
    """Five pictures of each of 600 subjects: the five are found without reading all rows."""
    monkeypatch.setattr(codes, "MOST_DIMS", 200)  # 300 are reduced,
    monkeypatch.setattr(codes, "MOST_EIGEN", 256)  # by the eigenproblem of so many rows
    rng = np.random.default_rng(0)
    subjects = rng.standard_normal((600, dim))
    rows = np.repeat(subjects, 5, axis=0) + 0.5 * rng.standard_normal((3000, dim))
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = torch.tensor(rows[[3, 1000, 2999]] + 0.3 * rows.std() * rng.standard_normal((3, dim)))
    calls = looked_up(monkeypatch)
    found = Searcher(Stored(rows, metric), engine="pq4").nearest(queries, 8, 5)
    assert not calls
    assert same(found, Searcher(Stored(rows, metric), engine="exact").nearest(queries, 8, 5))
    assert (found[1] // 5 == torch.tensor([[0], [200], [599]])).all()


def test_a_thousand_identical_rows_come_in_the_order_of_their_ids():
    rows, _ = some(3000, 16, "cosine")
    rows[500:2500] = rows[7]
    index, query = Stored(rows), torch.tensor(rows[7:8].astype(np.float32))
    values, ids = Searcher(index, engine="pq4").nearest(query, 8, 40)
    assert ids[0].tolist() == [7, *range(500, 539)] and len(values.unique()) == 1


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_batch_changes_nothing(metric):
    rows, queries = some(2000, 24, metric)
    searcher = Searcher(Stored(rows, metric), engine="pq4")
    values, ids = searcher.nearest(queries, 8, 10)
    for order in ([4, 3, 2, 1, 0], [2], [0] * 70):
        assert same(searcher.nearest(queries[order], 8, 10), (values[order], ids[order]))
    assert torch.equal(searcher.rows(ids, 8), torch.tensor(rows[ids.numpy()]).float())


def test_scan_holds_all_rows_above_its_rest_whatever_the_batch_and_the_threads(monkeypatch):
    rows, queries = some(5000, 24, "cosine")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = codes.open_codes(None, None, 8, rows, True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = codes.open_codes(None, None, 8, rows, True)
    assert len(several._parts) == 3 and len(one._parts) == 1
    asked = queries.numpy()
    for amount in (50, 700, 4000):
        batch = one.scan(asked, amount)
        for b in range(len(asked)):
            (alone,), (split,) = (
                one.scan(asked[b : b + 1], amount),
                several.scan(asked[b : b + 1], 5000),
            )
            assert (alone.ids == batch[b].ids).all() and (alone.scores == batch[b].scores).all()
            above = split.scores > alone.rest
            assert (split.ids[above] == alone.ids).all()
            assert (split.scores[above] == alone.scores).all()


def test_all_muted_and_wrong_engine():
    rows, queries = some(200, 8, "cosine")
    for engine in ("exact", "pq4"):
        searcher = Searcher(Stored(rows, muted=range(200)), engine=engine)
        with pytest.raises(AMGError, match="muted"):
            searcher.nearest(queries, 8, 1)
        _, ids = Searcher(Stored(rows, muted=range(198)), engine=engine).nearest(queries, 8, 5)
        assert ids.shape == (5, 2) and set(ids.ravel().tolist()) == {198, 199}
    with pytest.raises(ValueError, match="engine"):
        Searcher(Stored(rows), engine="hnsw")


def cached(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_cache_is_read_again(tmp_path, monkeypatch):
    rows, queries = some(1000, 20, "nl2")
    found = Searcher(Stored(rows, "nl2", tmp_path), engine="pq4").nearest(queries, 8, 5)
    data = cached(tmp_path).read_bytes()
    monkeypatch.setattr(codes, "train", lambda *a: pytest.fail("made again"))
    assert same(Searcher(Stored(rows, "nl2", tmp_path), engine="pq4").nearest(queries, 8, 5), found)
    assert cached(tmp_path).read_bytes() == data


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "layout", "longer"])
def test_unusable_cache_is_made_again(tmp_path, damage, monkeypatch):
    rows, queries = some(1000, 20, "cosine")
    index = Stored(rows, cache=tmp_path)
    expected = Searcher(index, engine="exact").nearest(queries, 8, 5)
    Searcher(index, engine="pq4").prepare(8)
    path = cached(tmp_path)
    good = path.read_bytes()
    wanted = {"version": 1, "rows": index.rows_key(8), "count": 1000, "dim": 20, "metric": "cosine"}
    assert codes.read(path, wanted) is not None
    rng = np.random.default_rng(1)
    places = [0, 9, 60, 4000, 4096, len(good) - 1, *rng.integers(0, len(good), 20)]
    if damage == "flip":
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            assert codes.read(path, wanted) is None, place
    elif damage == "foreign":
        other, _ = some(1000, 20, "cosine", seed=5)
        Searcher(Stored(other, cache=tmp_path), engine="pq4").prepare(8)
        assert path.read_bytes() != good
    elif damage == "layout":
        with monkeypatch.context() as patch:
            patch.setattr(codes.Tables, "layout", lambda self: "of another FAISS")
            assert codes.read(path, wanted) is None
        path.write_bytes(b"x" * len(good))
    else:
        path.write_bytes({"cut": good[:-1], "empty": b"", "longer": good + b"\0"}[damage])
    assert codes.read(path, wanted) is None
    assert same(Searcher(index, engine="pq4").nearest(queries, 8, 5), expected)
    assert cached(tmp_path).read_bytes() == good  # training is deterministic


def test_killed_builds_are_swept_and_read_only_folders_do_not_matter(tmp_path, monkeypatch):
    rows, queries = some(300, 8, "cosine")
    left, now = tmp_path / "pq4-abcd1234.tmp", tmp_path / "pq4-y.tmp"
    left.write_bytes(b"")
    now.write_bytes(b"")
    os.utime(left, (0, 0))
    Searcher(Stored(rows, cache=tmp_path), engine="pq4").prepare(8)
    assert not left.exists() and now.exists()
    index = Stored(rows, cache=tmp_path / "absent")
    expected = Searcher(index, engine="exact").nearest(queries, 8, 3)
    assert same(Searcher(index, engine="pq4").nearest(queries, 8, 3), expected)


def test_threads_share_a_searcher(tmp_path):
    rows, queries = some(2000, 16, "cosine")
    index = Stored(rows, cache=tmp_path)
    expected = Searcher(index, engine="exact").nearest(queries, 8, 5)
    searcher, others = Searcher(index, engine="pq4"), Searcher(index, engine="pq4")
    start = threading.Barrier(6)

    def work(i: int) -> bool:
        start.wait()
        used = (searcher, others)[i % 2]
        return all(same(used.nearest(queries, 8, 5), expected) for _ in range(5))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert [path.name for path in tmp_path.iterdir()] == ["pq4-8.bin"]


def test_random_state_and_host_threads_are_left_alone():
    import faiss

    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), faiss.omp_get_max_threads()
    rows, queries = some(1000, 16, "cosine")
    with torch.inference_mode():
        values, _ = Searcher(Stored(rows), engine="pq4").nearest(queries, 8, 5)
    assert not values.is_inference()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert faiss.omp_get_max_threads() == before[2]


@pytest.mark.parametrize("faster", ["exact", "pq4"])
def test_auto_takes_the_faster(monkeypatch, faster):
    rows, queries = some(900, 12, "cosine")
    assert Searcher(Stored(rows)).prepare(8) == "exact"
    monkeypatch.setattr(module, "FEW", 500)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "_exact_cost", lambda *a: {"exact": 0.0, "pq4": 99.0}[faster])
    searcher = Searcher(Stored(rows))
    assert searcher.prepare(8) == faster
    assert same(
        searcher.nearest(queries, 8, 5),
        Searcher(Stored(rows), engine="exact").nearest(queries, 8, 5),
    )
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert Searcher(Stored(rows)).prepare(8) == "exact"


def test_auto_measures(monkeypatch):
    rows, _ = some(3000, 64, "nl2")
    index = Stored(rows, "nl2")
    assert 0 < module._exact_cost(rows, torch.device("cpu"), False) < 10
    monkeypatch.setattr(module, "FEW", 500)
    assert Searcher(index).prepare(8) in ("exact", "pq4")


def test_without_faiss(monkeypatch, caplog):
    rows, _ = some(900, 12, "cosine")
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(module, "FEW", 500)
    monkeypatch.setattr(module, "MANY", 800)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert Searcher(Stored(rows)).prepare(8) == "exact"
    assert "pip install faiss-cpu" in caplog.text
    with pytest.raises(AMGError, match="pip install faiss-cpu"):
        Searcher(Stored(rows), engine="pq4")


def test_real_indexes_with_caches_combined_and_muted(tmp_path, made, pixel, monkeypatch):
    build(fill(tmp_path / "many", 150, first=100), tmp_path / "large", pixel)
    mute(tmp_path / "large", lambda entry: entry.source == "p103.png", "ours")
    scale = pixel.spec.scales[0]

    def opened() -> Index:
        return Index.combine([Index.open(made), Index.open(tmp_path / "large")])

    with opened() as index:
        queries = torch.tensor(index.rows(scale)[np.array([2, 8, 77])]).float()
        expected = Searcher(index, engine="exact").nearest(queries, scale, 6)
        assert same(Searcher(index, engine="pq4").nearest(queries, scale, 6), expected)
        assert expected[1][0, 0] == 2 and 8 not in expected[1] and expected[1][2, 0] == 77
        assert index.members[1].cache.joinpath(f"pq4-{scale}.bin").exists()
    monkeypatch.setattr(codes, "train", lambda *a: pytest.fail("made again"))
    with opened() as index:
        assert same(Searcher(index, engine="pq4").nearest(queries, scale, 6), expected)


def test_rows_rest_on_a_device_that_has_room(monkeypatch):
    device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 24 << 30))
    assert exact.fits((2_000_000, 512), device) and not exact.fits((3_000_000, 512), device)
    assert not exact.fits((3_000_000, 512), types.SimpleNamespace(type="mps"))
    assert exact.fits((500_000, 512), torch.device("cpu"))
    assert not exact.fits((1_000_000, 512), torch.device("cpu"))


def test_large_batches_are_split(monkeypatch):
    rows, queries = some(500, 16, "cosine")
    whole = Searcher(Stored(rows), engine="exact").nearest(queries, 8, 7)
    monkeypatch.setattr(exact, "SCORES", 1000)
    assert same(Searcher(Stored(rows), engine="exact").nearest(queries, 8, 7), whole)


def test_turn_is_a_rotation_with_balanced_groups():
    rng = np.random.default_rng(0)
    spread = np.linspace(4, 0.1, 32)
    rows = (rng.standard_normal((4000, 32)) * spread).astype(np.float32)
    tables = codes.train(rows, False)
    np.testing.assert_allclose(tables.turn.T @ tables.turn, np.eye(32), atol=1e-5)
    logs = np.log(tables.turned(rows).var(0)).reshape(8, 4).sum(1)
    assert np.ptp(logs) < 0.5 * np.ptp(np.log(rows.var(0)).reshape(8, 4).sum(1))
    assert codes.train(rows[:500, :30], True).turn.shape == (30, 32)
