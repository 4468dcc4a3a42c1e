"""Finds the pairs of rows of an index that are more alike than a threshold, in blocks.

Up to `EXHAUSTIVE` rows every row is compared with every other. Larger sets are divided into cells first, as
in an inverted file (Jégou, Douze, Schmid, *Product Quantization for Nearest Neighbor Search*, TPAMI 2011,
§IV): each row lives in the cell of its nearest centre, and is compared with the rows that live in the
`VISITED` cells nearest to it. Two rows that are very alike lie in the same cell or in neighbouring ones, so
few pairs are lost (docs/dedup.md), and the work grows as N·√N instead of N².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from amg_core.similarity.metrics import GAIN, OFFSET

if TYPE_CHECKING:
    from .terminal import Progress

BLOCK = 2048  # rows compared with as many others at once
FLAT = 1.0  # lower limit for the contrast ‖x − mean‖ of a picture
EXHAUSTIVE = 50_000  # rows up to which every pair is compared
VISITED = 8  # cells that each row is compared with
SAMPLED = 32  # rows for each cell, from which its centre is learnt
ROUNDS = 4  # of k-means
MOST_PAIRS, FEW = 1 << 24, 64  # pairs in memory, and those of a row that stay if there are more

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


class Stored(Protocol):
    """Stored rows (N, D) of any float type: `shard.Rows`, or an array."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __getitem__(self, key: slice | np.ndarray, /) -> np.ndarray: ...


def pairs(
    rows: Stored,
    metric: str,
    scale: int,
    threshold: float,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    exhaustive: bool | None = None,
) -> Iterator[Pairs]:
    """Find the pairs of rows more similar than `threshold`, each pair once.

    The memory does not grow with the number of pairs. Values for "nl2" are accurate to about 0.002
    (float32, the difference of large squares).

    Parameters
    ----------
    rows : (N, D) float16, sliceable (`Index.rows`)
    metric : "cosine" (similarity = cosine) or "nl2" (see `mirrored_too`)
    scale : side of the rows; for "nl2" they are D / scale² channels
    exhaustive : compare every row with every other, default: up to EXHAUSTIVE rows

    Yields
    ------
    (a, b, similarity) : ids with a < b, int64, and float32, of one block each.
    """
    if exhaustive is None:
        exhaustive = rows.shape[0] <= EXHAUSTIVE
    compare = COMPARE[metric]
    with torch.inference_mode():
        found = _all_blocks(rows.shape[0]) if exhaustive else _cells(rows, metric, scale, device)
        for block in found:
            first = prepared(rows[block.own], metric, scale, device)
            second = prepared(rows[block.other], metric, scale, device)
            similarity = compare(first, second)
            i, j = (at.cpu().numpy() for at in (similarity > threshold).nonzero(as_tuple=True))
            values = similarity[i, j].cpu().numpy()
            a, b = numbers(block.own)[i], numbers(block.other)[j]
            kept = block.once(a, b)
            if progress:
                progress(block.done, block.total, "")
            if kept.any():
                a, b = a[kept], b[kept]
                yield np.minimum(a, b), np.maximum(a, b), values[kept]


def strongest(found: Iterable[Pairs]) -> Pairs:
    """All pairs together; if they are more than MOST_PAIRS, the FEW most similar ones of each row.

    So a set in which everything is alike needs no more memory than another one.
    """
    parts: list[Pairs] = []
    count = 0
    for part in found:
        parts.append(part)
        count += len(part[0])
        if count > MOST_PAIRS:
            parts = [_pruned(*_joined(parts))]
            count = len(parts[0][0])
    return _joined(parts)


def _joined(parts: list[Pairs]) -> Pairs:
    empty = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    a, b, similarity = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    return a, b, similarity


def _pruned(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> Pairs:
    kept = np.zeros(len(a), bool)
    for ends in (a, b):
        order = np.lexsort((-similarity, ends))
        starts = np.flatnonzero(np.diff(ends[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        rank = np.arange(len(order)) - np.repeat(starts, sizes)
        kept[order[rank < FEW]] = True
    return a[kept], b[kept], similarity[kept]


Part = slice | np.ndarray  # rows, by place or by number


@dataclass(frozen=True)
class _Block:
    """Two groups of rows to compare. `once` says which of the pairs found here no other block reports."""

    done: int
    total: int
    own: Part
    other: Part
    once: Callable[[np.ndarray, np.ndarray], np.ndarray]


def numbers(part: Part) -> np.ndarray:
    return np.arange(part.start, part.stop) if isinstance(part, slice) else part


def _all_blocks(count: int) -> Iterator[_Block]:
    """Every block of the upper triangle."""
    parts = [slice(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
    total, done = len(parts) * (len(parts) + 1) // 2, 0
    for i, own in enumerate(parts):
        for other in parts[i:]:
            done += 1
            yield _Block(done, total, own, other, np.less)


def _cells(rows: Stored, metric: str, scale: int, device: torch.device | str) -> Iterator[_Block]:
    """For each cell the rows that live there, with the rows that visit it."""
    centres = _centres(rows, metric, scale, device)
    visited = _visited(rows, centres, metric, scale, device)
    home = visited[:, 0]

    def once(own: np.ndarray, guest: np.ndarray) -> np.ndarray:
        """Of two rows that visit each other, the pair is reported at the home of the lower number."""
        visits: np.ndarray = (visited[own] == home[guest][:, None]).any(1)
        first: np.ndarray = (own < guest) | ((own > guest) & ~visits)
        return first

    live, guest = _sorted(home[:, None], len(centres)), _sorted(visited, len(centres))
    for cell in range(len(centres)):
        own, other = live(cell), guest(cell)
        for i in range(0, len(own), BLOCK):
            for j in range(0, len(other), BLOCK):
                yield _Block(cell + 1, len(centres), own[i : i + BLOCK], other[j : j + BLOCK], once)


def _sorted(cells: np.ndarray, count: int) -> Callable[[int], np.ndarray]:
    """A function from a cell to the rows that have it in `cells` (N, V). −1 is no cell."""
    flat = cells.ravel()
    order = np.argsort(flat, kind="stable")
    ends = np.searchsorted(flat[order], np.arange(count + 1))
    order //= cells.shape[1]
    return lambda cell: order[ends[cell] : ends[cell + 1]]


def _centres(rows: Stored, metric: str, scale: int, device: torch.device | str) -> Tensor:
    """Directions (C, D) of norm 1 of the cells, by k-means on the sphere from a sample of the rows."""
    count = rows.shape[0]
    cells = max(1, min(count, round(math.sqrt(VISITED * count))))
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, min(count, SAMPLED * cells), replace=False))
    sample = _directions(rows[chosen], metric, scale, device)
    centres = sample[torch.from_numpy(rng.permutation(len(sample))[:cells])]
    for _ in range(ROUNDS):
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in torch.split(sample, BLOCK)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        used = torch.bincount(nearest, minlength=cells)[:, None] > 0
        centres = torch.where(used, nn.functional.normalize(sums), centres)
    return centres


def _visited(
    rows: Stored, centres: Tensor, metric: str, scale: int, device: torch.device | str
) -> np.ndarray:
    """The cells (N, V) int32 that each row visits, its home first. −1 stands for a repetition.

    A row of pixels visits the cells of its mirror image, too (`mirrored_too`).
    """
    most = min(VISITED, len(centres))
    views = 1 if metric == "cosine" else 2
    visited = np.empty((rows.shape[0], views * most), np.int32)
    for start in range(0, len(visited), BLOCK):
        part = slice(start, min(start + BLOCK, len(visited)))
        for view in range(views):
            near = _directions(rows[part], metric, scale, device, bool(view)) @ centres.T
            found = near.topk(most).indices.cpu().numpy()
            if view:
                again = (found[:, :, None] == visited[part, None, :most]).any(2)
                found = np.where(again, -1, found)
            visited[part, view * most : (view + 1) * most] = found
    return visited


def _directions(
    rows: np.ndarray, metric: str, scale: int, device: torch.device | str, mirror: bool = False
) -> Tensor:
    """Rows (M, D) of norm 1 whose inner product is large where the similarity is."""
    block = prepared(rows, metric, scale, device)
    if metric == "cosine":
        return block
    block = block - block.mean(2, keepdim=True)
    if mirror:
        block = mirrored(block)
    return nn.functional.normalize(block.flatten(1))


def prepared(rows: np.ndarray, metric: str, scale: int, device: torch.device | str) -> Tensor:
    """Rows of norm 1, (M, D), or for nl2 (M, C, P): C channels of P = scale² values. Float32."""
    block = torch.from_numpy(np.asarray(rows, np.float32)).to(device)
    if metric == "cosine":
        return nn.functional.normalize(block)
    return block.reshape(len(block), -1, scale * scale)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def likeness_of_pictures(a: Tensor, b: Tensor) -> Tensor:
    """How much structure small pictures have in common: (A, C, P), (B, C, P) -> (A, B).

    1 − ‖m(a) − b‖ / ‖b − b̄‖, the smaller value of both directions. m applies the best gain (½ to 2) and
    offset (±0.25) to each channel, as `metrics.matched`, and b̄ are the means of the channels. 1 is the
    same picture apart from contrast, brightness and tint, and 0 is nothing in common. Unlike nL2 (Eq. 8)
    it does not depend on the other pictures: with fifty duplicates the denominator of Eq. 8 would vanish.
    """
    a_mean, b_mean = a.mean(2), b.mean(2)
    a_part, b_part = a - a_mean[..., None], b - b_mean[..., None]
    a_power, b_power = a_part.square().sum(2), b_part.square().sum(2)
    there = torch.zeros(len(a), len(b), device=a.device)
    back = torch.zeros_like(there)
    for c in range(a.shape[1]):
        product = a_part[:, c] @ b_part[:, c].T
        shift = (a_mean[:, None, c] - b_mean[None, :, c]).abs()
        level = a.shape[2] * (shift - OFFSET).clamp_min(0).square()
        there += _left_over(product, a_power[:, None, c], b_power[None, :, c]) + level
        back += _left_over(product, b_power[None, :, c], a_power[:, None, c]) + level
    a_size = a_power.sum(1).clamp_min(FLAT**2)
    b_size = b_power.sum(1).clamp_min(FLAT**2)
    worse = torch.maximum(there / b_size[None, :], back / a_size[:, None])
    return 1 - worse.clamp_min(0).sqrt()


def mirrored_too(a: Tensor, b: Tensor) -> Tensor:
    """`likeness_of_pictures` of a to b or to b's mirror image, whichever is larger. Square pictures."""
    return torch.maximum(likeness_of_pictures(a, b), likeness_of_pictures(a, mirrored(b)))


def mirrored(pictures: Tensor) -> Tensor:
    """Square pictures (M, C, P), each mirrored."""
    side = math.isqrt(pictures.shape[2])
    return pictures.reshape(*pictures.shape[:2], side, side).flip(-1).flatten(2)


# A network such as SSCD recognises mirrored pictures itself.
COMPARE = {"cosine": _cosine, "nl2": mirrored_too}


def _left_over(product: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """min over the gain g of ‖g·x − y‖² from x·y, ‖x‖², ‖y‖²."""
    gain = (product / own.clamp_min(1e-6)).clamp(*GAIN)
    return gain.square() * own - 2 * gain * product + other
