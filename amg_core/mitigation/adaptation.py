"""Prompt adaptation: changes a prompt's embedding until a detection score no longer calls it memorised.

Wen et al., ICLR 2024, use the norm of the guidance vector at the first step as the score
(`transition.guidance_norm`). Asthana and Belagiannis, ICLR 2026, do the same with their own score
(`detection.statistics.anisotropy`). The score is a callable, so this serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AMGError

# Embedding (1, T, C) float32 -> the score of one prompt with one latent, a scalar, larger = more memorised.
# It is called with and without gradients.
Score = Callable[[Tensor], Tensor]

NORM, ANISOTROPY = METRICS = ("norm", "anisotropy")  # the names of the two papers' scores
ITERATIONS, RATE = 10, 0.05  # Wen et al.


@dataclass(frozen=True)
class Adapted:
    """The adapted embedding of one prompt.

    Attributes
    ----------
    embedding : Tensor (1, T, C)
        The given tensor itself if its score was not above the target.
    scores : list of float
        Scores of all embeddings tried, beginning with the given one.
    best : int
        The number of `embedding` among them.
    """

    embedding: Tensor
    scores: tuple[float, ...]
    best: int
    target: float

    @property
    def steps(self) -> int:
        """The number of gradient steps."""
        return len(self.scores) - 1

    @property
    def reached(self) -> bool:
        return self.scores[self.best] <= self.target


def adapt(
    embedding: Tensor,
    score: Score,
    target: float,
    *,
    iterations: int = ITERATIONS,
    rate: float = RATE,
    on_step: Callable[[int, float], None] | None = None,
) -> Adapted:
    """Change `embedding` (1, T, C) by AdamW steps until `score` is at most `target`.

    It takes one prompt and one latent at a time, which saves memory and keeps samples independent. The
    first score is computed without gradients, so an ordinary prompt costs only that. If the target is
    not reached, the embedding with the lowest score is returned.

    Parameters
    ----------
    target : float
        In units of the score, which differ from model to model.
    iterations, rate : int, float
        Largest number of steps, and the learning rate.
    on_step : callable, optional
        Called after each evaluation with the number of steps so far and the score. It may raise.

    Raises
    ------
    AMGError
        The score or its gradient is not finite.
    """
    tell = on_step or (lambda step, value: None)
    scores: list[float] = []
    best, lowest = 0, embedding

    def good_enough(current: Tensor) -> bool:
        nonlocal best, lowest
        scores.append(_finite(current.detach()))
        if scores[-1] < scores[best]:
            best, lowest = len(scores) - 1, value.detach().clone().to(embedding.dtype)
        tell(len(scores) - 1, scores[-1])
        return scores[-1] <= target

    value = embedding.detach().clone().float()
    with torch.no_grad():
        if good_enough(score(value)) or iterations < 1:
            return Adapted(embedding, tuple(scores), 0, target)
    value.requires_grad_(True)
    optimiser = torch.optim.AdamW([value], lr=rate)
    for step in range(iterations):
        with torch.enable_grad():
            current = score(value)
            if step > 0 and good_enough(current):
                break
            (value.grad,) = torch.autograd.grad(current, value)
        _finite(value.grad.abs().sum())
        optimiser.step()
    else:
        with torch.no_grad():
            good_enough(score(value))
    return Adapted(lowest, tuple(scores), best, target)


def _finite(value: Tensor) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise AMGError(
            "The score of this prompt, or its gradient, is not a finite number: half precision may be "
            "too coarse for this model. Load it in bf16 or fp32, or lower learning_rate."
        )
    return number
