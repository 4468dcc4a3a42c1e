"""Is a finished picture a copy? Two judges: the descriptor, and one that the guidance never followed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import judge
from .images import low_pass, thumbnail
from .metrics import PERFECT
from .probe import FEW, Probe

COPY = 0.4  # closeness above which the descriptor says copy: where the schedule of `main` ends
ZNCC_COPY = (
    0.75  # correlation above which the second judge does, or more where the index is uniform
)
PAIR_COPY = 0.6  # the same for one picture that was named beforehand
CANDIDATES = (
    32  # pictures the second judge looks at: the descriptor's nearest, and as many mirrored
)
SAMPLED = 512  # thumbnails compared with each other to learn that


@dataclass(frozen=True)
class Verdict:
    """What is known of one finished picture.

    similarity, threshold : float, in the descriptor's units, above the threshold it says copy;
    closeness : float, the same on the scale of `metrics.closeness`; zncc, zncc_threshold : float in
    [−1, 1], the second judge's correlation (see `judge.zncc`) farthest over its limit; neighbor :
    int, row id of the descriptor's nearest picture, or the second judge's where only that one says
    copy; source, caption : str, of that picture; copy : bool, either judge says so.
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

    def to_json(self) -> dict:
        return asdict(self)


def verdict(
    probe: Probe, pictures: Tensor, named: Sequence[Collection[int]] | None = None
) -> list[Verdict]:
    """Judge pictures (B, 3, H, W) in [0, 1], in full detail.

    Parameters
    ----------
    named : B collections of row ids, optional
        The pictures that the guard steered each one away from. Steering can have fooled the
        descriptor about these and no others, so the second judge looks at these, each by the limit
        for a pair (`zncc_limits`), and has no say where there is none: an innocent picture stays
        what the model draws. Without it, of a picture of unknown origin, the second judge looks at
        the descriptor's 32 nearest pictures and at the 32 nearest to the mirror image, because a
        descriptor that was fooled ranks a copy low. Among so many some are composed alike by
        chance: all but the nearest must correlate half-way from the limit to 1.
    """
    index = probe.searcher.index
    match = probe.look_at_pictures(pictures)
    unrelated = probe.unrelated(match.scale)
    threshold = unrelated + COPY * (PERFECT[probe.metric] - unrelated)
    verdicts = []
    columns = (match.similarity, match.closeness, match.ids)
    rows = zip(pictures.split(1), *(c.tolist() for c in columns), strict=True)
    for number, (picture, similarity, close, nearest) in enumerate(rows):
        steered = None if named is None else sorted(set(named[number]))
        correlation, limit, alike = _second_judge(probe, picture, nearest, steered)
        first = close > COPY
        second = correlation > limit and (first or steered != [])
        i = alike if second and not first else nearest
        verdicts.append(
            Verdict(
                similarity, threshold, close, correlation, limit, i, index.source(i),
                index.caption(i), first or second, _words(first, second, index.source(i)),
            )
        )  # fmt: skip
    return verdicts


def _second_judge(
    probe: Probe, picture: Tensor, nearest: int, named: list[int] | None
) -> tuple[float, float, int]:
    """Correlation, its limit, and the row, of the candidate that is farthest over its limit."""
    index = probe.searcher.index
    limit, limit_of_pair = zncc_limits((probe.zero_from or probe).searcher.index)
    if named:
        ids, limits = named, [limit_of_pair] * len(named)
    else:
        more = probe.candidates(picture, CANDIDATES) if named is None else []
        others = [i for i in more if i != nearest]
        ids, limits = [nearest, *others], [limit] + [(1 + limit) / 2] * len(others)
    values = judge.over_index(picture, ids, lambda i: thumbnail(index, i)).cpu()
    worst = int((values - torch.tensor(limits)).argmax())
    return float(values[worst]), limits[worst], ids[worst]


def zncc_threshold(index) -> float:
    """What the second judge calls a copy of the nearest picture in this index, at least 0.75."""
    return zncc_limits(index)[0]


def zncc_limits(index) -> tuple[float, float]:
    """The correlations that make a copy: of the nearest of all pictures, and of one that was named.

    Learned from up to 512 pictures of the index: the 99 % quantile of the correlation with the most
    alike other one (at least 0.75), and of that of all pairs (at least 0.6). Among hundreds, one is
    alike by chance; with a given one, chance is less likely. Mirror images count; files of one picture
    (above 0.97) are passed over. Pictures of one series correlate by themselves. An index of fewer
    than eight pictures teaches nothing: 0.75 and 0.6.
    """
    if index.count < FEW:
        return ZNCC_COPY, PAIR_COPY
    if index.hash not in _limits:
        chosen = torch.linspace(0, index.count - 1, min(SAMPLED, index.count)).round().long()
        small = [low_pass(thumbnail(index, i)[None], judge.ZNCC_SIDE) for i in chosen.tolist()]
        pictures = torch.cat(small)
        pairs = torch.maximum(
            judge.zncc_matrix(pictures, pictures), judge.zncc_matrix(pictures, pictures.flip(-1))
        )
        own = torch.eye(len(pictures), dtype=torch.bool) | (pairs > 0.97)
        nearest = pairs.masked_fill(own, -1).amax(dim=1).quantile(0.99)
        others = pairs[~own]
        pair = float(others.quantile(0.99)) if len(others) else PAIR_COPY
        of_nearest = max(ZNCC_COPY, float(nearest))
        _limits[index.hash] = of_nearest, min(of_nearest, max(PAIR_COPY, pair))
    return _limits[index.hash]


_limits: dict[str, tuple[float, float]] = {}  # by index hash: a pure function of the index


def _words(first: bool, second: bool, source: str) -> str:
    if first and second:
        return f"A copy of {source}: both judges agree."
    if first:
        return f"Too close to {source} by the descriptor's measure."
    if second:
        return f"Same composition as {source}, though the descriptor does not see it: look at both."
    return f"Not a copy of anything in this index (nearest: {source})."
