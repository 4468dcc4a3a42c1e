"""The paper's terms with the differences of the authors' code, github.com/chenchen-usyd/AMG.

That code is for Stable Diffusion and SSCD. Its differences from the paper: despecification also acts
outside the gate, wherever σ_t > 0. c2 is (s0 − 1 − s1)/0.3. After a trigger deduplication goes on for ten
steps. The similarity is computed anew after these two terms, and Eq. 17 acts if it is still above λ_t, with
a c3 that grows towards the end of sampling. λ_t is exponential.

Not taken over: the first 21 pictures of a folder without guidance, pictures for SSCD without its
normalisation, the most common caption of 1,000 neighbours by CLIP (here `Matcher.caption`), and the batch
of one. The move of Eq. 17 is bounded (`paper.FARTHEST`), which the code does not do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..similarity import metrics
from ..similarity.matcher import Match
from .base import StepContext
from .paper import Deduplication, Despecification, Dissimilarity, compared_again


def reference_c3(similarity: Tensor, t: float) -> Tensor:
    """100·(σ_t − 0.3)·e^((1000 − T)/170), (B,) -> (B,); t in [0, 1], T = 1000 t."""
    return 100 * (similarity - 0.3) * math.exp(1000 * (1 - t) / 170)


@dataclass(frozen=True)
class ReferenceDespecification(Despecification):
    """Despecification of all samples with σ_t > 0 in its own unit, active or not.

    A cosine is nearly always above 0. −nL2 never is, so with it the gate holds for this term, too.
    """

    c1: float = 13.0

    def rows(self, context: StepContext) -> Tensor:
        return context.active | (context.match.similarity > 0)


@dataclass(frozen=True)
class ReferenceDeduplication(Deduplication):
    """c2·(s0 − 1 − s1), with c2 = 1/0.3, at active steps and `hold` steps after each."""

    c2: float = 1 / 0.3
    hold: ClassVar[int] = 10

    def weight(self, context: StepContext) -> Tensor:
        return self.c2 * self.factor * (context.cfg_scale - 1 - context.spent)


@dataclass(frozen=True)
class ReferenceDissimilarity(Dissimilarity):
    """c3·`reference_c3`, at D with the changes of the other terms, if that is still above λ_t.

    With nL2, for which the code has no constants, the score takes the place of σ_t.
    """

    c3: float = 1.0

    def compared(self, context: StepContext) -> tuple[Tensor, Match]:
        return compared_again(context)

    def constant(self, context: StepContext, i: int, similarity: Tensor) -> Tensor:
        above = similarity > float(context.threshold[i])
        metric = context.matcher.metric
        if metric != "cosine":
            typical, limit = context.match.typical[i : i + 1], context.match.limit[i : i + 1]
            similarity = metrics.score(metric, similarity, typical, limit)
        c3 = reference_c3(similarity, context.t).clamp_min(0)
        return self.c3 * self.factor * torch.where(above, c3, 0.0)
