"""Checks finished latents for copies, decoded by the connected VAE if there is one."""

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
    """Maps latents (B, C, H, W) in the host's units to a `Verdict` each.

    Attributes
    ----------
    by : str
        The decoder: "vae", or the name of the guard's decoder.
    decode : callable
        A latent (1, C, H, W) in the host's units -> a picture (1, 3, h, w) in [0, 1], on any device.
    into_model : callable
        The same latent -> in the model's units.
    """

    by: str
    matcher: Matcher
    decode: Callable[[Tensor], Tensor]
    into_model: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor, named: Sequence[Collection[int]]) -> list[Verdict]:
        """The verdicts. `named` has for each latent the rows of the index to compare in any case."""
        pairs = zip(latents.split(1), named, strict=True)
        return [self._found(latent, self._picture(latent), rows) for latent, rows in pairs]

    def of_kept(self, given: Tensor, box: Box) -> Verdict | None:
        """The verdict on the part in `box` of a given latent (1, C, H, W), or None if `given` is no copy.

        The given latent is decoded as a whole, because a decoder mixes the drawn part into the border of
        the kept one.
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
    """Raise AMGError if the connected VAE belongs to another kind of model."""
    if decoding.usable(vae) and vae.latent_channels != latent_format.latent_channels:
        raise AMGError(
            f"vae: it decodes latents of {vae.latent_channels} channels and the model draws "
            f"{latent_format.latent_channels}. Connect the VAE that belongs to this model, or "
            "disconnect vae."
        )


def make(matcher: Matcher, model, vae, decoder: Decoder | None) -> Judge | None:
    """A `Judge` with the VAE if it decodes still pictures, or else with `decoder`. None without both.

    Parameters
    ----------
    matcher : Matcher
        On the device of the run.
    model : BaseModel
        The host's model, for the scale of its latents.
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
