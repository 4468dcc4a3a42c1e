"""Looking: how close is a prediction to its nearest picture, and which way leads off."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from . import metrics
from .decoders import Decoder, shrink, side_for
from .descriptors.base import Descriptor
from .errors import AMGError
from .guidance import resolved_side, without_brightness_and_contrast
from .images import low_pass, thumbnail
from .index.search import Searcher

SAMPLED = 256  # index pictures that are compared with the others to learn what unrelated means
QUANTILE = 0.99  # of their similarity to their nearest other picture
SAME = {"cosine": 0.9, "nl2": -0.2}  # above: two files of one picture, not two pictures
LIMIT = {"cosine": 0.75, "nl2": -0.35}  # unrelated pictures are never taken to be closer than this
FEW, UNKNOWN = 8, {"cosine": 0.3, "nl2": -0.8}  # an index of fewer pictures cannot tell


@dataclass(frozen=True)
class Match:
    """The nearest index picture of each sample, at one scale.

    similarity, closeness (see `metrics.closeness`), spread : Tensor (B,); ids : Tensor (B,) int64;
    mirrored : Tensor (B,) bool, whether the picture's mirror image was the closer one.
    """

    similarity: Tensor
    closeness: Tensor
    ids: Tensor
    mirrored: Tensor
    spread: Tensor
    scale: int

    def __getitem__(self, i: int) -> Match:
        """The match of sample i alone."""
        parts = (self.similarity, self.closeness, self.ids, self.mirrored, self.spread)
        return Match(*(part[i : i + 1] for part in parts), self.scale)


class Probe:
    """Index, descriptor and decoder together: latents in, matches and gradients out.

    A descriptor of latents needs no decoder.

    Samples are handled one at a time: nothing in a batch can touch anything else in it, not even
    through the rounding of a batched kernel, and memory stays that of one picture.

    zero_from : Probe, optional
        Takes the zero of closeness and the second judge's limits from its index: for an index to which
        pictures were added that may be its own, and would pass for what unrelated pictures are like.
    """

    def __init__(
        self,
        searcher: Searcher,
        descriptor: Descriptor,
        decoder: Decoder | None = None,
        zero_from: Probe | None = None,
    ):
        self.searcher, self.descriptor, self.decoder = searcher, descriptor, decoder
        self.zero_from = zero_from
        self.metric, self.scales = descriptor.spec.metric, descriptor.spec.scales
        self.latent = getattr(descriptor, "space", "picture") == "latent"
        self._channels = descriptor.channels if self.latent else 3
        self._offset = metrics.LATENT_OFFSET if self.latent else metrics.OFFSET
        self._decoys: dict[int, Tensor] = {}
        self._unrelated: dict[int, float] = {}
        self._captions: dict[int, str] = {}

    def scale_at(self, sigma: float, latent_side: int) -> int:
        """The finest stored scale that noise level `sigma` still resolves; the coarsest at least.

        Of latents, none that is finer than the latent itself.
        """
        legible = resolved_side(sigma, latent_side)
        if self.latent:
            legible = min(legible, latent_side)
        return max((s for s in self.scales if s <= legible), default=self.scales[0])

    def decode(self, latent: Tensor, scale: int | None = None) -> Tensor:
        """(1, C, H, W) -> (1, 3, h, w) in about [0, 1], no larger than is used to compare at `scale`.

        The finest scale unless one is given.
        """
        if self.decoder is None:
            raise AMGError(
                f"The descriptor {self.descriptor.spec.id} looks at pictures: give the probe a decoder."
            )
        scale = self.scales[-1] if scale is None else scale
        return self.decoder(shrink(latent, side_for(self.decoder, latent, scale)))

    @torch.no_grad()
    def look(self, latents: Tensor, sigma: float) -> Match:
        """Match the predictions (B, C, H, W) at noise level `sigma`."""
        scale = self.scale_at(sigma, min(latents.shape[-2:]))
        if self.latent:
            seen = (latent[None] for latent in latents)
        else:
            seen = (self.decode(latent[None], scale).clamp(0, 1) for latent in latents)
        return self._join([self._match(one, one.flip(-1), scale) for one in seen], scale)

    @torch.no_grad()
    def look_at_pictures(self, pictures: Tensor, scale: int | None = None) -> Match:
        """Match finished pictures (B, 3, H, W) in [0, 1], in full detail unless `scale` is given.

        Raises
        ------
        AMGError
            The descriptor compares latents and has no encoder.
        """
        scale = self.scales[-1] if scale is None else scale
        return self._join([self._match(*self._views(p[None]), scale) for p in pictures], scale)

    @torch.no_grad()
    def candidates(self, picture: Tensor, k: int) -> list[int]:
        """Ids of the k rows nearest to a finished picture (1, 3, H, W), and of k for its mirror image."""
        scale, found = self.scales[-1], []
        for view in self._views(picture):
            found += self.searcher.nearest(self._embed(view, scale), scale, k)[1][0].tolist()
        return list(dict.fromkeys(found))

    def _views(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """A finished picture (1, 3, H, W) and its mirror image, as the descriptor takes them."""
        both = picture, picture.flip(-1)
        return tuple(map(self.descriptor.encode, both)) if self.latent else both

    def gradient(self, latent: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        """∇_D similarity to the matched neighbour (1, C, H, W), and the similarity now (1,).

        Taken through the low-passed picture, so that only what the noise level still decides is
        pushed, and with what would merely change brightness, tint or contrast removed.
        Call outside inference mode with gradients enabled.
        """
        if self.latent:
            return self._latent_gradient(latent.detach(), match)
        latent = latent.detach().clone().requires_grad_()
        picture = low_pass(self.decode(latent, match.scale), match.scale)
        seen = picture.detach().clone().requires_grad_()
        view = seen.flip(-1) if bool(match.mirrored[0]) else seen
        query = self.descriptor.embed(view, match.scale)
        neighbor = self.searcher.rows(match.ids, match.scale)
        value = metrics.similarity(self.metric, query, neighbor, match.spread.to(query))
        (push,) = torch.autograd.grad(value.sum(), seen)
        push = without_brightness_and_contrast(push, seen.detach())
        (gradient,) = torch.autograd.grad(picture, latent, push)
        return gradient, value.detach()

    @torch.no_grad()
    def _latent_gradient(self, latent: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        """`gradient` in closed form, where what is compared is the latent itself."""
        from .descriptors.latent import low_pass_adjoint

        mirrored = bool(match.mirrored[0])
        seen = low_pass(latent.float(), match.scale)
        query = (seen.flip(-1) if mirrored else seen).flatten(1)
        neighbor = self.searcher.rows(match.ids, match.scale).to(query)
        push, value = metrics.nl2_gradient(
            query, neighbor, match.spread.to(query), self._channels, self._offset
        )
        push = push.reshape(seen.shape)
        push = without_brightness_and_contrast(push.flip(-1) if mirrored else push, seen)
        return low_pass_adjoint(push, tuple(latent.shape[-2:])).to(latent), value

    def caption(self, i: int) -> str:
        """The caption most often given to picture `i` (y_N of AMG Eq. 15); "" where there is none.

        Its own, those of files with the same bytes, and those of rows that are the same picture in
        other bytes vote; of equally frequent ones its own wins, then the first. The authors' code
        takes the most common caption among the neighbours, too.
        """
        if i not in self._captions:
            votes = Counter(self.searcher.index.captions(i))
            for other in self._same_picture(i):
                votes.update(self.searcher.index.captions(other))
            self._captions[i] = max(votes, key=votes.get, default="")
        return self._captions[i]

    @torch.no_grad()
    def _same_picture(self, i: int) -> list[int]:
        """Ids of other rows, at most `metrics.NEIGHBORS`, that hold the picture of row `i`."""
        scale = self.scales[-1]
        own = self.searcher.rows(torch.tensor([i]), scale)
        values, ids = self.searcher.nearest(own, scale, metrics.NEIGHBORS + 1)
        similarity, _ = self._similarities(own, values[:1], ids[0], scale)
        same = (similarity > SAME[self.metric]).cpu() & (ids[0].cpu() != i)
        return ids[0].cpu()[same].tolist()

    def towards(self, latent: Tensor, match: Match) -> tuple[Tensor, float]:
        """The direction in which a prediction becomes more like its matched picture.

        Returns
        -------
        direction : Tensor (1, C, H, W) of norm 1, each channel's mean removed
            The gradient of the product of the prediction, decoded and low-passed to the scale of the
            match, with the neighbour's thumbnail without its mean colour. The product is linear in
            the picture: there is nothing in it that could be fooled.
        share : float in [0, 1]
            How much of that picture there is in the prediction: its coefficient.
        """
        if self.latent:
            direction, share = self._towards_latent(latent, match)
        else:
            direction, share = self._towards_picture(latent, match)
        direction = direction - direction.mean(dim=(2, 3), keepdim=True)
        return direction / direction.norm().clamp_min(1e-12), min(1.0, max(0.0, share))

    def _towards_picture(self, latent: Tensor, match: Match) -> tuple[Tensor, float]:
        with torch.inference_mode(False), torch.enable_grad():
            latent = latent.detach().clone().requires_grad_()
            seen = low_pass(self.decode(latent, match.scale), match.scale)
            stored = low_pass(thumbnail(self.searcher.index, int(match.ids[0]))[None], match.scale)
            stored = stored.flip(-1) if bool(match.mirrored[0]) else stored
            stored = (stored - stored.mean(dim=(2, 3), keepdim=True)).to(seen)
            product = (seen * stored).sum()
            (direction,) = torch.autograd.grad(product, latent)
        return direction, float(product.detach() / stored.square().sum().clamp_min(1e-12))

    @torch.no_grad()
    def _towards_latent(self, latent: Tensor, match: Match) -> tuple[Tensor, float]:
        """The same, where what is stored is the latent itself."""
        from .descriptors.latent import low_pass_adjoint

        seen = low_pass(latent.float(), match.scale)
        stored = self.searcher.rows(match.ids, match.scale).to(seen).reshape(seen.shape)
        stored = stored.flip(-1) if bool(match.mirrored[0]) else stored
        stored = stored - stored.mean(dim=(2, 3), keepdim=True)
        share = float((seen * stored).sum() / stored.square().sum().clamp_min(1e-12))
        return low_pass_adjoint(stored, tuple(latent.shape[-2:])).to(latent), share

    @torch.no_grad()
    def unrelated(self, scale: int) -> float:
        """How similar two different pictures of this index can be, at one scale.

        The 99 % quantile, over up to 256 of its pictures, of the similarity to the nearest other one;
        files of one and the same picture are passed over. This is the zero of `metrics.closeness`.
        """
        if self.zero_from is not None:
            return self.zero_from.unrelated(scale)
        if scale not in self._unrelated:
            self._unrelated[scale] = self._measure_unrelated(scale)
        return self._unrelated[scale]

    def _measure_unrelated(self, scale: int) -> float:
        count = self.searcher.index.count
        if count < FEW:
            return UNKNOWN[self.metric]
        chosen = torch.linspace(0, count - 1, min(SAMPLED, count)).round().long()
        values, ids = self.searcher.nearest(
            self.searcher.rows(chosen, scale), scale, metrics.NEIGHBORS + 1
        )
        nearest = []
        for own, row_values, row_ids in zip(chosen.tolist(), values, ids.cpu(), strict=True):
            others = row_ids != own
            similarity = self._similarities(
                self.searcher.rows(torch.tensor([own]), scale), row_values[others][None],
                row_ids[others], scale,
            )[0]  # fmt: skip
            different = similarity[similarity < SAME[self.metric]]
            if len(different):
                nearest.append(different.max())
        if len(nearest) < FEW:
            return UNKNOWN[self.metric]
        return min(float(torch.stack(nearest).quantile(QUANTILE)), LIMIT[self.metric])

    def _embed(self, seen: Tensor, scale: int) -> Tensor:
        """Pictures, or latents where the descriptor compares latents: (B, C, H, W) -> (B, D)."""
        if self.latent:
            return self.descriptor.embed_latents(seen, scale)
        return self.descriptor.embed(seen, scale)

    def _match(self, seen: Tensor, mirror: Tensor, scale: int) -> Match:
        """`seen` and its mirror image: of a latent only nearly the latent of the mirrored picture.

        Both go through the descriptor at once, half the kernels to launch on an accelerator, and are
        searched for at once: an index of millions is read once, not twice.
        """
        queries = self._embed(torch.cat([seen, mirror]), scale)
        wanted = 1 if self.metric == "cosine" else metrics.NEIGHBORS
        values, ids = self.searcher.nearest(queries, scale, wanted)
        found = [self._best(queries[i : i + 1], values[i : i + 1], ids[i], scale) for i in range(2)]
        mirrored = bool(found[1][0] > found[0][0])
        similarity, index, spread = found[mirrored]
        close = metrics.closeness(self.metric, similarity, self.unrelated(scale))
        return Match(similarity, close, index, torch.tensor([mirrored]), spread, scale)

    def _best(
        self, query: Tensor, values: Tensor, ids: Tensor, scale: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity (1,), id (1,) and spread (1,) of the closest of the rows `ids` (K,)."""
        similarities, spread = self._similarities(query, values, ids, scale)
        best = similarities.argmax()
        return similarities[best][None], ids[best][None], spread

    def _similarities(
        self, query: Tensor, values: Tensor, ids: Tensor, scale: int
    ) -> tuple[Tensor, Tensor]:
        """Similarity to each of the rows `ids` (K,), found at `values` (1, K), and the spread (1,)."""
        if self.metric == "cosine":
            return values[0], torch.ones_like(values[:, 0])
        around, missing = values[0], metrics.NEIGHBORS - values.shape[1]
        if missing > 0:
            others = (self._decoy_rows(scale) - query).norm(dim=1).sort().values
            around = torch.cat([around, others[:missing].to(around)])
        spread = around.mean().clamp_min(1e-6)[None]
        rows = self.searcher.rows(ids, scale)
        near = metrics.matched(query[0], rows, self._channels, self._offset)
        return -metrics.nl2(near, rows, spread), spread

    def _decoy_rows(self, scale: int) -> Tensor:
        if scale not in self._decoys:
            every = torch.arange(self.searcher.index.count)
            self._decoys[scale] = metrics.decoys(
                self.searcher.rows(every, scale), scale, self._channels
            )
        return self._decoys[scale]

    @staticmethod
    def _join(matches: list[Match], scale: int) -> Match:
        columns = ("similarity", "closeness", "ids", "mirrored", "spread")
        return Match(*(torch.cat([getattr(m, c).cpu() for m in matches]) for c in columns), scale)
