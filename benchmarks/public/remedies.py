"""Remedies without an index that need the model: guidance that begins late, and adapted prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from amg_core.detection import statistics
from amg_core.mitigation.adaptation import ITERATIONS, adapt
from amg_core.mitigation.transition import Transition, guidance_norm, guided_by
from amg_diffusers.noise import level

from . import detectors
from .model import Model

UNTIL = 0.35  # share of the sampling: timestep 650, between the 500 and 700 of Jain et al.
WEN_TARGET = 3.0  # Wen et al.'s example for Stable Diffusion 1.4, ‖ε_c − ε_u‖ at the first step
ADAPTED_ROWS = 2 * (ITERATIONS + 1)  # of the denoiser, for one picture


@contextmanager
def delayed(model: Model, scale: float, dynamic: bool, until: float = UNTIL) -> Iterator[None]:
    """In this context the guidance scale is `scale` until the transition (`mitigation.transition`).

    The pipeline hands its guided output to `scheduler.step`. There it is changed, and at the end the
    method is put back.
    """
    run, outputs, scheduler = Transition(dynamic), [], model.pipe.scheduler
    step = scheduler.step

    @wraps(step)  # the pipeline asks which arguments it takes
    def changed(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        uncond, cond = outputs.pop().chunk(2)
        outputs.clear()
        at = level(scheduler, timestep)
        sigma = torch.full((len(cond),), at.sigma)
        norm = guidance_norm(at.b * cond, at.b * uncond, sigma)
        waiting = run.waiting(norm, at.sigma, early=1 - at.t < until)
        guided = guided_by(model_output, cond, uncond, model.cfg_scale, scale, waiting)
        return step(guided, timestep, *args, **kwargs)

    def called(_: Any, __: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out.sample)

    hook = model.denoiser.register_forward_hook(called)
    scheduler.step = changed
    try:
        yield
    finally:
        hook.remove()
        del scheduler.step


def adapted(model: Model, text: str, seeds: Sequence[int], target: float) -> tuple[Tensor, Tensor]:
    """Wen et al.: the prompt's tokens (B, T, C), adapted to the noise of each seed; those of no prompt."""
    tokens, empty = model.encode([text] * len(seeds))
    made = []
    for row, seed in zip(tokens, seeds, strict=True):
        noise = model.noise([seed])

        def score(prompt: Tensor, noise: Tensor = noise) -> Tensor:
            high = detectors.predictions(model, noise, detectors.last(model), prompt, empty[:1])
            return statistics.norm(high)[0]

        made.append(adapt(row[None], score, target).embedding)
    return torch.cat(made), empty
