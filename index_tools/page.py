"""The report of an evaluation as one HTML file (page.html), without scripts or network requests."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amg_core.optional import needed

if TYPE_CHECKING:
    from amg_core.index import Index

    from .evaluate import Evaluation

BINS = 40
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 220, 44, 34, 20  # sizes of the histogram, in pixels
COLOURS = ("#3566b8", "#c77d1a")  # of the sets
LIMITS = {
    "cosine": (0.5, 0.4),
    "nl2": (1.4, 1.6),
}  # in the papers, for copies: SSCD above, nL2 below


def template() -> Any:
    """The template page.html, which escapes all values. AMGError if Jinja is missing."""
    jinja2 = needed("jinja2", "The page", "pip install jinja2, or omit --out")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))


def render(
    evaluations: Sequence[Evaluation], index: Index, thumbnail: Callable[[int], bytes | None]
) -> str:
    """The page for one or two evaluations. `thumbnail` maps a row id to a JPEG, or None."""
    keys = list(dict.fromkeys(key for one in evaluations for key in one.figures))
    rows = [[one.figures.get(key) for one in evaluations] for key in keys]
    labelled = [(next(figure.label for figure in row if figure), row) for row in rows]
    page: str = template().render(
        sets=evaluations, index=index, thumbnail=thumbnail, rows=labelled,
        axis=_axis(evaluations[0]), histogram=histogram(evaluations),
    )  # fmt: skip
    return page


def _axis(one: Evaluation) -> str:
    if one.metric == "cosine":
        return "Similarity"
    return "nL2 (Eq. 8, smaller = closer)" if one.is_nl2 else "−nL2"


def histogram(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The data for the histogram: bars of each set beside each other, axis, and the papers' limits."""
    first = evaluations[0]
    limits = LIMITS[first.metric] if first.metric == "cosine" or first.is_nl2 else ()
    values = [value for one in evaluations for value in one.values()]
    low = min([*values, *limits, 0.0])
    high = max([*values, *limits, 1.0 if first.metric == "cosine" else 0.0])
    edges = np.linspace(low, high + 1e-9, BINS + 1).tolist()
    counts = [np.histogram(one.values(), edges)[0].tolist() for one in evaluations]
    most = max(1, *map(max, counts))
    plot, floor = WIDTH - LEFT - 10, HEIGHT - BOTTOM
    wide = plot / BINS / len(evaluations)

    def x(value: float) -> float:
        share: float = (value - low) / max(high - low, 1e-9)
        return round(LEFT + plot * share, 1)

    bars = [
        {
            "x": round(x(edges[i]) + n * wide, 1),
            "wide": round(max(1.0, wide - 1), 1),
            "tall": round(max(1.5, (floor - TOP) * count / most), 1),
            "colour": COLOURS[n % 2],
            "title": f"{edges[i]:.3f} to {edges[i + 1]:.3f}: {count}",
        }
        for n, bins in enumerate(counts)
        for i, count in enumerate(bins)
        if count
    ]
    named = evaluations if len(evaluations) > 1 else ()
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "floor": floor, "most": most,
        "bars": bars, "limits": [(x(limit), f"{limit:g}") for limit in limits],
        "ticks": [(x(tick), f"{tick:.2f}") for tick in np.linspace(low, high, 6).tolist()],
        "legend": [(one.name, COLOURS[n % 2]) for n, one in enumerate(named)],
        "label": f"Histogram of {len(values)} values from {low:.2f} to {high:.2f}",
    }  # fmt: skip
