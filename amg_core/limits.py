"""Every limit of the guard, once, with the figure it was set by; what is one descriptor's is in its file.

A limit is a false-alarm rate: how often a picture that is *not* in the index passes it. None depends on
how alike the pictures of an index are to each other; all of them depend on how many there are, because
the nearest of a million is nearer than the nearest of a thousand. The figures are those of
`python -m benchmarks.eye` (docs/descriptors.md): photographs, stamps and drawings against an index of
others; beyond 10,000 rows the tail is continued as it falls there, and checked on made-up rows.

On the scale of `metrics.score`, 0 is what such pictures typically reach, COPY (0.4) what one in a
hundred of them reaches, and 1 the same picture.
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

# Similarity to the nearest row, in the descriptor's own unit, of pictures that are not in the index: by
# scale (px a side; latents: cells), and for indexes of up to ROWS rows: (median, limit), in the file of
# each descriptor (`Kind.levels`). Asked were 1,050 photographs, cuts of photographs, stamps and drawings,
# against 9,000 others of their own kind; pairs that SSCD calls copies (cosine above 0.5) are no strangers
# and were left out. Beyond their number the tail is continued by Hill's estimator. The limit is passed by
# 1 in 100. What passes it: playing cards, nearly empty pictures, a wallpaper in another colour.
ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
# Score normalisation: what is alike to many of the background set is alike to much. By how much a
# query's mean similarity to the BACKGROUND_NEAREST nearest of them passes the usual one moves its levels,
# SHARE of it (`Kind.usual`).
BACKGROUND_NEAREST = 10
SHARE = 0.25

Usual = TypeVar("Usual", float, Tensor)


def levels(spec: DescriptorSpec, scale: int, rows: int) -> tuple[float, float]:
    """Similarities whose likeness is 0 and COPY, in an index of `rows` pictures."""
    table = registry.of(spec).levels
    nearest = min(table, key=lambda known: abs(known - scale))
    return table[nearest][min(bisect.bisect_left(ROWS, rows), len(ROWS) - 1)]


def shift(spec: DescriptorSpec, scale: int, usual: Usual) -> Usual:
    """What to add to the levels of a query that is `usual` similar to its nearest background pictures.

    usual : float, or a Tensor of them.
    """
    return SHARE * (usual - registry.of(spec).usual[scale])


# ------------------------------------------------------------------ the gate (Eq. 10)

# λ_t of each preset, on the scale of likeness.
GATE = {
    "main": Schedule("constant", 0.4, 0.4),
    "strong": Schedule("constant", 0.3, 0.3),
    "gentle": Schedule("constant", 0.5, 0.5),
    "paper": Schedule("constant", 0.4, 0.4),
}

# ------------------------------------------------------------------ verdicts

# Likeness of two drawings of one prompt above which they are one picture. By `compact`, 32 memorised
# prompts of the embedded model: 0.88 to 0.98; 32 others, which repeat one emoji on many grounds: -0.59 to
# 0.83, one above 0.8.
ONE_PICTURE = 0.8
# Score of the second check (`judge.registered`) above which it says copy. Of the 8 nearest pictures by
# `compact` that SSCD calls no copies, the best passes 0.6 for 0 of 62 photographs, 3 % of 89 stamps, and
# 15 % of 74 drawings, which come in series (playing cards, rings, flags); 0.65 for 0, 1 and 11 %.
REGISTERED = 0.62
CANDIDATES = 8  # nearest pictures that the second check looks at, and as many for the mirror image

# The plain correlation of 16x16 grey pictures (`judge.zncc`), by which tables grade what the two checks
# have steered or passed: with the nearest of hundreds, and with one given picture.
ZNCC, ZNCC_PAIR = 0.75, 0.6

# Two files of one picture, for the vote on its caption: similarity in the descriptor's own unit.
SAME_PICTURE = {"cosine": 0.9, "nl2": -0.2}
