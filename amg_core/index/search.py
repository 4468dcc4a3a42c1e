"""Exact nearest rows, the same for a picture alone as for the same picture in a batch.

A matrix product over all rows gives approximate scores with a known error bound (Higham, *Accuracy
and Stability of Numerical Algorithms*, §3.1: |error| <= n·u·|x||y| for an inner product). Every row
that could be among the best within that bound is then measured directly, in blocks of one fixed
shape, and the best of those are returned. So the answer is a function of the query and the rows
alone: neither the batch, nor the chunking, nor TF32 can change it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AMGError
from .reader import Index

BLOCK = 128  # rows measured directly at once; fixed, because a sum's rounding depends on the shape
CHUNK_VALUES = 1 << 24  # values of a matrix that are widened to float32 at once (64 MiB)
FLOAT32_BYTES = 1 << 30  # rows up to this size rest in float32 on a CPU
UNIT = 2.0**-24  # unit roundoff of float32
TINY = 1e-12


@contextmanager
def plain_arithmetic(device: torch.device | str) -> Iterator[None]:
    """Ordinary tensors, no graph, no autocast, whatever the host has switched on around us."""
    kind = torch.device(device).type
    known = getattr(torch.amp, "is_autocast_available", lambda kind: kind in ("cpu", "cuda"))
    autocast = torch.autocast(kind, enabled=False) if known(kind) else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


@dataclass(frozen=True)
class _Rows:
    """Rows of one scale on the device: (N, D) float16 or float32, and (N,) their |x|²."""

    values: Tensor
    squares: Tensor
    longest: float  # max |x|


class Searcher:
    """Searches one index on one device. Rows of a scale are loaded at its first use.

    The tensors it holds and returns are ordinary ones (no inference tensors), so they may be used
    in a graph even if the search was called inside ``torch.inference_mode``. Safe to share between
    threads. Draws nothing from a random generator. Stays usable after the index is closed for the
    scales already loaded.
    """

    def __init__(self, index: Index, device: torch.device | str = "cpu") -> None:
        self.index = index
        self.device = torch.device(device)
        self._rows: dict[int, _Rows] = {}
        self._lock = threading.Lock()

    def nearest(self, query: Tensor, scale: int, k: int) -> tuple[Tensor, Tensor]:
        """The k' = min(k, N) nearest rows of each query.

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
            The query is not finite.
        """
        with plain_arithmetic(self.device):
            rows = self._load(scale)
            count, dim = rows.values.shape
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
            k = min(k, count)
            cosine = self.index.spec.metric == "cosine"
            if cosine and len(query):
                query = torch.stack([_unit(one.clone()) for one in query])
            closeness = _closeness(query, rows, cosine)
            margins = _margins(query, rows, cosine)
            found = [
                _best(query[b].clone(), rows, closeness[b], margins[b], k, cosine)
                for b in range(len(query))
            ]
            if not found:
                empty = torch.empty((0, k), device=self.device)
                return empty, empty.long()
            values, ids = zip(*found, strict=True)
            return torch.stack(values), torch.stack(ids)

    def rows(self, ids: Tensor, scale: int) -> Tensor:
        """Rows of any shape of ids: (…,) int64 -> (…, D) float32 on the device, as stored."""
        with plain_arithmetic(self.device):
            values = self._load(scale).values
            ids = torch.as_tensor(ids, device=self.device)
            return values[ids.reshape(-1)].float().reshape(*ids.shape, values.shape[1])

    def _load(self, scale: int) -> _Rows:
        with self._lock:
            if scale not in self._rows:
                self._rows[scale] = _to_device(self.index.rows(scale), self.device)
            return self._rows[scale]


def _to_device(stored, device: torch.device) -> _Rows:
    """Copy memory-mapped rows: float32 on a CPU (float16 products are slow) while they are few."""
    count, dim = stored.shape
    wide = device.type == "cpu" and count * dim * 4 <= FLOAT32_BYTES
    values = torch.empty(
        (count, dim), dtype=torch.float32 if wide else torch.float16, device=device
    )
    squares = torch.empty(count, device=device)
    step = _step(dim)
    for start in range(0, count, step):
        chunk = torch.tensor(stored[start : start + step]).to(device)
        values[start : start + step] = chunk
        squares[start : start + step] = chunk.float().square().sum(1)
    return _Rows(values, squares, float(squares.max().sqrt()))


def _step(dim: int) -> int:
    return max(1, CHUNK_VALUES // dim)


def _unit(vector: Tensor) -> Tensor:
    """(D,) scaled to length 1; a zero vector stays zero."""
    return vector / vector.norm().clamp_min(TINY)


def _closeness(query: Tensor, rows: _Rows, cosine: bool) -> Tensor:
    """(B, N), larger = closer, approximate: cosine, or 2 q·x - |x|² (= |q|² - distance²)."""
    step = _step(rows.values.shape[1])
    result = torch.empty((len(query), len(rows.values)), device=query.device)
    for start in range(0, len(rows.values), step):
        part = slice(start, start + step)
        product = (rows.values[part].float() @ query.T).T
        if cosine:
            result[:, part] = product / rows.squares[part].sqrt().clamp_min(TINY)
        else:
            result[:, part] = 2 * product - rows.squares[part]
    return result


def _margins(query: Tensor, rows: _Rows, cosine: bool) -> list[float]:
    """How far `_closeness` of a row that belongs among the best may fall behind, for each query.

    Twice the error of two scores: that of the product and that of the direct measurement.
    """
    error = (query.shape[1] + 8) * UNIT + 2 * _input_rounding(query.device)
    if cosine:
        return [4 * error] * len(query)
    return [4 * error * (rows.longest + length) ** 2 for length in query.norm(dim=1).tolist()]


def _input_rounding(device: torch.device) -> float:
    """Relative rounding of the inputs of a float32 matrix product as the host has set it."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the host mixes the old and the new setting
        precision = "medium"
    if device.type not in ("cpu", "cuda") and precision == "highest":
        precision = "high"  # not promised elsewhere
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)  # none, TF32, bfloat16


def _best(
    query: Tensor, rows: _Rows, closeness: Tensor, margin: float, k: int, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Values (k,) and ids (k,) for one query (D,)."""
    bound = closeness.topk(k, sorted=False).values.min() - margin
    ids = torch.nonzero(closeness >= bound).squeeze(1)  # ascending
    values = _measure(query, rows, ids, cosine)
    values, order = torch.sort(values, descending=cosine, stable=True)
    return values[:k], ids[order[:k]]


def _measure(query: Tensor, rows: _Rows, ids: Tensor, cosine: bool) -> Tensor:
    """Cosine or distance of each row of `ids`, (M,), in blocks of BLOCK rows whatever M is."""
    padded = torch.cat([ids, ids.new_zeros(-len(ids) % BLOCK)])
    values = []
    for block in padded.split(BLOCK):
        near = rows.values[block].float()
        if cosine:
            length = near.square().sum(1).sqrt().clamp_min(TINY)
            values.append(((near * query).sum(1) / length).clamp(-1, 1))
        else:
            values.append((near - query).square().sum(1).sqrt())
    return torch.cat(values)[: len(ids)]
