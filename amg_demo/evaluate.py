"""The paper's figures for a set of generated pictures, and measures that never steer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from amg_core.descriptors import create
from amg_core.similarity import metrics, verifier
from amg_core.similarity.matcher import Matcher

from .model import Scorer

SIDE = 32  # nL2 is taken at CIFAR's size, as in the papers whose thresholds are 1.4 and 1.6


@dataclass(frozen=True)
class Scores:
    """One figure a picture, (B,) each; see `score`."""

    nl2: Tensor
    score: Tensor
    zncc: Tensor
    alignment: Tensor
    features: Tensor


@torch.inference_mode()
def score(
    pictures: Tensor, matcher: Matcher, training: Tensor, scorer: Scorer, subjects: Tensor
) -> Scores:
    """Grade pictures (B, 3, H, W) against the training set (N, 3, H, W), both in [0, 1].

    nl2: Eq. 8 to the nearest training picture, smaller = closer. score: the guard's own measure.
    zncc: largest correlation with any training picture or its mirror image. alignment: probability
    that the scorer gives to the prompt's subject (`subjects`, labels (B,)). features: (B, D).
    """
    distances = torch.cdist(_small(pictures), _small(training)).sort(dim=1).values
    distances = distances[:, : metrics.NEIGHBORS]
    graded = scorer(pictures)
    return Scores(
        nl2=distances[:, 0] / (metrics.ALPHA * distances.mean(dim=1)),
        score=matcher.match_pictures(pictures).score,
        zncc=verifier.zncc_matrix(pictures, torch.cat([training, training.flip(-1)])).amax(dim=1),
        alignment=graded["subject"].softmax(dim=1).gather(1, subjects[:, None])[:, 0],
        features=graded["features"],
    )


def sscd_embedding(weights: Path) -> Callable[[Tensor], Tensor]:
    """Pictures (B, 3, H, W) -> unit rows (B, D), by Meta's network at full detail."""
    descriptor = create("sscd", weights)
    scale = descriptor.spec.scales[-1]

    @torch.inference_mode()
    def embed(pictures: Tensor) -> Tensor:
        return torch.cat([descriptor.embed(part, scale) for part in pictures.split(8)])

    return embed


def _small(pictures: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(pictures, SIDE).flatten(1)


def among_themselves(training: Tensor) -> tuple[Tensor, Tensor]:
    """nL2 (N,) and ZNCC (N,) of each training picture to its nearest other one: the base rate."""
    rows = _small(training)
    distances = torch.cdist(rows, rows).sort(dim=1).values
    others = distances[:, 1 : metrics.NEIGHBORS + 1]  # the first is the picture itself
    every = verifier.zncc_matrix(training, torch.cat([training, training.flip(-1)]))
    own = torch.eye(len(training), dtype=torch.bool).repeat(1, 2)
    nearest = every.masked_fill(own, -1).amax(dim=1)
    return others[:, 0] / (metrics.ALPHA * others.mean(dim=1)), nearest


def kid(features: Tensor, reference: Tensor) -> float:
    """Kernel Inception Distance (Binkowski et al. 2018) on given features: unbiased, cubic kernel.

    (A, D), (B, D) -> 0 where both come from one distribution; may fall a little below 0.
    """
    scale = reference.std(dim=0).clamp_min(1e-6)
    x, y = features / scale, reference / scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        n = len(k)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    xx, yy = off_diagonal(kernel(x, x)), off_diagonal(kernel(y, y))
    return float(xx + yy - 2 * kernel(x, y).mean())


def share(values: Tensor) -> float:
    """Percentage of True."""
    return 100 * float(values.float().mean())


def percentile(values: Tensor, percent: float) -> float:
    """A percentile, interpolated linearly. The paper's "Top 5%" is the 95th of the similarities."""
    return float(values.double().quantile(percent / 100))
