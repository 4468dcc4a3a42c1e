"""The embedded model as the parts of a Stable Diffusion pipeline of diffusers."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from amg_demo.model import DOWNSCALE, TOKENS, DemoModel

STAGES = (0,) * (DOWNSCALE.bit_length())


class Part(nn.Module):
    """A network of the model with the properties that a pipeline asks for."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, network: nn.Module, **config):
        super().__init__()
        self.network, self.config = network, FrozenDict(config)


class Denoiser(Part):
    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_):
        return (self.network(sample, timestep.expand(len(sample)), encoder_hidden_states),)


class TextEncoder(Part):
    def forward(self, ids: Tensor, **_):
        return (self.network(ids),)


class Decoder(Part):
    def decode(self, z: Tensor, return_dict: bool = True, **_):
        picture = 2 * self.network(z) - 1
        return SimpleNamespace(sample=picture) if return_dict else (picture,)


class Tokenizer:
    model_max_length, added_tokens_encoder = TOKENS, {}

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, texts: str | list[str], **_):
        texts = [texts] if isinstance(texts, str) else texts
        return SimpleNamespace(input_ids=self.network.tokenize(texts), attention_mask=None)

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def pipeline(model: DemoModel, channels: int):
    """The model with Euler over its own noise levels. `channels` are those of its latents."""
    pipe = diffusers.StableDiffusionPipeline(
        unet=Denoiser(model.unet, in_channels=channels, sample_size=16, time_cond_proj_dim=None),
        vae=Decoder(
            model.decoder, latent_channels=channels, scaling_factor=1.0, block_out_channels=STAGES
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
