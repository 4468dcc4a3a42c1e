"""A network's predictions for noisy latents with and without the prompt, for ε, v and flow networks.

Hosts give the denoised prediction D of every kind of network. Papers on detection use ε, v or the
score s = ∇log p. All of these are affine in D at a given x and σ, so they can be computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON, V, FLOW = "epsilon", "v", "flow"
KINDS = (EPSILON, V, FLOW)


@dataclass(frozen=True)
class Predictions:
    """A network's predictions for a batch of noisy latents at one noise level.

    Attributes
    ----------
    x : Tensor (B, C, …)
        The latents in the sampler's units: x0 + σ·ε, for flow models (1 − σ)·x0 + σ·ε.
    sigma : float
        Above 0. k-diffusion's σ = √((1 − ᾱ)/ᾱ), for flow models their own σ, at most 1.
    cond, uncond : Tensor, as x
        D_c and D_u, the denoised predictions for the prompt and for no prompt.
    kind : one of `KINDS`
        The network's own output. Sigma-data (EDM) networks count as ε.
    """

    x: Tensor
    sigma: float
    cond: Tensor
    uncond: Tensor
    kind: str = EPSILON

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.sigma <= 0 or (self.kind == FLOW and self.sigma > 1):
            raise ValueError(f"sigma {self.sigma} is not a noise level of a {self.kind} network")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Predictions:
        return Predictions(self.x[rows], self.sigma, self.cond[rows], self.uncond[rows], self.kind)


def unrescaled(noise: Tensor, input_scale: float) -> Tensor:
    """Noise z (B, …) -> the x whose scaled network input is z.

    `input_scale` is the factor by which the sampler multiplies x before the network: 1/√(1 + σ²) for ε
    and v, 1 for flow. The anisotropy paper gives the network the same z at a high and a low noise level.
    """
    return noise / input_scale


def epsilon(p: Predictions, denoised: Tensor) -> Tensor:
    """The noise that remains if `denoised` is D: ε = (x − D)/σ, for flow (x − (1 − σ)·D)/σ."""
    share = 1 - p.sigma if p.kind == FLOW else 1.0
    noise: Tensor = (p.x - share * denoised) / p.sigma
    return noise


def output(p: Predictions, denoised: Tensor) -> Tensor:
    """The network's own output.

    ε: (x − D)/σ. v = √ᾱ·ε − √(1−ᾱ)·x0: (x − (1 + σ²)·D)/(σ·√(1 + σ²)). Flow, ε − x0: (x − D)/σ.
    """
    power = 1 + p.sigma**2 if p.kind == V else 1.0
    predicted: Tensor = (p.x - power * denoised) / (p.sigma * power**0.5)
    return predicted


def deviation(p: Predictions) -> float:
    """Standard deviation of the noise in the network's coordinates: √(1 − ᾱ), for flow σ."""
    return p.sigma if p.kind == FLOW else p.sigma / (1 + p.sigma**2) ** 0.5


def score_difference(p: Predictions) -> Tensor:
    """s_Δ = s_c − s_u = −(ε_c − ε_u)/√(1 − ᾱ), the guidance vector in score units.

    In terms of D: (D_c − D_u)/(σ·√(1 − ᾱ)), for flow (1 − σ)/σ²·(D_c − D_u). For flow that is 0 at
    σ = 1 for every prompt, because pure noise has the same score for all. There the difference of the
    outputs is used instead.
    """
    if p.kind == FLOW and p.sigma > 0.99:
        return output(p, p.uncond) - output(p, p.cond)
    return -(epsilon(p, p.cond) - epsilon(p, p.uncond)) / deviation(p)


def flat(x: Tensor) -> Tensor:
    """(B, …) -> (B, N) float32."""
    return torch.flatten(x, 1).float()
