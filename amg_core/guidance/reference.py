"""The paper's terms with the differences of the authors' code, github.com/chenchen-usyd/AMG.

Despecification also acts outside the gate, c2 = (s0 − 1 − s1)/0.3, and c3 grows towards the end of
sampling. The prediction for the neighbour's caption is computed at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..similarity.matcher import Match
from .base import StepContext
from .paper import Deduplication, Despecification, Dissimilarity


def reference_c3(similarity: Tensor, t: float) -> Tensor:
    """100·(σ_t − 0.3)·e^((1000 − T)/170), (B,) -> (B,); t in [0, 1], T = 1000 t."""
    return 100 * (similarity - 0.3) * math.exp(1000 * (1 - t) / 170)


@dataclass(frozen=True)
class ReferenceDespecification(Despecification):
    """Despecification of all samples that have anything in common with their neighbour."""

    def rows(self, context: StepContext) -> Tensor:
        return context.active | (context.match.score > 0)


@dataclass(frozen=True)
class ReferenceDeduplication(Deduplication):
    """c2·(s0 − 1 − s1), with c2 = 1/0.3."""

    c2: float = 1 / 0.3
    lasting: ClassVar[int] = 1

    def weight(self, context: StepContext) -> Tensor:
        return self.c2 * self.factor * (context.cfg_scale - 1 - context.spent)


@dataclass(frozen=True)
class ReferenceDissimilarity(Dissimilarity):
    """c3·`reference_c3`."""

    def constant(self, context: StepContext, match: Match, similarity: Tensor) -> Tensor:
        score = similarity if context.own_units else match.score
        return self.c3 * self.factor * reference_c3(score, context.t)
