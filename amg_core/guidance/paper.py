"""The paper's three terms, Eqs. 13 to 17 of AMG [1]_, in denoised space.

The terms act on active samples only. Their strengths follow σ_t (the paper's similarity, not the noise
level σ) on the scale of `metrics.score`, because the paper's −nL2 is never positive, and the zero of a
cosine has no meaning.

References
----------
.. [1] C. Chen, D. Liu, C. Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..similarity.matcher import Match
from .base import Change, Guidance, Step, StepContext, expand
from .neighbor import LASTING, Held, neighbor_prediction

# ------------------------------------------------------------------ the equations


def despecification_strength(score: Tensor, c1: float, cfg_scale: float) -> Tensor:
    """s1 = clamp(c1·σ_t, 0, s0 − 1)   (Eq. 14). score (B,) in [0, 1] -> (B,)."""
    return (c1 * score).clamp(0, max(0.0, cfg_scale - 1))


def deduplication_strength(
    score: Tensor, s1: Tensor, c2: float | Tensor, cfg_scale: float
) -> Tensor:
    """s2 = clamp(c2·σ_t, 0, s0 − s1 − 1)   (Eq. 16). (B,) each -> (B,)."""
    room = (cfg_scale - s1 - 1).clamp_min(0)
    return torch.minimum((c2 * score).clamp_min(0), room)


def despecification(cond: Tensor, uncond: Tensor, s1: Tensor) -> Tensor:
    """−s1·(D_c − D_u)   (Eq. 13), a change of D that weakens the prompt."""
    return -expand(s1, cond) * (cond - uncond)


def deduplication(neighbor: Tensor, uncond: Tensor, s2: Tensor) -> Tensor:
    """−s2·(D_n − D_u)   (Eq. 15), a change of D away from the prediction for the neighbour's caption."""
    return -expand(s2, uncond) * (neighbor - uncond)


def dissimilarity(gradient: Tensor, sigma: Tensor, c3: float | Tensor) -> Tensor:
    """−c3·σ²·∇_D similarity   (Eq. 17 in denoised space; σ in k-diffusion units, (B,)).

    ε is held constant, as in the authors' code. Then ∇_{x_t} = ∇_D/√ᾱ, and √(1−ᾱ) in ε becomes σ in D.
    """
    c3 = torch.as_tensor(c3).to(gradient)
    return -expand(c3 * sigma.to(gradient) ** 2, gradient) * gradient


def projection(gradient: Tensor, excess: Tensor, denoised: Tensor, cap: float) -> Tensor:
    """The smallest change of D that removes `excess` similarity in a linear model (Polyak's step).

    −excess·∇/‖∇‖², where excess = similarity − target (B,). Its norm is at most `cap`·‖D‖ per sample.
    """
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    length = excess.to(gradient).clamp_min(0) / norm
    length = torch.minimum(length, cap * denoised.flatten(1).norm(dim=1).to(gradient))
    return -expand(length / norm, gradient) * gradient


# ------------------------------------------------------------------ as ways to steer


@dataclass(frozen=True)
class Despecification(Guidance):
    """Eqs. 13 and 14. Needs D_c and D_u."""

    c1: float = 13.0
    kind: ClassVar[str] = "despecification"

    def rows(self, context: StepContext) -> Tensor:
        return context.active

    def step(self, context: StepContext, memory: None) -> Step:
        cond, uncond, rows = context.cond_denoised, context.uncond_denoised, self.rows(context)
        if cond is None or uncond is None or not rows.any():
            return Step([], context, None)
        score = context.score(context.match).clamp(0, 1)
        s1 = despecification_strength(score, self.c1 * self.factor, context.cfg_scale)
        change = Change(self.kind, despecification(cond, uncond, s1), rows)
        spent = context.spent + self.share * s1
        return Step([change], replace(context, spent=spent), None)


@dataclass(frozen=True)
class Deduplication(Guidance):
    """Eqs. 15 and 16. Needs D_u, and D_n for the neighbour's caption."""

    c2: float = 5.0
    kind: ClassVar[str] = "deduplication"
    lasting: ClassVar[int] = LASTING

    def start(self, batch: int) -> tuple[Held, ...]:
        return (Held(),) * batch

    def step(self, context: StepContext, memory: tuple[Held, ...]) -> Step:
        uncond, rows = context.uncond_denoised, context.active
        if uncond is None or not context.captions or not rows.any():
            return Step([], context, memory)
        score = context.score(context.match).clamp(0, 1)
        s2 = deduplication_strength(score, context.spent, self.weight(context), context.cfg_scale)
        neighbor, memory = neighbor_prediction(context, rows, memory, self.lasting)
        return Step([Change(self.kind, deduplication(neighbor, uncond, s2), rows)], context, memory)

    def weight(self, context: StepContext) -> float | Tensor:
        """c2, one value for all samples or (B,)."""
        return self.c2 * self.factor


@dataclass(frozen=True)
class Dissimilarity(Guidance):
    """Eq. 17 as in the paper: one gradient step of fixed size that lowers the similarity of D."""

    c3: float = 1.0
    kind: ClassVar[str] = "dissimilarity"

    def step(self, context: StepContext, memory: None) -> Step:
        if not context.active.any():
            return Step([], context, None)
        match = context.compare(context.denoised)
        rows = [context.denoised[i : i + 1] for i in range(len(context.active))]
        for i in context.active.nonzero()[:, 0].tolist():
            with torch.inference_mode(False), torch.enable_grad():
                rows[i] = self.moved(context, i, rows[i].detach().clone(), match[i])
        delta = torch.cat(rows) - context.denoised
        return Step([Change("dissimilarity", delta, context.active)], context, None)

    def moved(self, context: StepContext, i: int, latent: Tensor, match: Match) -> Tensor:
        """The prediction of sample i, (1, C, H, W), after the step away from its match."""
        gradient, value = context.matcher.gradient(latent, match)
        level = context.sigma[i : i + 1].clone()
        return latent + dissimilarity(gradient, level, self.constant(context, match, value))

    def constant(self, context: StepContext, match: Match, similarity: Tensor) -> float | Tensor:
        """c3, one value for all samples or (1,)."""
        return self.c3 * self.factor


@dataclass(frozen=True)
class Projection(Dissimilarity):
    """Eq. 17 with bounded steps, repeated until the similarity is `margin` below the threshold.

    Attributes
    ----------
    c3 : float
        Share of the excess that each step removes, 1 = all of it.
    margin : float
        In units of similarity.
    iterations, cap : int, float
        Largest number of steps, and the largest norm of each relative to ‖D‖.
    """

    margin: float = 0.05
    iterations: int = 3
    cap: float = 0.1
    kind: ClassVar[str] = "projection"

    def moved(self, context: StepContext, i: int, latent: Tensor, match: Match) -> Tensor:
        for _ in range(self.iterations):
            gradient, value = context.matcher.gradient(latent, match)
            excess = value - float(context.threshold[i]) + self.margin
            if float(excess) <= 0:
                break
            latent = latent + projection(gradient, self.c3 * self.factor * excess, latent, self.cap)
        return latent
