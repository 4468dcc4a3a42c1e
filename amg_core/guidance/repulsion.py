"""Repulsion: steers away from the neighbour's picture itself, for samples that no shorter prompt helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Change, Guidance, Step, StepContext, acted_at, grown, never


@dataclass(frozen=True)
class Repulsion(Guidance):
    """D ← D − r·a·‖D°‖·n for trapped samples.

    n is the unit direction in which the trapped prediction becomes more like its picture
    (`Matcher.towards`), a in [0, 1] is the picture's share of the prediction, ° removes each channel's
    mean, and r grows as the noise falls. The gradient of a distance would vanish at a certain distance and
    change only what is cheapest to change. This is one fixed direction in low frequencies without such
    an end.

    Attributes
    ----------
    first, growth, most : float
        The first r, its factor for every `base.STRIDE` of log σ, and its largest value, as multiples of
        a·‖D°‖.
    until : float
        Diffusion time below which repulsion stops, because it would only leave visible marks.
    """

    first: float = 3.0
    growth: float = 2.0
    most: float = 9.0
    until: float = 0.1
    kind: ClassVar[str] = "repulsion"

    def start(self, batch: int) -> tuple[Tensor, Tensor]:
        return torch.full((batch,), self.first), never(batch)

    def step(self, context: StepContext, memory: tuple[Tensor, Tensor]) -> Step:
        rows, prediction = context.trapped, context.watched
        if context.t <= self.until or not rows.any():
            return Step([], context, memory)
        strength = grown(memory[0], self.growth, self.most, memory[1], context.sigma)
        delta = torch.zeros_like(prediction)
        for i in rows.nonzero()[:, 0].tolist():
            direction, share = context.matcher.towards(prediction[i : i + 1], context.match[i])
            spread = prediction[i] - prediction[i].mean(dim=(1, 2), keepdim=True)
            length = self.factor * float(strength[i]) * share * float(spread.norm())
            delta[i] = -length * direction[0]
        memory = strength, acted_at(rows, context.sigma)
        return Step([Change(self.kind, delta, rows)], context, memory)
