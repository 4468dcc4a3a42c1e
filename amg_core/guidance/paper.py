"""The paper's three terms, Eqs. 13 to 17 of AMG [1]_, in denoised space.

The terms act on active samples only (Eq. 10). Their strengths follow σ_t, the paper's similarity (not the
noise level σ): `StepContext.similarity`. Eq. 10 adds all three to one ε̂, so σ_t and its gradient are those
of D before any of them.

References
----------
.. [1] C. Chen, D. Liu, C. Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..similarity.matcher import Match
from .base import Change, Guidance, Step, StepContext, expand
from .neighbor import Held, neighbor_prediction

# The longest move of Eq. 17, as a multiple of ‖D_c − D_u‖. Its σ² grows without bound towards pure noise,
# above all on flow models, where σ is σ/(1 − σ). 6.5 is s0 − 1 at the paper's guidance scale 7.5, so the
# term moves D no farther than despecification could. The figure is chosen, not measured.
FARTHEST = 6.5
# The longest move where there is no D_u, or D_u is D_c (no prompt), as a share of ‖D°‖, where ° removes
# each channel's mean: half of what there is to see. Chosen, not measured.
FARTHEST_ALONE = 0.5
SAME = 1e-4  # ‖D_c − D_u‖/‖D°‖ below which both are one prediction, up to rounding

# ------------------------------------------------------------------ the equations


def despecification_strength(similarity: Tensor, c1: float, cfg_scale: float) -> Tensor:
    """s1 = max(min(c1·σ_t, s0 − 1), 0)   (Eq. 13). (B,) -> (B,)."""
    return (c1 * similarity).clamp(0, max(0.0, cfg_scale - 1))


def deduplication_strength(
    similarity: Tensor, s1: Tensor, c2: float | Tensor, cfg_scale: float
) -> Tensor:
    """s2 = max(min(c2·σ_t, s0 − s1 − 1), 0)   (Eq. 15). (B,) each -> (B,)."""
    room = (cfg_scale - s1 - 1).clamp_min(0)
    return torch.minimum((c2 * similarity).clamp_min(0), room)


def despecification(cond: Tensor, uncond: Tensor, s1: Tensor) -> Tensor:
    """−s1·(D_c − D_u)   (Eq. 14), a change of D that weakens the prompt."""
    return -expand(s1, cond) * (cond - uncond)


def deduplication(neighbor: Tensor, uncond: Tensor, s2: Tensor) -> Tensor:
    """−s2·(D_n − D_u)   (Eq. 16), a change of D away from the prediction for the neighbour's caption."""
    return -expand(s2, uncond) * (neighbor - uncond)


def dissimilarity(
    gradient: Tensor, sigma: Tensor, c3: float | Tensor, farthest: Tensor | None = None
) -> Tensor:
    """−c3·σ²·∇_D σ_t, at most `farthest` long   (Eq. 17 in denoised space).

    ε is held constant, as in the authors' code. Then ∇_{x_t} = ∇_D/√ᾱ, and c3·√(1−ᾱ)·∇_{x_t} σ_t in ε is
    −c3·σ²·∇_D σ_t in D.

    Parameters
    ----------
    gradient : Tensor (B, C, H, W)
    sigma : Tensor (B,)
        In k-diffusion units.
    c3 : float or Tensor (B,)
    farthest : Tensor (B,), optional
        The largest norm, see `farthest`. Without it there is none.
    """
    norm = _norm(gradient)
    length = torch.as_tensor(c3).to(norm) * sigma.to(norm) ** 2 * norm
    if farthest is not None:
        length = torch.minimum(length, farthest.to(norm))
    return -expand(length / norm.clamp_min(1e-30), gradient) * gradient


def farthest(denoised: Tensor, cond: Tensor | None, uncond: Tensor | None) -> Tensor:
    """The longest move of Eq. 17, (B,): FARTHEST·‖D_c − D_u‖, or FARTHEST_ALONE·‖D°‖ without D_u.

    The second also if D_c and D_u are the same: then there is no prompt.
    """
    seen = _norm(denoised - denoised.mean(dim=(2, 3), keepdim=True))
    if cond is None or uncond is None:
        return FARTHEST_ALONE * seen
    apart = _norm(cond - uncond)
    return torch.where(apart > SAME * seen, FARTHEST * apart, FARTHEST_ALONE * seen)


def projection(gradient: Tensor, excess: Tensor, denoised: Tensor, cap: float) -> Tensor:
    """The smallest change of D that removes `excess` similarity in a linear model (Polyak's step).

    −excess·∇/‖∇‖², where excess = similarity − target (B,). Its norm is at most `cap`·‖D‖ per sample.
    """
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    length = excess.to(gradient).clamp_min(0) / norm
    length = torch.minimum(length, cap * denoised.flatten(1).norm(dim=1).to(gradient))
    return -expand(length / norm, gradient) * gradient


def _norm(latents: Tensor) -> Tensor:
    """The norm of each sample, (B,), in float32 or finer."""
    precise = torch.promote_types(latents.dtype, torch.float32)
    norm: Tensor = latents.flatten(1).to(precise).norm(dim=1)
    return norm


# ------------------------------------------------------------------ as ways to steer


@dataclass(frozen=True)
class Despecification(Guidance):
    """Eqs. 13 and 14. Needs D_c and D_u. It moves D by at most (s0 − 1)·‖D_c − D_u‖."""

    c1: float = 1.5
    kind: ClassVar[str] = "despecification"

    def rows(self, context: StepContext) -> Tensor:
        return context.active

    def step(self, context: StepContext, memory: None) -> Step:
        cond, uncond, rows = context.cond_denoised, context.uncond_denoised, self.rows(context)
        if cond is None or uncond is None or not rows.any():
            return Step([], context, None)
        s1 = despecification_strength(context.similarity, self.c1 * self.factor, context.cfg_scale)
        change = Change(self.kind, despecification(cond, uncond, s1), rows)
        spent = context.spent + self.share * s1
        return Step([change], replace(context, spent=spent), None)


class Captioned(NamedTuple):
    """D_n of each sample, and for how many more steps the term acts on it without a trigger, (B,)."""

    held: tuple[Held, ...]
    left: Tensor


@dataclass(frozen=True)
class Deduplication(Guidance):
    """Eqs. 15 and 16. Needs D_u, and D_n for the neighbour's caption.

    D_n is asked for at every step, and only for samples with s2 > 0. The move is at most
    (s0 − s1 − 1)·‖D_n − D_u‖. It has no bound by ‖D_c − D_u‖, because Eq. 16 is plain guidance, away from
    another caption, at no more than the scale that the artist chose for the prompt.
    """

    c2: float = 5.0
    kind: ClassVar[str] = "deduplication"
    hold: ClassVar[int] = 0  # steps for which the term goes on after a sample was active

    def start(self, batch: int) -> Captioned:
        return Captioned((Held(),) * batch, torch.zeros(batch, dtype=torch.int64))

    def step(self, context: StepContext, memory: Captioned) -> Step:
        uncond, active = context.uncond_denoised, context.active
        left = torch.where(active, self.hold, (memory.left - 1).clamp_min(0))
        memory, triggered = memory._replace(left=left), active | (memory.left > 0)
        if uncond is None or not context.captions:
            return Step([], context, memory)
        s2 = deduplication_strength(
            context.similarity, context.spent, self.weight(context), context.cfg_scale
        )
        rows = triggered & (s2 > 0)
        if not rows.any():
            return Step([], context, memory)
        neighbor, held = neighbor_prediction(context, rows, memory.held, lasting=1)
        change = Change(self.kind, deduplication(neighbor, uncond, s2), rows)
        return Step([change], context, memory._replace(held=held))

    def weight(self, context: StepContext) -> float | Tensor:
        """c2, one value for all samples or (B,)."""
        return self.c2 * self.factor


@dataclass(frozen=True)
class Dissimilarity(Guidance):
    """Eq. 17 as in the paper: one gradient step that lowers the similarity of D, at most `farthest` long.

    The default c3 was chosen: the paper names none, the port to audio (arXiv 2509.14934) has 100.
    """

    c3: float = 100.0
    kind: ClassVar[str] = "dissimilarity"

    def step(self, context: StepContext, memory: None) -> Step:
        if not context.active.any():
            return Step([], context, None)
        start, match = self.compared(context)
        moves = [torch.zeros_like(start[i : i + 1]) for i in range(len(start))]
        for i in context.active.nonzero()[:, 0].tolist():
            with torch.inference_mode(False), torch.enable_grad():
                moves[i] = self.move(context, i, start[i : i + 1].detach().clone(), match[i])
        return Step([Change("dissimilarity", torch.cat(moves), context.active)], context, None)

    def compared(self, context: StepContext) -> tuple[Tensor, Match]:
        """The prediction (B, C, H, W) from which the samples move, and its match."""
        if context.as_published:
            return context.watched, context.match
        return compared_again(context)

    def move(self, context: StepContext, i: int, latent: Tensor, match: Match) -> Tensor:
        """The change of the prediction `latent`, (1, C, H, W), of sample i away from its match."""
        gradient, value = context.gradient(latent, match)
        most = farthest(context.denoised, context.cond_denoised, context.uncond_denoised)
        c3, level = self.constant(context, i, value), context.sigma[i : i + 1].clone()
        return dissimilarity(gradient, level, c3, most[i : i + 1].clone())

    def constant(self, context: StepContext, i: int, similarity: Tensor) -> float | Tensor:
        """c3 for sample i, whose similarity is (1,)."""
        return self.c3 * self.factor


@dataclass(frozen=True)
class Projection(Dissimilarity):
    """Eq. 17 with bounded steps, repeated until the similarity is `margin` below the threshold.

    It starts from D with the changes of the other terms. Its bound is `iterations`·`cap`·‖D‖, not one by
    ‖D_c − D_u‖: it takes the shortest way to the threshold, with a prompt or without one.

    Attributes
    ----------
    c3 : float
        Share of the excess that each step removes, 1 = all of it.
    margin : float
        In units of similarity.
    iterations, cap : int, float
        Largest number of steps, and the largest norm of each relative to ‖D‖.
    """

    c3: float = 1.0
    margin: float = 0.05
    iterations: int = 3
    cap: float = 0.1
    kind: ClassVar[str] = "projection"

    def compared(self, context: StepContext) -> tuple[Tensor, Match]:
        return compared_again(context)

    def move(self, context: StepContext, i: int, latent: Tensor, match: Match) -> Tensor:
        here = latent
        for _ in range(self.iterations):
            gradient, value = context.gradient(here, match)
            excess = value - float(context.threshold[i]) + self.margin
            if float(excess) <= 0:
                break
            here = here + projection(gradient, self.c3 * self.factor * excess, here, self.cap)
        return here - latent


def compared_again(context: StepContext) -> tuple[Tensor, Match]:
    """D with the changes of the earlier ways, and its match."""
    unchanged = context.denoised is context.watched
    return context.denoised, context.match if unchanged else context.compare(context.denoised)
