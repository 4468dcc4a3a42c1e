"""Is a finished picture a copy? Two checks: the descriptor, and one that no guidance ever followed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from .. import limits
from ..errors import AMGError
from ..images import Box, largest_box, thumbnail
from ..messages import Message, message, words
from . import verifier
from .matcher import Matcher

COPY, NO_COPY, CANNOT_TELL = "copy", "no_copy", "cannot_tell"
FIRST, SECOND = "first", "second"
FLAT, NO_PICTURES = REASONS = "flat", "no_pictures"
KEPT_LEAST = 0.25  # of the picture: a smaller part of it that was kept is not looked at by itself


@dataclass(frozen=True)
class Verdict:
    """What is known of one finished picture.

    similarity, threshold : float, in the descriptor's units, above the threshold it says copy: of the
    picture, or of the part of it that is a copy; score : float, the same on the scale of
    `metrics.score`; zncc, zncc_threshold : float, the
    second check's correlation (see `verifier.registered`) with the candidate that is most alike, and its
    limit; neighbor : int, row id of the descriptor's nearest picture, or the second check's where only
    that one says copy; source, caption : str, of that picture; outcome : COPY, NO_COPY or CANNOT_TELL;
    checks : those of FIRST and SECOND that say copy; reason : one of REASONS why the two cannot tell, ""
    if they can; kept : bool, whether all this is of the part that was given and kept (`with_kept`).
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

    @property
    def copy(self) -> bool:
        return self.outcome == COPY

    def message(self) -> Message:
        return message_of(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """With the message in English, for who reads the JSON."""
        written = asdict(self) | {"checks": list(self.checks), "copy": self.copy}
        return written | {"words": words(self.message())}


def message_of(found: Mapping[str, Any]) -> Message:
    """Of a verdict in a report. Without the name of the picture it names its row; one of
    ``amg-report/1`` knows its words alone."""
    if "checks" not in found:
        return message("as_written", words=found["words"])
    if found.get("kept"):
        return message("in_kept_part", verdict=message_of({**found, "kept": False}))
    source, checks = found["source"], set(found["checks"])
    if found["reason"]:
        return message("cannot_tell", reason=reason_of(found))
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
    """Why the checks cannot tell, of a verdict in a report."""
    if found.get("reason") in REASONS:
        return message(found["reason"])
    return message("as_written", words=found.get("unsure", ""))


def verdict(
    matcher: Matcher, pictures: Tensor, named: Sequence[Collection[int]] | None = None
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
    return [
        _judge(matcher, picture[None], rows) for picture, rows in zip(pictures, named, strict=True)
    ]


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
    return replace(part, kept=True)


def _judge(matcher: Matcher, picture: Tensor, named: Collection[int]) -> Verdict:
    index, match = matcher.index, matcher.match_pictures(picture)
    within = matcher.match_parts(picture)
    if len(within.ids) and within.score.max() > max(limits.COPY, float(match.score[0])):
        match = within[int(within.score.argmax())]
    nearest, close = int(match.ids[0]), float(match.score[0])
    ids = list(
        dict.fromkeys([nearest, *sorted(named), *matcher.candidates(picture, limits.CANDIDATES)])
    )
    reason, correlation, alike = "", 0.0, nearest
    try:
        found = verifier.registered(picture, [thumbnail(index, i) for i in ids]).score
        correlation, alike = float(found.max()), ids[int(found.argmax())]
    except AMGError:
        reason = NO_PICTURES
    if verifier.flat(picture):
        reason = FLAT
    says = {FIRST: close > limits.COPY, SECOND: correlation > limits.REGISTERED}
    checks: tuple[str, ...] = (
        () if reason == FLAT else tuple(name for name, copy in says.items() if copy)
    )
    reason = "" if checks else reason
    i = alike if checks == (SECOND,) else nearest
    return Verdict(
        float(match.similarity[0]), float(match.limit[0]), close, correlation, limits.REGISTERED, i,
        index.source(i), index.caption(i), COPY if checks else CANNOT_TELL if reason else NO_COPY,
        checks, reason,
    )  # fmt: skip
