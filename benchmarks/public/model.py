"""The pipeline that is measured, and how it is asked for pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amg_core.errors import AMGError
from amg_core.optional import needed
from amg_core.similarity.matcher import Matcher
from amg_demo.pipeline import NAME as EMBEDDED
from amg_demo.pipeline import pipeline as embedded

TEXTS = ("prompt_embeds", "negative_prompt_embeds")


@dataclass
class Model:
    """A pipeline with the settings that all pictures share.

    Attributes
    ----------
    pipe : DiffusionPipeline
    matcher : Matcher
        On the training pictures, with a decoder for the pipeline's latents.
    steps, cfg_scale, size : int, float, int or None
        `size` is the side of a picture, None for the pipeline's own.
    rows : int
        How many rows the denoiser has been asked for so far.
    """

    pipe: Any
    matcher: Matcher | None
    steps: int = 50
    cfg_scale: float = 7.5
    size: int | None = None
    rows: int = field(default=0, init=False)

    @property
    def denoiser(self) -> nn.Module:
        found: nn.Module | None = getattr(self.pipe, "unet", None) or getattr(
            self.pipe, "transformer", None
        )
        if found is None:
            raise AMGError(f"{type(self.pipe).__name__} has neither a unet nor a transformer.")
        return found

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def guarded_by(self) -> Matcher:
        if self.matcher is None:
            raise AMGError("There is no index to guard with.")
        return self.matcher

    def asked(self, seeds: Sequence[int], **texts: Any) -> dict[str, Any]:
        """The arguments of the pipeline for a picture of each seed. Noise is drawn on the CPU."""
        size = {} if self.size is None else {"height": self.size, "width": self.size}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {
            "generator": generators, "num_inference_steps": self.steps, "output_type": "pt",
            "guidance_scale": self.cfg_scale, **size, **texts,
        }  # fmt: skip

    def draw(self, seeds: Sequence[int], **texts: Any) -> Tensor:
        """Plain pictures (B, 3, H, W) in [0, 1], on the CPU."""
        return pictures_of(self.pipe(**self.asked(seeds, **texts)))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise that the pipeline starts from, of unit variance, (B, C, h, w) on the CPU."""
        config = self.denoiser.config
        side = self.size // self.pipe.vae_scale_factor if self.size else int(config.sample_size)
        shape = (int(config.in_channels), side, side)
        each = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.stack([torch.randn(shape, generator=one) for one in each])

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The prompts' and the empty prompt's tokens, (B, T, C) each.

        AMGError for pipelines that need more than tokens, such as Stable Diffusion XL.
        """
        with torch.no_grad():
            made = self.pipe.encode_prompt(
                prompt=list(texts), device=self.device, num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )  # fmt: skip
        if len(made) != 2:
            raise AMGError(
                f"{type(self.pipe).__name__} takes more than tokens. The methods that change them (GNI, "
                "padding) are for Stable Diffusion 1 and 2: leave them out with --methods."
            )
        return made

    @contextmanager
    def counting(self):
        """Count the rows that the denoiser is asked for in this context."""

        def called(_: nn.Module, __: Any, out: Any) -> None:
            self.rows += len(out[0] if isinstance(out, tuple) else out.sample)

        hook = self.denoiser.register_forward_hook(called)
        try:
            yield
        finally:
            hook.remove()


def pictures_of(output: Any) -> Tensor:
    pictures: Tensor = output.images
    return pictures.detach().float().cpu().clamp(0, 1)


def open_pipeline(name: str, device: str, scheduler: str | None = None) -> Any:
    """A pipeline from a folder or a name on the hub, or the embedded one. It is the researcher's own choice
    what is loaded; only safetensors are read. `scheduler` is the name of one of diffusers, such as
    DDIMScheduler, None for the model's own.
    """
    diffusers = needed("diffusers", "The benchmark", "pip install diffusers transformers")
    if name == EMBEDDED:
        pipe = embedded()
    else:
        half = {} if device == "cpu" else {"torch_dtype": torch.float16}
        more = {"safety_checker": None, "requires_safety_checker": False}
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            name, use_safetensors=True, **half, **more
        )
    if scheduler is not None:
        kind = getattr(diffusers, scheduler, None)
        if kind is None:
            raise AMGError(f"--scheduler: diffusers has no {scheduler}.")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@dataclass(frozen=True)
class Spent:
    """Seconds, rows of the denoiser, and peak memory of the accelerator in bytes (None on a CPU)."""

    seconds: float
    rows: int
    peak: int | None


def measured(model: Model, work: Callable[[], Any]) -> tuple[Any, Spent]:
    """The result of `work`, and what it took."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, rows = time.perf_counter(), model.rows
    with model.counting():
        made = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return made, Spent(seconds, model.rows - rows, peak)
