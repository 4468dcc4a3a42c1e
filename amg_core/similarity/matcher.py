"""Looking: how close is a prediction to its nearest picture, and which way leads off."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import limits
from ..decoders import Decoder
from ..descriptors.base import Descriptor, LatentSpace, compares_latents
from ..errors import AMGError
from ..images import (
    PARTS,
    low_pass,
    parts,
    resolved_side,
    thumbnail,
    without_brightness_and_contrast,
)
from ..index.reader import Index
from ..index.search import Searcher
from . import background, metrics, verifier


@dataclass(frozen=True)
class Match:
    """The nearest index picture of each sample, at one scale.

    similarity, typical, limit : Tensor (B,), in the descriptor's own unit, and score : Tensor (B,),
    see `metrics.score`; spread : Tensor (B,), the unit of nL2; ids : Tensor (B,) int64; mirrored :
    Tensor (B,) bool, whether the picture's mirror image was the closer one.
    """

    similarity: Tensor
    score: Tensor
    ids: Tensor
    mirrored: Tensor
    spread: Tensor
    typical: Tensor
    limit: Tensor
    scale: int

    def __getitem__(self, i: int) -> Match:
        """The match of sample i alone."""
        return replace(self, **{name: getattr(self, name)[i : i + 1] for name in COLUMNS})


FEW_OF_PARTS = 4  # of the k nearest rows, this many times fewer for each part of a picture
NOTHING = -2.0  # −nL2 of what has nothing in common
COLUMNS = (
    "similarity",
    "score",
    "ids",
    "mirrored",
    "spread",
    "typical",
    "limit",
)  # of a `Match`


class Matcher:
    """Index, descriptor and decoder together: latents in, matches and gradients out.

    A descriptor of latents needs no decoder.

    Samples are handled one at a time: nothing in a batch can touch anything else in it, not even
    through the rounding of a batched kernel, and memory stays that of one picture.
    """

    def __init__(self, searcher: Searcher, descriptor: Descriptor, decoder: Decoder | None = None):
        self.searcher, self.descriptor, self.decoder = searcher, descriptor, decoder
        self.metric, self.scales = descriptor.spec.metric, descriptor.spec.scales
        self._latents = descriptor if compares_latents(descriptor) else None
        self.latent = self._latents is not None
        self._channels = 3 if self._latents is None else self._latents.channels
        self._offset = metrics.LATENT_OFFSET if self.latent else metrics.OFFSET
        self._searchers = {searcher.device: searcher}  # one a device, as it takes long to open
        self._encoded: Tensor | None = None
        self._background: dict[tuple[int, torch.device], Tensor | None] = {}
        self._captions: dict[int, str] = {}

    @property
    def index(self) -> Index:
        return self.searcher.index

    def through(self, decoder: Decoder | None) -> Matcher:
        """The same with another decoder. Both share what is made ready on a device."""
        other = copy.copy(self)
        other.decoder = decoder
        return other

    def of_latent(self, latent: Tensor) -> Matcher:
        """The same for one picture whose latent (1, C, h, w) is known, so that it is not encoded."""
        other = copy.copy(self)
        other._encoded = latent
        return other

    def to(self, device: torch.device) -> Matcher:
        """Move what compares to where the model is; returns itself. See `rest`."""
        self._move(device)
        if device not in self._searchers:
            self._searchers[device] = Searcher(self.index, device)
        self.searcher = self._searchers[device]
        return self

    def rest(self) -> None:
        """Leave the accelerator to the host until `to` is called again."""
        self.searcher.release()
        self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        with torch.inference_mode(False):
            self.descriptor.to(device)
            if self.decoder is not None:
                self.decoder.to(device)

    def scale_at(self, sigma: float, latent_side: int) -> int:
        """The finest stored scale that noise level `sigma` still resolves; the coarsest at least.

        None that is finer than the latent, or the picture that the decoder makes of it.
        """
        factor = 1 if self.latent else getattr(self.decoder, "factor", 1)
        return self._finest(min(resolved_side(sigma, latent_side), factor * latent_side))

    def _finest(self, side: float) -> int:
        """The finest stored scale of at most `side` pixels; the coarsest at least."""
        return max((s for s in self.scales if s <= side), default=self.scales[0])

    def decode(self, latent: Tensor, scale: int | None = None) -> Tensor:
        """(1, C, H, W) -> (1, 3, h, w) in about [0, 1], of at least `scale` pixels if it can be.

        The finest scale unless one is given. The latent itself is never reduced: the average of latents
        is not the latent of an average, and what is done to a prediction before it is compared must be
        done to the index's pictures, too.
        """
        if self.decoder is None:
            raise AMGError(
                f"The descriptor {self.descriptor.spec.id} looks at pictures: give the matcher a decoder."
            )
        return self.decoder(latent, at_least=self.scales[-1] if scale is None else scale)

    @torch.no_grad()
    def match(self, latents: Tensor, sigma: float) -> Match:
        """Match the predictions (B, C, H, W) at noise level `sigma`."""
        scale = self.scale_at(sigma, min(latents.shape[-2:]))
        if self.latent:
            seen = (latent[None] for latent in latents)
        else:
            seen = (self.decode(latent[None], scale).clamp(0, 1) for latent in latents)
        return self._join([self._match(one, one.flip(-1), scale) for one in seen], scale)

    @torch.no_grad()
    def match_pictures(self, pictures: Tensor, scale: int | None = None) -> Match:
        """Match finished pictures (B, 3, H, W) in [0, 1], in all the detail they have, or at `scale`.

        Raises
        ------
        AMGError
            The descriptor compares latents and has no encoder.
        """
        scale = self._scale_of(pictures) if scale is None else scale
        return self._join([self._match(*self._views(p[None]), scale) for p in pictures], scale)

    @torch.no_grad()
    def match_parts(self, picture: Tensor) -> Match:
        """Match the parts of a finished picture (1, 3, H, W) that show something: a copy may lie in it.

        B is the number of those parts (`images.parts`), perhaps 0. More comparisons are more chances: the
        limits are those of an index of as many times more rows. A descriptor of latents takes none.
        """
        scale = self._scale_of(picture)
        seen = [] if self.latent else [p for p in parts(picture) if not verifier.flat(p)]
        return self._join([self._match(p, p.flip(-1), scale, PARTS) for p in seen], scale)

    @torch.no_grad()
    def candidates(self, picture: Tensor, k: int) -> list[int]:
        """Ids of the k rows nearest to a finished picture (1, 3, H, W), and of k for its mirror image.

        And of a few for each of its parts (`images.parts`), where something in it may be a copy: of a
        descriptor of pictures.
        """
        scale, found = self._scale_of(picture), []
        for view in self._views(picture):
            found += self.searcher.nearest(self._embed(view, scale), scale, k)[1][0].tolist()
        if not self.latent:
            rows = torch.cat([self._embed(part, scale) for part in parts(picture)])
            few = max(1, k // FEW_OF_PARTS)
            found += self.searcher.nearest(rows, scale, few)[1].flatten().tolist()
        return list(dict.fromkeys(found))

    def _scale_of(self, pictures: Tensor) -> int:
        return self.scales[-1] if self.latent else self._finest(min(pictures.shape[-2:]))

    def _views(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """A finished picture (1, 3, H, W) and its mirror image, as the descriptor takes them."""
        mirror = picture.flip(-1)
        if self._latents is None:
            return picture, mirror
        if self._encoded is not None:
            return self._encoded, self._encoded.flip(-1)
        return self._latents.encode(picture), self._latents.encode(mirror)

    def gradient(self, latent: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        """∇_D similarity to the matched neighbour (1, C, H, W), and the similarity now (1,).

        Taken through the low-passed picture, so that only what the noise level still decides is
        pushed, and with what would merely change brightness, tint or contrast removed.
        Call outside inference mode with gradients enabled.
        """
        if self._latents is not None:
            return self._latent_gradient(self._latents, latent.detach(), match)
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
    def _latent_gradient(
        self, space: LatentSpace, latent: Tensor, match: Match
    ) -> tuple[Tensor, Tensor]:
        """`gradient` in closed form, where what is compared is the latent itself."""
        mirrored = bool(match.mirrored[0])
        seen = space.reduce(latent, match.scale)
        query = (seen.flip(-1) if mirrored else seen).flatten(1)
        neighbor = self.searcher.rows(match.ids, match.scale).to(query)
        push, value = metrics.nl2_gradient(
            query, neighbor, match.spread.to(query), self._channels, self._offset
        )
        push = push.reshape(seen.shape)
        push = without_brightness_and_contrast(push.flip(-1) if mirrored else push, seen)
        return space.adjoint(push, latent.shape[-2:]).to(latent), value

    def caption(self, i: int) -> str:
        """The caption most often given to picture `i` (y_N of AMG Eq. 15); "" where there is none.

        Its own, those of files with the same bytes, and those of rows that are the same picture in
        other bytes vote; of equally frequent ones its own wins, then the first. The authors' code
        takes the most common caption among the neighbours, too.
        """
        if i not in self._captions:
            votes = Counter(self.index.captions(i))
            for other in self._same_picture(i):
                votes.update(self.index.captions(other))
            self._captions[i] = max(votes, key=votes.__getitem__, default="")
        return self._captions[i]

    @torch.no_grad()
    def _same_picture(self, i: int) -> list[int]:
        """Ids of other rows, at most `metrics.NEIGHBORS`, that hold the picture of row `i`."""
        scale = self.scales[-1]
        own = self.searcher.rows(torch.tensor([i]), scale)
        values, ids = self.searcher.nearest(own, scale, metrics.NEIGHBORS + 1)
        similarity, _ = self._similarities(own, values[:1], ids[0], scale)
        same = (similarity > limits.SAME_PICTURE[self.metric]).cpu() & (ids[0].cpu() != i)
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
        if self._latents is not None:
            direction, share = self._towards_latent(self._latents, latent, match)
        else:
            direction, share = self._towards_picture(latent, match)
        direction = direction - direction.mean(dim=(2, 3), keepdim=True)
        return direction / direction.norm().clamp_min(1e-12), min(1.0, max(0.0, share))

    def _towards_picture(self, latent: Tensor, match: Match) -> tuple[Tensor, float]:
        with torch.inference_mode(False), torch.enable_grad():
            latent = latent.detach().clone().requires_grad_()
            seen = low_pass(self.decode(latent, match.scale), match.scale)
            stored = low_pass(thumbnail(self.index, int(match.ids[0]))[None], match.scale)
            stored = stored.flip(-1) if bool(match.mirrored[0]) else stored
            stored = (stored - stored.mean(dim=(2, 3), keepdim=True)).to(seen)
            product = (seen * stored).sum()
            (direction,) = torch.autograd.grad(product, latent)
        return direction, float(product.detach() / stored.square().sum().clamp_min(1e-12))

    @torch.no_grad()
    def _towards_latent(
        self, space: LatentSpace, latent: Tensor, match: Match
    ) -> tuple[Tensor, float]:
        """The same, where what is stored is the latent itself."""
        seen = space.reduce(latent, match.scale)
        stored = self.searcher.rows(match.ids, match.scale).to(seen).reshape(seen.shape)
        stored = stored.flip(-1) if bool(match.mirrored[0]) else stored
        stored = stored - stored.mean(dim=(2, 3), keepdim=True)
        share = float((seen * stored).sum() / stored.square().sum().clamp_min(1e-12))
        return space.adjoint(stored, latent.shape[-2:]).to(latent), share

    def _embed(self, seen: Tensor, scale: int) -> Tensor:
        """Pictures, or latents where the descriptor compares latents: (B, C, H, W) -> (B, D)."""
        if self._latents is None:
            return self.descriptor.embed(seen, scale)
        return self._latents.embed_latents(seen, scale)

    def _match(self, seen: Tensor, mirror: Tensor, scale: int, comparisons: int = 1) -> Match:
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
        levels = self._levels(queries[int(mirrored)][None], scale, comparisons)
        close = metrics.score(self.metric, similarity, *levels)
        return Match(similarity, close, index, torch.tensor([mirrored]), spread, *levels, scale)

    def _levels(self, query: Tensor, scale: int, comparisons: int) -> tuple[Tensor, Tensor]:
        """What counts as nothing in common and as a copy (1,) each, for a query (1, D): see `limits`."""
        levels = torch.tensor(self.levels(scale, comparisons), device=query.device)
        others = self._background_rows(scale)
        if self.metric == "cosine" and others is not None:
            usual = (query @ others.T).topk(limits.BACKGROUND_NEAREST, dim=1).values.mean()
            levels = levels + limits.shift(self.descriptor.spec, scale, float(usual))
        return levels[:1], levels[1:]

    def levels(self, scale: int, comparisons: int = 1) -> tuple[float, float]:
        """Similarity that ordinary pictures which are not in this index reach, and one in 100 of them.

        In the best of `comparisons` at each.
        """
        return limits.levels(self.descriptor.spec, scale, comparisons * self.index.count)

    def _best(
        self, query: Tensor, values: Tensor, ids: Tensor, scale: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity (1,), id (1,) and spread (1,) of the closest of the rows `ids` (K,)."""
        similarities, spread = self._similarities(query, values, ids, scale)
        best = similarities.argmax()[None]
        return similarities[best], ids[best], spread[best]

    def _similarities(
        self, query: Tensor, values: Tensor, ids: Tensor, scale: int
    ) -> tuple[Tensor, Tensor]:
        """Similarity to each of the rows `ids` (K,), found at `values` (1, K), and the spread of each.

        A row that is one flat tone is like nothing.
        """
        if self.metric == "cosine":
            return values[0], torch.ones_like(values[0])
        rows = self.searcher.rows(ids, scale)
        spread = metrics.structure(rows, self._channels).clamp_min(1e-6)
        near = metrics.matched(query[0], rows, self._channels, self._offset)
        flat = metrics.is_flat(rows, self._channels)
        return torch.where(flat, NOTHING, -metrics.nl2(near, rows, spread)), spread

    def _background_rows(self, scale: int) -> Tensor | None:
        key = scale, self.searcher.device
        if key not in self._background:
            found = background.rows(self.descriptor.spec, scale)
            self._background[key] = None if found is None else found.to(self.searcher.device)
        return self._background[key]

    @staticmethod
    def _join(matches: list[Match], scale: int) -> Match:
        if not matches:
            return Match(scale=scale, **{name: torch.empty(0) for name in COLUMNS})
        joined = {c: torch.cat([getattr(m, c).cpu() for m in matches]) for c in COLUMNS}
        return Match(scale=scale, **joined)
