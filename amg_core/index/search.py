"""Searches for the nearest rows of an index by the engine that is fastest on this machine.

``exact`` measures every row (`exact`). ``pq4`` scans the 4-bit code of every row, and then measures the
rows that could matter (`pq4`) by the same function, so the values are the same and fewer bytes are read.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import plain_arithmetic
from ..errors import AMGError
from ..optional import needed, optional
from . import exact, pq4
from .reader import Index

ENGINES = ("auto", "exact", "pq4")
FEW = 32_768  # rows; up to this number exact search takes a few milliseconds on any machine
MANY = 500_000  # rows; from this number on the log recommends faiss
SLICE = 16_384  # rows for timing exact search, whose cost is proportional to their number
log = logging.getLogger(__name__)

Found = list[tuple[Tensor, Tensor]]  # per query: values (k,), best first, and ids (k,)
Engine = Callable[[Tensor, int], Found]


@dataclass(frozen=True)
class _Scale:
    """One scale that is ready for searching."""

    rows: exact.Rows
    name: str
    search: Engine
    hidden: int


class Searcher:
    """Searches one index on one device. The rows of a scale are loaded at its first use.

    The tensors it returns are ordinary ones (no inference tensors), so they may take part in a gradient
    even if the search was called inside ``torch.inference_mode``. It may be shared between threads, and
    uses no random generator. Excluded (muted) rows are never returned. After the index is closed, it
    still works for scales whose rows were copied to the device.

    Parameters
    ----------
    index : Index
    device : torch.device or str
        The device for queries and results.
    engine : {"auto", "exact", "pq4"}
        "exact" reads every row, from the device if the rows fit (`exact.fits`), or else from the disk.
        "pq4" needs faiss-cpu. Codes are made at first use (about 15 s a million rows on one core) and
        kept in the cache folder of the index.
        "auto" is exact for few rows, on macOS (faiss and torch each load an OpenMP there, and the
        process may abort), without faiss, and on an accelerator with enough memory for the rows.
        Otherwise both engines are timed once on two queries, and the faster one is used.
    """

    def __init__(
        self, index: Index, device: torch.device | str = "cpu", engine: str = "auto"
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, not {engine!r}")
        if engine == "pq4":
            needed("faiss", "The search engine pq4", "pip install faiss-cpu, or choose engine auto")
        self.index, self.engine = index, engine
        self.device = torch.device(device)
        self._scales: dict[int, _Scale] = {}
        self._lock = threading.Lock()

    def nearest(self, query: Tensor, scale: int, k: int) -> tuple[Tensor, Tensor]:
        """The k' = min(k, number of rows that are not excluded) nearest rows of each query.

        Parameters
        ----------
        query : (B, D) Tensor
            Finite. It is converted to float32 and detached.
        scale : int
            One of the scales of the index.
        k : int
            At least 1.

        Returns
        -------
        values : (B, k') float32
            Metric "cosine": cosine similarities in [-1, 1], descending (0 for a zero vector).
            Metric "nl2": Euclidean distances, ascending (not yet divided as in AMG Eq. 8).
        ids : (B, k') int64
            Row ids. Among equal values the lowest comes first. Both are on the searcher's device.

        Raises
        ------
        ValueError
            The shape, scale or k is wrong.
        AMGError
            The query is not finite, or every row is excluded.
        """
        with plain_arithmetic(self.device):
            ready = self._load(scale)
            count, dim = ready.rows.shape
            if query.ndim != 2 or query.shape[1] != dim:
                raise ValueError(f"query must be (B, {dim}), not {tuple(query.shape)}")
            if k < 1:
                raise ValueError(f"k must be at least 1, not {k}")
            query = query.detach().to(device=self.device, dtype=torch.float32)
            if not torch.isfinite(query).all():
                raise AMGError(
                    "The picture to search for has values that are not finite (NaN): its decoding "
                    "or its descriptor overflowed; run the VAE in float32."
                )
            k = min(k, count - ready.hidden)
            if not len(query):
                empty = torch.empty((0, k), device=self.device)
                return empty, empty.long()
            if self._cosine:
                query = torch.stack([exact.unit(one.clone()) for one in query])
            values, ids = zip(*ready.search(query, k), strict=True)
            return torch.stack(values), torch.stack(ids)

    def rows(self, ids: Tensor, scale: int) -> Tensor:
        """The stored rows for ids of any shape: (…,) int64 -> (…, D) float32 on the device."""
        with plain_arithmetic(self.device):
            rows = self._load(scale).rows
            ids = torch.as_tensor(ids, device=self.device)
            return rows.gather(ids.reshape(-1)).reshape(*ids.shape, rows.shape[1])

    def prepare(self, scale: int) -> str:
        """Load a scale before its first search. Returns the engine that it will use."""
        with plain_arithmetic(self.device):
            return self._load(scale).name

    def release(self) -> None:
        """Free the rows on an accelerator, because the host needs its memory between runs.

        They are copied again at the next search. Codes, and rows in the CPU's memory, are kept.
        """
        if self.device.type == "cpu":
            return
        with self._lock:
            self._scales = {
                scale: ready
                for scale, ready in self._scales.items()
                if isinstance(ready.rows, exact.Mapped)
            }

    @property
    def _cosine(self) -> bool:
        return self.index.spec.metric == "cosine"

    def _load(self, scale: int) -> _Scale:
        with self._lock:
            if scale not in self._scales:
                self._scales[scale] = self._make(scale)
            return self._scales[scale]

    def _make(self, scale: int) -> _Scale:
        stored = self.index.rows(scale)
        count = stored.shape[0]
        muted = sorted(i for i in getattr(self.index, "muted", {}) if 0 <= i < count)
        if len(muted) == count:
            raise AMGError(
                f"Every picture of index {getattr(self.index, 'path', '')} is muted, so there is "
                f"nothing to search: unmute some, or choose another index."
            )
        hidden = torch.tensor(muted, dtype=torch.int64)
        name = self._choose(stored)
        if name != "exact":
            mapped = exact.Mapped(stored, self.device)
            by_codes = self._codes_or_none(mapped, scale, hidden)
            if by_codes and (name == "pq4" or self._faster(by_codes, stored)):
                return _Scale(mapped, "pq4", by_codes, len(hidden))
        rows = exact.place(stored, self.device)
        return _Scale(rows, "exact", self._exact(rows, hidden), len(hidden))

    def _codes_or_none(self, rows: exact.Mapped, scale: int, hidden: Tensor) -> Engine | None:
        """`_by_codes`, or None if codes cannot be written. If pq4 was chosen, that is an error."""
        try:
            return self._by_codes(rows, scale, hidden)
        except OSError as error:
            if self.engine == "pq4":
                raise AMGError(
                    f"Search codes cannot be made ({error}): free space on the disk of the index or "
                    f"in the temporary folder, or choose engine exact."
                ) from error
            log.warning("Search codes cannot be made (%s): every row is read instead.", error)
            return None

    def _faster(self, by_codes: Engine, stored: exact.Stored) -> bool:
        """Whether search by codes is faster than exact search."""
        codes = _cost(by_codes, _samples(stored, self.device, self._cosine))
        every = _exact_cost(stored, self.device, self._cosine)
        log.info("Index search: %.1f ms by codes, %.1f ms exact", codes * 1e3, every * 1e3)
        return codes < every

    def _choose(self, stored: exact.Stored) -> str:
        """ "exact" or "pq4", or "measure" if both have to be timed."""
        if self.engine != "auto":
            return self.engine
        count = stored.shape[0]
        if count <= FEW:
            return "exact"
        if self.device.type != "cpu" and exact.fits(stored.shape, self.device):
            return "exact"
        if sys.platform == "darwin":
            return "exact"
        if optional("faiss") is None:
            if count >= MANY:
                log.warning(
                    "Searching %d pictures is faster with faiss: pip install faiss-cpu", count
                )
            return "exact"
        return "measure"

    def _exact(self, rows: exact.Rows, hidden: Tensor) -> Engine:
        hidden, cosine = hidden.to(self.device), self._cosine
        return lambda queries, k: exact.nearest(queries, rows, k, cosine, hidden)

    def _by_codes(self, rows: exact.Mapped, scale: int, hidden: Tensor) -> Engine:
        members = getattr(self.index, "members", None) or (self.index,)
        parts, start = [], 0
        for member in members:
            part = member.rows(scale)
            parts.append(pq4.Part.open(member, part, scale, start, self._cosine))
            start += part.shape[0]
        hidden, cosine = hidden.to(self.device), self._cosine

        def search(queries: Tensor, k: int) -> Found:
            return pq4.nearest(queries, parts, rows, k, cosine, hidden)

        return search


def _samples(stored: exact.Stored, device: torch.device, cosine: bool) -> Tensor:
    """Queries for timing, (2, D): each is half-way between two pictures, like a noisy copy."""
    count = stored.shape[0]
    picked = np.asarray(stored[np.array([0, count // 3, count // 2, count - 1])])
    some = torch.from_numpy(picked).float().to(device)
    queries = some[:2] + some[2:]
    return torch.stack([exact.unit(q) for q in queries]) if cosine else queries / 2


def _cost(engine: Engine, queries: Tensor) -> float:
    """Seconds for one query, the better of two after a warm-up."""
    times = []
    for query in (queries[:1], *torch.split(queries, 1)):
        start = time.perf_counter()
        values = engine(query, 1)[0][0]
        float(values[0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _exact_cost(stored: exact.Stored, device: torch.device, cosine: bool) -> float:
    """Estimated seconds for an exact search of one query, from a part of the rows."""
    count = stored.shape[0]
    part = stored[: min(SLICE, count)]
    resident = exact.fits(stored.shape, device)
    rows = (exact.Resident if resident else exact.Mapped)(part, device)
    none = torch.empty(0, dtype=torch.int64, device=device)

    def engine(queries: Tensor, k: int) -> Found:
        return exact.nearest(queries, rows, k, cosine, none)

    return _cost(engine, _samples(part, device, cosine)) * count / len(part)
