"""Prompt reduction: steers away from a copy with fewer words of the prompt.

A prompt whose prediction is a copy is memorised, and draws that picture at any guidance scale. A shorter
prompt draws something else: the first words name the subject, and the later words trigger the stored
picture. So the guard keeps as many of the first words as draw nothing stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..hosts import Texts
from .base import Change, Guidance, Step, StepContext, expand, only
from .neighbor import Held, neighbor_prediction
from .paper import deduplication


def reduced(prompt: Tensor, nothing: Tensor, kept: Tensor) -> Tensor:
    """The first `kept` (B,) tokens of a prompt's conditioning, followed by those of the empty prompt.

    `prompt` and `nothing` are the two conditionings, (B, T, C), and so is the result. With a causal text
    encoder the kept tokens are exactly those of the shorter text.
    """
    place = torch.arange(prompt.shape[1], device=prompt.device)
    return torch.where((place < kept.to(prompt.device)[:, None])[..., None], prompt, nothing)


def away(cond: Tensor, reduced: Tensor, strength: Tensor) -> Tensor:
    """−r·(D_c − D_s)°, a change of D away from what the removed words add. r is (B,).

    ° removes the mean of each channel, the overall tone of the picture. Without that, a violet picture
    would only turn green and otherwise stay the same.
    """
    pull = cond - reduced
    return -expand(strength, pull) * (pull - pull.mean(dim=(2, 3), keepdim=True))


class Memory(NamedTuple):
    """For each sample the number of words kept (−1 = not searched yet), and r. Both are (B,)."""

    kept: Tensor
    away: Tensor


@dataclass(frozen=True)
class PromptReduction(Guidance):
    """D ← D + s0·(D_s − D_c) − r·(D_c − D_s)° for memorised prompts, until diffusion time `until`.

    D_s is the prediction for the reduced prompt, or D_u if even few words draw something stored. The
    r-term acts, and grows, while the picture is too close. A sample whose D_u is close to a stored
    picture as well stays trapped. Needs D_c and the reduced prompt, and does nothing without them. At
    cfg 1 there is no D_u: s0 is 1, and the prediction for no words stands for it.

    Attributes
    ----------
    first, growth, most : float
        The first r, its factor for each step that is still too close, and its largest value.
    until : float
        Diffusion time t down to which a memorised prompt stays reduced.
    safe_score : float
        Largest score at which a prediction for fewer words counts as nothing stored.
    """

    first: float = 1.0
    growth: float = 1.5
    most: float = 4.0
    until: float = 0.05
    safe_score: float = 0.0
    kind: ClassVar[str] = "prompt reduction"

    def start(self, batch: int) -> Memory:
        first = self.first * self.factor
        return Memory(torch.full((batch,), -1), torch.full((batch,), float(first)))

    def step(self, context: StepContext, memory: Memory) -> Step:
        cond, uncond, prompt = context.cond_denoised, context.uncond_denoised, context.texts
        rows = context.active | context.memorized if context.t > self.until else context.active
        if not rows.any() or cond is None or prompt is None or not prompt.words:
            return Step([], context, memory)
        context = replace(context, trapped=torch.zeros_like(context.active))
        drawn, usable, kept = self._draw(context, prompt, rows, memory.kept)
        if uncond is None:
            uncond = drawn if usable[rows].all() else prompt.reduced(torch.zeros_like(kept))
        base = only(usable, drawn, uncond)
        trapped = rows & ~usable
        if trapped.any():
            match = context.compare(uncond)
            trapped &= match.score > self.safe_score
            context = replace(context, trapped=trapped, watched=uncond, match=match)
        r = torch.where(context.active, memory.away, 0.0)
        changes = [
            Change("despecification", context.cfg_scale * (base - cond), rows),
            Change("away", away(cond, base, r), rows),
        ]
        most = max(self.most, self.first * self.factor)
        grown = torch.where(
            context.active, (memory.away * self.growth).clamp(max=most), memory.away
        )
        return Step(changes, context, Memory(kept, grown))

    def _draw(
        self, context: StepContext, prompt: Texts, rows: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D_s, whether it is nothing stored (B,) bool, and the number of words kept (B,)."""

        def draw(words: Tensor) -> tuple[Tensor, Tensor]:
            drawn = prompt.reduced(words.clamp_min(0))
            return drawn, context.compare(drawn).score <= self.safe_score

        kept = _searched(draw, rows & (kept < 0), kept, prompt.words)
        drawn, usable = draw(kept)
        again = rows & ~usable & (kept > 0)
        if again.any():  # words that were safe at first can be too close later: keep one less
            kept = torch.where(again, kept - 1, kept)
            fewer, good = draw(kept)
            drawn, usable = only(again, fewer, drawn), torch.where(again, good, usable)
        return drawn, usable, kept

    def retried(self, number: int) -> PromptReduction:
        """The same with a stricter limit for the words that are kept, a larger r and a later end."""
        return replace(
            self,
            first=self.first * 1.25**number,
            most=self.most * 1.25**number,
            until=self.until * 0.5**number,
            safe_score=self.safe_score - 0.1 * number,
        )


# Number of words kept (B,) -> the prediction for them, and whether it is nothing stored (B,) bool.
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


def _searched(draw: Draw, new: Tensor, kept: Tensor, words: int) -> Tensor:
    """Search by bisection how many first words of the samples `new` draw nothing stored, at least 0."""
    if not new.any():
        return kept
    low, high = torch.zeros_like(kept), torch.full_like(kept, words)
    while bool((high - low > 1)[new].any()):
        middle = (low + high) // 2
        usable = draw(middle)[1]
        low, high = torch.where(usable, middle, low), torch.where(usable, high, middle)
    return torch.where(new, low, kept)


@dataclass(frozen=True)
class AwayFromCaption(Guidance):
    """D ← D − c2·σ_t·(D_n − D_u) for trapped samples: steers away from the caption of the neighbour of D_u.

    Eq. 15 without the limit of Eq. 16. It comes after `PromptReduction`.
    """

    c2: float = 1.5
    kind: ClassVar[str] = "away from caption"

    def start(self, batch: int) -> tuple[Held, ...]:
        return (Held(),) * batch

    def step(self, context: StepContext, memory: tuple[Held, ...]) -> Step:
        uncond, rows = context.uncond_denoised, context.trapped
        if uncond is None or context.watched is not uncond or not context.captions:
            return Step([], context, memory)
        if not rows.any():
            return Step([], context, memory)
        s2 = torch.where(rows, self.c2 * self.factor * context.match.score.clamp(0, 1), 0.0)
        neighbor, memory = neighbor_prediction(context, rows, memory)
        change = Change("deduplication", deduplication(neighbor, uncond, s2), rows)
        return Step([change], context, memory)
