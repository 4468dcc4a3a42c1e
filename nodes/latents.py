"""Indexes of latents: the host's VAE as the encoder, and checks that a model fits an index."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from comfy_api.latest import io
from torch import Tensor

from ..amg_core.descriptors.tensors import tensors_sha256
from ..amg_core.errors import AMGError
from ..amg_core.similarity.matcher import Matcher
from . import decoding

DECODER = ("decoder", "post_quant_conv", "taesd_decoder")  # of a VAE: has no part in encoding
OTHERWISE = "or use an index made with compact, pixel or sscd, which guards every model"


def inputs() -> list[io.Input]:
    """The inputs of a node that has to encode pictures as the model's latents."""
    return [
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Only for indexes of descriptor latent: the VAE of your model. It turns each "
            "picture into a latent once. Not needed for drawing under guard.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="Only for indexes of descriptor latent: the model that you want to guard, or "
            "another of its family. It says how the latents are scaled. Nothing is drawn.",
        ),
    ]


def family(latent_format) -> str:
    """The name of a latent space from the host's class: "sd15", "sdxl", "sd3", "flux", …"""
    return re.sub("[^a-z0-9]", "", type(latent_format).__name__.lower())


def make(kind, vae, model, spec=None):
    """A descriptor of latents that encodes with the host's VAE, for a new index or for that of `spec`.

    Raises
    ------
    AMGError
        VAE or model are not connected, do not fit each other, or do not fit the index.
    """
    if vae is None or model is None:
        raise AMGError(
            f"descriptor: {kind.name!r} compares pictures as latents of your model. Connect vae "
            "and model, both from the checkpoint loader, or choose compact, pixel or sscd."
        )
    space = model.get_model_object("latent_format")
    _check(vae, space)
    made = kind.descriptor.encoded(
        _encoder(vae, space), family(space), _encoder_sha256(vae), space.latent_channels,
        getattr(space, "amg_side", None), spec,
    )  # fmt: skip
    if spec is None or made.spec == spec:
        return made
    if made.spec.id != spec.id:
        raise AMGError(
            f"The index was made for models of the family {_family_of(spec)} and the connected "
            f"model is of {made.family}. Connect a model of {_family_of(spec)}, {OTHERWISE}."
        )
    raise AMGError(
        f"The index was made with another encoder ({spec.preprocessing}, weights "
        f"{spec.weights_sha256[:12]}) than the connected VAE ({made.spec.preprocessing}, weights "
        f"{made.spec.weights_sha256[:12]}). Connect the VAE that it was made with, or build the "
        "index again."
    )


def check_model(matcher: Matcher, latent_format) -> None:
    """Raise AMGError unless the index of latents was made for models of this kind."""
    own, index = family(latent_format), matcher.index
    if own != matcher.descriptor.family:
        raise AMGError(
            f"Index {index.name} holds latents for models of the family "
            f"{matcher.descriptor.family}, and this model is of {own}. Build an index with this "
            f"model (Build Memorization Index, descriptor latent), {OTHERWISE}."
        )


def check_latent(matcher: Matcher, latent: Tensor) -> None:
    """Raise AMGError unless `latent` is (B, C, H, W) with the channels of the index."""
    channels = matcher.descriptor.channels
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise AMGError(
            f"latent_image has shape {tuple(latent.shape)}, and index {matcher.index.name} holds "
            f"still pictures as latents of {channels} channels. Connect an empty latent for this "
            f"model, {OTHERWISE}."
        )


def _check(vae, space) -> None:
    decoding.check_still(space)
    if getattr(vae, "first_stage_model", None) is None or vae.latent_dim != 2:
        raise AMGError("vae: it does not encode still pictures. Connect the VAE of your model.")
    if vae.latent_channels != space.latent_channels:
        raise AMGError(
            f"vae: it makes latents of {vae.latent_channels} channels and the model draws "
            f"{space.latent_channels}. Connect the VAE that belongs to this model."
        )


def _encoder(vae, space) -> Callable[[Tensor], Tensor]:
    def encode(pictures: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> latents (B, C, S/8, S/8) in the sampler's space.

        They are ordinary tensors without gradients, on the device of the pictures.
        """
        with (
            torch.inference_mode()
        ):  # as in the host's nodes, because the host may move the weights now
            latents = space.process_in(vae.encode(pictures.movedim(1, -1)))
        return latents.clone().to(pictures.device)

    return encode


def _encoder_sha256(vae) -> str:
    """Hash of the encoder. VAEs that differ only in the decoder make the same latents.

    Values are rounded to bfloat16, so that the hash does not depend on the precision in which a host loads
    the file.
    """
    state = vae.first_stage_model.state_dict()
    used = {name: value for name, value in state.items() if not name.startswith(DECODER)}
    return tensors_sha256({name: value.to(torch.bfloat16) for name, value in used.items()})


def _family_of(spec) -> str:
    return spec.id.partition("_")[2]
