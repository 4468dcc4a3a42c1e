"""When guidance begins (Jain et al., CVPR 2025, "Classifier-Free Guidance inside the Attraction Basin …").

Near pure noise a memorised prompt pulls every start into the basin of one picture. Guidance that begins
only outside of it, after the transition point, meets a picture that is already another one. Written in
denoised space, D = D_u + s0·(D_c − D_u): (B, C, …) each; σ and what is returned a sample are (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance import expand


def guidance_norm(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
    """‖ε_c − ε_u‖₂ of each sample (B,): ‖D_c − D_u‖₂/σ, whatever the model predicts itself."""
    difference: Tensor = (cond - uncond).float().flatten(1).norm(dim=1)
    return difference / sigma.to(difference).clamp_min(1e-12)


def first_minimum(norms: Tensor) -> Tensor:
    """DTP: which samples have had the first local minimum of their norm, (S, B) -> (B,) bool.

    As in the authors' code: a value below both of its neighbours, so at least three steps, known one
    step after it. A norm that rises from the first step on has had none.
    """
    if len(norms) < 3:
        return torch.zeros(norms.shape[1], dtype=torch.bool, device=norms.device)
    before, middle, after = norms[:-2], norms[1:-1], norms[2:]
    return ((middle < before) & (middle < after)).any(dim=0)


def guided_by(
    denoised: Tensor, cond: Tensor, uncond: Tensor, cfg_scale: float, scale: float, where: Tensor
) -> Tensor:
    """Samples `where` (B,) as if cfg had been `scale`: D + (scale − s0)·(D_c − D_u).

    scale 0: no prompt (STP); 1: the prompt without guidance (DTP as the authors ran it); below 0:
    opposite guidance. As a change of D, so that what other nodes did to it stays. Where nothing is to be
    done the very tensor comes back, and the other samples of a batch stay bit for bit.
    """
    if scale == cfg_scale or not bool(where.any()):
        return denoised
    changed = denoised + (scale - cfg_scale) * (cond - uncond)
    return torch.where(expand(where, denoised).bool(), changed, denoised)


class Transition:
    """Which samples still wait for their transition, over one sampling run.

    Samplers that evaluate a noise level twice, or go back to one, are counted once a level.
    """

    def __init__(self, dynamic: bool):
        self.dynamic = dynamic
        self._norms: list[Tensor] = []
        self._level = float("inf")

    def waiting(self, norm: Tensor, level: float, early: bool) -> Tensor:
        """(B,) bool.

        norm : (B,), see `guidance_norm`; level : the noise level σ, falling over a run; early : whether
        it is still before the static point, at which dynamic ones end at the latest.
        """
        if level < self._level:
            self._norms.append(norm)
            self._level = level
        if not early:
            return torch.zeros_like(norm, dtype=torch.bool)
        if not self.dynamic:
            return torch.ones_like(norm, dtype=torch.bool)
        return ~first_minimum(torch.stack(self._norms))
