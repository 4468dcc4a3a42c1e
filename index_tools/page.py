"""The report of an evaluation as one HTML file: no script, no request to anywhere."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .evaluate import Evaluation, Judged

BINS = 40
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 220, 44, 34, 20  # of a histogram, pixels
COLOURS = ("#3566b8", "#c77d1a")  # of the sets
LIMITS = {"cosine": (0.5, 0.4), "nl2": (1.4, 1.6)}  # of the papers: SSCD above, nL2 below

STYLE = """
:root { color-scheme: light dark; --ink: #22242a; --faint: #6b6f78; --line: #dcdee3;
  --back: #fbfbfc; --bad: #b3261e; --good: #1e7a3c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --faint: #a0a4ad; --line: #3a3d45;
  --back: #191b1f; --bad: #ff8a80; --good: #7bd596; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td { font-variant-numeric: tabular-nums; }
.faint, .interval, figcaption { color: var(--faint); } .interval { font-size: .88em; }
.bad { color: var(--bad); } .good { color: var(--good); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.two div { font-size: .8rem; overflow-wrap: anywhere; }
img, .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line);
  border-radius: 3px; display: grid; place-items: center; }
figcaption { font-size: .85rem; margin-top: .4rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
"""


def render(
    evaluations: Sequence[Evaluation], index, thumbnail: Callable[[int], bytes | None]
) -> str:
    """The page of one or two evaluations. `thumbnail`: row id -> JPEG, None where there is none."""
    names = " and ".join(escape(one.name) for one in evaluations)
    parts = [
        "<h1>How much is copied?</h1>",
        f"<p>{names}, compared with the index <b>{escape(index.name)}</b> "
        f"({index.count} pictures, descriptor {escape(index.spec.id)}, "
        f"hash <code>{escape(index.hash[:12])}</code>).</p>",
        *(_sentence(one, len(evaluations) > 1) for one in evaluations),
    ]
    for one in evaluations:
        title = "The closest pairs" + (f": {escape(one.name)}" if len(evaluations) > 1 else "")
        parts.append(f'<h2>{title}</h2><div class="pairs">')
        parts += [_pair(judged, jpeg, thumbnail(judged.neighbor)) for judged, jpeg in one.worst]
        parts.append("</div>")
    parts += [
        "<h2>Figures</h2>",
        _table(evaluations),
        '<p class="faint">Brackets: 95 % intervals, of shares by Wilson, of the others by bootstrap '
        "over the pictures. Matched: up to contrast, brightness, tint and mirroring, as the guard "
        "compares. Closeness: 0 = as alike as pictures that are not in the index, "
        "0.4 = what one in a hundred of these reaches, 1 = the same picture.</p>",
        f"<h2>{_axis(evaluations[0])} to the nearest picture</h2>",
        histogram(evaluations),
    ]
    parts += [_remarks(one) for one in evaluations]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>How much is copied? {names}</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _sentence(one: Evaluation, named: bool) -> str:
    copies, n = sum(judged.copy for judged in one.judged), len(one.judged)
    word = "bad" if copies else "good"
    told = f"{copies} of {n} pictures" if copies else f"None of {n} pictures"
    verb = "is" if copies == 1 or not copies else "are"
    return (
        f'<p><b class="{word}">{told} {verb} too close</b> to a picture of the index'
        f" by one judge or both{f' ({escape(one.name)})' if named else ''}.</p>"
    )


def _table(evaluations: Sequence[Evaluation]) -> str:
    keys = list(dict.fromkeys(key for one in evaluations for key in one.figures))
    head = "".join(f"<th>{escape(one.name)}</th>" for one in evaluations)
    rows = [f"<tr><th></th>{head}</tr>"]
    for key in keys:
        label = next(one.figures[key].label for one in evaluations if key in one.figures)
        cells = []
        for one in evaluations:
            figure = one.figures.get(key)
            value, _, interval = (figure.text() if figure else "").partition(" [")
            shown = escape(value)
            if figure and figure.value is None:
                shown = f'<span class="faint">{shown}</span>'
            if interval:
                shown += f' <span class="interval">[{escape(interval)}</span>'
            if figure and figure.value is not None and figure.note:
                shown += f' <span class="faint">({escape(figure.note)})</span>'
            cells.append(f"<td>{shown}</td>")
        rows.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _axis(one: Evaluation) -> str:
    if one.metric == "cosine":
        return "Similarity"
    return "nL2 (Eq. 8, smaller = closer)" if _is_nl2(one) else "−nL2"


def _is_nl2(one: Evaluation) -> bool:
    return one.metric == "nl2" and all(judged.nl2 is not None for judged in one.judged)


def histogram(evaluations: Sequence[Evaluation]) -> str:
    """Inline SVG: pictures by similarity, the papers' thresholds marked, the sets beside each other."""
    first = evaluations[0]
    limits = LIMITS[first.metric] if first.metric == "cosine" or _is_nl2(first) else ()
    all_values = [value for one in evaluations for value in one.values()]
    low = min([*all_values, *limits, 0.0])
    high = max([*all_values, *limits, 1.0 if first.metric == "cosine" else 0.0])
    edges = np.linspace(low, high + 1e-9, BINS + 1)
    counts = [np.histogram(one.values(), edges)[0] for one in evaluations]
    most = max(1, *(int(c.max()) for c in counts))
    plot, floor = WIDTH - LEFT - 10, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + plot * (value - low) / max(high - low, 1e-9)

    bars = plot / BINS / len(evaluations)
    parts = []
    for n, bins in enumerate(counts):
        for i, count in enumerate(bins.tolist()):
            if count:
                tall = max(1.5, (floor - TOP) * count / most)
                parts.append(
                    f'<rect x="{x(edges[i]) + n * bars:.1f}" y="{floor - tall:.1f}" '
                    f'width="{max(1.0, bars - 1):.1f}" height="{tall:.1f}" fill="{COLOURS[n % 2]}">'
                    f"<title>{edges[i]:.3f} to {edges[i + 1]:.3f}: {count}</title></rect>"
                )
    parts.append(
        f'<line x1="{LEFT}" y1="{floor}" x2="{WIDTH - 10}" y2="{floor}" stroke="currentColor" '
        f'opacity=".4"/>'
    )
    for n, tick in enumerate(np.linspace(low, high, 6)):
        anchor = "end" if n == 5 else "middle"
        parts.append(
            f'<text x="{x(tick):.1f}" y="{floor + 16}" text-anchor="{anchor}">{tick:.2f}</text>'
        )
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 6}" text-anchor="end">{most}</text>')
    for limit in limits:
        at = x(limit)
        parts.append(
            f'<line x1="{at:.1f}" y1="{TOP - 4}" x2="{at:.1f}" y2="{floor}" stroke="#c22" '
            f'stroke-dasharray="4 3"/><text x="{at:.1f}" y="{TOP - 8}" text-anchor="middle" '
            f'style="fill:#c22">{limit:g}</text>'
        )
    if len(evaluations) > 1:
        for n, one in enumerate(evaluations):
            parts.append(
                f'<text x="{WIDTH - 12}" y="{TOP + 12 + 16 * n}" text-anchor="end" '
                f'style="fill:{COLOURS[n % 2]}">{escape(one.name)}</text>'
            )
    label = f"Histogram of {len(all_values)} values from {low:.2f} to {high:.2f}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _pair(judged: Judged, jpeg: bytes, neighbor: bytes | None) -> str:
    scores = [f"similarity {judged.similarity:.3f}", f"closeness {judged.closeness:.2f}"]
    if judged.nl2 is not None:
        scores[0] = f"nL2 {judged.nl2:.3f}, matched {-judged.similarity:.3f}"
    if judged.zncc is not None:
        scores.append(f"second judge {judged.zncc:.2f}")
    word = "bad" if judged.copy else "good"
    return (
        '<figure><div class="two">'
        f"<div>{_image(jpeg)}generated: {escape(judged.picture)}"
        f'<div class="faint">{escape(judged.prompt)}</div></div>'
        f"<div>{_image(neighbor)}nearest: {escape(judged.source)}"
        f'<div class="faint">{escape(judged.caption)}</div></div></div>'
        f'<figcaption><span class="{word}">{escape(judged.words)}</span><br>'
        f"{' · '.join(scores)}</figcaption></figure>"
    )


def _image(jpeg: bytes | None) -> str:
    if jpeg is None:
        return '<span class="none">no picture</span>'
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _remarks(one: Evaluation) -> str:
    if not one.skipped and not one.notes:
        return ""
    lines = [f"not judged: {name} ({reason})" for name, reason in one.skipped] + one.notes
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Remarks: {escape(one.name)}</h2><ul>{items}</ul>"
