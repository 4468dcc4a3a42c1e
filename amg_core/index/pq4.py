"""Search by 4-bit codes, followed by exact measurement of every row that could matter.

All codes are scanned (`codes`). There is no inverted list and no graph that could miss a row. The rows
with the best estimates are then read from their file and measured by the function of exact search
(`exact.measure`), best estimate first, until the remaining rows are not expected to change the answer.
Let m and s be the mean and the deviation of (true similarity - estimate) over the rows just measured
(`codes.spread`), e_i the estimates of the rows not measured, and Q the tail of the normal distribution.
Then the number of these that are closer than some v is at most about

    missed(v) = Σ_i Q((v - m - e_i) / (tail · max(s, floor)))

(a union bound; `_unseen` extrapolates the number of rows beyond the scan). Rows are measured until
missed(v1) <= MISS_BEST for the best similarity v1 found and missed(vk) <= MISS_SHARE · k for the k-th.
`tail` >= 1 widens the deviation where the errors of this index have heavier tails than the normal
distribution, and `floor` is the usual deviation; both are measured when the codes are made
(`codes.calibrate`). m and s are measured in every query, so an unusual query has its own.

How often is the answer wrong? At most one query in 100,000 misses its best row, and at most one
in a hundred of the k rows is missing. This is an estimate, not a proof, because it assumes a normal far
tail of the errors after widening. A missed row is only slightly closer than those found. The sum is a
loose bound: docs/search.md has measurements. A query that would need too many rows goes to exact search
instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import codes as coding
from . import exact

if TYPE_CHECKING:
    from .reader import Index

MISS_BEST = 1e-5  # expected number of rows closer than the best that was found
TRUST = 1000  # largest factor by which an extrapolated number may be below its bound
MISS_SHARE = 1e-2  # expected share of missing rows among the k rows of an answer
GROWTH = 4  # growth of a scan whose rows were not enough
WIDE = 400  # a first scan returns 1/400 of the rows, but at least SCAN
SHARE = 32  # a scan for more than 1/32 of the rows is slower than reading all of them
BATCH = 64  # queries scanned at once


@dataclass(frozen=True)
class Part:
    """The rows of one index, of which `start` is the first id. Without codes all are measured."""

    start: int
    count: int
    codes: coding.Codes | None

    @classmethod
    def open(cls, index: Index, rows: exact.Stored, scale: int, start: int, cosine: bool) -> Part:
        """A part with codes from the cache of the index, or made now."""
        count = rows.shape[0]
        if count <= coding.SCAN:
            return cls(start, count, None)
        key = index.rows_key(scale) if hasattr(index, "rows_key") else getattr(index, "hash", None)
        cache = getattr(index, "cache", None)
        return cls(start, count, coding.open_codes(cache, key, scale, rows, cosine))

    @property
    def first(self) -> int:
        """The number of rows of a first scan. More of them cost little, but a second scan costs a scan."""
        return max(coding.SCAN, self.count // WIDE)

    def scan(self, queries: np.ndarray, amount: int) -> list[coding.Scanned]:
        """See `codes.Codes.scan`."""
        if self.codes is None:
            every = np.arange(self.count)
            return [coding.Scanned(np.zeros(self.count), every, -np.inf)] * len(queries)
        return self.codes.scan(queries, amount)


def nearest(
    queries: Tensor, parts: list[Part], rows: exact.Mapped, k: int, cosine: bool, hidden: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The same as `exact.nearest`, by codes. `rows` are those of all parts together."""
    concealed = hidden.cpu().numpy()
    found = []
    for batch in torch.split(queries, BATCH):
        asked = batch.cpu().numpy()
        scans = [part.scan(asked, part.first) for part in parts]
        for b, query in enumerate(batch):
            looked = _Seen(asked[b], rows, cosine, concealed)
            own = [scan[b] for scan in scans]
            if all(looked.enough(part, scan, k) for part, scan in zip(parts, own, strict=True)):
                ids = torch.from_numpy(looked.contenders(k)).to(query.device)
                values, order = exact.best(query.clone(), rows.gather, ids, k, cosine)
                found.append((values, ids[order]))
            else:
                found += exact.nearest(query[None], rows, k, cosine, hidden)
    return found


class _Seen:
    """The rows read for one query (D,), and their similarity: the cosine, or minus the distance."""

    def __init__(
        self, query: np.ndarray, rows: exact.Mapped, cosine: bool, hidden: np.ndarray
    ) -> None:
        self._query, self._rows, self._cosine, self._hidden = query, rows, cosine, hidden
        self.ids = np.empty(0, np.int64)
        self.score = np.empty(0, np.float32)

    def enough(self, part: Part, scan: coding.Scanned, k: int) -> bool:
        """Measure more and more rows of a part until no other can matter. False if they are too many."""
        before, amount = len(self.ids), part.first
        while not self._within(part, scan, k, before):
            amount *= GROWTH
            if amount > max(part.count // SHARE, GROWTH * part.first):
                return False
            (scan,) = part.scan(self._query[None], amount)
        return True

    def contenders(self, k: int) -> np.ndarray:
        """Ascending ids of all measured rows that could be among the k best.

        Each similarity has the rounding error of a sum of D terms, and so has that of `exact.best`.
        """
        last = np.partition(self.score, -k)[-k]
        error = 4 * (len(self._query) + 8) * exact.UNIT * (1 if self._cosine else abs(last))
        return np.sort(self.ids[self.score >= last - error])

    def _within(self, part: Part, scan: coding.Scanned, k: int, before: int) -> bool:
        """`enough` for the rows of one scan. Its first `before` rows have been measured already."""
        ids, scores = scan.ids + part.start, scan.scores
        if len(self._hidden):
            seen = ~np.isin(ids, self._hidden)
            ids, scores = ids[seen], scores[seen]
        if part.codes is None:
            self._look(ids)
            return True
        while True:
            done = len(self.ids) - before
            if done and self._settled(part.codes, scan, scores, k, done):
                return True
            if done == len(ids):
                return scan.rest == -np.inf
            self._look(ids[done : max(coding.FIRST, 2 * k, 2 * done)])

    def _look(self, ids: np.ndarray) -> None:
        near = self._rows.read(ids)
        if self._cosine:
            lengths = np.sqrt(np.einsum("nd,nd->n", near, near))
            close = np.einsum("nd,d->n", near, self._query) / np.maximum(lengths, exact.TINY)
        else:
            near -= self._query
            close = -np.sqrt(np.einsum("nd,nd->n", near, near))
        self.ids = np.append(self.ids, ids)
        self.score = np.append(self.score, close)

    def _settled(
        self, codes: coding.Codes, scan: coding.Scanned, scores: np.ndarray, k: int, done: int
    ) -> bool:
        """The stopping rule after the first `done` rows of those with estimates `scores`."""
        if len(self.score) < k:
            return False
        mean, deviation = coding.spread(self.score[-done:] - scores[:done])
        deviation = codes.tail * max(deviation, codes.floor)
        left = torch.from_numpy(scores[done:])
        unseen = codes.count - len(scan.ids)

        def missed(value: np.float32) -> float:
            near = _beyond((float(value) - mean - left.double()) / deviation).sum()
            return float(near) + _unseen(scan, unseen, float(value) - mean, deviation)

        last = np.partition(self.score, -k)[-k]
        return missed(last) <= MISS_SHARE * k and missed(self.score.max()) <= MISS_BEST


def _unseen(scan: coding.Scanned, count: int, value: float, deviation: float) -> float:
    """The expected number, of `count` rows beyond a scan, that are closer than `value`.

    The number of rows is assumed to grow by a factor e for every τ of estimate, as in the last three
    quarters of the scan. ∫ n/τ exp(x/τ) Q(a + x/s) dx has a closed form. The result is at most a factor
    TRUST below the bound count · Q(a).
    """
    if not count:
        return 0.0
    a = (value - scan.rest) / deviation
    bound = count * float(_beyond(a))
    n = len(scan.scores)
    if n < 4 * coding.LEAST or bound == 0 or not np.isfinite(a):
        return bound
    growth = deviation * np.log(4) / max(float(scan.scores[n // 4]) - scan.rest, coding.TINY)
    growth = min(growth, 1e3)  # for equal estimates, a limit that float64 can represent
    lift = min(growth * growth / 2 - a * growth, 700.0)
    total = n * (float(np.exp(lift)) * float(_beyond(a - growth)) - float(_beyond(a)))
    return min(bound, max(total, bound / TRUST))


def _beyond(z: Tensor | float) -> Tensor:
    """Q(z): the probability that a standard normal variable exceeds z."""
    tail: Tensor = torch.special.erfc(torch.as_tensor(z, dtype=torch.float64) / 2**0.5)
    return 0.5 * tail
