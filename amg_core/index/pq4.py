"""Search by 4-bit codes, answered by exact measurement of every row that could matter.

All codes are scanned (`codes`): nothing is skipped, no cell of an inverted list and no edge of a graph
can hide a row. The rows with the best estimates are then read from their file and measured by the
function of exact search (`exact.measure`), best estimate first, until what is left cannot be expected
to change the answer. With m and s the mean and the deviation of (true closeness - estimate) over
the rows just looked at (`codes.spread`), e_i the estimates of the rows not looked at, and Q the tail
of the normal distribution, the number of them that are closer than some v is at most about

    missed(v) = Σ_i Q((v - m - e_i) / (tail · max(s, floor)))

(a union bound; rows beyond the scan count with the last estimate of the scan). Looking goes on until
missed(v1) <= MISS_BEST for the best closeness v1 found and missed(vk) <= MISS_SHARE · k for the k-th.
`tail` >= 1 widens the deviation where the errors of this index have heavier tails than the normal
distribution, and `floor` is the usual deviation; both are measured when the codes are made
(`codes.calibrate`). m and s are measured in every query, so an unusual query has its own.

How often is the answer wrong? One query in a million misses its best row, and one neighbour in ten
thousand is missing from the others: an estimate, not a proof, as it takes the far tail of the errors
to be normal after widening. What is missed is then better by a hair. docs/search.md says what was
measured. A query that would need too many rows is handed to exact search instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import codes as coding
from . import exact

MISS_BEST = 1e-6  # rows expected to be closer than the best that was found
MISS_SHARE = 1e-4  # of the k rows of an answer, how many are expected to be missing
GROWTH = 4  # of the scan where its rows did not suffice
SHARE = 32  # more than 1/32 of the rows: read all of them instead
BATCH = 64  # queries scanned at once


@dataclass(frozen=True)
class Part:
    """The rows of one index: `start` is the id of its first. Without codes all of them are measured."""

    start: int
    count: int
    codes: coding.Codes | None

    @classmethod
    def open(cls, index: Any, rows: Any, scale: int, start: int, cosine: bool) -> Part:
        """From the cache of the index, or made now."""
        count = rows.shape[0]
        if count <= coding.SCAN:
            return cls(start, count, None)
        key = index.rows_key(scale) if hasattr(index, "rows_key") else getattr(index, "hash", None)
        cache = getattr(index, "cache", None)
        return cls(start, count, coding.open_codes(cache, key, scale, rows, cosine))

    def scan(self, queries: np.ndarray, amount: int) -> list[coding.Scanned]:
        """See `codes.Codes.scan`."""
        if self.codes is None:
            every = np.arange(self.count)
            return [coding.Scanned(np.zeros(self.count), every, -np.inf)] * len(queries)
        return self.codes.scan(queries, amount)


def nearest(
    queries: Tensor, parts: list[Part], rows: exact.Mapped, k: int, cosine: bool, hidden: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """As `exact.nearest`; `rows` are those of all parts together."""
    found = []
    for batch in queries.split(BATCH):
        asked = batch.cpu().numpy()
        scans = [part.scan(asked, coding.SCAN) for part in parts]
        for b, query in enumerate(batch):
            query = query.clone()
            candidates = _candidates(
                query, asked[b], [scan[b] for scan in scans], parts, rows, k, cosine, hidden
            )
            if candidates is None:
                found += exact.nearest(query[None], rows, k, cosine, hidden)
            else:
                near, ids = candidates
                found.append(exact.nearest_among(query, near, ids, k, cosine))
    return found


def _candidates(
    query: Tensor, asked: np.ndarray, scans: list[coding.Scanned], parts: list[Part],
    rows: exact.Mapped, k: int, cosine: bool, hidden: Tensor,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Rows (M, D) and ids (M,), ascending, that hold the k best; None where they are too many."""
    looked = _Looked(query, rows, cosine, hidden)
    for part, scan in zip(parts, scans, strict=True):
        amount = coding.SCAN
        before = looked.count
        while not looked.at(scan, part, k, before):
            amount *= GROWTH
            if amount > max(part.count // SHARE, GROWTH * coding.SCAN):
                return None
            scan = part.scan(asked[None], amount)[0]
    ids, order = torch.sort(torch.cat(looked.ids))
    return torch.cat(looked.near)[order], ids


class _Looked:
    """Rows read for one query, and how close they are."""

    def __init__(self, query: Tensor, rows: exact.Mapped, cosine: bool, hidden: Tensor) -> None:
        self._query, self._rows, self._cosine, self._hidden = query, rows, cosine, hidden
        empty = torch.empty(0, device=query.device)
        self.near: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.closeness = empty
        self.count = 0

    def at(self, scan: coding.Scanned, part: Part, k: int, before: int) -> bool:
        """Look at the rows of a scan of one part until no other can matter; False if they do not do.

        The first `count - before` of them, muted ones not counted, were looked at already.
        """
        ids = torch.from_numpy(scan.ids).to(self._query.device) + part.start
        scores = scan.scores
        if len(self._hidden):
            seen = ~torch.isin(ids, self._hidden)
            ids, scores = ids[seen], scores[seen.cpu().numpy()]
        done = self.count - before
        while True:
            if part.codes is not None and done and self._settled(scores, scan, part, k, done):
                return True
            if done == len(ids):
                return scan.rest == -np.inf
            upto = len(ids) if part.codes is None else max(coding.FIRST, 2 * k, 2 * done)
            self._read(ids[done:upto])
            done = min(upto, len(ids))

    def _read(self, ids: Tensor) -> None:
        near = self._rows.gather(ids)
        if self._cosine:
            squares = near.square().sum(1)
            close = exact.score(self._query[None], near, squares, True)[0]
        else:
            close = -(near - self._query).square().sum(1).sqrt()
        self.near.append(near)
        self.ids.append(ids)
        self.closeness = torch.cat([self.closeness, close])
        self.count += len(ids)

    def _settled(
        self, scores: np.ndarray, scan: coding.Scanned, part: Part, k: int, done: int
    ) -> bool:
        """The stopping rule, after the first `done` of the rows with estimates `scores`."""
        if self.count < k:
            return False
        errors = self.closeness[self.count - done :].cpu().double().numpy() - scores[:done]
        mean, deviation = coding.spread(errors, scores[:done])
        deviation = part.codes.tail * max(deviation, part.codes.floor)
        best = self.closeness.topk(k).values
        left = np.append(scores[done:], scan.rest)
        weights = np.append(np.ones(len(left) - 1), part.count - len(scan.ids))

        def missed(found: Tensor) -> float:
            return float(weights @ _beyond((float(found) - mean - left) / deviation))

        return missed(best[0]) <= MISS_BEST and missed(best[-1]) <= MISS_SHARE * k


def _beyond(z: np.ndarray) -> np.ndarray:
    """Q(z): how often a standard normal variable exceeds z."""
    return 0.5 * torch.special.erfc(torch.from_numpy(z / np.sqrt(2))).numpy()
