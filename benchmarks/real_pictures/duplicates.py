"""How many edited copies are found as duplicates, at which share of false alarms.

A copy is found if its pair with its own source is above the limit. A picture of the set that was not edited
is a false alarm if a pair with any other such picture is. Among these are real duplicates that the folders
hold, and which count against every measure alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from amg_core.images import thumbnail
from amg_core.index import Index
from index_tools import dedup, verifying

from ..eye.rivals import NotInstalled, rival
from .planting import EDITS, Planted

HASH_SIDE, HASH_BITS = (
    32,
    8,
)  # of the perceptual hash: the reduced picture, and the cosines that count
ASKED = 4  # most similar pictures of the set that are compared, for a false alarm
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)  # shares of false alarms at which measures are compared


@dataclass(frozen=True)
class Measured:
    """Scores of one measure: of each copy with its source, and the best of each unedited picture."""

    name: str
    own: np.ndarray
    alarms: np.ndarray
    pairs_per_second: float = 0.0
    limit: float | None = None  # of the command line
    worst: list[tuple[str, str, float]] = field(default_factory=list)

    def recall(self, limit: float, chosen: np.ndarray | slice = slice(None)) -> float:
        return float((self.own[chosen] > limit).mean())

    def false_alarms(self, limit: float) -> float:
        return float((self.alarms > limit).mean())

    def limit_at(self, share: float) -> float:
        """The lowest limit that at most `share` of the unedited pictures pass."""
        return float(np.quantile(self.alarms, 1 - share, method="higher"))


@dataclass(frozen=True)
class Setting:
    """Both indexes, the pairs of a copy with its source, and the pictures that were not edited."""

    base: Index
    copies: Index
    own: list[tuple[int, int]]  # rows of the source and of the copy
    edits: np.ndarray
    kinds: np.ndarray
    others: list[int]
    asked: list[int]  # places in `others`: those that are asked for false alarms


def setting(base: Index, copies: Index, planted: Planted, asked: int) -> Setting:
    rows = {base.source(i): i for i in range(base.count)}
    names = [copies.source(i) for i in range(copies.count)]
    usable = [
        (rows[planted.source[n]], j) for j, n in enumerate(names) if planted.source[n] in rows
    ]
    edited = set(planted.source.values())
    others = [i for name, i in rows.items() if name not in edited]
    return Setting(
        base,
        copies,
        usable,
        np.array([planted.edit[names[j]] for _, j in usable]),
        np.array([planted.kind[base.source(i)] for i, _ in usable]),
        others,
        np.random.default_rng(0).permutation(len(others))[:asked].tolist(),
    )


def measures(given: Setting, rivals: Sequence[str]) -> Iterator[Measured]:
    """The descriptor of the index alone, with its pairs verified, pHash, and the rivals installed."""
    yield _by_rows(
        "similarity alone", *(_rows(index) for index in (given.base, given.copies)), given
    )
    yield _verified(given)
    hashes = [_each(index, lambda images: np.stack([phash(image) for image in images]))
              for index in (given.base, given.copies)]  # fmt: skip
    yield _by_rows("pHash", *hashes, given)
    for name in rivals:
        try:
            eye = rival(name)
        except NotInstalled as missing:
            print(f"left out: {missing}")
            continue
        yield _by_rows(
            name, *(_each(index, eye.embed) for index in (given.base, given.copies)), given
        )


def phash(image: Image.Image) -> np.ndarray:
    """The perceptual hash (Zauner 2010): 64 values ±1/8, so that the product is 1 − hamming/32."""
    from scipy.fft import dctn

    grey = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(grey, dtype=np.float64))[:HASH_BITS, :HASH_BITS]
    return np.where(low > np.median(low), 1, -1).ravel() / 8


def _rows(index: Index) -> np.ndarray:
    rows = index.rows(index.spec.scales[-1])[:].astype(np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _each(
    index: Index, embed: Callable[[list[Image.Image]], np.ndarray], batch: int = 16
) -> np.ndarray:
    """What a measure makes of the stored pictures, (N, D). All measures see the same ones."""
    parts = [range(i, min(i + batch, index.count)) for i in range(0, index.count, batch)]
    return np.concatenate([embed([index.thumbnail(i) for i in part]) for part in parts])


def _by_rows(name: str, base: np.ndarray, copies: np.ndarray, given: Setting) -> Measured:
    own = np.array([float(base[i] @ copies[j]) for i, j in given.own])
    others = base[given.others]
    alike = others[given.asked] @ others.T
    alike[np.arange(len(alike)), given.asked] = -np.inf
    return Measured(name, own, alike.max(1))


def _verified(given: Setting) -> Measured:
    """1 − the share of detail that differs, 0 for pairs that are no candidates."""
    base, copies = _rows(given.base), _rows(given.copies)
    limit = dedup.default_threshold(given.base.spec, checked=True)
    started = time.process_time()
    own, asked = own_shares(given, base, copies, limit)
    alarms, worst, more = alarm_shares(given, base, limit)
    rate = (asked + more) / max(time.process_time() - started, 1e-9)
    return Measured("verified", own, alarms, rate, 1 - verifying.DIFFERENT, worst)


def own_shares(
    given: Setting, base: np.ndarray, copies: np.ndarray, limit: float
) -> tuple[np.ndarray, int]:
    """The share of each copy with its source, and the number of pairs that were compared."""
    own, asked = np.zeros(len(given.own)), 0
    for k, (i, j) in enumerate(given.own):
        if base[i] @ copies[j] > limit:
            mine, source = _picture(given.copies, j), [_picture(given.base, i)]
            own[k] = verifying.compare(mine, source, different=1.0)[0]  # the curve has every limit
            asked += 1
    return own, asked


def alarm_shares(
    given: Setting, base: np.ndarray, limit: float
) -> tuple[np.ndarray, list[tuple[str, str, float]], int]:
    """The best share of each of `given.asked` with another unedited picture, by name, and their number."""
    others = base[given.others]
    alarms, worst, asked = np.zeros(len(given.asked)), [], 0
    for k, at in enumerate(given.asked):
        row = others @ others[at]
        row[at] = -np.inf
        near = [i for i in np.argsort(-row)[:ASKED].tolist() if row[i] > limit]
        if near:
            series = int((row > limit).sum()) > dedup.SERIES
            mine = _picture(given.base, given.others[at])
            pictures = [_picture(given.base, given.others[i]) for i in near]
            shares = verifying.compare(mine, pictures, series=series, different=1.0)
            best = int(np.argmax(shares))
            alarms[k] = shares[best]
            names = [given.base.source(given.others[i]) for i in (at, near[best])]
            worst.append((*names, float(shares[best])))
            asked += len(near)
    return alarms, sorted(worst, key=lambda one: -one[2]), asked


def _picture(index: Index, i: int) -> torch.Tensor:
    return thumbnail(index, i)[None]


def text(given: Setting, found: Sequence[Measured]) -> str:
    """Recall at equal false alarms, and of each edit where the command line's limit has them."""
    lines = [
        f"{len(given.own)} copies of {len({i for i, _ in given.own})} pictures among "
        f"{len(given.others)} others. Recall, in %, where that share of {len(given.asked)} of the others "
        f"is called a duplicate of another one:",
        "",
        "| measure | " + " | ".join(f"{100 * level:g} %" for level in LEVELS) + " |",
        "|---|" + "---|" * len(LEVELS),
    ]
    for one in found:
        cells = [f"{100 * one.recall(one.limit_at(level)):.0f}" for level in LEVELS]
        lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    at = next(one for one in found if one.limit is not None)
    assert at.limit is not None
    share = at.false_alarms(at.limit)
    lines += [
        "",
        f"The command line's limit: {100 * at.recall(at.limit):.0f} % found, "
        f"{int((at.own <= at.limit).sum())} of {len(at.own)} missed, {100 * share:.1f} % false alarms. "
        f"Each edit, in %, all measures at these false alarms:",
        "",
        "| edit | " + " | ".join(one.name for one in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    limits = [at.limit if one is at else one.limit_at(share) for one in found]
    groups = [(edit, given.edits == edit) for edit in EDITS]
    groups += [(f"**{kind}**", given.kinds == kind) for kind in sorted(set(given.kinds.tolist()))]
    for label, chosen in groups:
        cells = [
            f"{100 * one.recall(limit, chosen):.0f}"
            for one, limit in zip(found, limits, strict=True)
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
