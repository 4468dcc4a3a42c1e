"""Looking: how close is a prediction to its nearest picture, and which way leads off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import metrics
from .decoders import Decoder, shrink
from .descriptors.base import Descriptor
from .guidance import resolved_side, without_brightness_and_contrast
from .images import low_pass
from .index.search import Searcher


@dataclass(frozen=True)
class Match:
    """The nearest index picture of each sample, at one scale.

    similarity, spread : Tensor (B,); ids : Tensor (B,) int64; mirrored : Tensor (B,) bool, whether
    the picture's mirror image was the closer one.
    """

    similarity: Tensor
    ids: Tensor
    mirrored: Tensor
    spread: Tensor
    scale: int


class Probe:
    """Index, descriptor and decoder together: latents in, matches and gradients out.

    Samples are handled one at a time: nothing in a batch can touch anything else in it, not even
    through the rounding of a batched kernel, and memory stays that of one picture.
    """

    def __init__(self, searcher: Searcher, descriptor: Descriptor, decoder: Decoder | None = None):
        self.searcher, self.descriptor, self.decoder = searcher, descriptor, decoder
        self.metric, self.scales = descriptor.spec.metric, descriptor.spec.scales
        self._decoys: dict[int, Tensor] = {}

    def scale_at(self, sigma: float, latent_side: int) -> int:
        """The finest stored scale that noise level `sigma` still resolves; the coarsest at least."""
        legible = resolved_side(sigma, latent_side)
        return max((s for s in self.scales if s <= legible), default=self.scales[0])

    def decode(self, latent: Tensor) -> Tensor:
        """(1, C, H, W) -> (1, 3, h, w) in about [0, 1], no larger than the descriptor can use."""
        return self.decoder(shrink(latent, self.decoder_side))

    @property
    def decoder_side(self) -> int:
        return max(32, -(-self.scales[-1] // 8))

    @torch.no_grad()
    def look(self, latents: Tensor, sigma: float) -> Match:
        """Match the predictions (B, C, H, W) at noise level `sigma`."""
        scale = self.scale_at(sigma, min(latents.shape[-2:]))
        pictures = (self.decode(latent[None]).clamp(0, 1) for latent in latents)
        return self._join([self._match(picture, scale) for picture in pictures], scale)

    @torch.no_grad()
    def look_at_pictures(self, pictures: Tensor, scale: int | None = None) -> Match:
        """Match finished pictures (B, 3, H, W) in [0, 1], in full detail unless `scale` is given."""
        scale = self.scales[-1] if scale is None else scale
        return self._join([self._match(picture[None], scale) for picture in pictures], scale)

    def gradient(self, latent: Tensor, match: Match) -> tuple[Tensor, float]:
        """∇_D similarity to the matched neighbour (1, C, H, W), and the similarity now.

        Taken through the low-passed picture, so that only what `sigma` still decides is pushed, and
        with the components that would merely change brightness, tint or contrast removed.
        Call outside inference mode with gradients enabled.
        """
        latent = latent.detach().clone().requires_grad_()
        picture = low_pass(self.decode(latent), match.scale)
        seen = picture.detach().clone().requires_grad_()
        value = self._similarity(seen, match)
        (push,) = torch.autograd.grad(value.sum(), seen)
        push = without_brightness_and_contrast(push, seen.detach())
        (gradient,) = torch.autograd.grad(picture, latent, push)
        return gradient, float(value)

    def _similarity(self, pictures: Tensor, match: Match) -> Tensor:
        view = pictures.flip(-1) if bool(match.mirrored[0]) else pictures
        query = self.descriptor.embed(view, match.scale)
        neighbor = self.searcher.rows(match.ids, match.scale)
        return metrics.similarity(self.metric, query, neighbor, match.spread)

    def _match(self, picture: Tensor, scale: int) -> Match:
        found = [self._nearest(view, scale) for view in (picture, picture.flip(-1))]
        mirrored = bool(found[1][0] > found[0][0])
        similarity, index, spread = found[mirrored]
        return Match(similarity, index, torch.tensor([mirrored]), spread, scale)

    def _nearest(self, picture: Tensor, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        query = self.descriptor.embed(picture, scale)
        if self.metric == "cosine":
            values, ids = self.searcher.nearest(query, scale, 1)
            return values[:, 0], ids[:, 0], torch.ones_like(values[:, 0])
        distances, ids = self.searcher.nearest(query, scale, metrics.NEIGHBORS)
        missing = metrics.NEIGHBORS - distances.shape[1]
        if missing > 0:
            others = (self._decoy_rows(scale) - query).norm(dim=1).sort().values[:missing]
            around = torch.cat([distances, others[None]], dim=1)
        else:
            around = distances
        spread = around.mean(dim=1).clamp_min(1e-6)
        return -distances[:, 0] / (metrics.ALPHA * spread), ids[:, 0], spread

    def _decoy_rows(self, scale: int) -> Tensor:
        if scale not in self._decoys:
            every = torch.arange(self.searcher.count)
            rows = self.searcher.rows(every, scale)
            self._decoys[scale] = metrics.decoys(rows, scale)
        return self._decoys[scale]

    @staticmethod
    def _join(matches: list[Match], scale: int) -> Match:
        columns = ("similarity", "ids", "mirrored", "spread")
        return Match(*(torch.cat([getattr(m, c).cpu() for m in matches]) for c in columns), scale)
