"""The limits of false alarms, the gate and the verdicts, with the figures they were set by.

The levels of one descriptor are in its file. A level is set by its false-alarm rate: how often a picture
that is *not* in the index passes it. No level depends on how alike the pictures of an index are to each
other. All depend on their number, because the nearest of a million is nearer than the nearest of a
thousand. The figures are those of `python -m benchmarks.eye` (docs/descriptors.md): photographs, stamps and
drawings against an index of others. Beyond 10,000 rows the tail is extrapolated, and checked on synthetic
rows. Where there is no such figure, the comment beside the number says so.

On the scale of `metrics.score`, 0 is what such pictures typically reach, and 1 is the same picture. COPY
(0.4) is what one in a hundred of them reaches. There are two exceptions: for `compact` it is one in 400 at
each comparison, and for `sscd` at 288 px it is the cosine of 0.5 of the literature.
"""

from __future__ import annotations

import bisect
from typing import TypeVar

from torch import Tensor

from .descriptors import registry
from .descriptors.base import DescriptorSpec
from .schedule import Schedule
from .similarity.metrics import COPY as COPY

# ------------------------------------------------------------------ the scale of likeness

# The levels of a descriptor are in its file (`Kind.levels`): for each scale (pixels a side; latents:
# cells) and for indexes of up to ROWS rows, the median and the limit of the similarity to the nearest row,
# in the descriptor's own unit, for pictures that are not in the index. They were measured with 1,050
# photographs, crops of photographs, stamps and drawings against 9,000 others of the same kind. Pairs that
# SSCD calls copies (cosine above 0.5) were left out. For more rows the tail is extrapolated by Hill's
# estimator. 1 in 100 passes the limit: playing cards, nearly empty pictures, a wallpaper in another colour.
# For `compact` it is 1 in 400. For `sscd` at 288 px the limit is 0.5, as in the literature.
ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
# Score normalisation: a query that is like many pictures of the background set is like many pictures in
# general. Its levels move by SHARE times the difference between its mean similarity to the
# BACKGROUND_NEAREST nearest of them and the usual one (`Kind.usual`). A quarter of the difference separated
# copies best (docs/decisions/limits.md). No measurement is recorded for BACKGROUND_NEAREST.
BACKGROUND_NEAREST = 10
SHARE = 0.25

Usual = TypeVar("Usual", float, Tensor)


def levels(spec: DescriptorSpec, scale: int, rows: int) -> tuple[float, float]:
    """The similarities that correspond to the scores 0 and COPY in an index of `rows` pictures."""
    table = registry.of(spec).levels
    nearest = min(table, key=lambda known: abs(known - scale))
    return table[nearest][min(bisect.bisect_left(ROWS, rows), len(ROWS) - 1)]


def shift(spec: DescriptorSpec, scale: int, usual: Usual) -> Usual:
    """The shift of a query's levels (`SHARE`).

    `usual` is its mean similarity to the nearest background pictures, a float or a Tensor of them.
    """
    return SHARE * (usual - registry.of(spec).usual[scale])


# ------------------------------------------------------------------ the gate (Eq. 10)

# λ_t of each preset, on the scale of likeness. That of `main` is COPY: docs/descriptors.md has how often it
# opened for pictures that are in the index, and for others. `strong` is 0.1 below it and `gentle` 0.1 above
# it. No measurement of these two by themselves is recorded. `paper` is a parabola. The paper does not name
# its ends, so they are chosen, not measured: at t = 0 what the paper calls a copy (nL2 of 1.4, or 0.5 with
# SSCD at 288 px), and at t = 1 half of that likeness (nL2 of 1.7).
GATE = {
    "main": Schedule("constant", 0.4, 0.4),
    "strong": Schedule("constant", 0.3, 0.3),
    "gentle": Schedule("constant", 0.5, 0.5),
    "paper": Schedule("parabolic", 0.2, 0.4),
}

# ------------------------------------------------------------------ verdicts

# Score above which two drawings of one prompt are one picture. Measured with `compact`: 0.88 to 0.98 for 32
# memorised prompts of the embedded model, and -0.59 to 0.83, one above 0.8, for 32 others, which repeat one
# emoji on many backgrounds.
ONE_PICTURE = 0.8
# Score of the second check (`verifier.registered`) above which it says copy. Of the 8 nearest pictures by
# `compact` that SSCD calls no copies, the best passes 0.6 for 0 of 62 photographs, 3 % of 89 stamps, and
# 15 % of 74 drawings, which come in series (playing cards, rings, flags). It passes 0.65 for 0, 1 and 11 %.
REGISTERED = 0.62
# A picture that is no copy is called close, and not "no copy", if the plain correlation of 16x16 grey
# pixels with a stored picture or its mirror image is above CLOSE_ZNCC, and above CLOSE together with the
# score of the second check. Of 40 photographs, 60 stamps and 60 drawings 0, 4 and 4 are, with the 8 of up
# to 800 others that correlate most. Of 64 drawings of captions that the embedded model has seen once or
# never, 27 are, most with the picture of that caption. Burnt or half formed copies had sums of 1.24 to 1.5.
# Pictures that merely correlate had 0.97 to 1.18.
CLOSE, CLOSE_ZNCC = 1.2, 0.75
# Likeness (`metrics.likeness`) by either check from which on a picture that is no copy is shown as near the
# limit: "look yourself". It stops nothing. Chosen, not measured: three quarters of the way
# to the limit. Table 4 of `benchmarks.eye` counts such pictures.
NEAR = 0.3
# Nearest pictures for the second check, and as many for the mirror image. The figures of REGISTERED are for
# this number. No measurement of others is recorded.
CANDIDATES = 8

# Limits for the plain correlation of 16x16 grey pictures (`verifier.zncc`), which the tables use as an
# independent measure: with the nearest of hundreds of pictures, and with one given picture. Both are
# chosen, not measured. `benchmarks.tables.grade.pair_limit` measures the second one for a training set.
ZNCC, ZNCC_PAIR = 0.75, 0.6

# Similarity, in the descriptor's own unit, above which two rows are one picture in the vote on its caption.
# Chosen, not measured.
SAME_PICTURE = {"cosine": 0.9, "nl2": -0.2}
