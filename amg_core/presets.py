"""The named settings.

docs/decisions/leaving.md has the reasons for the ways to steer. docs/honesty.md has the figures of `main`,
and docs/tables.md those of all presets in an earlier version. The thresholds are in `limits.GATE`. The
other numbers of `main`, `strong` and `gentle`, such as `release` and `safe_score`, were chosen on trial
drawings (docs/tables.md names their seeds). No measurement of each by itself is recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from . import limits
from .errors import AMGError
from .guidance import (
    AwayFromCaption,
    Deduplication,
    Despecification,
    Dissimilarity,
    Guidance,
    Projection,
    PromptReduction,
    ReferenceDeduplication,
    ReferenceDespecification,
    ReferenceDissimilarity,
    Repulsion,
)
from .run import Settings
from .schedule import Schedule

AUTHORS = Schedule("exponential", 0.3, 0.4)  # λ_t of their code, as a cosine of SSCD
FORMS = ("projection", "gradient", "repulsion")  # of the dissimilarity term


@dataclass(frozen=True)
class Preset:
    """The parts of a preset.

    c1, c2 and c3 are the constants of the paper's terms, or of the terms in their place. c3 is a factor on
    the constant of the form. `form` is that of the dissimilarity term. `reduction` is None if the prompt is
    not reduced. `as_published` is that of `run.Settings`. `reference` selects the constants of the authors'
    code.
    """

    c1: float
    c2: float
    c3: float
    form: str
    release: float
    reduction: PromptReduction | None = None
    as_published: bool = False
    reference: bool = False


# `paper`: the paper does not name c1 and c2. c1 + c2 = 6.5 = s0 − 1 at its guidance scale s0 = 7.5, so an
# exact copy (σ_t = 1) spends the budget of Eq. 15 exactly. c1 is half of s0 − 1 at cfg 4, so deduplication
# has at least half of the budget there, and some of it above cfg 2.5. The authors' c1 = 13 spends all of it
# on despecification, at cfg 7.5 where σ_t is above .5, at cfg 4 where it is above .23.
_PRESETS = {
    "main": Preset(
        1.0, 1.5, 1.0, "repulsion", 0.3, PromptReduction(first=1.0, most=3.0, safe_score=0.3)
    ),
    "strong": Preset(
        1.0, 2.0, 1.5, "repulsion", 0.1, PromptReduction(first=1.5, until=0.0, safe_score=0.1)
    ),
    "paper": Preset(1.5, 5.0, 1.0, "gradient", 1.0, as_published=True),
    "reference": Preset(13.0, 1 / 0.3, 1.0, "gradient", 1.0, as_published=True, reference=True),
    "gentle": Preset(
        1.0, 1.0, 0.5, "repulsion", 0.4,
        PromptReduction(first=0.75, most=3.0, until=0.15, safe_score=0.3),
    ),
}  # fmt: skip
PRESETS = tuple(_PRESETS)


def settings(
    preset: str,
    metric: str,
    *,
    strength: float = 1.0,
    despecification: float = 1.0,
    deduplication: float = 1.0,
    dissimilarity: float = 1.0,
    exit: float = 1.0,
    form: str | None = None,
    margin: float | None = None,
    iterations: int | None = None,
    schedule: Schedule | None = None,
    own_units: bool | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> Settings:
    """A preset with its strengths multiplied and single values replaced.

    Parameters
    ----------
    preset : one of PRESETS
        main (recommended) and strong steer away early, gentle later and less. paper is Eqs. 8 to 17.
        reference has the differences of the authors' code.
    metric : {"cosine", "nl2"}
        The metric of the descriptor. With the cosine, reference has thresholds in SSCD units, unless
        `schedule` is given.
    strength : float
        Factor on the next three, 0 = off, 1 = no change.
    despecification, deduplication, dissimilarity, exit : float
        Strengths, 0 = off, 1 = the preset, see `Guidance.strength`. The strength of prompt reduction
        is the product of despecification and exit. At exit 0 the paper's two terms take its place.
    form : one of FORMS, optional
        Form of the dissimilarity term, instead of the preset's.
    margin, iterations : optional
        Settings of the projection.
    schedule, own_units : optional
        Settings of the gate, instead of the preset's.

    Raises
    ------
    AMGError
        A value is not a finite number or out of range. The message names the widget.
    """
    if preset not in _PRESETS:
        raise AMGError(f"preset: {preset!r} is unknown. Choose one of {', '.join(PRESETS)}.")
    numbers = {
        "strength": strength, "despecification": despecification, "deduplication": deduplication,
        "dissimilarity": dissimilarity, "exit": exit, "margin": margin, "iterations": iterations,
    }  # fmt: skip
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise AMGError(f"{name}: {value} is not usable. Give a number of 0 or more (0 = off).")
    for name, value in {"start_percent": start_percent, "end_percent": end_percent}.items():
        if not 0 <= value <= 1:
            raise AMGError(f"{name}: {value} is not usable. Give a number from 0 to 1.")
    if start_percent > end_percent:
        raise AMGError("start_percent is larger than end_percent: the guard would never act.")
    if form is not None and form not in FORMS:
        raise AMGError(f"form: choose one of {', '.join(FORMS)}.")
    base = _PRESETS[preset]
    if form is not None:
        base = replace(base, form=form)
    words = _away_from_words(base, strength * despecification, strength * deduplication, exit)
    projection = {"margin": margin, "iterations": iterations}
    picture = _away_from_picture(base, strength * dissimilarity, projection)
    if own_units is None:
        own_units = base.reference and metric == "cosine" and schedule is None
    return Settings(
        limits.GATE.get(preset, AUTHORS) if schedule is None else schedule, (*words, picture),
        base.release, start_percent, end_percent, own_units, preset, base.as_published,
    )  # fmt: skip


def _away_from_words(
    base: Preset, despecification: float, deduplication: float, exit: float
) -> tuple[Guidance, Guidance]:
    """The despecification term (or prompt reduction), and the term for the neighbour's caption."""
    if base.reduction is not None and exit > 0:
        return (
            replace(base.reduction, strength=despecification * exit),
            AwayFromCaption(deduplication, base.c2),
        )
    if base.reference:
        return (
            ReferenceDespecification(despecification, base.c1),
            ReferenceDeduplication(deduplication, base.c2),
        )
    return Despecification(despecification, base.c1), Deduplication(deduplication, base.c2)


def _away_from_picture(base: Preset, strength: float, projection: dict[str, Any]) -> Guidance:
    if base.form == "repulsion":
        plain = Repulsion()
        return Repulsion(strength, base.c3 * plain.first, plain.growth, base.c3 * plain.most)
    if base.form == "projection":
        given = {name: value for name, value in projection.items() if value is not None}
        return Projection(strength, base.c3, **given)
    if base.reference:
        return ReferenceDissimilarity(strength, base.c3)
    return Dissimilarity(strength, base.c3 * Dissimilarity.c3)
