"""Every limit of the guard, once, with the figure it was set by.

A limit is a false-alarm rate: how often a picture that is *not* in the index passes it. None depends on
how alike the pictures of an index are to each other; all of them depend on how many there are, because
the nearest of a million is nearer than the nearest of a thousand. The figures are those of
`python -m benchmarks.eye` (docs/descriptors.md): photographs, stamps and drawings against an index of
others; beyond 10,000 rows the tail is continued as it falls there, and checked on made-up rows.

On the scale of `metrics.closeness`, 0 is what such pictures typically reach, COPY (0.4) what one in a
hundred of them reaches, and 1 the same picture.
"""

from __future__ import annotations

import bisect

from .descriptors.base import DescriptorSpec
from .metrics import COPY as COPY
from .schedule import Schedule

# ------------------------------------------------------------------ the scale of closeness

# Similarity to the nearest row, in the descriptor's own unit, of pictures that are not in the index: by
# scale (px a side; latents: cells), and for indexes of up to ROWS rows: (median, limit). Asked were 1,050
# photographs, cuts of photographs, stamps and drawings, against 9,000 others of their own kind; pairs that
# SSCD calls copies (cosine above 0.5) are no strangers and were left out. Beyond their number the tail is
# continued by Hill's estimator. The limit is passed by 1 in 100; of `compact`, by which a run looks at many
# steps, by 1 in 400. What passes it: playing cards, nearly empty pictures, a wallpaper in another colour.
# sscd: an int8 export at 224 px stood in for Meta's file; in full detail the limit is the literature's,
# 0.5. latent: of the demo's autoencoder; strangers are less alike in FLUX.2's. clip: not measured.
ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
Levels = tuple[tuple[float, float], ...]
LEVELS: dict[str, dict[int, Levels]] = {
    "compact": {
        16: ((0.65, 0.89), (0.73, 0.89), (0.80, 0.92), (0.84, 0.94), (0.88, 0.95)),
        32: ((0.64, 0.87), (0.72, 0.88), (0.78, 0.90), (0.83, 0.92), (0.87, 0.94)),
        48: ((0.64, 0.86), (0.72, 0.87), (0.78, 0.90), (0.83, 0.92), (0.87, 0.94)),
        96: ((0.64, 0.85), (0.72, 0.87), (0.78, 0.90), (0.83, 0.92), (0.87, 0.94)),
    },
    "sscd": {
        16: ((0.60, 0.73), (0.67, 0.77), (0.72, 0.81), (0.77, 0.84), (0.81, 0.87)),
        32: ((0.51, 0.66), (0.58, 0.71), (0.64, 0.75), (0.69, 0.79), (0.73, 0.82)),
        64: ((0.37, 0.56), (0.45, 0.62), (0.52, 0.66), (0.58, 0.71), (0.63, 0.74)),
        288: ((0.33, 0.50), (0.36, 0.50), (0.39, 0.50), (0.42, 0.50), (0.45, 0.50)),
    },
    "pixel": {
        16: ((-1.48, -0.90), (-1.28, -0.86), (-1.11, -0.74), (-0.96, -0.64), (-0.83, -0.56)),
        32: ((-1.54, -1.03), (-1.35, -0.94), (-1.19, -0.82), (-1.04, -0.72), (-0.92, -0.64)),
    },
    "latent": {
        8: ((-1.40, -0.95), (-1.19, -0.81), (-1.01, -0.69), (-0.86, -0.59), (-0.73, -0.50)),
        16: ((-1.56, -1.15), (-1.39, -1.03), (-1.24, -0.91), (-1.10, -0.81), (-0.98, -0.72)),
    },
    "clip": {224: ((0.7, 0.9),) * 5},
}
# Score normalisation: what is alike to many of the background set is alike to much. By how much a
# query's mean similarity to the BACKGROUND_NEAREST nearest of them passes the usual one moves its levels,
# SHARE of it.
BACKGROUND_NEAREST = 10
SHARE = 0.25
USUAL: dict[str, dict[int, float]] = {"compact": {16: 0.42, 32: 0.395, 48: 0.395, 96: 0.40}}


def levels(spec: DescriptorSpec, scale: int, rows: int) -> tuple[float, float]:
    """Similarities whose closeness is 0 and COPY, in an index of `rows` pictures."""
    table = LEVELS[kind(spec)]
    nearest = min(table, key=lambda known: abs(known - scale))
    return table[nearest][min(bisect.bisect_left(ROWS, rows), len(ROWS) - 1)]


def shift(spec: DescriptorSpec, scale: int, usual):
    """What to add to the levels of a query that is `usual` similar to its nearest background pictures.

    usual : float, or a Tensor of them.
    """
    return SHARE * (usual - USUAL[kind(spec)][scale])


def kind(spec: DescriptorSpec) -> str:
    """The name that `descriptors.create` takes."""
    return spec.id.partition("_")[0]


# ------------------------------------------------------------------ the gate (Eq. 10)

# λ_t of each preset, on the scale of closeness.
GATE = {
    "main": Schedule("constant", 0.4, 0.4),
    "strong": Schedule("constant", 0.3, 0.3),
    "gentle": Schedule("constant", 0.5, 0.5),
    "paper": Schedule("constant", 0.4, 0.4),
}

# ------------------------------------------------------------------ verdicts

# Closeness of two drawings of one prompt above which they are one picture. By `compact`, 32 memorised
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
