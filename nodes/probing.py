"""The two model evaluations of the Prompt Probe, and the identifier of a model.

The host's own guider does the work (it loads models, prepares prompts, control nets and hooks, and cleans
up), with a sampler that draws nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ..amg_core.detection import predictions as of
from ..amg_core.detection import statistics
from ..amg_core.detection.calibration import Measured
from ..amg_core.detection.predictions import Predictions
from ..amg_core.errors import AMGError
from . import decoding, hook

# All tests use these noises, so that prompts are compared on the same noises.
FIRST_NOISE = 20_260_101
SAMPLED = 16  # values of each tensor in the hash of a model
# A prompt is tested as a whole, without the time ranges of its parts.
SCHEDULED = (
    "start_percent", "end_percent", "clip_start_percent", "clip_end_percent",
    "timestep_start", "timestep_end",
)  # fmt: skip


class _Asker:
    """A sampler for the host that only evaluates the model, one batch at each noise level."""

    def __init__(self):
        self.heard: list[Predictions] = []

    def sample(self, guider, sigmas, extra_args, callback, noise, *_, **__):
        """The host's interface. Returns the noise unchanged."""
        model = guider.inner_model
        sampling = model.model_sampling
        conds = [guider.conds["positive"], guider.conds["negative"]]
        for sigma in sigmas:
            comfy.model_management.throw_exception_if_processing_interrupted()
            level = sigma.expand(len(noise))
            x = same_input(sampling, noise, sigma)
            cond, uncond = comfy.samplers.calc_cond_batch(
                model, conds, x, level, extra_args["model_options"]
            )
            self.heard.append(Predictions(x, float(sigma), cond, uncond, kind(sampling)))
        return noise


def kind(sampling) -> str:
    """The kind of network of this `model_sampling`, one of `predictions.KINDS`."""
    if isinstance(sampling, comfy.model_sampling.CONST):
        return of.FLOW
    if isinstance(sampling, comfy.model_sampling.EDM):  # D = x·c_skip − c_out·F, and no ε
        return of.EPSILON
    return of.V if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else of.EPSILON


def same_input(sampling, noise: Tensor, sigma: Tensor) -> Tensor:
    """The latents x (B, C, …) at the level σ, a scalar, for which the network's input is `noise`."""
    scale = sampling.calculate_input(sigma.reshape(1), torch.ones_like(noise[:1, :1]))
    return of.unrescaled(noise, float(scale.flatten()[0]))


def levels(sampling, low: float) -> Tensor:
    """σ of the highest noise level and at the share `low` of the schedule, (2,)."""
    return torch.tensor([float(sampling.sigma_max), float(sampling.percent_to_sigma(1 - low))])


def noises(shape: tuple[int, ...], count: int) -> Tensor:
    """`count` fixed noises of that shape (C, …). The first ones do not depend on `count`."""
    each = (torch.Generator().manual_seed(FIRST_NOISE + i) for i in range(count))
    return torch.stack([torch.randn(shape, generator=generator) for generator in each])


def measure(model, positive, negative, shape: tuple[int, ...], seeds: int, low: float) -> Measured:
    """All statistics of one prompt, from two batched evaluations of the model.

    Parameters
    ----------
    model : ModelPatcher
        With its LoRAs and patches, but without an AMG guard.
    positive, negative : CONDITIONING
        The prompt, and no prompt.
    shape : tuple of int
        (C, …) of the latents.
    seeds : int
        Number of noises.
    low : float
        The low noise level, as a share of the schedule.
    """
    guider = comfy.samplers.CFGGuider(hook.detach(model.clone()))
    guider.set_conds(_whole(positive), _whole(negative))
    guider.set_cfg(2.0)  # any value but 1, which would mean no guidance
    noise = noises(shape, seeds)
    asker = _Asker()
    sigmas = levels(model.get_model_object("model_sampling"), low)
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), asker, sigmas, disable_pbar=True, seed=0)
        high, low_level = asker.heard
        return statistics.measure(high, low_level)


def _whole(conditioning: list) -> list:
    """The conditioning without the time ranges of its parts."""
    return [
        [text, {name: value for name, value in more.items() if name not in SCHEDULED}]
        for text, more in conditioning
    ]


def encode(clip, text: str) -> list:
    """Text -> CONDITIONING, as by CLIP Text Encode. AMGError without a text encoder."""
    if clip is None:
        raise AMGError(
            "clip: it is missing. Connect the CLIP of this model (from its checkpoint loader)."
        )
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def latent_shape(model, latent: Tensor) -> tuple[int, ...]:
    """(C, H, W) for a LATENT's samples (B, c, H, W), with the channels of the model.

    AMGError for latents with a time axis, and for audio.
    """
    space = model.get_model_object("latent_format")
    decoding.check_still(space)
    if latent.ndim != 4:
        raise AMGError(
            f"latent_image has shape {tuple(latent.shape)}, and prompts are tested on still "
            "pictures only. Connect an Empty Latent Image, and a model that draws pictures."
        )
    return (space.latent_channels, *latent.shape[2:])


def model_key(model) -> str:
    """A short identifier that changes with the weights of a model, its LoRAs and strengths, and its kind.

    It is a hash of the names, shapes and some values of its tensors, before LoRAs are applied.
    """
    digest = hashlib.sha256()
    sampling = model.get_model_object("model_sampling")
    for part in (type(model.model).__name__, kind(sampling), *_values(sampling.sigmas)):
        digest.update(repr(part).encode())
    for name, weight in sorted(model.model.diffusion_model.state_dict().items()):
        kept = model.backup.get(f"diffusion_model.{name}")
        original = weight if kept is None else kept.weight
        digest.update(repr((name, tuple(original.shape), *_values(original))).encode())
    for name, patches in sorted(model.patches.items(), key=lambda item: str(item[0])):
        digest.update(str(name).encode())
        for part in _leaves(patches):
            digest.update(repr(part).encode())
    return digest.hexdigest()[:24]


def _values(tensor: Tensor) -> list[float]:
    """Up to `SAMPLED` evenly spaced values, rounded to bfloat16, in which a host may load a file."""
    flat = tensor.detach().flatten()
    few = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]
    return few.to(torch.bfloat16).float().cpu().tolist()


def _leaves(value) -> Iterator[object]:
    """The numbers, strings and sampled tensors in the host's data of a LoRA."""
    if isinstance(value, Tensor):
        yield (tuple(value.shape), *_values(value))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, (int, float, str)):
        yield value
    elif hasattr(value, "weights"):  # an adapter of the host
        yield type(value).__name__
        yield from _leaves(value.weights)
