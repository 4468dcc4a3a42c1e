"""The papers' measures, and judges that no guidance has seen."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from amg_core.limits import COPY, ZNCC
from amg_core.similarity import verifier
from amg_core.similarity.matcher import Matcher
from amg_demo.evaluate import kid, score
from amg_demo.sheet import to_image
from index_tools import intervals

from .domains import Domain

Embed = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) -> unit rows (B, D)


@dataclass(frozen=True)
class Own:
    """Row of the training picture that each picture would be a copy of (B,), and whether it is known.

    Known: the caption is that picture's alone, or the unguarded twin copied it. Else it is merely the
    nearest of all, and likeness to it is judged by the limit for that.
    """

    ids: Tensor
    known: Tensor

    def first(self, n: int) -> Own:
        return Own(self.ids[:n], self.known[:n])


@dataclass(frozen=True)
class Grades:
    """One figure a picture, (B,) each, and features (B, D); see `grade`."""

    nl2: Tensor
    score: Tensor
    views: Tensor
    other: Tensor
    zncc: Tensor
    zncc_own: Tensor
    zncc_limit: Tensor
    sscd: Tensor | None
    sscd_own: Tensor | None
    alignment: Tensor
    features: Tensor
    same: Tensor


def pair_limit(pictures: Tensor, quantile: float = 0.99) -> float:
    """The ZNCC that 1 % of all pairs of different training pictures reach, mirrored ones included.

    The limit for one given picture. That for the nearest of all (`limits.ZNCC`) is higher:
    among hundreds, one is alike by chance, and judged by it half a copy of one's own picture passes.
    """
    both = torch.maximum(
        verifier.zncc_matrix(pictures, pictures), verifier.zncc_matrix(pictures, pictures.flip(-1))
    )
    pairs = both[~torch.eye(len(both), dtype=torch.bool)]
    return float(np.quantile(pairs.numpy(), quantile))


@dataclass
class Judges:
    """What judges one world's pictures. `sscd` None: its weights are not at hand.

    limit, own_limit : the ZNCC above which any training picture, or the prompt's own, was copied.
    """

    domain: Domain
    sscd: Embed | None = None

    def __post_init__(self) -> None:
        self.training = self.domain.data.pictures
        self.limit = ZNCC
        self.own_limit = pair_limit(self.training)
        self.sscd_rows = None if self.sscd is None else self.sscd(self.training)
        with torch.inference_mode():
            once = self.training[self.domain.data.copies == 1]
            self.real = self.domain.scorer(once)["features"]

    @torch.inference_mode()
    def grade(
        self, pictures: Tensor, captions: list[str], own: Own, plain: Tensor, eye: str = ""
    ) -> Grades:
        """Grade pictures (B, 3, H, W) in [0, 1].

        own : Own
            Of the unguarded twins.
        plain : Tensor (B, 3, H, W)
            The unguarded twins.
        eye : str
            The descriptor that guarded, "" for the product's: `score` is its measure, `other` the largest
            of those of the others.
        """
        eye = eye or self.domain.eye
        matcher = self.domain.matchers[eye]
        labels = self.domain.subject(captions) if captions[0] else torch.zeros(len(pictures)).long()
        base = score(pictures, matcher, self.training, self.domain.scorer, labels)
        others = [
            other.match_pictures(pictures).score
            for name, other in self.domain.matchers.items()
            if name != eye
        ]
        sscd = None if self.sscd is None else self.sscd(pictures)
        mine = self.training[own.ids]
        return Grades(
            nl2=base.nl2,
            score=base.score,
            views=on_views(matcher, pictures),
            other=torch.stack(others).amax(dim=0),
            zncc=base.zncc,
            zncc_own=torch.maximum(
                verifier.zncc(pictures, mine), verifier.zncc(pictures, mine.flip(-1))
            ),
            zncc_limit=torch.where(own.known, self.own_limit, self.limit),
            sscd=None if sscd is None else (sscd @ self.sscd_rows.T).amax(dim=1),
            sscd_own=None if sscd is None else (sscd * self.sscd_rows[own.ids]).sum(dim=1),
            alignment=base.alignment if captions[0] else torch.full((len(pictures),), float("nan")),
            features=base.features,
            same=(pictures == plain).flatten(1).all(dim=1),
        )

    def own(self, plain: Tensor, captions: list[str]) -> Own:
        """What the plain pictures are, or would be, copies of.

        A prompt of the text model that belongs to one picture would copy that one.
        """
        match = self.domain.matchers[self.domain.eye].match_pictures(plain)
        ids, known = match.ids, match.score > COPY
        for i, caption in enumerate(captions):
            if caption in self.domain.own:
                ids[i], known[i] = self.domain.own[caption], True
        return Own(ids, known)


def fooled(grades: Grades) -> Tensor:
    """Which pictures the guard's own measure calls clean and an unseen judge a copy (B,) bool.

    Unseen: the other descriptors, the descriptor on other views, and the correlation with the
    picture that the unguarded twin copied.
    """
    return (grades.score <= COPY) & unseen(grades)


def unseen(grades: Grades) -> Tensor:
    """Which pictures at least one unseen judge calls a copy (B,) bool."""
    correlated = grades.zncc_own > grades.zncc_limit
    return (grades.other > COPY) | (grades.views > COPY) | correlated


# ---------------------------------------------------------------- views


def views(pictures: Tensor) -> dict[str, Tensor]:
    """Pictures (B, 3, H, W) as they come back from the world: {what was done: (B, 3, h, w)}."""
    side = pictures.shape[-1]
    margin = max(1, round(0.08 * side))
    small = F.interpolate(pictures, scale_factor=0.5, mode="area")
    return {
        "blur": F.interpolate(
            F.adaptive_avg_pool2d(pictures, max(8, side // 8)), size=side, mode="bilinear"
        ),
        "jpeg": torch.stack([_jpeg(picture) for picture in pictures]),
        "rescale": F.interpolate(small, size=side, mode="bilinear"),
        "crop": pictures[:, :, margin:-margin, margin:-margin],
        "flip": pictures.flip(-1),
    }


def on_views(matcher: Matcher, pictures: Tensor) -> Tensor:
    """The largest likeness that any view has to any picture of the index (B,)."""
    seen = [matcher.match_pictures(view).score for view in views(pictures).values()]
    return torch.stack(seen).amax(dim=0)


def _jpeg(picture: Tensor, quality: int = 40) -> Tensor:
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "JPEG", quality=quality)
    back = np.array(Image.open(buffer).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(back).permute(2, 0, 1) / 255


# ---------------------------------------------------------------- intervals


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a − b over pairs, and its bootstrap interval (95 %): pairs are drawn together."""
    return intervals.mean(np.asarray(a, np.float64) - np.asarray(b, np.float64), seed=1)


def kid_interval(features: Tensor, real: Tensor, halves: int = 100) -> tuple[float, float, float]:
    """KID and its 95 % interval from random halves of the pictures.

    Not by drawing with replacement: a picture drawn twice is like itself, which KID takes for a
    trait of the set. The spread over halves without replacement is the estimate's own spread
    (delete-half jackknife).
    """
    rng = np.random.Generator(np.random.PCG64(2))
    value, n = kid(features, real), len(features)
    parts = [kid(features[rng.permutation(n)[: n // 2]], real) for _ in range(halves)]
    spread = 1.96 * float(np.std(parts))
    return value, value - spread, value + spread
