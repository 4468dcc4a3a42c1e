"""Recall, time and memory of the search engines, beside brute force and what the machine allows.

    python -m benchmarks.index_search 1000000
    python -m benchmarks.index_search --vectors rows.npy

Everything is measured in one run on the same vectors. Without ``--vectors`` (an (N, D) .npy of unit
rows) they are synthetic: 300 domains, N/5 subjects of Zipf-like size, individual variation with the
spectrum of real SSCD rows (sscd_spectrum.txt), 3 % near-duplicates at cosine 0.95. They are not
turned to random axes: the codes learn their own. Queries are rows mixed with noise (16 other rows
less 16 others) to a cosine of 0.9, 0.7, 0.5 and 0.35 with the row, and fresh vectors ("none"). Truth is the
product with all rows in float32.

Times disturbed by other programs are no better than their minimum; so both are printed. The file
cache is warm: the vectors were just written. "limit" is the bytes that must be read for one
query divided by the bandwidth measured in this run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amg_core.descriptors.base import DescriptorSpec
from amg_core.index import pq4
from amg_core.index.search import Searcher

from . import harness

BANDS = (0.9, 0.7, 0.5, 0.35)
CHUNK = 65_536
SCALE = 288
DEEP = 50


class Vectors:
    """As much of an index as a `Searcher` needs: rows in an .npy file."""

    def __init__(self, path: Path) -> None:
        self._rows = np.load(path, mmap_mode="r")
        self.cache, self.hash, self.muted = path.parent, path.name, {}
        self.spec = DescriptorSpec("vectors", "cosine", "none/1", (SCALE,))

    def rows(self, scale: int) -> np.ndarray:
        return self._rows


def main() -> None:
    parser = harness.parser("benchmarks.index_search", __doc__)
    parser.add_argument("count", type=int, nargs="?", default=100_000, help="synthetic vectors")
    parser.add_argument("--vectors", type=Path, help="an .npy of rows instead")
    parser.add_argument("--queries", type=Path, help="an .npz of real queries, an array a band")
    parser.add_argument("--each", type=int, default=100, help="queries in a band")
    parser.add_argument("--repeats", type=int, default=100, help="timed queries")
    parser.add_argument("--engines", nargs="+", default=["exact", "pq4"])
    parser.add_argument("--folder", type=Path, help="for files of 1.1 KB a vector; removed again")
    options = harness.parse(parser)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rows.npy"
        fresh = write(path, options)
        report(path, queries(path, fresh, options), options)


def write(path: Path, options: argparse.Namespace) -> np.ndarray:
    """Put the rows at `path`; returns vectors (options.each, D) that are not among them."""
    if options.vectors:
        rows = np.load(options.vectors, mmap_mode="r")
        np.save(path, rows[: -options.each].astype(np.float16))
        return np.asarray(rows[-options.each :], np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (options.count, 512))
    starts = range(0, options.count, CHUNK)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start, rows in zip(
            starts, pool.map(lambda s: synthetic(s, options.count), starts), strict=True
        ):
            out[start : start + CHUNK] = rows
    out.flush()
    return synthetic(options.count, options.count, options.each)


def synthetic(start: int, total: int, most: int = CHUNK) -> np.ndarray:
    """Rows from `start` on, at most `most`: (n, 512) float32, unit."""
    spread = np.sqrt(np.loadtxt(Path(__file__).with_name("sscd_spectrum.txt"), dtype=np.float32))
    pool = np.random.default_rng(1).standard_normal((8192, 512), np.float32) * spread
    rng = np.random.default_rng([2, start])
    count = min(most, total - start) if start < total else most
    subject = (rng.pareto(1.2, count) * total / 250).astype(np.int64) % max(1, total // 5)
    domain, one, two = subject % 300, subject * 7919 % 8192, subject * 104729 // 8192 % 8192
    rows = rng.standard_normal((count, 512), np.float32) * (0.8 * spread)
    rows += 0.35 * pool[domain] + 0.35 * (pool[one] + pool[two])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    twins = np.flatnonzero(rng.random(count) < 0.03)
    rows[twins] = mixed(rows[twins - 1], rows[twins - 2] - rows[twins - 3], 0.95)
    return rows


def mixed(rows: np.ndarray, noise: np.ndarray, cosine: float) -> np.ndarray:
    """(n, D) unit rows with that cosine to `rows`."""
    noise = noise - (noise * rows).sum(1, keepdims=True) * rows
    noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-12)
    return (cosine * rows + np.sqrt(1 - cosine**2) * noise).astype(np.float32)


def queries(path: Path, fresh: np.ndarray, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Of each band (n, D)."""
    if options.queries:
        with np.load(options.queries) as given:
            return {name: torch.from_numpy(given[name]).float() for name in given.files}
    rows, rng = np.load(path, mmap_mode="r"), np.random.default_rng(3)
    found = {}
    for cosine in BANDS:
        x, *others = rows[rng.integers(0, len(rows), (33, options.each))].astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        noise = sum(others[:16]) - sum(others[16:])
        found[str(cosine)] = torch.from_numpy(mixed(x, noise, cosine))
    return found | {"none": torch.from_numpy(fresh)}


def truth(path: Path, asked: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values and ids (B, DEEP) of the nearest rows by brute force."""
    rows = np.load(path, mmap_mode="r")
    asked = asked / asked.norm(dim=1, keepdim=True)
    values = torch.empty((len(asked), 0))
    ids = torch.empty((len(asked), 0), dtype=torch.int64)
    for start in range(0, len(rows), CHUNK):
        chunk = torch.tensor(rows[start : start + CHUNK]).float()
        close = asked @ (chunk / chunk.norm(dim=1, keepdim=True).clamp_min(1e-12)).T
        best, order = close.topk(min(DEEP, len(chunk)), dim=1)
        values, picked = torch.cat([values, best], 1).topk(min(DEEP, start + len(chunk)), dim=1)
        ids = torch.cat([ids, order + start], 1).gather(1, picked)
    return values.numpy(), ids.numpy()


def report(path: Path, bands: dict[str, torch.Tensor], options: argparse.Namespace) -> None:
    count, dim = np.load(path, mmap_mode="r").shape
    asked = torch.cat(list(bands.values()))
    print(f"{count} x {dim}, {torch.get_num_threads()} threads, {len(asked)} queries")
    values, ids = truth(path, asked)
    speed = bandwidth()
    print(f"memory bandwidth, read: {speed / 1e9:.1f} GB/s")
    shuffled = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))]
    bytes_read = {"exact": 4 if count * dim * 4 <= 1 << 30 else 2, "pq4": 0.125}  # a dimension
    for engine in options.engines:
        width = bytes_read[engine]
        print(f"\n{engine}")
        if engine == "pq4":
            print(f"  build {apart(build, path):.1f} s")
        result = apart(measured, path, engine, asked, shuffled, options.repeats)
        print("  " + json.dumps(result["figures"]))
        limit = count * min(dim, 512 if engine == "pq4" else dim) * width / speed * 1e3
        for key, times in result["ms"].items():
            low, middle = min(times), float(np.median(times))
            print(f"  {key}: {low:.2f} / {middle:.2f} ms a query (min / median); limit {limit:.2f}")
        start = 0
        for name, some in bands.items():
            part = slice(start, start + len(some))
            print(f"  {name:>10}: " + agreement(result, values[part], ids[part], part))
            start += len(some)
        print("         all: " + agreement(result, values, ids, slice(None)))


def agreement(result: dict, values: np.ndarray, ids: np.ndarray, part: slice) -> str:
    """Recall of the best and of the best 50, and what the best was under-reported by at most.

    A row counts as found where it is as close as the one it stands for, to 1e-6: twins tie.
    """
    one, deep, found = (result[name][part] for name in ("best", "values", "ids"))
    loss = float((values[:, 0] - one[:, 0]).max())
    first = float((one[:, 0] >= values[:, 0] - 1e-6).mean())
    same = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, ids, strict=True)]
    as_close = float((deep >= values[:, -1:] - 1e-6).mean())
    rows = result["looked"][part] if result["looked"] is not None else None
    looked = (
        f", rows looked at {np.median(rows):.0f}, at most {rows.max()}" if rows is not None else ""
    )
    return (
        f"mean cosine {values[:, 0].mean():.2f}, recall@1 {first:.4f}, loss {max(loss, 0):.1e}, "
        f"recall@50 {as_close:.4f} (same ids {np.mean(same):.4f}){looked}"
    )


def apart(call: Callable, *arguments: Any) -> Any:
    """The result of a call in a process of its own, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def build(path: Path) -> float:
    """Seconds to make and cache the codes."""
    start = time.perf_counter()
    Searcher(Vectors(path), engine="pq4").prepare(SCALE)
    return time.perf_counter() - start


def measured(
    path: Path, engine: str, asked: torch.Tensor, shuffled: torch.Tensor, repeats: int
) -> dict:
    """What is measured with codes already made."""
    if engine == "pq4":
        import faiss  # noqa: F401  its code is not counted with the rows
    index = Vectors(path)
    count = len(index.rows(SCALE))
    before = memory()
    start = time.perf_counter()
    searcher = Searcher(index, engine=engine)
    searcher.prepare(SCALE)
    opened = time.perf_counter() - start
    searcher.nearest(asked[:1], SCALE, 1)
    after = memory()
    looked: list[int] = []
    plain = pq4._Seen.contenders

    def counting(self: pq4._Seen, k: int) -> np.ndarray:
        looked.append(len(self.ids))
        return plain(self, k)

    best, _ = searcher.nearest(asked, SCALE, 1)
    pq4._Seen.contenders = counting
    values, ids = searcher.nearest(asked, SCALE, DEEP)
    pq4._Seen.contenders = plain
    times: dict[str, list[float]] = {}
    for batch in (1, 8):
        for k in (1, DEEP):
            parts = shuffled.split(batch)[: max(8, repeats // batch)]
            times[f"batch {batch}, k = {k}"] = spent = []
            for part in parts:
                start = time.perf_counter()
                searcher.nearest(part, SCALE, k)
                spent.append((time.perf_counter() - start) * 1e3 / len(part))
    return {
        "figures": {
            "open s": round(opened, 3),
            "bytes a vector": {k: round((after[k] - before[k]) / count, 1) for k in after},
        },
        "ms": times, "best": best.numpy(), "values": values.numpy(), "ids": ids.numpy(),
        "looked": np.array(looked) if len(looked) == len(asked) else None,
    }  # fmt: skip


def bandwidth() -> float:
    """Bytes a second that all threads together read from memory, the best of ten."""
    values = torch.ones(1 << 27)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return values.nbytes / min(times)


def memory() -> dict[str, int]:
    """Bytes of this process in memory, own and mapped from files (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"own": fields["Anonymous"], "mapped": fields["Rss"] - fields["Anonymous"]}


if __name__ == "__main__":
    main()
