"""The places of indexes, descriptor weights and decoders in the host's model folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from amg_core.errors import AMGError

INDEXES, MANIFEST = "amg_indexes", "manifest.json"
NO_INDEX = "(no index yet)"
# Published preview colours of two latent spaces: latent channels -> RGB of about [-1, 1].
COLOURS = {
    "sd": [
        [0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473],
    ],
    "sdxl": [
        [0.3448, 0.4168, 0.4395], [-0.1953, -0.0290, 0.0250], [0.1074, 0.0886, -0.0163],
        [-0.3730, -0.2499, -0.2088],
    ],
}  # fmt: skip

_open: dict[Path, tuple[int, object]] = {}


def models() -> Path:
    """The host's folder of models."""
    from modules import paths_internal

    return Path(paths_internal.models_path)


def index_names() -> list[str]:
    """The sorted names of all indexes in models/amg_indexes, or a note if there are none."""
    try:
        entries = list(os.scandir(models() / INDEXES))
    except OSError:
        entries = []
    names = [e.name for e in entries if os.path.isfile(os.path.join(e.path, MANIFEST))]
    return sorted((n for n in names if not n.startswith(".")), key=str.lower) or [NO_INDEX]


def index_folder(name: str) -> Path:
    """The folder of index `name`, which may not exist yet. AMGError if it is no plain name."""
    from amg_core.files import named_folder

    return named_folder(models() / INDEXES, name)


def weights(kind) -> list[Path]:
    """Files in the model folders that may be the weights of such a descriptor."""

    def names(place: str) -> list[str]:
        folder = models() / place
        return os.listdir(folder) if folder.is_dir() else []

    return [models() / place / name for place, name in kind.weights.among(names)]


def open_matcher(name: str):
    """A `Matcher` (without decoder, on the CPU) on index `name`. It is cached until the files change.

    Raises
    ------
    AMGError
        There is no such index, it is damaged, or the weights of its descriptor are missing or different.
    """
    from amg_core.descriptors.registry import for_index
    from amg_core.index import Index
    from amg_core.index.search import Searcher
    from amg_core.similarity.matcher import Matcher

    folder = index_folder(name) if name and name != NO_INDEX else models() / INDEXES / "none"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise AMGError(
            f"index: there is no index named {name!r} in {models() / INDEXES}. Build one in the "
            "tab AMG Index, or copy an index folder there. Then press the refresh button."
        )
    changed = manifest.stat().st_mtime_ns
    if folder not in _open or _open[folder][0] != changed:
        with torch.inference_mode(False):
            index = Index.open(folder)
            descriptor = for_index(index.spec, weights)
            _open[folder] = (changed, Matcher(Searcher(index), descriptor))
    return _open[folder][1]


def decoder(
    taesd: str, channels: int, vae: Callable[[], nn.Module | None], enter: Callable[[Tensor], Tensor],
    colours=None,
):  # fmt: skip
    """The guard's own decoder: from TAESD's file, or else a copy of the host's VAE, or preview colours.

    Parameters
    ----------
    taesd : str
        Name of the file without ending, such as "taesd_decoder", in models/VAE-taesd or
        models/vae_approx.
    vae : callable
        Returns the host's autoencoder, with `decoder` and perhaps `post_quant_conv`, or None.
    enter : callable
        A model-space latent -> the input of that autoencoder.
    colours : (C, 3), optional

    Raises
    ------
    AMGError
        There is no decoder for these latents.
    """
    from amg_core.decoders import LinearDecoder, ModuleDecoder, load_taesd

    with torch.random.fork_rng(devices=[]):  # building a module draws its initial weights
        for folder in ("VAE-taesd", "vae_approx"):
            for end in (".safetensors", ".pth"):
                file = models() / folder / (taesd + end)
                if file.is_file() and (found := load_taesd(file)).channels == channels:
                    return found
        network = vae()
        if hasattr(network, "decoder"):
            return ModuleDecoder(
                "vae",
                _Decode(network),
                channels,
                enter=enter,
                leave=lambda picture: (picture + 1) / 2,
            )
        if colours is not None and len(colours) == channels:
            return LinearDecoder(torch.tensor(colours))
    raise AMGError(
        f"The guard cannot decode the latents of this model ({channels} channels). Put "
        f"{taesd}.pth (from github.com/madebyollin/taesd) into {models() / 'VAE-taesd'}."
    )


class _Decode(nn.Module):
    """The decoding half of a host's VAE, without the hooks that the host has added to the whole."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.first, self.decoder = getattr(vae, "post_quant_conv", None), vae.decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(latent if self.first is None else self.first(latent))
