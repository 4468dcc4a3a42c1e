"""The embedded model as stock MODEL, CLIP and VAE, so that an empty ComfyUI can try the guard."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..amg_core.errors import AMGError
from .types import START, place


class DemoModelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_DemoModel",
            display_name="AMG Demo Model",
            **place(START),
            description="A tiny model, made for this pack, that has memorised some of its 632 "
            "training pictures. With it you can see a copy, and the guard that prevents it, in "
            "seconds and without a download. It draws 128 x 128 pictures of emoji.",
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="MODEL",
                    tooltip="The model. It draws 128 x 128 pictures. Use cfg 4, 20 steps, euler.",
                ),
                io.Clip.Output(
                    "clip",
                    display_name="CLIP",
                    tooltip="The text encoder. It reads prompts of up to 8 words, such as 'fox "
                    "face on violet rays'.",
                ),
                io.Vae.Output(
                    "vae",
                    display_name="VAE",
                    tooltip="The VAE. It turns latents into pictures and back.",
                ),
                io.String.Output(
                    "pictures",
                    display_name="pictures",
                    tooltip="The folder of its training pictures, with captions. Connect it to "
                    "folder of Build Memorization Index.",
                ),
                io.String.Output(
                    "lora_pictures",
                    display_name="lora_pictures",
                    tooltip="The folder of the eight pictures that amg-demo-lora has memorised. "
                    "Connect it to folder of Build Memorization Index.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..amg_demo import model as demo

        try:
            with torch.random.fork_rng(devices=[]):  # building modules draws initial weights
                network = demo.load()
                return io.NodeOutput(
                    demo_model(network),
                    demo_clip(network),
                    demo_vae(network),
                    str(demo.PICTURES),
                    str(demo.LORA_PICTURES),
                )
        except FileNotFoundError as error:
            raise AMGError(str(error)) from error


def demo_model(network) -> comfy.model_patcher.ModelPatcher:
    """MODEL: v-prediction on Stable Diffusion's own noise levels."""
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = _latent_format(network)
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION)
    model.diffusion_model = network.unet
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _latent_format(network) -> comfy.latent_formats.LatentFormat:
    """Latents of unit variance, 4 channels, an eighth of the size, with a small decoder.

    It is a separate class because its name is the family of a latent index.
    """
    from ..amg_core.decoders import ModuleDecoder

    latent_format = type("Demo", (comfy.latent_formats.LatentFormat,), {})()
    latent_format.amg_decoder = lambda: ModuleDecoder("demo", network.decoder, 4)
    latent_format.amg_side = 128  # side of its training pictures in pixels
    return latent_format


def demo_clip(network) -> comfy.sd.CLIP:
    """CLIP with the word-level text encoder. Weights such as (red:1.3) are ignored."""
    target = SimpleNamespace(
        params={},
        clip=lambda device, **_: _TextModel(network.text).to(device),
        tokenizer=lambda **_: _Tokenizer(network.text),
    )
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


def demo_vae(network) -> comfy.sd.VAE:
    """VAE with the autoencoder."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = Autoencoder(network.encoder, network.decoder)
    vae.downscale_ratio = vae.upscale_ratio = 8
    vae.latent_channels = 4
    vae.memory_used_encode = lambda shape, dtype: 400 * 4 * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: 400 * 4 * shape[2] * shape[3] * 64
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae


class _Tokenizer:
    """Text -> {"words": [[(id, weight), …]]}, the format of the host's nodes."""

    def __init__(self, text):
        self.text = text

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        ids = self.text.tokenize([text])[0].tolist()
        extra = (0,) if return_word_ids else ()
        return {"words": [[(i, 1.0, *extra) for i in ids]]}

    def state_dict(self) -> dict:
        return {}


class _TextModel(nn.Module):
    """The interface that the host's CLIP expects of a text encoder."""

    dtypes = (torch.float32,)

    def __init__(self, text: nn.Module):
        super().__init__()
        self.text = text

    def set_clip_options(self, options: dict) -> None:
        """The network has no layers to choose from."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None]:
        """The embedding (1, T, 128) of all chunks in sequence, and None for the pooled output."""
        device = self.text.position.device
        ids = [[token[0] for token in chunk] for chunk in tokens["words"]]
        encoded = self.text(torch.tensor(ids, device=device))
        encoded = encoded.reshape(1, -1, encoded.shape[-1])
        return encoded.to(comfy.model_management.intermediate_device()), None


class Autoencoder(nn.Module):
    """The autoencoder for pictures of about ±1, as in the host's VAE."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, pictures: Tensor) -> Tensor:
        return self.encoder((pictures + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 2 - 1
