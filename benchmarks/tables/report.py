"""Tables in Markdown, JSON, sheets and curves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amg_core.limits import COPY
from amg_core.plot import curve
from amg_demo.sheet import sheet, side_by_side
from index_tools import intervals

from .. import harness
from .grade import Grades, Judges, Own, fooled, kid_interval, paired_difference, unseen
from .methods import Drawings, Method, watch

NOT_MEASURED = "not measured"
FEW = 8  # pictures of which figures are still told
CURVES = 5  # pictures on a plot
SHEET = 32  # pictures on a sheet


@dataclass(frozen=True)
class Row:
    """What one method drew for one world, and its grades; `group` (B,) 0 = memorised, 1 = others."""

    method: Method
    drawn: Drawings
    grades: Grades
    group: Tensor


Interval = tuple[float, float | None, float | None] | None  # value, low, high; not measured


def percentage(hits: Tensor) -> Interval:
    return intervals.share(int(hits.sum()), len(hits)) if len(hits) else None


def mean(values: Tensor) -> Interval:
    array = values.double().numpy()
    if not len(array) or np.isnan(array).any():
        return None
    return intervals.mean(array)


def percentile(values: Tensor, percent: float) -> Interval:
    return intervals.percentile(values.double().numpy(), percent)


def pick(grades: Grades, rows: Tensor) -> Grades:
    values = {f.name: getattr(grades, f.name) for f in fields(grades)}
    return Grades(**{k: None if v is None else v[rows] for k, v in values.items()})


def paper_columns(row: Row, rows: Tensor, real: Tensor) -> dict[str, Interval]:
    """The columns of the paper's tables, over the pictures `rows` (B,) bool."""
    g = pick(row.grades, rows)
    s = g.sscd
    return {
        "SSCD 95th percentile": None if s is None else percentile(s, 95),
        "SSCD top 1": None if s is None else (float(s.max()), None, None),
        "SSCD % > 0.5": None if s is None else percentage(s > 0.5),
        "SSCD % > 0.4": None if s is None else percentage(s > 0.4),
        "nL2 5th percentile": percentile(g.nl2, 5),
        "nL2 top 1": (float(g.nl2.min()), None, None),
        "nL2 % < 1.4": percentage(g.nl2 < 1.4),
        "nL2 % < 1.6": percentage(g.nl2 < 1.6),
        "KID": kid_interval(g.features, real),
        "alignment": mean(g.alignment),
        "s/picture": (row.drawn.seconds / len(row.group), None, None),
    }


def honest_columns(row: Row, rows: Tensor, judges: Judges) -> dict[str, Interval]:
    """What the guard's own measure says, then the judges that no guidance has seen."""
    g = pick(row.grades, rows)
    clean = g.score <= COPY
    return {
        "own measure: copies %": percentage(~clean),
        "on views %": percentage(g.views > COPY),
        "other family %": percentage(g.other > COPY),
        "ZNCC with own, mean": mean(g.zncc_own),
        "ZNCC with own, worst": (float(g.zncc_own.max()), None, None),
        "ZNCC with own % > limit": percentage(g.zncc_own > g.zncc_limit),
        "its negative %": percentage(g.zncc_own < -judges.own_limit),
        "ZNCC with any % > limit": percentage(g.zncc > judges.limit),
        "SSCD with own % > 0.5": None if g.sscd_own is None else percentage(g.sscd_own > 0.5),
        "any unseen judge %": percentage(unseen(g)),
        "fooled % of the clean": percentage(fooled(g)[clean]),
    }


def kind_columns(row: Row, rows: Tensor) -> dict[str, Interval]:
    """One kind of training picture: how near, and how many an unseen judge calls a copy."""
    g = pick(row.grades, rows[: len(row.group)])
    return {
        "ZNCC with own, mean": mean(g.zncc_own),
        "ZNCC with own, worst": (float(g.zncc_own.max()), None, None),
        "ZNCC with own % > limit": percentage(g.zncc_own > g.zncc_limit),
        "any unseen judge %": percentage(unseen(g)),
        "alignment": mean(g.alignment),
    }


def dormant_columns(row: Row, rows: Tensor) -> dict[str, Interval]:
    """Pictures that should be left alone."""
    acted = torch.tensor(row.drawn.acted)[rows]
    g = pick(row.grades, rows)
    return {
        "guard acted %": percentage(acted),
        "bit-identical %": percentage(g.same),
        "identical where it never acted %": percentage(g.same[~acted]),
        "own measure: copies %": percentage(g.score > COPY),
        "alignment": mean(g.alignment),
    }


def against_plain(row: Row, plain: Row) -> dict[str, Interval]:
    """Method minus plain on what is memorised, paired by seed."""
    a, b = (pick(one.grades, one.group == 0) for one in (row, plain))

    def difference(x: Tensor, y: Tensor) -> Interval:
        if torch.isnan(x).any():
            return None
        return paired_difference(x.numpy(), y.numpy())

    return {
        "nL2": difference(a.nl2, b.nl2),
        "ZNCC with own": difference(a.zncc_own, b.zncc_own),
        "SSCD": None if a.sscd is None else difference(a.sscd, b.sscd),
        "alignment": difference(a.alignment, b.alignment),
    }


def text(heading: str, cell: Interval) -> str:
    """ "12 [5, 25]", percentages without decimals."""
    if cell is None:
        return NOT_MEASURED
    form = "{:.0f}" if "%" in heading else "{:.2f}"
    value, low, high = cell
    if low is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def markdown(table: dict[str, dict[str, Interval]]) -> str:
    """{row: {column: cell}} as a Markdown table. A column nobody measured stays, saying so."""
    headings = list(next(iter(table.values())))
    lines = [[name, *(text(h, cells[h]) for h in headings)] for name, cells in table.items()]
    return harness.markdown(["", *headings], lines)


def failures(row: Row, captions: list[str], seeds: list[int]) -> list[dict]:
    """Pictures of memorised prompts on which any unseen judge still sees a copy."""
    g, out = row.grades, []
    for i in (unseen(g) & (row.group == 0)).nonzero()[:, 0].tolist():
        figures = {
            name: round(float(getattr(g, name)[i]), 3)
            for name in ("score", "views", "other", "zncc_own", "zncc", "nl2")
        }
        if g.sscd_own is not None:
            figures |= {"sscd_own": round(float(g.sscd_own[i]), 3)}
        out.append({"prompt": captions[i], "seed": seeds[i]} | figures)
    return out


def tell_failures(name: str, failed: list[dict], count: int) -> str:
    """Which pictures a guard left as copies, in the eyes of a judge it never saw."""
    lines = [f"{name}: an unseen judge sees a copy in {len(failed)} of {count}"]
    for one in failed:
        figures = ", ".join(f"{k} {v:.2f}" for k, v in one.items() if isinstance(v, float))
        lines.append(f"  {one['prompt'] or 'picture'} (seed {one['seed']}): {figures}")
    return "\n".join(lines)


def save_sheet(
    path: Path, judges: Judges, rows: dict[str, Row], guard: str, captions: list[str], own: Own,
    group: int = 0,
) -> None:  # fmt: skip
    """Training picture | plain | guarded."""
    chosen = (rows["plain"].group == group).nonzero()[:SHEET, 0]
    if not len(chosen):
        return
    columns = {"training picture": judges.training[own.ids[chosen]]}
    notes = {}
    for heading, name in (("plain", "plain"), (guard, guard)):
        columns[heading] = rows[name].drawn.pictures[chosen]
        correlation = rows[name].grades.zncc_own[chosen].tolist()
        notes[heading] = [(f"ZNCC {z:.2f}", z > judges.own_limit) for z in correlation]
    labels = [captions[i] or f"#{i}" for i in chosen.tolist()]
    sheet(labels, columns, notes).save(path)


def save_curves(
    path: Path, judges: Judges, guarded: Row, captions: list[str], seeds: list[int], steps: int
) -> None:
    """The paper's Fig. 3: without and with the guard, the same pictures."""
    batch = len(guarded.drawn.reports[0]["guarded_evaluations"])
    watched = watch(judges.domain, captions[:batch], seeds[:batch], steps)
    plots = [
        curve(_first(report), title=f"{judges.domain.name}: {title}")
        for report, title in ((watched, "plain"), (guarded.drawn.reports[0], guarded.method.name))
    ]
    side_by_side(plots).save(path)


def _first(report: dict, count: int = CURVES) -> dict:
    """A report of the first `count` pictures of a batch alone."""

    def cut(step: dict) -> dict:
        return {k: v[:count] if isinstance(v, list) else v for k, v in step.items()}

    return report | {"steps": [cut(step) for step in report["steps"]]}
