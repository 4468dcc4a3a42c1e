"""The named settings. Why these numbers: docs/honesty.md."""

from __future__ import annotations

import math
from dataclasses import replace

from . import limits
from .errors import AMGError
from .schedule import Schedule
from .session import FORMS, Settings

AUTHORS = Schedule("exponential", 0.3, 0.4)

_PRESETS = {
    "main": Settings(
        AUTHORS, despecification=1.0, deduplication=1.5, dissimilarity=1.0, form="repulsion",
        exit=1.0, release=0.3, unrelated=0.3, most=3.0, preset="main",
    ),
    "strong": Settings(
        AUTHORS, despecification=1.0, deduplication=2.0, dissimilarity=1.5, form="repulsion",
        exit=1.5, exit_until=0.0, release=0.1, unrelated=0.1, preset="strong",
    ),
    "paper": Settings(
        AUTHORS, despecification=13.0, deduplication=5.0, dissimilarity=1.0, release=1.0,
        preset="paper",
    ),
    "reference": Settings(
        AUTHORS, despecification=13.0, deduplication=1 / 0.3, dissimilarity=1.0, form="reference",
        release=1.0, preset="reference",
    ),
    "gentle": Settings(
        AUTHORS, despecification=1.0, deduplication=1.0, dissimilarity=0.5, form="repulsion",
        exit=0.75, exit_until=0.15, release=0.4, unrelated=0.3, most=3.0, preset="gentle",
    ),
}  # fmt: skip
PRESETS = tuple(_PRESETS)
CLOSENESS = ("release", "unrelated")  # below 0: less alike than different pictures can be


def settings(
    preset: str,
    metric: str,
    *,
    despecification: float = 1.0,
    deduplication: float = 1.0,
    dissimilarity: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    **overrides,
) -> Settings:
    """A preset with its strengths multiplied and single fields replaced.

    Parameters
    ----------
    preset : one of PRESETS
        main (recommended) and strong leave the copy's basin early, gentle later and less far; paper
        is Eqs. 10 to 17 with the projection for Eq. 17; reference has the constants of the authors'
        code.
    metric : {"cosine", "nl2"}
        Of the descriptor. reference takes thresholds in SSCD units where the metric is the cosine.
    despecification, deduplication, dissimilarity : float
        Multipliers, 0 = off, 1 = the preset. despecification includes the early exit.
    overrides
        Fields of `Settings`.

    Raises
    ------
    AMGError
        For a value that is not a finite number or out of range; names the widget.
    """
    if preset not in _PRESETS:
        raise AMGError(f"preset: {preset!r} is unknown. Choose one of {', '.join(PRESETS)}.")
    multipliers = {
        "despecification": despecification,
        "deduplication": deduplication,
        "dissimilarity": dissimilarity,
    }
    numbers = multipliers | {k: v for k, v in overrides.items() if isinstance(v, int | float)}
    for name, value in numbers.items():
        if not (math.isfinite(value) and (value >= 0 or name in CLOSENESS)):
            raise AMGError(f"{name}: {value} is not usable. Give a number of 0 or more (0 = off).")
    for name, value in {"start_percent": start_percent, "end_percent": end_percent}.items():
        if not 0 <= value <= 1:
            raise AMGError(f"{name}: {value} is not usable. Give a number from 0 to 1.")
    if start_percent > end_percent:
        raise AMGError("start_percent is larger than end_percent: the guard would never look.")
    if overrides.get("form", "projection") not in FORMS:
        raise AMGError(f"form: choose one of {', '.join(FORMS)}.")
    base = _PRESETS[preset]
    chosen = replace(
        base,
        schedule=limits.GATE.get(preset, base.schedule),
        despecification=base.despecification * despecification,
        deduplication=base.deduplication * deduplication,
        dissimilarity=base.dissimilarity * dissimilarity,
        exit=base.exit * despecification,
        start_percent=start_percent,
        end_percent=end_percent,
        own_units=base.own_units or (preset == "reference" and metric == "cosine"),
    )
    return replace(chosen, **overrides)
