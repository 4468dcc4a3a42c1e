"""What is measured in predictions for pure noise. Pure functions, per sample; larger = more suspicious.

norm                ‖D_c − D_u‖ at the highest level (Wen et al., ICLR 2024, at the first step)
alignment           cos(s_u, s_Δ) near zero noise (Asthana and Belagiannis, ICLR 2026)
alignment_pixelwise the same as their code computes it
low_norm            the norm near zero noise
agreement           how little the prediction for the prompt depends on the noise (ours)

The paper's metric is γ1·norm + γ2·alignment: `anisotropy`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import predictions as of
from .predictions import Predictions

NAMES = ("norm", "alignment", "alignment_pixelwise", "low_norm", "agreement")
LOW = 0.041  # share of the noise schedule: the code's timesteps[-3] of 50 steps, 41 of 1,000


def norm(p: Predictions) -> Tensor:
    """‖s_Δ‖₂ over all of a sample (B,)."""
    norms: Tensor = of.flat(of.score_difference(p)).norm(dim=1)
    return norms


def alignment(p: Predictions) -> Tensor:
    """cos(s_u, s_Δ) of the flattened scores (B,) in [−1, 1], the paper's. As s = −ε/√(1 − ᾱ),
    this is cos(ε_u, ε_c − ε_u)."""
    uncond = of.epsilon(p, p.uncond)
    return F.cosine_similarity(of.flat(uncond), of.flat(of.epsilon(p, p.cond) - uncond), dim=1)


def alignment_pixelwise(p: Predictions) -> Tensor:
    """The code's: the cosine over channels at every pixel, then its mean over pixels; of the raw
    outputs, which for v networks are not ε (B,) in [−1, 1]."""
    uncond = of.output(p, p.uncond).float()
    difference = of.output(p, p.cond).float() - uncond
    return F.cosine_similarity(uncond, difference, dim=1).flatten(1).mean(dim=1)


def agreement(cond: Tensor) -> Tensor:
    """−log of the standard deviation of D_c over noises z: scalar, from (n ≥ 2, C, …).

    By Tweedie's second formula ∂D/∂x = Cov[x0 | x]/σ². So over x = σ·z, D varies by about Cov/σ: the
    covariance of the pictures that prompt and noise leave possible. A prompt that leaves one
    picture has none. The sharpness of Jeon et al. (ICML 2025), without differentiating anything.
    """
    if len(cond) < 2:
        raise ValueError("agreement compares predictions for at least two noises")
    variance = of.flat(cond).var(dim=0).mean()
    return -0.5 * variance.clamp_min(1e-20).log()


def measure(high: Predictions, low: Predictions) -> list[dict[str, float]]:
    """All statistics of one prompt, from predictions for the same n noises at two levels.

    Entry i is what the first i + 1 noises say, means over them; the first has no `agreement`.
    """
    columns = {
        "norm": norm(high),
        "alignment": alignment(low),
        "alignment_pixelwise": alignment_pixelwise(low),
        "low_norm": norm(low),
    }
    means = {name: list(_running_mean(column)) for name, column in columns.items()}
    figures = [{name: mean[i] for name, mean in means.items()} for i in range(len(high))]
    for i in range(1, len(high)):
        figures[i]["agreement"] = float(agreement(high.cond[: i + 1]))
    return figures


def _running_mean(values: Tensor) -> Iterator[float]:
    values = values.cpu().double()  # not every accelerator knows float64
    yield from (values.cumsum(0) / torch.arange(1, len(values) + 1)).tolist()
