"""Is what was drawn a copy? Finished latents, decoded by the artist's own VAE where it is connected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import comfy.model_management
from torch import Tensor

from ..amg_core.decoders import Decoder
from ..amg_core.errors import AMGError
from ..amg_core.probe import Probe
from ..amg_core.verdict import Verdict, verdict
from . import decoding

BY_VAE = "vae"


@dataclass(frozen=True)
class Judge:
    """Latents (B, C, H, W), as the host hands them on, -> a `Verdict` each.

    by : str
        What decodes: "vae", or the name of the guard's decoder.
    decode : callable
        A latent (1, C, H, W) as handed on -> a picture (1, 3, h, w) in [0, 1], on any device.
    into_model : callable
        The same latent -> as the model sees it.
    """

    by: str
    probe: Probe
    decode: Callable[[Tensor], Tensor]
    into_model: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor, named: Sequence[Collection[int]]) -> list[Verdict]:
        """`named`: of each latent the rows of the index that it was steered away from."""
        return [self._one(*pair) for pair in zip(latents.split(1), named, strict=True)]

    def _one(self, latent: Tensor, named: Collection[int]) -> Verdict:
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = self.decode(latent).float().clamp(0, 1).to(self.probe.searcher.device)
        probe = self.probe
        if probe.latent:
            probe = probe.of_latent(self.into_model(latent.to(picture.device)))
        (found,) = verdict(probe, picture, [named])
        return found


def check(vae, latent_format) -> None:
    """AMGError where the connected VAE belongs to another kind of model."""
    if decoding.usable(vae) and vae.latent_channels != latent_format.latent_channels:
        raise AMGError(
            f"vae: it decodes latents of {vae.latent_channels} channels and the model draws "
            f"{latent_format.latent_channels}. Connect the VAE that belongs to this model, or none."
        )


def make(probe: Probe, model, vae, decoder: Decoder | None) -> Judge | None:
    """By the VAE where it is one of pictures, else by `decoder`; None where there is neither.

    Parameters
    ----------
    probe : Probe
        On the device of the run.
    model : BaseModel
        The host's, for the scale of its latents.
    """
    into_model = model.process_latent_in
    if decoding.usable(vae):
        return Judge(BY_VAE, probe, lambda latent: _decoded(vae, latent), into_model)
    if decoder is None:
        return None

    def decode(latent: Tensor) -> Tensor:
        return decoder(into_model(latent.to(probe.searcher.device)))

    return Judge(decoder.name, probe, decode, into_model)


def _decoded(vae, latent: Tensor) -> Tensor:
    return vae.decode(latent)[..., :3].movedim(-1, 1)
