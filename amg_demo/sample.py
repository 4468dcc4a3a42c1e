"""A minimal sampler, Euler over a model's own noise levels with guidance, and retries around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amg_core import prompt
from amg_core.guidance import without
from amg_core.retry import Outcome, until_no_copy
from amg_core.run import Drawn, SamplingRun, Settings
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import Verdict

from .model import DOWNSCALE, LATENT_CHANNELS, DemoModel

OTHER_NOISE = 500_000  # added to the seed once for each retry that starts from other noise

Guide = Callable[..., Tensor]  # the signature of `SamplingRun.step`


class Leveled(Protocol):
    """sigmas : the noise levels, ascending."""

    sigmas: Tensor


class Denoiser(Leveled, Protocol):
    """What is drawn with: x, σ (B,), context -> x̂0, and captions -> context."""

    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    encode: Callable[[list[str]], Tensor]


def noise_levels(model: Leveled, steps: int) -> tuple[Tensor, Tensor]:
    """σ (steps + 1,) from the highest level to 0, evenly spaced in t, and t in [0, 1] of each."""
    t = torch.linspace(len(model.sigmas) - 1, 0, steps + 1)[:-1].round().long()
    return torch.cat([model.sigmas[t], torch.zeros(1)]), t / (len(model.sigmas) - 1)


@dataclass(frozen=True)
class OtherTexts:
    """`hosts.Texts` of this model, at one evaluation. `prompts` are the texts of `context`, if known."""

    model: Denoiser
    x: Tensor
    sigma: Tensor
    context: Tensor
    empty: Tensor
    captions: bool
    prompts: Sequence[str] | None = None

    @property
    def separable(self) -> bool:
        return self.prompts is not None

    @property
    def words(self) -> Tensor:
        if self.prompts is not None:
            return torch.tensor(prompt.counts(self.prompts))
        tokens = self.context.shape[1]
        return torch.full((len(self.x),), tokens if tokens > 1 else 0)  # a class label is no words

    def reduced(self, kept: Tensor) -> Tensor:
        if self.prompts is None:
            context = without(self.context, self.empty, kept)
        else:
            context = self.model.encode(prompt.keep(self.prompts, kept.tolist()))
        return self.model.denoise(self.x, self.sigma, context)

    def left_out(self, kept: Tensor) -> list[str]:
        if self.prompts is None:
            return [""] * len(kept)
        return prompt.missing(self.prompts, kept.tolist())

    def neighbor(self, captions: list[str]) -> Tensor:
        return self.model.denoise(self.x, self.sigma, self.model.encode(captions))


@torch.inference_mode()
def euler(
    model: Denoiser, context: Tensor, seeds: Sequence[int], shape: tuple[int, int, int], *,
    steps: int, cfg_scale: float, conditional: bool = True, guide: Guide | None = None,
    prompts: Sequence[str] | None = None,
) -> Tensor:  # fmt: skip
    """Latents (B, *shape) for contexts (B, T, C).

    `guide` may change each prediction; without it this is plain classifier-free guidance, or none
    if the model is not conditional. At `cfg_scale` 1 no unconditional prediction is made, as in the
    hosts. Noise comes from a generator of each sample's own seed. `prompts` are the texts of `context`:
    with them the guard can leave out any word.
    """
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    empty = model.encode([""] * len(seeds))
    sigmas, times = noise_levels(model, steps)
    x = torch.stack(noise) * sigmas[0]
    for i, t in enumerate(times.tolist()):
        sigma = sigmas[i].expand(len(x))
        known: dict = {"cond": None, "uncond": None}
        if not conditional:
            denoised = model.denoise(x, sigma, context)
        elif cfg_scale == 1:
            denoised = known["cond"] = model.denoise(x, sigma, context)
        else:
            both = model.denoise(
                torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([context, empty])
            )
            known["cond"], known["uncond"] = cond, uncond = both.chunk(2)
            denoised = uncond + cfg_scale * (cond - uncond)
        if conditional:
            known["texts"] = OtherTexts(model, x, sigma, context, empty, cfg_scale != 1, prompts)
        if guide is not None:
            denoised = guide(denoised, cfg_scale=cfg_scale, sigma=sigma, t=t, **known)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


@torch.inference_mode()
def sample(
    model: DemoModel,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    cfg_scale: float = 4.0,
    side: int = 128,
    guide: Guide | None = None,
) -> Tensor:
    """Draw one picture a prompt: (B, 3, side, side) in [0, 1]."""
    shape = (LATENT_CHANNELS, side // DOWNSCALE, side // DOWNSCALE)
    context = model.encode(prompts)
    x = euler(
        model, context, seeds, shape, steps=steps, cfg_scale=cfg_scale, guide=guide, prompts=prompts
    )
    return torch.cat([model.decoder(latent) for latent in x.split(16)]).clamp(0, 1)


def closed_loop(
    draw: Callable[[list[int], Guide], Tensor],
    judge: Callable[[Tensor, Sequence[Collection[int]]], list[Verdict]],
    matcher: Matcher,
    settings: Settings,
    seeds: Sequence[int],
    *,
    retries: int,
    steps: int,
) -> Outcome:
    """A batch drawn by (seeds, guide), and its copies once more, the last time from other noise."""

    class Demo:
        drawings = 0

        def restarts(self) -> bool:
            return True

        def draw(self, settings: Settings, suspects: Tensor, anew: Tensor) -> Drawn:
            if self.drawings == retries > 0:
                anew = anew | suspects
            pairs = zip(seeds, anew.tolist(), strict=True)
            chosen = [seed + OTHER_NOISE * self.drawings * other for seed, other in pairs]
            run = SamplingRun(matcher, settings, steps, suspects if self.drawings else None)
            self.drawings += 1
            return run.drawn(draw(chosen, run.step))

        def judge(self, latents, named, samples) -> list[Verdict]:
            return judge(latents, named)

        def stopped(self) -> bool:
            return False

    return until_no_copy(Demo(), settings, len(seeds), retries)
