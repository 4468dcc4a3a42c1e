"""Nearest rows of an index, by whichever engine is fastest where it runs. All give the same answers.

``exact`` looks at every row (`exact`). ``pq4`` looks at every row's 4-bit code and then at the rows
that could matter (`pq4`): the same values, from the same function, and fewer bytes.
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
FEW = 32_768  # rows; up to here exact search takes a few milliseconds on any machine
MANY = 500_000  # rows; from here on it is worth telling that faiss would be faster
SLICE = 16_384  # rows exact search is timed on: its cost is proportional to their number
log = logging.getLogger(__name__)

Found = list[tuple[Tensor, Tensor]]  # per query: values (k,), best first, and ids (k,)
Engine = Callable[[Tensor, int], Found]


@dataclass(frozen=True)
class _Scale:
    """One scale made ready."""

    rows: exact.Rows
    name: str
    search: Engine
    hidden: int


class Searcher:
    """Searches one index on one device. Rows of a scale are made ready at its first use.

    The tensors it holds and returns are ordinary ones (no inference tensors), so they may be used
    in a graph even if the search was called inside ``torch.inference_mode``. Safe to share between
    threads. Draws nothing from a random generator. Muted rows are never returned. Stays usable
    after the index is closed for the scales whose rows were copied to the device.

    Parameters
    ----------
    index : Index
    device : torch.device or str
        Where queries are taken to and answers returned.
    engine : {"auto", "exact", "pq4"}
        "exact" reads every row: on the device where the rows fit (`exact.fits`), else streamed.
        "pq4" needs faiss-cpu; codes are made at first use (about 15 s a million rows on one core)
        and kept in the cache folder of the index.
        "auto": exact for few rows, on macOS (faiss and torch each bring an OpenMP there, and the
        process may abort), without faiss, and on an accelerator that has room for the rows;
        otherwise both are timed once on two queries and the faster is taken.
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
        """The k' = min(k, rows that are not muted) nearest rows of each query.

        Parameters
        ----------
        query : (B, D) Tensor
            Finite; taken in float32, detached.
        scale : int
            One of the scales of the index.
        k : int
            At least 1.

        Returns
        -------
        values : (B, k') float32
            Metric "cosine": cosine similarities in [-1, 1], descending (0 for a zero vector).
            Metric "nl2": Euclidean distances, ascending (not yet normalised: AMG Eq. 8 divides).
        ids : (B, k') int64
            Row ids; among equal values the lowest id comes first. Both on the searcher's device.

        Raises
        ------
        ValueError
            Wrong shape, scale or k.
        AMGError
            The query is not finite, or every row is muted.
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
        """Rows of any shape of ids: (…,) int64 -> (…, D) float32 on the device, as stored."""
        with plain_arithmetic(self.device):
            rows = self._load(scale).rows
            ids = torch.as_tensor(ids, device=self.device)
            return rows.gather(ids.reshape(-1)).reshape(*ids.shape, rows.shape[1])

    def prepare(self, scale: int) -> str:
        """Do now what the first search of a scale would have to do; the engine it will use."""
        with plain_arithmetic(self.device):
            return self._load(scale).name

    def release(self) -> None:
        """Let go of rows that rest on an accelerator: its memory belongs to the host between runs.

        They are copied again at the next search. Codes and what rests on a CPU stay.
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
        """`_by_codes`; where there is no room to make codes, None, or an error if pq4 was chosen."""
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
        """Whether searching by codes takes less time than exact search."""
        codes = _cost(by_codes, _samples(stored, self.device, self._cosine))
        every = _exact_cost(stored, self.device, self._cosine)
        log.info("Index search: %.1f ms by codes, %.1f ms exact", codes * 1e3, every * 1e3)
        return codes < every

    def _choose(self, stored: exact.Stored) -> str:
        """ "exact", "pq4", or "measure" where only time can tell."""
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
    """(2, D) queries to time with: half-way between two pictures, like a half-formed copy."""
    count = stored.shape[0]
    picked = np.asarray(stored[np.array([0, count // 3, count // 2, count - 1])])
    some = torch.from_numpy(picked).float().to(device)
    queries = some[:2] + some[2:]
    return torch.stack([exact.unit(q) for q in queries]) if cosine else queries / 2


def _cost(engine: Engine, queries: Tensor) -> float:
    """Seconds a query, the better of two after one to warm up."""
    times = []
    for query in (queries[:1], *torch.split(queries, 1)):
        start = time.perf_counter()
        values = engine(query, 1)[0][0]
        float(values[0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _exact_cost(stored: exact.Stored, device: torch.device, cosine: bool) -> float:
    """Seconds a query that exact search over all rows would take, from a slice of them."""
    count = stored.shape[0]
    part = stored[: min(SLICE, count)]
    resident = exact.fits(stored.shape, device)
    rows = (exact.Resident if resident else exact.Mapped)(part, device)
    none = torch.empty(0, dtype=torch.int64, device=device)

    def engine(queries: Tensor, k: int) -> Found:
        return exact.nearest(queries, rows, k, cosine, none)

    return _cost(engine, _samples(part, device, cosine)) * count / len(part)
