"""Finds the nearest picture of the index for a prediction, and the gradient of the similarity to it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
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
    """The nearest picture of the index for each of B samples, at one scale.

    Attributes
    ----------
    similarity, typical, limit : Tensor (B,)
        In the descriptor's own unit, see `metrics.score`.
    score : Tensor (B,)
        See `metrics.score`.
    spread : Tensor (B,)
        The unit of nL2.
    ids : Tensor (B,) int64
        Rows of the index.
    mirrored : Tensor (B,) bool
        Whether the mirror image of the sample was closer.
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
        """The match of sample i only."""
        return replace(self, **{name: getattr(self, name)[i : i + 1] for name in COLUMNS})


@dataclass(frozen=True)
class Finished:
    """A finished picture in rows of the descriptor, so that it is embedded once for all comparisons.

    Attributes
    ----------
    whole : Tensor (2, D)
        The picture and its mirror image.
    parts : Tensor (P, 2, D)
        Its parts (`images.parts`) and their mirror images. With a descriptor of latents, P is 0.
    shown : Tensor (P,) bool
        Which parts are not flat.
    """

    scale: int
    whole: Tensor
    parts: Tensor
    shown: Tensor


FEW_OF_PARTS = 4  # for each part of a picture, the k nearest rows are divided by this
COLUMNS = (
    "similarity",
    "score",
    "ids",
    "mirrored",
    "spread",
    "typical",
    "limit",
)  # fields of a `Match`


class Matcher:
    """Compares latents or pictures with an index: matches and gradients, by descriptor and decoder.

    A descriptor of latents needs no decoder.

    Samples are processed one at a time. So they cannot influence each other, not even by the rounding of a
    batched kernel, and the memory needed is that of one picture.
    """

    def __init__(self, searcher: Searcher, descriptor: Descriptor, decoder: Decoder | None = None):
        self.searcher, self.descriptor, self.decoder = searcher, descriptor, decoder
        self.metric, self.scales = descriptor.spec.metric, descriptor.spec.scales
        self._latents = descriptor if compares_latents(descriptor) else None
        self.latent = self._latents is not None
        self._channels = 3 if self._latents is None else self._latents.channels
        self._offset = metrics.LATENT_OFFSET if self.latent else metrics.OFFSET
        self._searchers = {
            searcher.device: searcher
        }  # one for each device, because opening takes long
        self._encoded: Tensor | None = None
        self._background: dict[tuple[int, torch.device], Tensor | None] = {}
        self._captions: dict[int, str] = {}

    @property
    def index(self) -> Index:
        return self.searcher.index

    def through(self, decoder: Decoder | None) -> Matcher:
        """The same matcher with another decoder. Both share the searchers of each device."""
        other = copy.copy(self)
        other.decoder = decoder
        return other

    def of_latent(self, latent: Tensor) -> Matcher:
        """The same matcher for one picture whose latent (1, C, h, w) is given, so it is not encoded."""
        other = copy.copy(self)
        other._encoded = latent
        return other

    def to(self, device: torch.device) -> Matcher:
        """Move index, descriptor and decoder to the model's device. Returns itself. See `rest`."""
        self._move(device)
        if device not in self._searchers:
            self._searchers[device] = Searcher(self.index, device)
        self.searcher = self._searchers[device]
        return self

    def rest(self) -> None:
        """Free the memory of the accelerator until `to` is called again."""
        self.searcher.release()
        self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        with torch.inference_mode(False):
            self.descriptor.to(device)
            if self.decoder is not None:
                self.decoder.to(device)

    def scale_at(self, sigma: float, latent_side: int) -> int:
        """The finest scale of the descriptor whose detail is above the noise at `sigma`.

        It is not finer than the latent or its decoded picture. If no scale fits, it is the coarsest.
        """
        factor = 1 if self.latent else getattr(self.decoder, "factor", 1)
        return self._finest(min(resolved_side(sigma, latent_side), factor * latent_side))

    def _finest(self, side: float) -> int:
        """The finest scale of at most `side` pixels, or else the coarsest."""
        return max((s for s in self.scales if s <= side), default=self.scales[0])

    def decode(self, latent: Tensor, scale: int | None = None) -> Tensor:
        """Decode (1, C, H, W) to (1, 3, h, w) in about [0, 1], of at least `scale` pixels if possible.

        Without `scale` the finest scale is used. The latent itself is never reduced, because an averaged
        latent does not decode to the averaged picture, and predictions must be treated in the same way as
        the pictures of the index.
        """
        if self.decoder is None:
            raise AMGError(
                f"The descriptor {self.descriptor.spec.id} compares pictures: give the matcher a decoder."
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
    def match_as_published(self, latents: Tensor) -> Match:
        """Match the predictions (B, C, H, W) by Eq. 8 or Eq. 9 of AMG as they stand.

        n0 is the nearest row at the finest scale, whatever the noise. Unlike `match` it compares no mirror
        image, fits no contrast and brightness, and moves no level for a single query. The spread of nL2 is
        the mean distance of the k = 50 nearest rows, or of all rows of a smaller index, so an index of one
        picture finds nothing. Levels of the score with nL2: 0 at nL2 = 2, which is the most, and COPY at
        1.4, below which the paper calls a picture memorised.
        """
        scale = self.scale_at(0.0, min(latents.shape[-2:]))
        found = (self._match_as_published(latent[None], scale) for latent in latents)
        return self._join(list(found), scale)

    @torch.no_grad()
    def match_pictures(self, pictures: Tensor, scale: int | None = None) -> Match:
        """Match finished pictures (B, 3, H, W) in [0, 1] at `scale`, or else at the finest that fits.

        Raises
        ------
        AMGError
            The descriptor compares latents and has no encoder.
        """
        scale = self.scale_of(pictures) if scale is None else scale
        return self._join([self._match(*self._views(p[None]), scale) for p in pictures], scale)

    @torch.no_grad()
    def finished(self, picture: Tensor) -> Finished:
        """Embed a finished picture (1, 3, H, W) in [0, 1], and its parts.

        Raises
        ------
        AMGError
            The descriptor compares latents and has no encoder.
        """
        scale = self.scale_of(picture)
        whole = self._embed(torch.cat(self._views(picture)), scale)
        seen = [] if self.latent else parts(picture)
        rows = [self._embed(torch.cat([part, part.flip(-1)]), scale) for part in seen]
        stacked = torch.stack(rows) if rows else whole.new_empty(0, *whole.shape)
        shown = torch.tensor([not verifier.flat(part) for part in seen], dtype=torch.bool)
        return Finished(scale, whole, stacked, shown)

    @torch.no_grad()
    def match_whole(self, seen: Finished) -> Match:
        """Match a finished picture, as `match_pictures` does."""
        return self._join(self._matches(seen.whole[None], seen.scale), seen.scale)

    @torch.no_grad()
    def nearest(self, picture: Tensor, k: int, scale: int | None = None) -> list[tuple[int, float]]:
        """The k rows most similar to a finished picture (1, 3, H, W) or its mirror image.

        They are ids and similarities, as `match_pictures` measures them: the first is its match.
        """
        scale = self.scale_of(picture) if scale is None else scale
        best: dict[int, float] = {}
        for view in self._views(picture):
            query = self._embed(view, scale)
            wanted = k if self.metric == "cosine" else max(k, metrics.NEIGHBORS)
            values, ids = self.searcher.nearest(query, scale, wanted)
            similarities, _ = self._similarities(query, values, ids[0], scale)
            for i, value in zip(ids[0].tolist(), similarities.tolist(), strict=True):
                best[i] = max(value, best.get(i, value))
        return sorted(best.items(), key=lambda one: -one[1])[:k]

    @torch.no_grad()
    def match_parts(self, seen: Finished) -> Match:
        """Match the parts of a finished picture, which may hold a copy.

        Flat parts are left out, so B can be 0. More comparisons raise the chance of a false alarm, so the
        limits are those of an index with as many times more rows.
        """
        shown = seen.parts[seen.shown.to(seen.parts.device)]
        return self._join(self._matches(shown, seen.scale, PARTS), seen.scale)

    @torch.no_grad()
    def candidates(self, seen: Finished, k: int) -> list[int]:
        """Ids of the k rows nearest to a finished picture, and of k for its mirror image.

        With a descriptor of pictures, a few rows for each of its parts are added.
        """
        found = self.searcher.nearest(seen.whole, seen.scale, k)[1].flatten().tolist()
        few = max(1, k // FEW_OF_PARTS)
        found += self.searcher.nearest(seen.parts[:, 0], seen.scale, few)[1].flatten().tolist()
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def ranked(self, picture: Tensor, k: int) -> Match:
        """The k rows nearest to a finished picture (1, 3, H, W), or to its mirror image, closest first.

        B of the result is k, or the number of rows of a smaller index.
        """
        scale = self.scale_of(picture)
        queries = self._embed(torch.cat(self._views(picture)), scale)
        wanted = k if self.metric == "cosine" else max(k, metrics.NEIGHBORS)
        values, ids = self.searcher.nearest(queries, scale, wanted)
        found: dict[int, Match] = {}
        for view in range(2):
            query, rows = queries[view : view + 1], ids[view]
            similarity, spread = self._similarities(query, values[view : view + 1], rows, scale)
            typical, limit = (each.expand_as(similarity) for each in self._levels(query, scale, 1))
            score = metrics.score(self.metric, similarity, typical, limit)
            mirrored = torch.full(rows.shape, bool(view))
            every = Match(similarity, score, rows, mirrored, spread, typical, limit, scale)
            for i, row in enumerate(rows.tolist()):
                if row not in found or float(score[i]) > float(found[row].score):
                    found[row] = every[i]
        closest = sorted(found.values(), key=lambda one: -float(one.score))
        return self._join(closest[:k], scale)

    @torch.no_grad()
    def scores(self, seen: Finished, ids: Sequence[int]) -> Tensor:
        """The scores (K,) of a finished picture, or its mirror image, with each row."""
        scale, rows = seen.scale, torch.tensor(ids)
        stored = self.searcher.rows(rows, scale)
        similarities, scores = [], []
        for query in torch.split(seen.whole, 1):
            values = query @ stored.to(query).T
            similarity, _ = self._similarities(query, values, rows, scale)
            levels = (level.to(similarity) for level in self._levels(query, scale, 1))
            similarities.append(similarity)
            scores.append(metrics.score(self.metric, similarity, *levels))
        nearer = torch.stack(similarities).argmax(0, keepdim=True)
        return torch.stack(scores).gather(0, nearer)[0].cpu()

    def scale_of(self, pictures: Tensor) -> int:
        """The scale at which finished pictures (B, 3, H, W) are compared: the finest that fits."""
        return self.scales[-1] if self.latent else self._finest(min(pictures.shape[-2:]))

    def _views(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """A finished picture (1, 3, H, W) and its mirror image, encoded for a descriptor of latents."""
        mirror = picture.flip(-1)
        if self._latents is None:
            return picture, mirror
        if self._encoded is not None:
            return self._encoded, self._encoded.flip(-1)
        return self._latents.encode(picture), self._latents.encode(mirror)

    def gradient(self, latent: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        """∇_D of the similarity to the matched neighbour (1, C, H, W), and the similarity itself (1,).

        It is taken through the low-passed picture, so that it has only detail that is above the noise.
        The part that only changes brightness, tint or contrast is removed. Call this outside inference
        mode with gradients enabled.
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

    def gradient_as_published(self, latent: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        """∇_D of Eq. 8 or Eq. 9 (1, C, H, W), and the similarity itself (1,), for `match_as_published`.

        By autograd through decoder and descriptor, with no part removed. The denominator of Eq. 8 is held
        constant, as in the authors' code. Call this outside inference mode with gradients enabled.
        """
        latent = latent.detach().clone().requires_grad_()
        query = self._embed_prediction(latent, match.scale)
        neighbor = self.searcher.rows(match.ids, match.scale).to(query)
        value = self._published(query, neighbor, match.spread.to(query))
        (gradient,) = torch.autograd.grad(value.sum(), latent)
        return gradient, value.detach()

    @torch.no_grad()
    def _latent_gradient(
        self, space: LatentSpace, latent: Tensor, match: Match
    ) -> tuple[Tensor, Tensor]:
        """`gradient` in closed form, for a descriptor of latents."""
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
        """The most frequent caption of picture `i` (y_N of AMG Eq. 16), "" if it has none.

        Its own caption, those of files with the same bytes, and those of other rows with the same picture
        count. Of equally frequent ones its own wins, then the first. The authors' code uses the most
        common caption among the neighbours, too.
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
        direction : Tensor (1, C, H, W)
            Of norm 1, without each channel's mean. It is the gradient of an inner product: the
            prediction, decoded and low-passed to the scale of the match, times the neighbour's thumbnail
            without its mean colour. The product is linear in the picture, so unlike a network it cannot
            be fooled.
        share : float in [0, 1]
            The coefficient of that picture in the prediction.
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
        """The same for a descriptor of latents, whose rows are latents."""
        seen = space.reduce(latent, match.scale)
        stored = self.searcher.rows(match.ids, match.scale).to(seen).reshape(seen.shape)
        stored = stored.flip(-1) if bool(match.mirrored[0]) else stored
        stored = stored - stored.mean(dim=(2, 3), keepdim=True)
        share = float((seen * stored).sum() / stored.square().sum().clamp_min(1e-12))
        return space.adjoint(stored, latent.shape[-2:]).to(latent), share

    def _embed(self, seen: Tensor, scale: int) -> Tensor:
        """Embed pictures, or latents if the descriptor compares latents: (B, C, H, W) -> (B, D)."""
        if self._latents is None:
            return self.descriptor.embed(seen, scale)
        return self._latents.embed_latents(seen, scale)

    def _match(self, seen: Tensor, mirror: Tensor, scale: int) -> Match:
        """Match `seen` and its mirror image. A mirrored latent is only about that of the mirrored picture.

        Both are embedded in one batch, which halves the kernel launches on an accelerator.
        """
        return self._matches(self._embed(torch.cat([seen, mirror]), scale)[None], scale)[0]

    def _matches(self, queries: Tensor, scale: int, comparisons: int = 1) -> list[Match]:
        """Match N pictures, whose rows and those of their mirror images are `queries` (N, 2, D).

        All are searched in one pass, so that an index of millions is read only once.
        """
        if not len(queries):
            return []
        wanted = 1 if self.metric == "cosine" else metrics.NEIGHBORS
        every = queries.flatten(0, 1)
        values, ids = self.searcher.nearest(every, scale, wanted)
        rows = zip(torch.split(every, 1), torch.split(values, 1), ids, strict=True)
        found = [(query, *self._best(query, value, near, scale)) for query, value, near in rows]
        return [
            self._nearer(*pair, scale, comparisons)
            for pair in zip(found[::2], found[1::2], strict=True)
        ]

    def _nearer(
        self, plain: tuple[Tensor, ...], mirror: tuple[Tensor, ...], scale: int, comparisons: int
    ) -> Match:
        """The match of the nearer one: query (1, D), and what `_best` says of it."""
        mirrored = bool(mirror[1] > plain[1])
        query, similarity, index, spread = mirror if mirrored else plain
        levels = self._levels(query, scale, comparisons)
        close = metrics.score(self.metric, similarity, *levels)
        return Match(similarity, close, index, torch.tensor([mirrored]), spread, *levels, scale)

    def _match_as_published(self, latent: Tensor, scale: int) -> Match:
        query = self._embed_prediction(latent, scale)
        values, ids = self.searcher.nearest(query, scale, metrics.NEIGHBORS)
        index, spread = ids[:, 0], values.mean(dim=1).clamp_min(1e-6)
        value = self._published(query, self.searcher.rows(index, scale).to(query), spread.to(query))
        if self.metric == "cosine":
            levels = self.levels(scale)
        else:
            levels = metrics.NOTHING, metrics.PUBLISHED_COPY
        typical, limit = (torch.full_like(value, level) for level in levels)
        close = metrics.score(self.metric, value, typical, limit)
        mirrored = torch.zeros(1, dtype=torch.bool)
        return Match(value, close, index, mirrored, spread, typical, limit, scale)

    def _embed_prediction(self, latent: Tensor, scale: int) -> Tensor:
        """The row (1, D) of a prediction (1, C, H, W). Differentiable."""
        return self._embed(latent if self.latent else self.decode(latent, scale), scale)

    def _published(self, query: Tensor, neighbor: Tensor, spread: Tensor) -> Tensor:
        """σ_t (1,) of Eq. 9 or, with the denominator α·`spread`, of Eq. 8."""
        if self.metric == "cosine":
            return (query * neighbor).sum(dim=1)
        return -metrics.nl2(query, neighbor, spread)

    def _levels(self, query: Tensor, scale: int, comparisons: int) -> tuple[Tensor, Tensor]:
        """The similarities for scores 0 and COPY, (1,) each, for a query (1, D), see `limits`."""
        levels = torch.tensor(self.levels(scale, comparisons), device=query.device)
        others = self._background_rows(scale)
        if self.metric == "cosine" and others is not None:
            usual = (query @ others.T).topk(limits.BACKGROUND_NEAREST, dim=1).values.mean()
            levels = levels + limits.shift(self.descriptor.spec, scale, float(usual))
        return levels[:1], levels[1:]

    def levels(self, scale: int, comparisons: int = 1) -> tuple[float, float]:
        """The similarities for scores 0 and COPY in this index, see `limits`.

        They are for the best of `comparisons` comparisons of one picture.
        """
        return limits.levels(self.descriptor.spec, scale, comparisons * self.index.count)

    def _best(
        self, query: Tensor, values: Tensor, ids: Tensor, scale: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity, id and spread, (1,) each, of the closest of the rows `ids` (K,)."""
        similarities, spread = self._similarities(query, values, ids, scale)
        best = similarities.argmax()[None]
        return similarities[best], ids[best], spread[best]

    def _similarities(
        self, query: Tensor, values: Tensor, ids: Tensor, scale: int
    ) -> tuple[Tensor, Tensor]:
        """Similarity to each of the rows `ids` (K,), whose search values are (1, K), and their spreads.

        A row that is one flat tone is like no picture.
        """
        if self.metric == "cosine":
            return values[0], torch.ones_like(values[0])
        rows = self.searcher.rows(ids, scale)
        spread = metrics.structure(rows, self._channels).clamp_min(1e-6)
        near = metrics.matched(query[0], rows, self._channels, self._offset)
        flat = metrics.is_flat(rows, self._channels)
        return torch.where(flat, metrics.NOTHING, -metrics.nl2(near, rows, spread)), spread

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
