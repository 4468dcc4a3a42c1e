"""λ_t, the threshold of the gate over the course of sampling (AMG, §3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("parabolic", "exponential", "constant")


@dataclass(frozen=True)
class Schedule:
    """A threshold that rises from `start` (pure noise, t = 1) to `end` (finished picture, t = 0).

    Parameters
    ----------
    kind : {"parabolic", "exponential", "constant"}
        parabolic: λ(t) = end − (end − start)·t²; exponential: λ(t) = start + (end − start)·e^(−5t),
        the curve of the authors' code (0.3 + 0.1·e^(−0.005 T)); constant: λ(t) = end.
    start, end : float
        On the scale of `metrics.score`, or in the descriptor's own unit (SSCD cosine, −nL2). Larger =
        closer.
    """

    kind: str
    start: float
    end: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError("threshold start and end must be finite numbers")

    def __call__(self, t: float) -> float:
        """λ at diffusion time t in [0, 1] (1 = pure noise)."""
        t = min(1.0, max(0.0, t))
        if self.kind == "parabolic":
            return self.end - (self.end - self.start) * t * t
        if self.kind == "exponential":
            return self.start + (self.end - self.start) * math.exp(-5 * t)
        return self.end
