"""Is a finished picture a copy? Two judges: the descriptor, and one that the guidance never followed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from . import judge
from .probe import Probe

COPY = {"cosine": 0.5, "nl2": -1.4}  # Somepalli et al. 2023 (SSCD); Carlini et al. 2023 (nL2)


@dataclass(frozen=True)
class Verdict:
    """What is known of one finished picture.

    similarity : float, in the descriptor's units; threshold : float, above it the descriptor says copy;
    zncc : float in [−1, 1], the second judge's correlation with the nearest picture (see `judge.zncc`);
    neighbor : int, row id; source, caption : str, of that picture; copy : bool, either judge says so.
    """

    similarity: float
    threshold: float
    zncc: float
    neighbor: int
    source: str
    caption: str
    copy: bool
    words: str

    def to_json(self) -> dict:
        return asdict(self)


def verdict(probe: Probe, pictures: Tensor, threshold: float | None = None) -> list[Verdict]:
    """Judge pictures (B, 3, H, W) in [0, 1]. `threshold` defaults to the literature's for the metric.

    The second judge looks at the descriptor's nearest picture and at its mirror image.
    """
    threshold = COPY[probe.metric] if threshold is None else threshold
    if not math.isfinite(threshold):
        raise ValueError("threshold must be a finite number")
    index = probe.searcher.index
    match = probe.look_at_pictures(pictures)
    blind = judge.over_index(pictures, match.ids[:, None], lambda i: thumbnail(index, i))
    verdicts = []
    for similarity, i, correlation in zip(
        match.similarity.tolist(), match.ids.tolist(), blind.tolist(), strict=True
    ):
        first, second = similarity > threshold, correlation > judge.ZNCC_COPY
        verdicts.append(
            Verdict(
                similarity, threshold, correlation, i, index.source(i), index.caption(i),
                first or second, _words(first, second, index.source(i)),
            )
        )  # fmt: skip
    return verdicts


def thumbnail(index, i: int) -> Tensor:
    """Row i's thumbnail as (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(index.thumbnail(i), dtype=np.float32)).permute(2, 0, 1) / 255


def _words(first: bool, second: bool, source: str) -> str:
    if first and second:
        return f"A copy of {source}: both judges agree."
    if first:
        return f"Too close to {source} by the descriptor's measure."
    if second:
        return f"Same composition as {source}, though the descriptor does not see it: look at both."
    return f"Not a copy of anything in this index (nearest: {source})."
