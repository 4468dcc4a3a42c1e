"""Off the neighbour's picture itself, for samples that no prompt leads elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Change, Guidance, Step, StepContext


@dataclass(frozen=True)
class Repulsion(Guidance):
    """D ← D − r·a·‖D°‖·n for trapped samples.

    n is the unit direction in which the prediction that is trapped becomes more like its picture
    (`Matcher.towards`), a in [0, 1] how much of it there is, ° takes away each channel's mean, and r grows
    with every step. Unlike the gradient of a distance, which ends at the edge of a ball around the
    picture and finds the cheapest way there, it stays one direction in low frequencies and does not
    stop there.

    Attributes
    ----------
    first, growth, most : float
        r at first, by what it grows a step, and its largest value, in lengths of what D shares with the
        picture.
    until : float
        Diffusion time below which it would only leave marks.
    """

    first: float = 3.0
    growth: float = 2.0
    most: float = 9.0
    until: float = 0.1
    kind: ClassVar[str] = "repulsion"

    def start(self, batch: int) -> Tensor:
        return torch.full((batch,), self.first)

    def step(self, context: StepContext, memory: Tensor) -> Step:
        rows, prediction = context.trapped, context.watched
        if context.t <= self.until or not rows.any():
            return Step([], context, memory)
        delta = torch.zeros_like(prediction)
        for i in rows.nonzero()[:, 0].tolist():
            direction, share = context.matcher.towards(prediction[i : i + 1], context.match[i])
            spread = prediction[i] - prediction[i].mean(dim=(1, 2), keepdim=True)
            length = self.factor * float(memory[i]) * share * float(spread.norm())
            delta[i] = -length * direction[0]
        grown = torch.where(rows, (memory * self.growth).clamp(max=self.most), memory)
        return Step([Change("dissimilarity", delta, rows)], context, grown)
