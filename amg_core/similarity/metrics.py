"""Comparison of two embeddings: the similarity σ_t of the papers. Larger = closer."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.5  # Carlini et al. 2023, used by AMG Eq. 8
NEIGHBORS = 50  # k of the denominator; the guard compares as many rows
FLAT = {
    3: 0.01
}  # deviation of each channel below which a row is one flat tone, by number of channels
FLAT_LATENT = 0.04  # the same for latents, which have unit deviation
GAIN, OFFSET = (0.5, 2.0), 0.25  # how far contrast and brightness may be matched
LATENT_OFFSET = 1.0  # the same for latents, in units of their deviation (about 1 in every family)
COPY = 0.4  # likeness above which a picture is called a copy
PERFECT = {"cosine": 1.0, "nl2": 0.0}  # similarity of a picture with itself
NOTHING = -2.0  # −nL2 of pictures that have nothing in common; the least that Eq. 8 can give
PUBLISHED_COPY = -1.4  # −nL2 of Eq. 8 above which the AMG paper (§6.1) calls a picture memorised


def nl2(query: Tensor, neighbor: Tensor, spread: Tensor) -> Tensor:
    """Normalised L2 (AMG Eq. 8): ‖q − n‖ / (α · spread). Smaller = closer.

    Parameters
    ----------
    query, neighbor : Tensor (B, D)
    spread : Tensor (B,)
        In the paper mean_k ‖q − z_k‖, the mean distance of the query to its k nearest rows, held
        constant. The guard uses the neighbour's `structure` instead: the paper's mean shrinks with every
        near-duplicate in the index, and distances between smooth pictures are all small.

    Returns
    -------
    Tensor (B,)
        0 for an exact copy, about 2 for a query with nothing of the neighbour.
    """
    distance: Tensor = (query - neighbor).norm(dim=1)
    return distance / (ALPHA * spread)


def structure(rows: Tensor, channels: int = 3) -> Tensor:
    """‖row − means of its channels‖, the distance of each picture from one flat tone: (K, D) -> (K,)."""
    parts = rows.reshape(len(rows), channels, -1)
    distance: Tensor = (parts - parts.mean(dim=2, keepdim=True)).flatten(1).norm(dim=1)
    return distance


def is_flat(rows: Tensor, channels: int = 3) -> Tensor:
    """Which rows (K, D) are nearly one flat tone, so that nothing can be recognised: (K,) bool."""
    least: float = FLAT.get(channels, FLAT_LATENT) * rows.shape[1] ** 0.5
    return structure(rows, channels) < least


def matched(query: Tensor, neighbors: Tensor, channels: int = 3, offset: float = OFFSET) -> Tensor:
    """`query`, fitted to each neighbour by contrast, brightness and tint.

    By Eq. 8 a darker copy is no copy, and the overshoot of classifier-free guidance changes every early
    copy in this way. So nL2 is computed after the best gain (½ to 2) and offset (±0.25; latents: ±1) of
    each channel. Both are constant for gradients, which then follow structure only.

    Parameters
    ----------
    query, neighbors : Tensor (D,), (K, D)
        Rows of equal blocks for each channel: pictures in [0, 1], or latents of about unit variance.

    Returns
    -------
    Tensor (K, D)
    """
    q, q_mean, gain, shift = _match(query, neighbors, channels, offset)
    return ((q - q_mean) * gain + q_mean + shift).flatten(1)


def _match(query: Tensor, neighbors: Tensor, channels: int, offset: float) -> tuple[Tensor, ...]:
    """The query (1, C, D/C), its channel means, and the best gain and offset a neighbour, (K, C, 1)."""
    q, n = query.reshape(1, channels, -1), neighbors.reshape(len(neighbors), channels, -1)
    q_mean, n_mean = q.mean(dim=2, keepdim=True), n.mean(dim=2, keepdim=True)
    q_part, n_part = (q - q_mean).detach(), n - n_mean
    power = q_part.square().sum(dim=2, keepdim=True).clamp_min(1e-6)
    gain = ((q_part * n_part).sum(dim=2, keepdim=True) / power).clamp(*GAIN)
    shift = (n_mean - q_mean).detach().clamp(-offset, offset)
    return q, q_mean, gain, shift


def similarity(
    metric: str,
    query: Tensor,
    neighbor: Tensor,
    spread: Tensor,
    channels: int = 3,
    offset: float = OFFSET,
) -> Tensor:
    """σ_t (1,): the cosine of unit rows (Eq. 9), or −nL2 (Eq. 8) of the `matched` query.

    `query` and `neighbor` are (1, D), `spread` is (1,). Differentiable in `query`.
    """
    if metric == "cosine":
        return (query * neighbor).sum(dim=1)
    if metric == "nl2":
        return -nl2(matched(query[0], neighbor, channels, offset), neighbor, spread)
    raise ValueError(f"unknown metric {metric!r}")


def nl2_gradient(
    query: Tensor, neighbor: Tensor, spread: Tensor, channels: int, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradient of `similarity("nl2", …)` in the query (1, D) in closed form, and the similarity (1,).

    With constant gain g and offset o, the matched query is g·(q − q̄) + q̄ + o in each channel. So, with
    the unit vector u from the neighbour to the matched query, the gradient is
    −(g·(u − ū) + ū)/(α·spread), or 0 if both are equal. `query` and `neighbor` are (1, D), `spread` (1,).
    """
    q, q_mean, gain, shift = _match(query[0], neighbor, channels, offset)
    left = (q - q_mean) * gain + q_mean + shift - neighbor.reshape(q.shape)
    distance = left.norm()
    unit = left / distance.clamp_min(1e-12)
    mean = unit.mean(dim=2, keepdim=True)
    gradient = (gain * (unit - mean) + mean) / (ALPHA * spread)
    return -gradient.flatten(1), -distance / (ALPHA * spread)


def score(metric: str, value: Tensor, typical: Tensor, limit: Tensor) -> Tensor:
    """The score: calibrated similarity, on one scale for every descriptor, index and size. (B,) -> (B,).

    0 is `typical`, which pictures that are not in the index usually reach. COPY is `limit`, which few of
    them reach: `limits` says how many. 1 is the same picture. In between it is linear. `typical` and
    `limit` (B,) are in the unit of `value`. Thresholds use this scale, because the zero of a cosine
    has no meaning.
    """
    below = COPY * (value - typical) / (limit - typical)
    above = COPY + (1 - COPY) * (value - limit) / (PERFECT[metric] - limit)
    return torch.where(value < limit, below, above)


def likeness(value: float, limit: float = COPY) -> float:
    """The one scale on which people read every check, from 0 to 1: 1 is the same picture.

    COPY is the check's `limit`, so the limit is at the same place for every check, descriptor and index. On
    both sides of it the scale is linear:

        COPY · value / limit  below,  COPY + (1 − COPY) · (value − limit) / (1 − limit)  above

    A `score` is on this scale already, and is only cut off at both ends. The second check is read with
    `limits.REGISTERED`, two drawings of one prompt with `limits.ONE_PICTURE`. Sentences, panels, curves and
    sheets show these numbers. The figures of the checks themselves are in reports and tooltips.
    """
    if limit == COPY:
        place = value
    elif value < limit:
        place = COPY * value / limit
    else:
        place = COPY + (1 - COPY) * (value - limit) / (1 - limit)
    return min(1.0, max(0.0, place))


def similarity_at(metric: str, level: float, typical: Tensor, limit: Tensor) -> Tensor:
    """The similarity (B,) whose `score` is `level`."""
    if level < COPY:
        return typical + level / COPY * (limit - typical)
    return limit + (level - COPY) / (1 - COPY) * (PERFECT[metric] - limit)


def in_common(metric: str, similarity: Tensor) -> Tensor:
    """σ_t as the strengths of Eqs. 13 and 15 need it, (B,): 0 = nothing in common, 1 = the same picture.

    It is the cosine of Eq. 9 itself. −nL2 of Eq. 8 is never positive, so both strengths would be 0. The
    authors compare by nL2 only where there is no prompt, and steer by Eq. 17 alone there. To use the
    other terms with a prompt, 1 − nL2/2 takes the place of σ_t: nL2 is from 0 to 2.
    """
    return similarity if metric == "cosine" else 1 + similarity / -NOTHING
