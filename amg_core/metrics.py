"""How two embeddings compare. Similarity σ_t of the papers: larger = closer."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.5  # Carlini et al. 2023, used by AMG Eq. 8
NEIGHBORS = 50  # k of the denominator


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


def similarity(metric: str, query: Tensor, neighbor: Tensor, spread: Tensor) -> Tensor:
    """σ_t (B,): the cosine of unit rows (Eq. 9) or −nL2 (Eq. 8). Differentiable in `query`."""
    if metric == "cosine":
        return (query * neighbor).sum(dim=1)
    if metric == "nl2":
        return -nl2(query, neighbor, spread)
    raise ValueError(f"unknown metric {metric!r}")


def closeness(metric: str, value: Tensor) -> Tensor:
    """Similarity on the scale that c1 and c2 expect: 0 = unrelated, 1 = the same picture.

    The cosine as it is; 1 − nL2/2 for nL2, whose σ_t = −nL2 is never positive and would make
    Eqs. 13 and 15 vanish. (B,) in, (B,) in [0, 1] out.
    """
    return (value if metric == "cosine" else 1 + value / 2).clamp(0, 1)


def decoys(rows: Tensor, side: int) -> Tensor:
    """Stand-ins for the unrelated pictures that a very small index lacks.

    The denominator of Eq. 8 needs about 50 neighbours. An index of fewer pictures lends its own,
    turned by 90, 180 and 270 degrees with the colour channels permuted. rows (N, 3·side²) -> (18·N, D).
    """
    pictures = rows.reshape(-1, 3, side, side)
    made = [
        torch.rot90(pictures, turn, (2, 3))[:, list(order)].flatten(1)
        for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0))
        for turn in (1, 2, 3)
    ]
    return torch.cat(made)
