"""Is a finished picture a copy? Two checks: the descriptor, and one that no guidance ever followed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from . import judge, limits
from .errors import AMGError
from .images import Box, largest_box, thumbnail
from .probe import Probe

FLAT = "it is nearly one flat tone, and neither check can compare that"
KEPT_LEAST = 0.25  # of the picture: a smaller part of it that was kept is not looked at by itself
KEPT = "It is the part that was given and kept."
NO_PICTURES = "the index holds no pictures, so that the second check has nothing to look at"


@dataclass(frozen=True)
class Verdict:
    """What is known of one finished picture.

    similarity, threshold : float, in the descriptor's units, above the threshold it says copy: of the
    picture, or of the part of it that is a copy; closeness : float, the same on the scale of
    `metrics.closeness`; zncc, zncc_threshold : float, the
    second check's correlation (see `judge.registered`) with the candidate that is most alike, and its
    limit; neighbor : int, row id of the descriptor's nearest picture, or the second check's where only
    that one says copy; source, caption : str, of that picture; copy : bool, either check says so;
    unsure : str, why the two cannot tell, "" if they can.
    """

    similarity: float
    threshold: float
    closeness: float
    zncc: float
    zncc_threshold: float
    neighbor: int
    source: str
    caption: str
    copy: bool
    words: str
    unsure: str = ""

    def to_json(self) -> dict:
        return asdict(self)


def verdict(
    probe: Probe, pictures: Tensor, named: Sequence[Collection[int]] | None = None
) -> list[Verdict]:
    """Judge pictures (B, 3, H, W) in [0, 1], in full detail.

    The first check, the descriptor, looks at the picture and at its parts: a copy may lie in a border or in
    a collage. The second check looks at the descriptor's nearest pictures, of the picture and of its
    mirror image, and at those that are named, and always votes: a descriptor that was fooled ranks a
    copy low.

    Parameters
    ----------
    named : B collections of row ids, optional
        The pictures that the guard steered each one away from.
    """
    named = [()] * len(pictures) if named is None else named
    pairs = zip(pictures.split(1), named, strict=True)
    return [_judge(probe, picture, rows) for picture, rows in pairs]


def kept_box(mask: Tensor) -> Box | None:
    """What to look at besides where only `mask` (H, W) was drawn: 1 = drawn, 0 = kept as it was given.

    The largest rectangle that was kept, None where it is all of the picture or less than KEPT_LEAST.
    """
    box = largest_box(mask < 0.5)
    if box is None:
        return None
    top, left, bottom, right = box
    return box if KEPT_LEAST <= (bottom - top) * (right - left) < 1 else None


def with_kept(whole: Verdict, part: Verdict | None) -> Verdict:
    """The verdict on a picture of which a part was given and kept: that part's, where only it is a copy.

    The guard cannot change that part, and by spoiling the rest it can fool both checks of the whole.
    """
    if whole.copy or part is None or not part.copy:
        return whole
    return replace(part, words=f"{part.words} {KEPT}")


def _judge(probe: Probe, picture: Tensor, named: Collection[int]) -> Verdict:
    index, match = probe.searcher.index, probe.look_at_pictures(picture)
    within = probe.look_at_parts(picture)
    if len(within.ids) and within.closeness.max() > max(limits.COPY, float(match.closeness[0])):
        match = within[int(within.closeness.argmax())]
    nearest, close = int(match.ids[0]), float(match.closeness[0])
    ids = list(
        dict.fromkeys([nearest, *sorted(named), *probe.candidates(picture, limits.CANDIDATES)])
    )
    unsure, correlation, alike = "", 0.0, nearest
    try:
        found = judge.registered(picture, [thumbnail(index, i) for i in ids]).score
        correlation, alike = float(found.max()), ids[int(found.argmax())]
    except AMGError:
        unsure = NO_PICTURES
    if judge.flat(picture):
        unsure = FLAT
    first, second = close > limits.COPY, correlation > limits.REGISTERED
    copy = (first or second) and unsure != FLAT
    i = alike if second and not first else nearest
    source = index.source(i)
    return Verdict(
        float(match.similarity[0]), float(match.limit[0]), close, correlation, limits.REGISTERED, i, source,
        index.caption(i), copy, _words(first, second, source, "" if copy else unsure),
        "" if copy else unsure,
    )  # fmt: skip


def _words(first: bool, second: bool, source: str, unsure: str) -> str:
    if unsure:
        return f"Cannot tell: {unsure}."
    if first and second:
        return f"A copy of {source}: both checks agree."
    if first:
        return f"A copy of {source}, by the first check alone."
    if second:
        return f"A copy of {source}, by the second check alone: look at both."
    return f"Not a copy of anything in this index (nearest: {source})."
