"""Opens an index for a model of diffusers: descriptor, and a decoder for the model's latents."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amg_core.decoders import Decoder, ModuleDecoder, load_taesd
from amg_core.descriptors import registry
from amg_core.errors import AMGError
from amg_core.index import Index
from amg_core.index.search import Searcher
from amg_core.similarity.matcher import Matcher


def open_matcher(
    index: str | Path | Index | Matcher,
    vae: Any,
    *,
    decoder: str | Path | Decoder | nn.Module | None = None,
    weights: str | Path | None = None,
) -> Matcher:
    """A matcher on an index, with a decoder for the latents that `vae` decodes.

    Parameters
    ----------
    index : path, Index or Matcher
        A folder that `amg-index build` made, or the same opened. A matcher's decoder is not used.
    vae : AutoencoderKL or the like
        It is copied in float32, unless there is a `decoder`.
    decoder : path, module or Decoder, optional
        What to decode predictions with instead: a TAESD file, an AutoencoderTiny, or a decoder of
        `amg_core`. It is much faster than a VAE.
    weights : path, optional
        The weights of the index's descriptor, if it needs any.

    Raises
    ------
    AMGError
        There is no index, it is damaged, its descriptor lacks weights or compares latents, or the decoder
        is for other latents.
    """
    if not isinstance(index, Matcher):
        opened = index if isinstance(index, Index) else Index.open(Path(index).expanduser())

        def find(kind: registry.Kind) -> Iterable[Path]:
            return [] if weights is None else [Path(weights).expanduser()]

        index = Matcher(Searcher(opened), registry.for_index(opened.spec, find))
    if index.latent:
        raise AMGError(
            f"index: {index.index.name} is an index of latents, which only the ComfyUI nodes can use. "
            "Build one with the descriptor compact, pixel or sscd."
        )
    return index.through(_decoder(vae, decoder))


def _decoder(vae: Any, decoder: str | Path | Decoder | nn.Module | None) -> Decoder:
    channels = int(vae.config.latent_channels)
    if decoder is None:
        return of_vae(vae)
    if isinstance(decoder, str | Path):
        found: Decoder = load_taesd(Path(decoder).expanduser())
    else:
        found = of_vae(decoder) if isinstance(decoder, nn.Module) else decoder
    if found.channels != channels:
        raise AMGError(
            f"decoder: it decodes latents of {found.channels} channels, and the model draws {channels}. "
            "Give the decoder that belongs to this model, or none."
        )
    return found


def of_vae(vae: Any) -> ModuleDecoder:
    """A decoder of our own, from a copy of a VAE of diffusers: AutoencoderKL, AutoencoderTiny, …"""
    stages = getattr(vae.config, "block_out_channels", None) or (0,) * 4
    decoder = ModuleDecoder(
        "vae", _Decode(vae), int(vae.config.latent_channels), enter=into_vae(vae), leave=as_picture,
        factor=2 ** (len(stages) - 1),
    )  # fmt: skip
    _without_offloading(decoder.network)
    return decoder


def into_vae(vae: Any) -> Any:
    """A function from latents of the model to what the VAE decodes, as the pipelines do it."""
    config = vae.config
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    shift = float(getattr(config, "shift_factor", None) or 0.0)
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))

    def enter(latent: Tensor) -> Tensor:
        if mean is None or std is None:
            return latent / scale + shift
        middle, width = (latent.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
        return latent * width / scale + middle

    return enter


def as_picture(decoded: Tensor) -> Tensor:
    """The output of a VAE, about ±1 -> about [0, 1]."""
    return decoded / 2 + 0.5


class _Decode(nn.Module):
    vae: Any

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(latent, return_dict=False)[0]
        return picture


def _without_offloading(network: nn.Module) -> None:
    """Leave the copy where it is put, if the original is offloaded by accelerate."""
    if any(hasattr(part, "_hf_hook") for part in network.modules()):
        hooks = sys.modules["accelerate.hooks"]
        hooks.remove_hook_from_module(network, recurse=True)
