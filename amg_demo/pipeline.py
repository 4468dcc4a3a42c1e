"""The embedded model as a Stable Diffusion pipeline of diffusers, which needs no download.

The four networks are those of `model.load`: nothing is copied or converted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from amg_core.optional import needed

from .model import DOWNSCALE, LATENT_CHANNELS, TOKENS, DemoModel, load
from .sample import noise_levels

NAME = "embedded"  # how programs call it in place of a path
SIDE = 16  # of a latent
STAGES = (0,) * DOWNSCALE.bit_length()  # a pipeline halves the picture between two of them


class Part(nn.Module):
    """A network of the model with the properties that a pipeline asks for."""

    def __init__(self, network: nn.Module, **config: Any):
        super().__init__()
        frozen = needed("diffusers", "The pipeline", "pip install diffusers transformers")
        self.network = network
        self.config = frozen.configuration_utils.FrozenDict(config)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Denoiser(Part):
    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any):
        times = timestep.to(sample.device).expand(len(sample))
        return (self.network(sample, times, encoder_hidden_states),)


class TextEncoder(Part):
    def forward(self, ids: Tensor, **_: Any):
        return (self.network(ids),)


class Decoder(Part):
    def decode(self, z: Tensor, return_dict: bool = True, **_: Any):
        picture = 2 * self.network(z) - 1
        return SimpleNamespace(sample=picture) if return_dict else (picture,)


class Tokenizer:
    model_max_length, added_tokens_encoder, all_special_ids = TOKENS, {}, ()

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, texts: str | list[str], **_: Any):
        texts = [texts] if isinstance(texts, str) else texts
        return SimpleNamespace(input_ids=self.network.tokenize(texts), attention_mask=None)

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.network.words[i - 2] for i in ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.network.ids)


def pipeline(model: DemoModel | None = None) -> Any:
    """The model (by default the embedded one) as a StableDiffusionPipeline, with Euler.

    It draws 128 x 128 pixels. AMGError if diffusers is missing.
    """
    diffusers = needed("diffusers", "The pipeline", "pip install diffusers transformers")
    model = load() if model is None else model
    pipe = diffusers.StableDiffusionPipeline(
        unet=Denoiser(
            model.unet, in_channels=LATENT_CHANNELS, sample_size=SIDE, time_cond_proj_dim=None
        ),
        vae=Decoder(
            model.decoder, latent_channels=LATENT_CHANNELS, scaling_factor=1.0, block_out_channels=STAGES
        ),
        text_encoder=TextEncoder(model.text),
        tokenizer=Tokenizer(model.text),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            prediction_type="v_prediction", timestep_spacing="linspace",
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timesteps(model: DemoModel, steps: int) -> list[int]:
    """Those of `sample.euler`, to be given to the pipeline, whose own differ a little."""
    _, times = noise_levels(model, steps)
    return (times * (len(model.sigmas) - 1)).round().long().tolist()
