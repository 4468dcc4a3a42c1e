"""Exact search for the nearest rows, with the same result for a picture alone and in a batch.

A matrix product over all rows gives approximate scores with a known error bound (Higham, *Accuracy
and Stability of Numerical Algorithms*, §3.1: |error| <= n·u·|x||y| for an inner product). Every row
that could be among the best within that bound is then measured directly, in blocks of one fixed
shape, and the best of those are returned. So the result depends only on the query and the rows, and not
on the batch, the chunks or TF32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..threads import one_thread

BLOCK = 128  # rows measured directly at once; fixed, because rounding depends on the shape
CHUNK_VALUES = 1 << 20  # values converted to float32 at once: 4 MiB fit the cache of a core
GPU_CHUNK_VALUES = 1 << 24
SCORES = 1 << 26  # approximate scores in memory at once (256 MiB)
FLOAT32_BYTES = 1 << 30  # rows up to this size are kept in float32 on a CPU
GPU_FRACTION = 0.25  # largest share of a device's free memory for the rows of one scale
GPU_BYTES = 1 << 30  # the same in bytes, if the device does not report its free memory
UNIT = 2.0**-24  # unit roundoff of float32
TINY = 1e-12
SMALL = 1 << 26  # values of all rows, times queries, that one core multiplies


class Stored(Protocol):
    """Stored rows (N, D) of any float type: `shard.Rows`, or an array."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __getitem__(self, key: slice | np.ndarray, /) -> np.ndarray: ...


class Resident:
    """Rows (N, D) copied to the device once: float32 on a CPU, float16 elsewhere."""

    def __init__(self, stored: Stored, device: torch.device) -> None:
        self.shape, self.device = stored.shape, device
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.values = torch.empty(stored.shape, dtype=dtype, device=device)
        self.squares = torch.empty(len(self.values), device=device)  # |x|²
        for part, chunk in _chunks(stored, device):
            self.values[part] = chunk
            self.squares[part] = chunk.square().sum(1)

    def gather(self, ids: Tensor) -> Tensor:
        """(M,) int64 -> (M, D) float32 on the device."""
        return self.values[ids].float()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which rows, their values in float32, their |x|²)."""
        step = _step(self.shape[1], self.device)
        for start in range(0, self.shape[0], step):
            part = slice(start, start + step)
            yield part, self.values[part].float(), self.squares[part]


class Mapped:
    """Rows (N, D) that stay in their file. Only the rows in use are copied to the device."""

    def __init__(self, stored: Stored, device: torch.device) -> None:
        self.shape, self.device, self._stored = stored.shape, device, stored

    def gather(self, ids: Tensor) -> Tensor:
        """(M,) int64 -> (M, D) float32 on the device."""
        picked = np.asarray(self._stored[ids.cpu().numpy()])
        return torch.from_numpy(picked).to(self.device).float()

    def read(self, ids: np.ndarray) -> np.ndarray:
        """(M,) int64 -> (M, D) float32 in memory."""
        return torch.from_numpy(np.asarray(self._stored[ids])).float().numpy()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which rows, their values in float32, their |x|²)."""
        for part, chunk in _chunks(self._stored, self.device):
            yield part, chunk, chunk.square().sum(1)


Rows = Resident | Mapped
Gather = Callable[[Tensor], Tensor]  # (M,) int64 -> (M, D) float32 on the same device


def fits(shape: Sequence[int], device: torch.device) -> bool:
    """Whether rows of this shape may be kept on the device."""
    values = math.prod(shape)
    if device.type == "cpu":
        return 4 * values <= FLOAT32_BYTES
    if device.type == "cuda":
        return 2 * values <= GPU_FRACTION * torch.cuda.mem_get_info(device)[0]
    return 2 * values <= GPU_BYTES


def place(stored: Stored, device: torch.device) -> Rows:
    """The rows copied to the device if they fit, or else read from their file in chunks."""
    return (Resident if fits(stored.shape, device) else Mapped)(stored, device)


def nearest(
    queries: Tensor, rows: Rows, k: int, cosine: bool, hidden: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The k best rows of each query.

    Parameters
    ----------
    queries : Tensor (B, D) float32
        On the device of `rows`. For `cosine` they have norm 1, or are zero.
    k : int
        At most the number of rows that are not hidden.
    cosine : bool
        Whether rows are compared by the cosine. Otherwise it is the Euclidean distance.
    hidden : Tensor (H,) int64
        Ids that are never returned.

    Returns
    -------
    For each query the values (k,), best first, and the ids (k,).
    """
    found = []
    for batch in torch.split(queries, max(1, SCORES // rows.shape[0])):
        small = len(batch) * math.prod(rows.shape) <= SMALL
        with one_thread() if small else nullcontext():
            score, longest = _scores(batch, rows, cosine)
        score[:, hidden] = -torch.inf
        for query, close in zip(batch, score, strict=True):
            query = query.clone()
            ids = _contenders(close, margin(query, longest, cosine), k)
            values, order = best(query, rows.gather, ids, k, cosine)
            found.append((values, ids[order]))
    return found


def unit(vector: Tensor) -> Tensor:
    """A vector (D,) scaled to norm 1. A zero vector stays zero."""
    length: Tensor = vector.norm().clamp_min(TINY)
    return vector / length


def score(queries: Tensor, near: Tensor, squares: Tensor, cosine: bool) -> Tensor:
    """Approximate scores (B, M), larger = closer: cosine, or 2 q·x - |x|² (= |q|² - distance²)."""
    product: Tensor = (near @ queries.T).T
    return product / squares.sqrt().clamp_min(TINY) if cosine else 2 * product - squares


def margin(query: Tensor, longest: float, cosine: bool) -> float:
    """By how much the approximate `score` of one of the best rows can be too low.

    It is twice the error of two scores: of the product, and of the direct measurement. `longest` is the
    largest |x|.
    """
    error = (len(query) + 8) * UNIT + 2 * _input_rounding(query.device)
    return 4 * error * (1 if cosine else (longest + float(query.norm())) ** 2)


def measure(query: Tensor, near: Tensor, cosine: bool) -> Tensor:
    """Cosine or distance of BLOCK rows, measured directly: (BLOCK, D) -> (BLOCK,) float32."""
    if cosine:
        length = near.square().sum(1).sqrt().clamp_min(TINY)
        cosines: Tensor = (near * query).sum(1) / length
        return cosines.clamp(-1, 1)
    return (near - query).square().sum(1).sqrt()


@one_thread()
def best(query: Tensor, gather: Gather, ids: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """Values and positions of the k best of the rows `ids` (M,), measured in blocks of BLOCK rows.

    Equal values keep their order.
    """
    padded = torch.cat([ids, ids[:1].expand(-len(ids) % BLOCK)])
    blocks = [measure(query, gather(block), cosine) for block in torch.split(padded, BLOCK)]
    values, order = torch.sort(torch.cat(blocks)[: len(ids)], descending=cosine, stable=True)
    return values[:k], order[:k]


def _contenders(close: Tensor, margin: float, k: int) -> Tensor:
    """Ascending positions of all approximate scores (M,) that could belong to the k best rows."""
    bound = close.topk(k, sorted=False).values.min() - margin
    return torch.nonzero(close >= bound).squeeze(1)


def _scores(queries: Tensor, rows: Rows, cosine: bool) -> tuple[Tensor, float]:
    """`score` of all rows, (B, N), and the largest |x|."""
    result = torch.empty((len(queries), rows.shape[0]), device=queries.device)
    longest = torch.zeros((), device=queries.device)
    for part, chunk, squares in rows.chunks():
        result[:, part] = score(queries, chunk, squares, cosine)
        longest = torch.maximum(longest, squares.max())
    return result, float(longest.sqrt())


def _chunks(stored: Stored, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Stored rows from first to last, in float32 on the device."""
    step = _step(stored.shape[1], device)
    for start in range(0, stored.shape[0], step):
        part = slice(start, start + step)
        yield part, torch.tensor(np.asarray(stored[part])).to(device).float()


def _step(dim: int, device: torch.device) -> int:
    return max(1, (CHUNK_VALUES if device.type == "cpu" else GPU_CHUNK_VALUES) // dim)


def _input_rounding(device: torch.device) -> float:
    """Relative rounding of the inputs of a float32 matrix product with the host's settings."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the host mixes the old and the new setting
        precision = "medium"
    if device.type not in ("cpu", "cuda") and precision == "highest":
        precision = "high"  # other devices do not promise full precision
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)  # none, TF32, bfloat16
