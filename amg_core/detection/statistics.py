"""Statistics of predictions for pure noise: pure functions, one value a sample, larger = more suspicious.

norm                ‖D_c − D_u‖ at the highest level (Wen et al., ICLR 2024, at the first step)
alignment           cos(s_u, s_Δ) near zero noise (Asthana and Belagiannis, ICLR 2026)
alignment_pixelwise the same, as their code computes it
low_norm            the norm near zero noise
agreement           how little the prediction for the prompt depends on the noise (new here)

The paper's metric is γ1·norm + γ2·alignment: `anisotropy`. Gradients pass through all of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import predictions as of
from .predictions import Predictions

NAMES = ("norm", "alignment", "alignment_pixelwise", "low_norm", "agreement")
WEIGHT = (
    2.0  # γ2/γ1 of the paper for Stable Diffusion 1.4; 0.1 for 2.0, 0.5 for Realistic Vision 5.1
)
LOW = 0.041  # share of the noise schedule: the code's timesteps[-3] of 50 steps, 41 of 1,000


def norm(p: Predictions) -> Tensor:
    """‖s_Δ‖₂ of each sample, (B,)."""
    norms: Tensor = of.flat(of.score_difference(p)).norm(dim=1)
    return norms


def alignment(p: Predictions) -> Tensor:
    """cos(s_u, s_Δ) of the flattened scores, (B,) in [−1, 1], as in the paper.

    Because s = −ε/√(1 − ᾱ), this is cos(ε_u, ε_c − ε_u).
    """
    uncond = of.epsilon(p, p.uncond)
    return F.cosine_similarity(of.flat(uncond), of.flat(of.epsilon(p, p.cond) - uncond), dim=1)


def alignment_pixelwise(p: Predictions) -> Tensor:
    """The alignment of the authors' code, (B,) in [−1, 1].

    The cosine over channels at every pixel, averaged over pixels. It uses the raw outputs, which for v
    networks are not ε.
    """
    uncond = of.output(p, p.uncond).float()
    difference = of.output(p, p.cond).float() - uncond
    return F.cosine_similarity(uncond, difference, dim=1).flatten(1).mean(dim=1)


def anisotropy(high: Predictions, low: Predictions, weight: float = WEIGHT) -> Tensor:
    """M/γ1 = ‖s_Δ(x_T, T)‖ + γ2/γ1·cos(s_u, s_Δ)(x_T, t ≈ 0) of each sample, (B,).

    The metric of Asthana and Belagiannis, ICLR 2026, up to the factor γ1. It detects memorised prompts, and
    minimised over a prompt's embedding it mitigates them. `high` and `low` are of the same unscaled noise
    (`predictions.unrescaled`), at the highest noise level and near zero. `weight` is γ2/γ1, which the
    authors set by hand for each model.
    """
    return norm(high) + weight * alignment(low)


def agreement(cond: Tensor) -> Tensor:
    """−log of the standard deviation of D_c over noises z: (n ≥ 2, C, …) -> scalar.

    By Tweedie's second-order formula ∂D/∂x = Cov[x0 | x]/σ². So over x = σ·z, D varies by about Cov/σ,
    where Cov is the covariance of the pictures that are possible given prompt and noise. For a prompt
    that allows only one picture it is 0. This measures the sharpness of Jeon et al. (ICML 2025) without
    derivatives.
    """
    if len(cond) < 2:
        raise ValueError("agreement compares predictions for at least two noises")
    variance = of.flat(cond).var(dim=0).mean()
    return -0.5 * variance.clamp_min(1e-20).log()


def measure(high: Predictions, low: Predictions) -> list[dict[str, float]]:
    """All statistics of one prompt, from predictions for the same n noises at two noise levels.

    Entry i has the means over the first i + 1 noises. Entry 0 has no `agreement`.
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
    values = values.cpu().double()  # not every accelerator supports float64
    yield from (values.cumsum(0) / torch.arange(1, len(values) + 1)).tolist()
