"""Delays guidance (Jain et al., CVPR 2025, "Classifier-Free Guidance inside the Attraction Basin …").

Near pure noise, a memorised prompt pulls every start into the attraction basin of one picture. If guidance
begins only after the transition point, outside the basin, the picture is already another one. The
equations are in denoised space, D = D_u + s0·(D_c − D_u), with tensors (B, C, …). σ and values per sample
are (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance import expand


def guidance_norm(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
    """‖ε_c − ε_u‖₂ = ‖D_c − D_u‖₂/σ of each sample, (B,), for every kind of model."""
    difference: Tensor = (cond - uncond).float().flatten(1).norm(dim=1)
    return difference / sigma.to(difference).clamp_min(1e-12)


def first_minimum(norms: Tensor) -> Tensor:
    """DTP, the dynamic transition point: which samples have passed the first local minimum of their norm.

    `norms` (S, B) over S steps -> (B,) bool. As in the authors' code, a minimum is below both of its
    neighbours, so it takes at least three steps and is found one step later. A norm that rises from the
    first step on has no minimum.
    """
    if len(norms) < 3:
        return torch.zeros(norms.shape[1], dtype=torch.bool, device=norms.device)
    before, middle, after = norms[:-2], norms[1:-1], norms[2:]
    return ((middle < before) & (middle < after)).any(dim=0)


def guided_by(
    denoised: Tensor, cond: Tensor, uncond: Tensor, cfg_scale: float, scale: float, where: Tensor
) -> Tensor:
    """D + (scale − s0)·(D_c − D_u) for the samples `where` (B,): D as if cfg were `scale`.

    A scale of 0 is no prompt (STP), 1 is the prompt without guidance (DTP as the authors ran it), and
    below 0 is opposite guidance. It is a change of D, so effects of other nodes are kept. If `where` is
    False everywhere, the same tensor is returned. Other samples of a batch stay the same, bit for bit.
    """
    if scale == cfg_scale or not bool(where.any()):
        return denoised
    changed = denoised + (scale - cfg_scale) * (cond - uncond)
    return torch.where(expand(where, denoised).bool(), changed, denoised)


class Transition:
    """Tracks over one sampling run which samples have not reached their transition point.

    If a sampler evaluates a noise level twice or goes back to it, that level counts once.
    """

    def __init__(self, dynamic: bool):
        self.dynamic = dynamic
        self._norms: list[Tensor] = []
        self._level = float("inf")

    def waiting(self, norm: Tensor, level: float, early: bool) -> Tensor:
        """The samples that still wait, (B,) bool.

        Parameters
        ----------
        norm : Tensor (B,)
            See `guidance_norm`.
        level : float
            The noise level σ, which falls over a run.
        early : bool
            Whether the static transition point is not reached yet. A dynamic one is never later.
        """
        if level < self._level:
            self._norms.append(norm)
            self._level = level
        if not early:
            return torch.zeros_like(norm, dtype=torch.bool)
        if not self.dynamic:
            return torch.ones_like(norm, dtype=torch.bool)
        return ~first_minimum(torch.stack(self._norms))
