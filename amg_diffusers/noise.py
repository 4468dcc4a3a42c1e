"""The noise level at a step of a scheduler, and what the model's output is there: ε, v, x̂0 or a flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg_core import hosts
from amg_core.errors import AMGError

LEAST_SIGNAL = 2.0**-24  # ᾱ of the last step is 0 in schedules that end in pure noise
FLOW = "flow_prediction"


@dataclass(frozen=True)
class Level:
    """The noise level of one evaluation, with x̂0 = a·x + b·output.

    x is the model's input, after `scale_model_input`: √ᾱ·x0 + √(1 − ᾱ)·noise, or for a flow model
    (1 − σ)·x0 + σ·noise.

    Attributes
    ----------
    sigma, t : float
        In the units of `hosts.noise_level`.
    a, b : float
    """

    sigma: float
    t: float
    a: float
    b: float

    def denoised(self, x: Tensor, output: Tensor) -> Tensor:
        """x̂0 (B, C, H, W) in float32."""
        return self.a * x.float() + self.b * output.float()

    def output(self, output: Tensor, change: Tensor) -> Tensor:
        """The model's output for which x̂0 is larger by `change`. Where `change` is 0, it is the same."""
        return output + (change / self.b).to(output)


def level(scheduler: Any, timestep: Any) -> Level:
    """The noise level for which the model is asked at `timestep`.

    It depends on the timestep alone, which is what the model is given. So it holds for every scheduler of
    a kind, also for those that ask the model between two steps.

    Raises
    ------
    AMGError
        The scheduler has another kind of noise. The message names it.
    """
    config = scheduler.config
    kind = config.get("prediction_type", "")
    asked = float(torch.as_tensor(timestep).flatten()[0])
    if type(scheduler).__name__.startswith("FlowMatch") or kind == FLOW:
        part = asked / config.num_train_timesteps
        sigma, t = hosts.noise_level(torch.tensor([part]), None)
        return Level(float(sigma), t, 1.0, -part)
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is None or kind not in ("epsilon", "v_prediction", "sample"):
        raise AMGError(
            f"The guard does not know the noise of {type(scheduler).__name__} (prediction {kind!r}). "
            "Choose another scheduler, such as DDIMScheduler, DPMSolverMultistepScheduler or "
            "FlowMatchEulerDiscreteScheduler."
        )
    table = sigmas(signal)
    at = _between(table, asked)
    sigma, t = hosts.noise_level(at[None], table)
    alpha = float((1 + at**2).rsqrt())
    noise = float(at) * alpha
    a, b = {
        "epsilon": (1 / alpha, -noise / alpha),
        "v_prediction": (alpha, -noise),
        "sample": (0.0, 1.0),
    }[kind]
    return Level(float(sigma), t, a, b)


def sigmas(signal: Tensor) -> Tensor:
    """σ (T,), ascending, of ᾱ (T,)."""
    signal = signal.detach().cpu().double().clamp(min=LEAST_SIGNAL)
    return ((1 - signal) / signal).sqrt().float()


def _between(table: Tensor, timestep: float) -> Tensor:
    """σ at a timestep that may lie between two of the table: the logarithm is interpolated."""
    place = min(max(timestep, 0.0), len(table) - 1.0)
    below = int(place)
    pair = table[[below, min(below + 1, len(table) - 1)]].log()
    return torch.lerp(pair[0], pair[1], place - below).exp()
