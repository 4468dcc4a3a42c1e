"""How two embeddings compare. Similarity σ_t of the papers: larger = closer."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.5  # Carlini et al. 2023, used by AMG Eq. 8
NEIGHBORS = 50  # k of the denominator
GAIN, OFFSET = (0.5, 2.0), 0.25  # how far contrast and brightness may be matched
LATENT_OFFSET = 1.0  # the same for latents, in units of their deviation (about 1 in every family)
PERFECT = {"cosine": 1.0, "nl2": 0.0}  # similarity of a picture with itself


def nl2(query: Tensor, neighbor: Tensor, spread: Tensor) -> Tensor:
    """Normalised L2 (AMG Eq. 8): ‖q − n‖ / (α · mean_k ‖q − z_k‖). Smaller = closer.

    Parameters
    ----------
    query, neighbor : Tensor (B, D)
    spread : Tensor (B,)
        Mean distance of the query to its k nearest rows; detached by the caller, as the paper does.

    Returns
    -------
    Tensor (B,), 0 for an exact copy, about 2 where the nearest is no nearer than the others.
    """
    return (query - neighbor).norm(dim=1) / (ALPHA * spread)


def matched(query: Tensor, neighbors: Tensor, channels: int = 3, offset: float = OFFSET) -> Tensor:
    """`query` brought as close to each neighbour as contrast, brightness and tint alone can bring it.

    Eq. 8 calls a darker copy something new, and the overshoot of classifier-free guidance makes
    every early copy look that way. So nL2 is taken after the best gain (½ to 2) and
    offset (±0.25; latents: ±1) of each channel, both held constant for gradients: what is left to
    follow is structure. query (D,), neighbors (K, D), rows of equal channel blocks, pictures in
    [0, 1] or latents of about unit variance -> (K, D).
    """
    q, q_mean, gain, shift = _match(query, neighbors, channels, offset)
    return ((q - q_mean) * gain + q_mean + shift).flatten(1)


def _match(query: Tensor, neighbors: Tensor, channels: int, offset: float) -> tuple[Tensor, ...]:
    """query (1, C, D/C), its channel means, and the best gain and offset for each neighbour (K, C, 1)."""
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

    query, neighbor (1, D), spread (1,). Differentiable in `query`.
    """
    if metric == "cosine":
        return (query * neighbor).sum(dim=1)
    if metric == "nl2":
        return -nl2(matched(query[0], neighbor, channels, offset), neighbor, spread)
    raise ValueError(f"unknown metric {metric!r}")


def nl2_gradient(
    query: Tensor, neighbor: Tensor, spread: Tensor, channels: int, offset: float
) -> tuple[Tensor, Tensor]:
    """∇ of `similarity("nl2", …)` in the query in closed form (1, D), and the similarity (1,).

    With the gain g and the offset held constant, the matched query is g·(q − q̄) + q̄ + o in each
    channel. For the unit vector u from neighbour to matched query the gradient is therefore
    −(g·(u − ū) + ū)/(α·spread), and 0 where the two coincide. query, neighbor (1, D), spread (1,).
    """
    q, q_mean, gain, shift = _match(query[0], neighbor, channels, offset)
    left = (q - q_mean) * gain + q_mean + shift - neighbor.reshape(q.shape)
    distance = left.norm()
    unit = left / distance.clamp_min(1e-12)
    mean = unit.mean(dim=2, keepdim=True)
    gradient = (gain * (unit - mean) + mean) / (ALPHA * spread)
    return -gradient.flatten(1), -distance / (ALPHA * spread)


def closeness(metric: str, value: Tensor, unrelated: float) -> Tensor:
    """Similarity on one scale for every descriptor and index, (B,) -> (B,).

    0 = as close as the most alike unrelated pictures of the index are to each other, 1 = the same
    picture. Thresholds and the strengths of Eqs. 14 and 16 are given on this scale: the cosine's own
    zero means nothing on an index of look-alikes, and σ_t = −nL2 is never positive.
    """
    return (value - unrelated) / (PERFECT[metric] - unrelated)


def decoys(rows: Tensor, side: int, channels: int = 3) -> Tensor:
    """Stand-ins for the unrelated pictures that a very small index lacks.

    The denominator of Eq. 8 needs about 50 neighbours. An index of fewer pictures lends its own,
    turned by 90, 180 and 270 degrees, the channels in a circle shifted, both ways round.
    (N, C·side²) -> (6·C·N, C·side²).
    """
    pictures = rows.reshape(-1, channels, side, side)
    ring = range(channels)
    orders = [
        tuple((first + step * i) % channels for i in ring) for step in (1, -1) for first in ring
    ]
    made = [
        torch.rot90(pictures, turn, (2, 3))[:, list(order)].flatten(1)
        for order in dict.fromkeys(orders)
        for turn in (1, 2, 3)
    ]
    return torch.cat(made)
