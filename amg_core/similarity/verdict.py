"""Is a finished picture a copy? Two checks: by the descriptor, and by a measure that never steers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import limits
from ..errors import AMGError
from ..images import Box, largest_box, low_pass, thumbnail
from ..messages import Message, message, words
from . import verifier
from .matcher import Matcher
from .metrics import likeness

COPY, NO_COPY, CANNOT_TELL = "copy", "no_copy", "cannot_tell"
FIRST, SECOND = "first", "second"
FLAT, NO_PICTURES, CLOSE = REASONS = "flat", "no_pictures", "close"
BEST = 3  # pictures of the index that a verdict names
KEPT_LEAST = 0.25  # smallest share of the picture at which a kept part is checked by itself


@dataclass(frozen=True)
class Near:
    """A picture of the index beside a finished one, by both checks.

    Attributes
    ----------
    row, source : int, str
    score : float
        By the descriptor.
    zncc : float
        By the second check, 0 if it has nothing to compare with.
    """

    row: int
    source: str
    score: float
    zncc: float

    @property
    def place(self) -> float:
        """The larger of both on the scale of `likeness`."""
        return max(likeness(self.score), likeness(self.zncc, limits.REGISTERED))

    def to_json(self) -> dict[str, Any]:
        by_both = {
            "likeness": likeness(self.score),
            "composition": likeness(self.zncc, limits.REGISTERED),
        }
        return asdict(self) | by_both


@dataclass(frozen=True)
class Verdict:
    """The result of the two checks of one finished picture.

    Attributes
    ----------
    similarity, threshold : float
        The first check, in the descriptor's units, of the picture or of the part of it that is a copy. It
        says copy above the threshold.
    score : float
        The similarity on the scale of `metrics.score`.
    zncc, zncc_threshold : float
        The second check: the score of `verifier.registered` with the candidate that is most alike, and
        its limit.
    neighbor : int
        The row that the verdict is about: of the check that says copy, by the descriptor if both do, or
        else the first of `nearest`.
    source, caption : str
        Those of the neighbour.
    outcome : str
        COPY, NO_COPY or CANNOT_TELL.
    checks : tuple of str
        Those of FIRST and SECOND that say copy.
    reason : str
        One of REASONS why the checks cannot tell, "" if they can.
    kept : bool
        Whether this is about the given part of an inpainting (`with_kept`).
    nearest : tuple of Near
        The BEST pictures of the index, ranked by the better of both checks.
    """

    similarity: float
    threshold: float
    score: float
    zncc: float
    zncc_threshold: float
    neighbor: int
    source: str
    caption: str
    outcome: str
    checks: tuple[str, ...] = ()
    reason: str = ""
    kept: bool = False
    nearest: tuple[Near, ...] = ()

    @property
    def copy(self) -> bool:
        return self.outcome == COPY

    @property
    def likeness(self) -> float:
        """The first check as people read it (`metrics.likeness`)."""
        return likeness(self.score)

    @property
    def composition(self) -> float:
        """The second check on the same scale."""
        return likeness(self.zncc, self.zncc_threshold)

    @property
    def near(self) -> bool:
        """Whether it is no copy, but near the limit of either check (`limits.NEAR`)."""
        return self.outcome == NO_COPY and max(self.likeness, self.composition) > limits.NEAR

    def message(self) -> Message:
        return message_of(self._fields())

    def to_json(self) -> dict[str, Any]:
        """The fields and properties, with the message in English."""
        return self._fields() | {"words": words(self.message())}

    def _fields(self) -> dict[str, Any]:
        read = {"likeness": self.likeness, "composition": self.composition, "near": self.near}
        nearest = [each.to_json() for each in self.nearest]
        return asdict(self) | {
            "checks": list(self.checks), "copy": self.copy, "nearest": nearest,
        } | read  # fmt: skip


def message_of(found: Mapping[str, Any]) -> Message:
    """The message for a verdict in a report.

    If the report has no name for the neighbour, the message has its row.
    """
    if found.get("kept"):
        return message("in_kept_part", verdict=message_of({**found, "kept": False}))
    source, checks = found["source"], set(found["checks"])
    if found["reason"]:
        return message("cannot_tell", reason=reason_of(found))
    if found.get("near"):
        return message("near_limit", source=source or str(found["neighbor"]))
    if not source:
        return (
            message("copy_of_row", row=found["neighbor"]) if checks else message("no_copy_of_any")
        )
    if not checks:
        return message("no_copy_nearest", source=source)
    if checks == {FIRST}:
        return message("copy_by_first", source=source)
    return message("copy_by_second" if checks == {SECOND} else "copy_by_both", source=source)


def reason_of(found: Mapping[str, Any]) -> Message:
    """Why a verdict in a report cannot tell."""
    if found["reason"] == CLOSE:
        return message(CLOSE, source=found["source"] or str(found["neighbor"]))
    return message(found["reason"])


def verdict(
    matcher: Matcher, pictures: Tensor, named: Sequence[Collection[int]] | None = None
) -> list[Verdict]:
    """Check finished pictures (B, 3, H, W) in [0, 1] in full detail.

    The first check compares the picture and its parts by the descriptor, because a copy may lie in a border
    or in a collage. The second check compares it with the descriptor's nearest pictures, those of its
    mirror image, and the `named` ones. It does so in any case, because a descriptor that was fooled finds a
    copy not similar.

    Parameters
    ----------
    matcher : Matcher
    pictures : Tensor (B, 3, H, W)
    named : B collections of row ids, optional
        For each picture the rows from which the guard steered it away.
    """
    named = [()] * len(pictures) if named is None else named
    return [
        _check(matcher, picture[None], rows) for picture, rows in zip(pictures, named, strict=True)
    ]


def kept_box(mask: Tensor) -> Box | None:
    """The part of an inpainting to check by itself: the largest rectangle that was kept.

    `mask` (H, W) is 1 for drawn pixels and 0 for kept ones. None if the rectangle is the whole picture or
    less than KEPT_LEAST of it.
    """
    box = largest_box(mask < 0.5)
    if box is None:
        return None
    top, left, bottom, right = box
    return box if KEPT_LEAST <= (bottom - top) * (right - left) < 1 else None


def with_kept(whole: Verdict, part: Verdict | None) -> Verdict:
    """The verdict on an inpainting, from those on the `whole` picture and on the kept `part`.

    It is that on the part if only the part is a copy. The guard cannot change the part, and changes
    around it can fool both checks of the whole.
    """
    if whole.copy or part is None or not part.copy:
        return whole
    return replace(part, kept=True)


def _check(matcher: Matcher, picture: Tensor, named: Collection[int]) -> Verdict:
    index, seen = matcher.index, matcher.finished(picture)
    match, within = matcher.match_whole(seen), matcher.match_parts(seen)
    if len(within.ids) and within.score.max() > max(limits.COPY, float(match.score[0])):
        match = within[int(within.score.argmax())]
    nearest, close = int(match.ids[0]), float(match.score[0])
    ids = list(
        dict.fromkeys([nearest, *sorted(named), *matcher.candidates(seen, limits.CANDIDATES)])
    )
    reason, correlation, alike, near = "", 0.0, nearest, None
    found = torch.zeros(len(ids))
    try:
        thumbnails = [thumbnail(index, i) for i in ids]
        found = verifier.registered(picture, thumbnails).score.cpu()
        correlation, alike = float(found.max()), ids[int(found.argmax())]
        near = _close(picture, thumbnails, found)
        reason = "" if near is None else CLOSE
    except AMGError:
        reason = NO_PICTURES
    if verifier.flat(picture):
        reason = FLAT
    says = {FIRST: close > limits.COPY, SECOND: correlation > limits.REGISTERED}
    checks: tuple[str, ...] = (
        () if reason == FLAT else tuple(name for name, copy in says.items() if copy)
    )
    reason = "" if checks else reason
    if reason == CLOSE and near is not None:
        correlation, i = float(found[near]), ids[near]
    else:
        i = alike if checks == (SECOND,) else nearest
    scores = matcher.scores(seen, ids)
    scores[0] = max(close, float(scores[0]))  # of the part that is most alike
    best = _best(matcher, ids, scores, found)
    if not checks and reason != CLOSE:
        i = best[0].row
    return Verdict(
        float(match.similarity[0]), float(match.limit[0]), close, correlation, limits.REGISTERED, i,
        index.source(i), index.caption(i), COPY if checks else CANNOT_TELL if reason else NO_COPY,
        checks, reason, nearest=best,
    )  # fmt: skip


def _best(matcher: Matcher, ids: list[int], scores: Tensor, found: Tensor) -> tuple[Near, ...]:
    """The nearest of the rows `ids` by the better of both checks, (K,) each."""
    every = [
        Near(i, matcher.index.source(i), score, zncc)
        for i, score, zncc in zip(ids, scores.tolist(), found.tolist(), strict=True)
    ]
    return tuple(sorted(every, key=lambda each: (-each.place, -each.score))[:BEST])


def _close(picture: Tensor, others: list[Tensor], scores: Tensor) -> int | None:
    """Which of `others` a picture is too near to be called no copy: faded, burnt or half formed. Or None.

    It agrees with it nearly as well as a copy, and also without being moved. `scores` (K,) are those of
    the second check.
    """
    both = low_pass(torch.cat([picture, picture.flip(-1)]), verifier.ZNCC_SIDE)
    sums = []
    for other, score in zip(others, scores.tolist(), strict=True):
        alike = 0.0
        if score + 1 > limits.CLOSE:  # a correlation is at most 1
            stored = other.reshape(1, *other.shape[-3:]).to(both)
            alike = float(verifier.zncc_matrix(both, stored).max())
        sums.append(score + alike if alike > limits.CLOSE_ZNCC else 0.0)
    most = max(range(len(sums)), key=sums.__getitem__)
    return most if sums[most] > limits.CLOSE else None
