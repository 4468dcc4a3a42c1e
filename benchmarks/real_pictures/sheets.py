"""Contact sheets of what `dedup` got wrong: a false alarm or a missed copy beside its picture.

A figure does not say whether a false alarm is a duplicate that the folders hold. A look does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amg_core import sheet
from amg_core.index import Index

from .duplicates import Measured, Setting

MISSED = 10  # missed copies that are drawn, evenly spaced among all
ACROSS = 3  # pairs beside each other


def draw(out: Path, given: Setting, found: Measured) -> list[Path]:
    """`false_alarms.png` and `missed.png` in the folder `out`. A measure without a limit has none."""
    if found.limit is None:
        return []
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, groups in (
        ("false_alarms", false_alarms(given, found, found.limit)),
        ("missed", missed(given, found, found.limit)),
    ):
        picture = sheet.draw(groups, columns=2, across=ACROSS, heading=name.replace("_", " "))
        drawn.append(out / f"{name}.png")
        picture.save(drawn[-1])
    return drawn


def false_alarms(given: Setting, found: Measured, limit: float) -> list[sheet.Group]:
    """Every pair of unedited pictures above the limit, each pair once."""
    rows = {given.base.source(i): i for i in given.others}
    pairs = {tuple(sorted((a, b))): value for a, b, value in found.worst if value > limit}
    return [
        sheet.Group([_tile(given.base, rows[a]), _tile(given.base, rows[b])], f"{value:.3f}")
        for (a, b), value in pairs.items()
    ]


def missed(given: Setting, found: Measured, limit: float) -> list[sheet.Group]:
    """Sources and edited copies at or below the limit."""
    places = np.flatnonzero(found.own <= limit)
    chosen = places[np.linspace(0, len(places) - 1, min(MISSED, len(places))).round().astype(int)]
    return [
        sheet.Group(
            [_tile(given.base, given.own[k][0]), _tile(given.copies, given.own[k][1])],
            f"{given.edits[k]}: {found.own[k]:.3f}",
        )
        for k in chosen.tolist()
    ]


def _tile(index: Index, i: int) -> sheet.Tile:
    return sheet.Tile(index.thumbnail(i), [index.source(i)])
