"""Out of a copy's basin with fewer of the prompt's words.

A prompt whose prediction is a copy has proved to be memorised, and draws that picture at any guidance
scale. What leads elsewhere is a prompt that says less: its first words name the subject, and the later
ones make it a key to one picture. So as many of the first words are kept as draw nothing stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import Change, Guidance, Step, StepContext, expand, only
from .neighbor import Held, neighbor_prediction
from .paper import deduplication


@dataclass(frozen=True)
class ReducedPrompt:
    """The prompt with only its first words kept, the rest as if nothing were said.

    words : int
        How many words (tokens, rows of the conditioning) the whole prompt has.
    denoised : callable
        Words kept (B,) int64 in [0, words] -> the prediction for them (B, C, H, W).
    """

    words: int
    denoised: Callable[[Tensor], Tensor]


def reduced(prompt: Tensor, nothing: Tensor, kept: Tensor) -> Tensor:
    """The first `kept` (B,) tokens of a prompt's conditioning, the rest from that of no prompt.

    prompt, nothing : Tensor (B, T, C) -> (B, T, C). Under a causal text encoder the kept tokens are
    exactly those of the shorter text.
    """
    place = torch.arange(prompt.shape[1], device=prompt.device)
    return torch.where((place < kept.to(prompt.device)[:, None])[..., None], prompt, nothing)


def away(cond: Tensor, reduced: Tensor, strength: Tensor) -> Tensor:
    """−r·(D_c − D_s)°: away from what the left-out words add, r (B,).

    ° takes away the mean of each channel, which is the picture's overall tone. Pushed away from as well,
    a violet picture turns green and stays what it was otherwise.
    """
    pull = cond - reduced
    return -expand(strength, pull) * (pull - pull.mean(dim=(2, 3), keepdim=True))


class Memory(NamedTuple):
    """Of each sample: words kept, −1 = not looked for yet; and r. (B,) each."""

    kept: Tensor
    away: Tensor


@dataclass(frozen=True)
class PromptReduction(Guidance):
    """D ← D + s0·(D_s − D_c) − r·(D_c − D_s)° for memorised prompts, as far as `until`.

    D_s is the prediction for the reduced prompt, or D_u where even few words draw something stored. The
    r-term acts while D_c is too close, and grows until it is not. Samples whose D_u is something stored
    as well stay trapped, in D_u. Needs D_c, D_u and the reduced prompt; else does nothing.

    Attributes
    ----------
    first, growth, most : float
        r at first, by what it grows with each step that is still too close, and its largest value.
    until : float
        Diffusion time t down to which a memorised prompt stays reduced.
    unrelated : float
        Calibrated similarity up to which a prediction for fewer words counts as nothing stored.
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
        cond, uncond, prompt = context.cond_denoised, context.uncond_denoised, context.reduced
        if cond is None or uncond is None or prompt is None:
            return Step([], context, memory)
        context = replace(context, trapped=torch.zeros_like(context.active))
        rows = context.active | context.memorized if context.t > self.until else context.active
        if not rows.any():
            return Step([], context, memory)
        drawn, usable, kept = self._draw(context, prompt, rows, memory.kept)
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
        self, context: StepContext, prompt: ReducedPrompt, rows: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D_s, where it is nothing stored (B,) bool, and the words that each sample keeps."""

        def draw(words: Tensor) -> tuple[Tensor, Tensor]:
            drawn = prompt.denoised(words.clamp_min(0))
            return drawn, context.compare(drawn).score <= self.safe_score

        kept = _searched(draw, rows & (kept < 0), kept, prompt.words)
        drawn, usable = draw(kept)
        again = rows & ~usable & (kept > 0)
        if again.any():  # what was new at first may lead back later: one word less
            kept = torch.where(again, kept - 1, kept)
            fewer, good = draw(kept)
            drawn, usable = only(again, fewer, drawn), torch.where(again, good, usable)
        return drawn, usable, kept

    def retried(self, number: int) -> PromptReduction:
        """Keeps fewer words, longer, and goes farther."""
        return replace(
            self,
            first=self.first * 1.25**number,
            most=self.most * 1.25**number,
            until=self.until * 0.5**number,
            safe_score=self.safe_score - 0.1 * number,
        )


# Words kept (B,) -> the prediction for them, and where it is nothing stored (B,) bool.
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


def _searched(draw: Draw, new: Tensor, kept: Tensor, words: int) -> Tensor:
    """By bisection, the most first words that draw nothing stored, for `new`; 0 where one is too many."""
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
    """D ← D − c2·σ_t·(D_n − D_u) for samples that are trapped in D_u: off its neighbour's caption.

    Eq. 15 without the limit of Eq. 16. Comes after `PromptReduction`.
    """

    c2: float = 1.5
    kind: ClassVar[str] = "away from caption"

    def start(self, batch: int) -> tuple[Held, ...]:
        return (Held(),) * batch

    def step(self, context: StepContext, memory: tuple[Held, ...]) -> Step:
        uncond, rows = context.uncond_denoised, context.trapped
        if uncond is None or context.watched is not uncond or context.neighbor_denoised is None:
            return Step([], context, memory)
        if not rows.any():
            return Step([], context, memory)
        s2 = torch.where(rows, self.c2 * self.factor * context.match.score.clamp(0, 1), 0.0)
        neighbor, memory = neighbor_prediction(context, rows, memory)
        change = Change("deduplication", deduplication(neighbor, uncond, s2), rows)
        return Step([change], context, memory)
