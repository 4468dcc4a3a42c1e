"""Is what was drawn a copy? Finished latents, decoded by the artist's own VAE where it is connected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import comfy.model_management
from torch import Tensor

from ..amg_core.decoders import Decoder
from ..amg_core.errors import AMGError
from ..amg_core.images import Box, cut
from ..amg_core.similarity.matcher import Matcher
from ..amg_core.similarity.verdict import Verdict, verdict
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
    matcher: Matcher
    decode: Callable[[Tensor], Tensor]
    into_model: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor, named: Sequence[Collection[int]]) -> list[Verdict]:
        """`named`: of each latent the rows of the index that it was steered away from."""
        pairs = zip(latents.split(1), named, strict=True)
        return [self._found(latent, self._picture(latent), rows) for latent, rows in pairs]

    def of_kept(self, given: Tensor, box: Box) -> Verdict | None:
        """On the part in `box` of a given latent (1, C, H, W); None unless that latent is a copy.

        Decoded as it was given: a decoder smears what was drawn beside that part over its border.
        """
        picture = self._picture(given)
        whole = self._found(given, picture, ())
        if not whole.copy:
            return None
        return self._found(cut(given, box), cut(picture, box), [whole.neighbor])

    def _picture(self, latent: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.decode(latent).float().clamp(0, 1).to(self.matcher.searcher.device)

    def _found(self, latent: Tensor, picture: Tensor, named: Collection[int]) -> Verdict:
        matcher = self.matcher
        if matcher.latent:
            matcher = matcher.of_latent(self.into_model(latent.to(picture.device)))
        (found,) = verdict(matcher, picture, [named])
        return found


def check(vae, latent_format) -> None:
    """AMGError where the connected VAE belongs to another kind of model."""
    if decoding.usable(vae) and vae.latent_channels != latent_format.latent_channels:
        raise AMGError(
            f"vae: it decodes latents of {vae.latent_channels} channels and the model draws "
            f"{latent_format.latent_channels}. Connect the VAE that belongs to this model, or "
            "disconnect vae."
        )


def make(matcher: Matcher, model, vae, decoder: Decoder | None) -> Judge | None:
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
        return Judge(BY_VAE, matcher, lambda latent: _decoded(vae, latent), into_model)
    if decoder is None:
        return None

    def decode(latent: Tensor) -> Tensor:
        return decoder(into_model(latent.to(matcher.searcher.device)))

    return Judge(decoder.name, matcher, decode, into_model)


def _decoded(vae, latent: Tensor) -> Tensor:
    return vae.decode(latent)[..., :3].movedim(-1, 1)
