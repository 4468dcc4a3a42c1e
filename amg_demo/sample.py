"""A minimal sampler for the demo: Euler over Stable Diffusion's own noise levels, with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amg_core.guidance import ReducedPrompt, reduced

from .model import DOWNSCALE, LATENT_CHANNELS, DemoModel


def noise_levels(model: DemoModel, steps: int) -> tuple[Tensor, Tensor]:
    """σ (steps + 1,) from the highest level to 0, evenly spaced in t, and t in [0, 1] of each."""
    t = torch.linspace(len(model.sigmas) - 1, 0, steps + 1)[:-1].round().long()
    return torch.cat([model.sigmas[t], torch.zeros(1)]), t / (len(model.sigmas) - 1)


@torch.inference_mode()
def sample(
    model: DemoModel,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    cfg_scale: float = 4.0,
    side: int = 128,
    guide: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Draw one picture a prompt: (B, 3, side, side) in [0, 1].

    `guide` has the signature of `amg_core.session.Session.step` and may change each prediction; without
    it this is plain classifier-free guidance. Noise comes from a generator of
    each sample's own seed.
    """
    size = (LATENT_CHANNELS, side // DOWNSCALE, side // DOWNSCALE)
    noise = [torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds]
    context = model.text(model.text.tokenize(prompts))
    empty = model.text(model.text.tokenize([""] * len(prompts)))
    sigmas, times = noise_levels(model, steps)
    x = torch.stack(noise) * sigmas[0]
    for i, t in enumerate(times.tolist()):
        sigma = sigmas[i].expand(len(x))
        both = model.denoise(
            torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([context, empty])
        )
        cond, uncond = both.chunk(2)
        denoised = uncond + cfg_scale * (cond - uncond)
        if guide is not None:

            def neighbor_denoised(captions: list[str], x=x, sigma=sigma) -> Tensor:
                return model.denoise(x, sigma, model.text(model.text.tokenize(captions)))

            def fewer_words(kept: Tensor, x=x, sigma=sigma) -> Tensor:
                return model.denoise(x, sigma, reduced(context, empty, kept))

            denoised = guide(
                denoised, cond=cond, uncond=uncond, cfg_scale=cfg_scale, sigma=sigma, t=t,
                neighbor_denoised=neighbor_denoised, reduced=ReducedPrompt(context.shape[1], fewer_words),
            )  # fmt: skip
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return torch.cat([model.decoder(latent) for latent in x.split(16)]).clamp(0, 1)
