"""Chooses the guard's decoder from those that the host has."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import folder_paths
import torch
from torch import Tensor, nn

from ..amg_core.decoders import Decoder, LinearDecoder, ModuleDecoder, load_taesd
from ..amg_core.errors import AMGError

CHOICES = ["auto", "taesd", "vae", "linear"]
ENCODERS = ("encoder", "quant_conv", "taesd_encoder")  # parts of a VAE that decoding does not need

_of_vae: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def choose(latent_format, wanted: str = "auto", vae=None) -> Decoder:
    """An owned decoder for latents of `latent_format`, on the CPU.

    Parameters
    ----------
    wanted : {"auto", "taesd", "vae", "linear"}
        "auto" takes the first available of these: the small TAESD decoder in models/vae_approx, the
        host's preview colours, a copy of the connected VAE. The VAE is exact but slow: decoding at every
        step takes longer than the step.

    Raises
    ------
    AMGError
        The wanted decoder is not available. The message says which file to put where.
    """
    check_still(latent_format)
    makers = {"taesd": _taesd, "linear": _linear, "vae": _vae}
    order = list(makers) if wanted == "auto" else [wanted]
    with torch.random.fork_rng(devices=[]):  # building a module draws its initial weights
        if wanted == "auto" and hasattr(latent_format, "amg_decoder"):
            return latent_format.amg_decoder()
        for name in order:
            decoder = makers[name](latent_format, vae)
            if decoder is not None:
                return decoder
    raise AMGError(_nothing(latent_format, wanted))


def choose_if_any(latent_format) -> Decoder | None:
    """The best available decoder without a VAE, or None."""
    try:
        return choose(latent_format)
    except AMGError:
        return None


def check_still(latent_format) -> None:
    """Raise AMGError with the reason unless latents of `latent_format` are those of still pictures."""
    if latent_format.latent_dimensions > 2:
        raise AMGError(
            "model: its latents have a time axis, even for a single picture, and the guard reads "
            "only latents without one. Models for video, such as Wan, are built like that, and "
            "so is Qwen-Image. Take the AMG node out of this graph, and check finished pictures "
            "with Similarity Probe."
        )
    if latent_format.latent_dimensions < 2:
        raise AMGError(
            "model: it makes no pictures (its latents have one dimension, like those of audio), "
            "so an index of pictures cannot guard it. Take the AMG node out of this graph."
        )


def check(decoder: Decoder, latent: Tensor) -> None:
    """Raise AMGError unless `latent` is (B, C, H, W) with the decoder's channels."""
    if latent.ndim != 4:
        raise AMGError(
            f"latent_image has shape {tuple(latent.shape)}, and the guard reads only latents of "
            "still pictures (batch, channels, height, width). Video latents, with a time axis, "
            "are refused. Connect an Empty Latent Image, or take the AMG node out of this graph."
        )
    if latent.shape[1] != decoder.channels:
        raise AMGError(
            f"latent_image has {latent.shape[1]} channels and decoder {decoder.name} takes "
            f"{decoder.channels}. Connect the VAE of this model, or choose another decoder in "
            f"Apply AMG."
        )


def usable(vae) -> bool:
    """Whether a VAE is connected and decodes still pictures."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        return False
    return vae.latent_dim == 2 and vae.output_channels == 3


def _taesd(latent_format, _vae) -> Decoder | None:
    prefix = latent_format.taesd_decoder_name
    if prefix is None:
        return None
    for name in folder_paths.get_filename_list("vae_approx"):
        if name.startswith(prefix):
            file = Path(folder_paths.get_full_path_or_raise("vae_approx", name))
            return load_taesd(file, latent_format.latent_channels)
    return None


def _vae(latent_format, vae) -> Decoder | None:
    if not usable(vae):
        return None
    kind, known = type(latent_format), _of_vae.setdefault(vae, {})
    if kind not in known:
        slope, middle = _output_range(vae)
        known[kind] = ModuleDecoder(
            "vae",
            _VAEDecode(vae.first_stage_model),
            latent_format.latent_channels,
            enter=latent_format.process_out,
            leave=lambda picture: picture * slope + middle,
        )
    return known[kind]


class _VAEDecode(nn.Module):
    """The decoding half of a host's VAE."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vae = copy.copy(model)
        self.vae._modules = {k: v for k, v in model._modules.items() if k not in ENCODERS}

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent)


def _output_range(vae) -> tuple[float, float]:
    """(a, b) with process_output(x) = a·x + b before its clamp: (½, ½) for networks about ±1."""
    ends = vae.process_output(torch.tensor([0.0, 0.5]))
    return float(ends[1] - ends[0]) / 0.5, float(ends[0])


def _linear(latent_format, _vae) -> Decoder | None:
    factors = latent_format.latent_rgb_factors
    if factors is None:
        return None
    bias = latent_format.latent_rgb_factors_bias
    return LinearDecoder(torch.tensor(factors), None if bias is None else torch.tensor(bias))


def _nothing(latent_format, wanted: str) -> str:
    name = latent_format.taesd_decoder_name
    folders = " or ".join(folder_paths.get_folder_paths("vae_approx"))
    put = (
        f"You can put {name}.safetensors (or .pth, from github.com/madebyollin/taesd) into "
        f"{folders}."
        if name
        else "This kind of model has no TAESD."
    )
    if wanted == "taesd":
        return f"decoder: no TAESD was found for this model. {put} Or choose 'auto'."
    if wanted == "vae":
        return "decoder: 'vae' needs a VAE for pictures. Connect the vae input, or choose 'auto'."
    if wanted == "linear":
        return (
            "decoder: this kind of model has no preview colours. Choose 'auto' and connect the vae."
        )
    return f"The guard cannot decode the latents of this model. Connect the vae input. {put}"
