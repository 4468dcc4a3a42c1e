"""Is a finished picture a copy? Two judges: the descriptor, and one that the guidance never followed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from . import judge
from .images import low_pass
from .metrics import PERFECT
from .probe import Probe

COPY = 0.4  # closeness above which the descriptor says copy: where the schedule of `main` ends
ZNCC_COPY = (
    0.75  # correlation above which the second judge does, or more where the index is uniform
)
CANDIDATES = (
    32  # pictures the second judge looks at: the descriptor's nearest, and as many mirrored
)
SAMPLED = 256  # thumbnails compared with each other to learn that


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


def verdict(probe: Probe, pictures: Tensor) -> list[Verdict]:
    """Judge pictures (B, 3, H, W) in [0, 1], in full detail.

    The second judge looks at the descriptor's 32 nearest pictures and at the 32 nearest to the mirror
    image, in both directions: a descriptor that was fooled ranks a copy low. Among so many some are
    composed alike by chance, so all but the nearest must correlate half-way from the limit to 1.
    """
    index = probe.searcher.index
    match = probe.look_at_pictures(pictures)
    unrelated = probe.unrelated(match.scale)
    threshold = unrelated + COPY * (PERFECT[probe.metric] - unrelated)
    verdicts = []
    columns = (match.similarity, match.closeness, match.ids)
    rows = zip(pictures.split(1), *(c.tolist() for c in columns), strict=True)
    for picture, similarity, close, nearest in rows:
        correlation, limit, alike = _second_judge(probe, picture, nearest)
        first, second = close > COPY, correlation > limit
        i = alike if second and not first else nearest
        verdicts.append(
            Verdict(
                similarity, threshold, close, correlation, limit, i, index.source(i),
                index.caption(i), first or second, _words(first, second, index.source(i)),
            )
        )  # fmt: skip
    return verdicts


def _second_judge(probe: Probe, picture: Tensor, nearest: int) -> tuple[float, float, int]:
    """Correlation, its limit, and the row, of the candidate that is farthest over its limit."""
    index = probe.searcher.index
    others = [i for i in probe.candidates(picture, CANDIDATES) if i != nearest]
    ids = [nearest, *others]
    limit = zncc_threshold(index)
    limits = torch.tensor([limit] + [(1 + limit) / 2] * len(others))
    values = judge.over_index(picture, ids, lambda i: thumbnail(index, i)).cpu()
    worst = int((values - limits).argmax())
    return float(values[worst]), float(limits[worst]), ids[worst]


def zncc_threshold(index) -> float:
    """What the second judge calls a copy in this index, at least 0.75.

    The 99 % quantile, over up to 256 pictures, of the correlation with the most alike other one
    (files of one picture, above 0.97, passed over): pictures of one series correlate by themselves.
    """
    if index.hash not in _limits:
        chosen = torch.linspace(0, index.count - 1, min(SAMPLED, index.count)).round().long()
        small = [low_pass(thumbnail(index, i)[None], judge.ZNCC_SIDE) for i in chosen.tolist()]
        pictures = torch.cat(small)
        every = judge.zncc_matrix(pictures, torch.cat([pictures, pictures.flip(-1)]))
        own = torch.eye(len(pictures), dtype=torch.bool).repeat(1, 2)
        nearest = every.masked_fill(own | (every > 0.97), -1).amax(dim=1)
        _limits[index.hash] = max(ZNCC_COPY, float(nearest.quantile(0.99)))
    return _limits[index.hash]


_limits: dict[str, float] = {}  # by index hash: a pure function of the index


def thumbnail(index, i: int) -> Tensor:
    """Row i's thumbnail as (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(index.thumbnail(i), dtype=np.float32)).permute(2, 0, 1) / 255


def _words(first: bool, second: bool, source: str) -> str:
    if first and second:
        return f"A copy of {source}: both judges agree."
    if first:
        return f"Too close to {source} by the descriptor's measure."
    if second:
        return f"Same composition as {source}, though the descriptor does not see it: look at both."
    return f"Not a copy of anything in this index (nearest: {source})."
