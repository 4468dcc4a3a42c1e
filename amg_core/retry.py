"""Retries: finished pictures are checked, and copies are drawn again with stronger settings.

During sampling the guard compares noisy predictions, but the finished picture is what counts. So it is
decoded and checked (`verdict`). Samples that are still copies are drawn again from the same noise, with
stronger settings and as suspects: their prompt is memorised, so they are steered from the first step.
Samples that passed are kept unchanged, bit for bit.

A sample that no words led away from a stored picture was pushed off it, and the push can be seen. Where the
host can start from other noise, such a sample is drawn again from there, and becomes a picture of the
model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .hosts import Generation
from .run import Drawn, Settings
from .similarity.verdict import Verdict


@dataclass(frozen=True)
class Attempt:
    """One drawing: the samples that were drawn, its report, and the verdict on each of them.

    `suspects` are those of the samples that were steered from the first step.
    """

    samples: list[int]
    report: dict[str, Any]
    verdicts: list[Verdict]
    suspects: Sequence[int] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of `until_no_copy`.

    Attributes
    ----------
    latents : Tensor (B, C, H, W)
    verdicts : list of Verdict
        One for each sample, on `latents`.
    kept : list of int
        The number of the attempt that each sample is from.
    attempts : list of Attempt
        All drawings. The first one has all samples, the others those that were drawn again.
    named : sequence of collections of int
        For each sample the rows of the index that its checks compared in any case.
    """

    latents: Tensor
    verdicts: list[Verdict]
    kept: list[int]
    attempts: list[Attempt]
    named: Sequence[Collection[int]] = ()

    @property
    def copies(self) -> list[int]:
        """Samples that are still copies after all retries."""
        return [i for i, verdict in enumerate(self.verdicts) if verdict.copy]


def until_no_copy(generation: Generation, settings: Settings, batch: int, retries: int) -> Outcome:
    """Draw, judge, and draw again copies and pictures that were pushed off one, at most `retries` times.

    If a sample is a copy every time, the attempt that exceeds the limits of the two checks least is kept.
    One that was pushed off a picture is kept if the others are copies.

    What a sample was near in any drawing, or a copy of, is compared in all later ones. After an
    interrupt nothing is drawn again, and a retry that was cut short is thrown away.
    """
    named: list[set[int]] = [set() for _ in range(batch)]

    def judged(drawn: Drawn, samples: list[int]) -> list[Verdict]:
        for i in samples:
            named[i] |= set(drawn.acted_on[i])
        found = list(generation.judge(drawn.latents[samples], [named[i] for i in samples], samples))
        for i, verdict in zip(samples, found, strict=True):
            if verdict.copy:
                named[i].add(verdict.neighbor)
        return found

    nobody = torch.zeros(batch, dtype=torch.bool)
    drawn = generation.draw(settings, nobody, nobody)
    latents, everyone = drawn.latents, list(range(batch))
    verdicts, repelled = judged(drawn, everyone), _repelled(generation, drawn, batch)
    attempts = [Attempt(everyone, drawn.report, list(verdicts))]
    kept = [0] * batch
    for number in range(1, retries + 1):
        again = [i for i in everyone if verdicts[i].copy or repelled[i]]
        if not again or settings.off or generation.stopped():
            break
        anew = torch.tensor(repelled)
        suspects = torch.tensor([verdict.copy for verdict in verdicts]) & ~anew
        stronger = escalated(settings, number) if suspects.any() else settings
        drawn = generation.draw(stronger, suspects, anew)
        if generation.stopped():
            break
        found, pushed = judged(drawn, again), _repelled(generation, drawn, batch)
        steered = [i for i in again if suspects[i]]
        attempts.append(Attempt(again, drawn.report, found, steered))
        for i, verdict in zip(again, found, strict=True):
            new, old = (
                (each.copy, push[i], excess(each))
                for each, push in ((verdict, pushed), (verdicts[i], repelled))
            )
            if new < old:
                latents = torch.where(_only(i, latents), drawn.latents, latents)
                verdicts[i], kept[i], repelled[i] = verdict, number, pushed[i]
    return Outcome(latents, verdicts, kept, attempts, named)


def _repelled(generation: Generation, drawn: Drawn, batch: int) -> list[bool]:
    """Which samples were pushed off a picture, and can become another one."""
    return list(drawn.repelled) if generation.restarts() else [False] * batch


def escalated(settings: Settings, number: int) -> Settings:
    """The settings of retry `number`, 1, 2, …: lower thresholds, and stronger steering."""
    schedule, lower = settings.schedule, 0.75**number
    return replace(
        settings,
        schedule=replace(schedule, start=schedule.start * lower, end=schedule.end * lower),
        guidance=tuple(way.retried(number) for way in settings.guidance),
        release=settings.release - 0.1 * number,
    )


def excess(verdict: Verdict) -> float:
    """By how much a picture exceeds the limits of the two checks. At most 0 if neither says copy."""
    first = verdict.similarity - verdict.threshold
    return max(first, verdict.zncc - verdict.zncc_threshold)


def _only(i: int, like: Tensor) -> Tensor:
    """A mask of sample i that broadcasts over `like`."""
    mask = torch.zeros(len(like), dtype=torch.bool, device=like.device)
    mask[i] = True
    return mask.view(-1, *[1] * (like.ndim - 1))
