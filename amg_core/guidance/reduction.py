"""Prompt reduction: steers away from a copy with fewer words of the prompt.

A prompt whose prediction is a copy is memorised, and draws that picture at any guidance scale. With some of
its words left out it draws something else. Often two words make such a prompt only together: the subject
and a colour, a name and a place. So the guard finds the words that matter by leaving out each one, makes
two reduced prompts that lack different ones, and draws with them in turn. All words take part in the
picture, but never those together that lead to the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..hosts import Texts
from .base import Change, Guidance, Step, StepContext, acted_at, expand, grown, never, only
from .neighbor import Held, neighbor_prediction
from .paper import deduplication


def without(prompt: Tensor, nothing: Tensor, kept: Tensor) -> Tensor:
    """The tokens `kept` (B, T) bool of a prompt's conditioning, and those of the empty prompt elsewhere.

    `prompt` and `nothing` are the two conditionings, (B, T, C), and so is the result. With a causal text
    encoder the first tokens are exactly those of the shorter text.
    """
    return torch.where(kept.to(prompt.device)[..., None], prompt, nothing)


def away(cond: Tensor, reduced: Tensor, strength: Tensor) -> Tensor:
    """−r·(D_c − D_s)°, a change of D away from what the removed words add. r is (B,).

    ° removes the mean of each channel, the overall tone of the picture. Without that, a violet picture
    would only turn green and otherwise stay the same.
    """
    pull = cond - reduced
    return -expand(strength, pull) * (pull - pull.mean(dim=(2, 3), keepdim=True))


@dataclass(frozen=True, eq=False)
class Plan:
    """The reduced prompts of one sample.

    Attributes
    ----------
    kept : tuple of Tensor (W,) bool
        The parts of the prompt in each of them. They are drawn in turn.
    order : tuple of int
        The parts in the order in which they are left out.
    words : tuple of str
        The words that each of them lacked at first, "" if the text is not known.
    """

    kept: tuple[Tensor, ...]
    order: tuple[int, ...]
    words: tuple[str, ...] = ()

    def now(self, number: int) -> Tensor:
        """The parts (W,) bool for evaluation `number` of the run."""
        return self.kept[number % len(self.kept)]

    def fewer(self, number: int) -> Plan:
        """The plan with one part less in the reduced prompt of that evaluation, if it has any."""
        which = number % len(self.kept)
        left = [part for part in self.order if self.kept[which][part]]
        if not left:
            return self
        changed = self.kept[which].clone()
        changed[left[0]] = False
        return replace(self, kept=(*self.kept[:which], changed, *self.kept[which + 1 :]))


class Memory(NamedTuple):
    """For each sample its plan (None = not searched yet), r, and when it acted, see `base.grown`."""

    plans: tuple[Plan | None, ...]
    away: Tensor
    acted: Tensor


@dataclass(frozen=True)
class PromptReduction(Guidance):
    """D ← D + s0·(D_s − D_c) − r·(D_c − D_s)° for memorised prompts, until diffusion time `until`.

    D_s is the prediction for the reduced prompt, or D_u if it is close to something stored. The r-term
    acts, and grows, while the picture is too close. A sample whose D_u is close to a stored picture as
    well stays trapped. Needs D_c and the reduced prompt, and does nothing without them. At cfg 1 there is
    no D_u: s0 is 1, and the prediction for no words stands for it.

    `plans` describes the search for the words. Where the host does not know the text
    (`Texts.separable`), the prompt keeps as many of its first tokens as draw nothing stored.

    Attributes
    ----------
    first, growth, most : float
        The first r, its factor for every `base.STRIDE` of log σ that is still too close, and its largest
        value.
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
        return Memory((None,) * batch, torch.full((batch,), float(first)), never(batch))

    def step(self, context: StepContext, memory: Memory) -> Step:
        cond, uncond, prompt = context.cond_denoised, context.uncond_denoised, context.texts
        rows = context.active | context.memorized if context.t > self.until else context.active
        if not rows.any() or cond is None or prompt is None or not prompt.words.any():
            return Step([], context, memory)
        context = replace(context, trapped=torch.zeros_like(context.active))
        drawn, usable, found = self._draw(context, prompt, rows, memory.plans)
        if uncond is None:
            none = torch.zeros(len(rows), int(prompt.words.max()), dtype=torch.bool)
            uncond = drawn if usable[rows].all() else prompt.reduced(none)
        base = only(usable, drawn, uncond)
        trapped = rows & ~usable
        if trapped.any():
            match = context.compare(uncond)
            trapped &= match.score > self.safe_score
            context = replace(context, trapped=trapped, watched=uncond, match=match)
        most = max(self.most, self.first * self.factor)
        strength = grown(memory.away, self.growth, most, memory.acted, context.sigma)
        r = torch.where(context.active, strength, 0.0)
        changes = [
            Change("despecification", context.cfg_scale * (base - cond), rows),
            Change("away", away(cond, base, r), rows),
        ]
        acted = acted_at(context.active, context.sigma)
        return Step(changes, context, Memory(found, strength, acted))

    def _draw(
        self, context: StepContext, prompt: Texts, rows: Tensor, known: tuple[Plan | None, ...]
    ) -> tuple[Tensor, Tensor, tuple[Plan | None, ...]]:
        """D_s, whether it is nothing stored (B,) bool, and the plans."""

        def draw(kept: Tensor) -> tuple[Tensor, Tensor]:
            drawn = prompt.reduced(kept)
            return drawn, context.compare(drawn).score

        def now(plans: Sequence[Plan | None]) -> Tensor:
            kept = torch.ones(len(rows), int(prompt.words.max()), dtype=torch.bool)
            for i, plan in enumerate(plans):
                if plan is not None:
                    kept[i] = plan.now(context.number)
            return kept

        new = rows & torch.tensor([plan is None for plan in known])
        if new.any():
            found = plans(
                lambda kept: draw(kept)[1], prompt.words, new, self.safe_score, prompt.separable
            )
            found = _described(found, prompt)
            known = tuple(a if b else c for a, b, c in zip(found, new.tolist(), known, strict=True))
        drawn, score = draw(now(known))
        usable = score <= self.safe_score
        again = rows & ~usable
        fewer = tuple(
            plan.fewer(context.number) if plan is not None and too_close else plan
            for plan, too_close in zip(known, again.tolist(), strict=True)
        )
        if fewer != known:  # words that were safe at first can be too close later
            other, score = draw(now(fewer))
            drawn, usable = (
                only(again, other, drawn),
                torch.where(again, score <= self.safe_score, usable),
            )
        return drawn, usable, fewer

    def retried(self, number: int) -> PromptReduction:
        """The same with a stricter limit for the words that are kept, a larger r and a later end."""
        return replace(
            self,
            first=self.first * 1.25**number,
            most=self.most * 1.25**number,
            until=self.until * 0.5**number,
            safe_score=self.safe_score - 0.1 * number,
        )


def _described(found: Sequence[Plan | None], prompt: Texts) -> list[Plan | None]:
    """The plans with the words that their prompts lack."""
    whole = torch.ones(int(prompt.words.max()), dtype=torch.bool)
    lacking = [
        prompt.left_out(torch.stack([whole if plan is None else plan.now(k) for plan in found]))
        for k in (0, 1)
    ]
    return [
        None if plan is None else replace(plan, words=words[: len(plan.kept)])
        for plan, words in zip(found, zip(*lacking, strict=True), strict=True)
    ]


# ------------------------------------------------------------------ the search for the words

Scored = Callable[[Tensor], Tensor]  # parts kept (B, W) bool -> score of the prediction (B,)


def plans(
    scored: Scored, words: Tensor, new: Tensor, safe_score: float, separable: bool
) -> list[Plan | None]:
    """The reduced prompts of the samples `new`, (B,) bool.

    Each part is left out once: the lower the score without it, the more it matters. The first reduced
    prompt lacks parts that matter most, as few as draw nothing stored. The second one keeps these and
    lacks others. There is no second one if the parts that matter most are a copy by themselves.

    This takes max(words) evaluations if leaving out one part is enough, or else up to four times as many.
    If the parts are not `separable`, there is only the first prompt, which lacks the last parts, and it
    takes log2(max(words)) evaluations.

    Parameters
    ----------
    words : Tensor (B,) int64
        The number of parts of each sample's prompt.
    safe_score : float
        Largest score that counts as nothing stored.
    """
    width, batch = int(words.max()), len(words)
    whole = torch.arange(width) < words[:, None]

    def keep(removed: Removed) -> Tensor:
        kept = whole.clone()
        for row, parts in zip(kept, removed, strict=True):
            row[list(parts)] = False
        return kept

    def safe(removed: Removed) -> list[bool]:
        return (scored(keep(removed)) <= safe_score).tolist()

    orders = [list(range(int(count)))[::-1] for count in words]
    if not separable:
        kept = keep(_first(safe, orders, [False] * batch, new))
        return [
            Plan((row,), tuple(order)) if wanted else None
            for row, order, wanted in zip(kept, orders, new.tolist(), strict=True)
        ]
    single = torch.stack([scored(keep([[part]] * batch)) for part in range(width)], dim=1).tolist()
    orders = [sorted(order, key=row.__getitem__) for order, row in zip(orders, single, strict=True)]

    def needed(orders: Removed, wanted: Tensor) -> list[list[int]]:
        alone = [
            bool(order) and row[order[0]] <= safe_score
            for order, row in zip(orders, single, strict=True)
        ]
        return _thinned(safe, _first(safe, orders, alone, wanted), wanted)

    removed = needed(orders, new)
    others = [
        [part for part in order if part not in gone]
        for order, gone in zip(orders, removed, strict=True)
    ]
    two = new & torch.tensor([bool(order) for order in others])
    if two.any():  # what the first prompt lacks, by itself
        two &= torch.tensor(safe(others))
    also = needed(others, two) if two.any() else others
    return [
        Plan((first, second) if both else (first,), tuple(order)) if wanted else None
        for first, second, both, order, wanted in zip(
            keep(removed), keep(also), two.tolist(), orders, new.tolist(), strict=True
        )
    ]


Removed = Sequence[Sequence[int]]  # for each sample the parts that are left out


def _first(
    safe: Callable[[Removed], list[bool]], orders: Removed, alone: Sequence[bool], wanted: Tensor
) -> list[list[int]]:
    """The first parts of each order, as few as are enough, by bisection. All of them count as enough.

    `alone` says for which samples the first one is known to be enough.
    """
    low = torch.zeros(len(orders), dtype=torch.long)
    high = torch.tensor(
        [1 if one else len(order) for one, order in zip(alone, orders, strict=True)]
    )
    while bool((high - low > 1)[wanted].any()):
        middle = (low + high) // 2
        enough = torch.tensor(
            safe([order[:count] for order, count in zip(orders, middle.tolist(), strict=True)])
        )
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return [list(order[:count]) for order, count in zip(orders, high.tolist(), strict=True)]


def _thinned(
    safe: Callable[[Removed], list[bool]], removed: list[list[int]], wanted: Tensor
) -> list[list[int]]:
    """The same without the parts that need not be left out: all but the last are put back once."""
    longest = max(
        (len(parts) for parts, one in zip(removed, wanted.tolist(), strict=True) if one), default=0
    )
    kept = [list(parts) for parts in removed]
    for place in range(longest - 2, -1, -1):
        tried = [
            [part for part in now if place >= len(parts) - 1 or part != parts[place]]
            for now, parts in zip(kept, removed, strict=True)
        ]
        kept = [
            new if enough else now
            for new, now, enough in zip(tried, kept, safe(tried), strict=True)
        ]
    return kept


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
