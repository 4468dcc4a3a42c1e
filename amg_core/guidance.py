"""The guidance of AMG (Chen, Liu, Xu, CVPR 2024), in denoised space, as pure functions of tensors.

Hosts hand every kind of model (ε, v, flow) as the predicted clean latent, so the paper's ε-updates are
written there: D, D_c, D_u, D_n are the prediction that leaves classifier-free guidance and those for
the prompt, for no prompt and for the neighbour's caption. All are (B, C, H, W); strengths are (B,).
Every function works per sample: no reduction ever crosses the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, …), on the device and in the type of `like`."""
    return per_sample.to(like).reshape(-1, *[1] * (like.ndim - 1))


def despecification_strength(closeness: Tensor, c1: float, cfg_scale: float) -> Tensor:
    """s1 = clamp(c1·σ_t, 0, s0 − 1)   (Eq. 14). closeness (B,) in [0, 1] -> (B,)."""
    return (c1 * closeness).clamp(0, max(0.0, cfg_scale - 1))


def deduplication_strength(
    closeness: Tensor, s1: Tensor, c2: float | Tensor, cfg_scale: float
) -> Tensor:
    """s2 = clamp(c2·σ_t, 0, s0 − s1 − 1)   (Eq. 16). (B,) each -> (B,)."""
    room = (cfg_scale - s1 - 1).clamp_min(0)
    return torch.minimum((c2 * closeness).clamp_min(0), room)


def despecification(cond: Tensor, uncond: Tensor, s1: Tensor) -> Tensor:
    """−s1·(D_c − D_u)   (Eq. 13): less of the prompt's pull. Returned as a change of D."""
    return -expand(s1, cond) * (cond - uncond)


def deduplication(neighbor: Tensor, uncond: Tensor, s2: Tensor) -> Tensor:
    """−s2·(D_n − D_u)   (Eq. 15): away from what the neighbour's caption would draw."""
    return -expand(s2, uncond) * (neighbor - uncond)


def away(cond: Tensor, uncond: Tensor, strength: Tensor) -> Tensor:
    """−r·(D_c − D_u), without the mean of each channel: away from the composition, not from its colours.

    The mean of a latent channel is the picture's overall tone. Pushed away from as well, a violet
    picture turns green and stays what it was otherwise. strength r (B,).
    """
    pull = cond - uncond
    return -expand(strength, pull) * (pull - pull.mean(dim=(2, 3), keepdim=True))


def dissimilarity(gradient: Tensor, sigma: Tensor, c3: float | Tensor) -> Tensor:
    """−c3·σ²·∇_D similarity   (Eq. 17 in denoised space; σ in k-diffusion units, (B,)).

    ε is held constant, as in the authors' code: ∇_{x_t} = ∇_D/√ᾱ, and √(1−ᾱ) in ε is σ in D.
    """
    c3 = torch.as_tensor(c3).to(gradient)
    return -expand(c3 * sigma.to(gradient) ** 2, gradient) * gradient


def reference_c3(similarity: Tensor, t: float) -> Tensor:
    """The authors' code instead of a constant c3: 100·(σ_t − 0.3)·e^((1000 − T)/170), (B,) -> (B,)."""
    return 100 * (similarity - 0.3) * math.exp(1000 * (1 - t) / 170)


def projection(gradient: Tensor, excess: Tensor, denoised: Tensor, cap: float) -> Tensor:
    """The smallest move of D that a linear model says removes `excess` similarity (Polyak's step).

    −excess·∇/‖∇‖², excess = similarity − target (B,); its norm is capped at `cap`·‖D‖ per sample.
    """
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    length = excess.to(gradient).clamp_min(0) / norm
    length = torch.minimum(length, cap * denoised.flatten(1).norm(dim=1).to(gradient))
    return -expand(length / norm, gradient) * gradient


def without_brightness_and_contrast(gradient: Tensor, pictures: Tensor) -> Tensor:
    """Remove from a picture-space gradient what would only brighten, tint or flatten the picture.

    Per sample the components along each colour channel's constant and along the picture's own
    deviation from its mean are projected out: moving along them lowers nL2 and leaves the copy a copy.
    gradient, pictures : (B, 3, H, W) -> (B, 3, H, W), orthogonal to both.
    """
    flat = gradient - gradient.mean(dim=(2, 3), keepdim=True)
    deviation = pictures - pictures.mean(dim=(2, 3), keepdim=True)
    along = (flat * deviation).sum(dim=(1, 2, 3), keepdim=True)
    length = deviation.square().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return flat - deviation * along / length


def resolved_side(sigma: float, latent_side: int) -> float:
    """How many pixels a side the noise level still leaves legible, for a latent of that side.

    A unit-variance latent with the 1/f² spectrum of natural pictures has, at radial frequency k
    half-cycles, coefficients of size L/(k·√(π/2·ln L)); those above σ stand out of the noise.
    """
    side = max(2, latent_side)
    return side / (math.sqrt(math.pi / 2 * math.log(side)) * max(sigma, 1e-6))
