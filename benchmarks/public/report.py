"""Tables in Markdown, and the same with pictures in HTML."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from amg_core.optional import needed
from benchmarks import harness

from .figures import Cell, Row
from .records import Line
from .run import DETECTORS

NOT_MEASURED = "not measured"
SHOWN, SIDE = 24, 160  # prompts on a sheet, and pixels of a picture
DIGITS = {
    "pictures": 0,
    "rows of the denoiser": 0,
    "s/picture": 2,
    "peak GiB": 1,
    "CLIP score": 2,
    "TPR at 1 % FPR": 3,
}

PAGE = """<!doctype html>
<meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 14px sans-serif; margin: 2em; color: #202126; background: #fafafa }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .3em .6em; border: 1px solid #ddd }
td { text-align: right } td:first-child { text-align: left } figure { display: inline-block; margin: 4px }
figcaption { font-size: 12px; max-width: 160px } .copy { color: #c41e1e }
</style>
<h1>{{ title }}</h1>
{% for name, value in settings %}<div>{{ name }}: {{ value }}</div>{% endfor %}
{% for heading, columns, rows in tables %}<h2>{{ heading }}</h2>
<table><tr><th></th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endfor %}
{% for prompt, figures in sheet %}<h3>{{ prompt }}</h3>
{% for name, data, note, copy in figures %}<figure><img src="data:image/jpeg;base64,{{ data }}" alt="">
<figcaption{% if copy %} class="copy"{% endif %}>{{ name }}<br>{{ note }}</figcaption></figure>{% endfor %}
{% endfor %}
"""


def text(heading: str, cell: Cell) -> str:
    """ "12.0 [5.1, 25.3]", or "not measured"."""
    if cell is None:
        return NOT_MEASURED
    form = f"{{:.{DIGITS.get(heading, 1 if '%' in heading else 3)}f}}"
    value, low, high = cell
    shown = form.format(value)
    return shown if low is None else f"{shown} [{form.format(low)}, {form.format(high)}]"


def cells(table: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    """The headings of the columns, and rows that begin with their names."""
    columns = list(next(iter(table.values())))
    return columns, [[name, *(text(c, row[c]) for c in columns)] for name, row in table.items()]


def markdown(tables: Mapping[str, Mapping[str, Row]], notes: Sequence[str] = ()) -> str:
    """All tables, each under its title, and what was not measured."""
    parts = []
    for title, table in tables.items():
        columns, rows = cells(table)
        parts.append(f"### {title}\n\n{harness.markdown(['', *columns], rows)}")
    parts += ["95 % intervals by bootstrap over prompts; shares of 0 and 100 % by Wilson.\n"]
    if notes:
        parts.append("Not measured:\n" + "".join(f"- {note}\n" for note in notes))
    return "\n".join(parts)


def page(
    out: Path, title: str, tables: Mapping[str, Mapping[str, Row]], settings: Mapping[str, object],
    lines: Sequence[Line],
) -> str:  # fmt: skip
    """A page with all tables and the first pictures of memorised prompts, which needs no other file."""
    template = needed("jinja2", "The page", "pip install jinja2").Environment(autoescape=True)
    return str(
        template.from_string(PAGE).render(
            title=title,
            settings=[(name, value) for name, value in settings.items() if name != "prompts"],
            tables=[(name, *cells(table)) for name, table in tables.items()],
            sheet=_sheet(out, lines),
        )
    )


def _sheet(out: Path, lines: Sequence[Line]) -> list[tuple[str, list[tuple[str, str, str, bool]]]]:
    """Of the first prompts the first picture by each method."""
    first: dict[tuple[str, int], dict[str, Line]] = {}
    for line in sorted(
        lines, key=lambda line: (line["list"] != "memorised", line["number"], line["seed"])
    ):
        if line["method"] != DETECTORS:
            first.setdefault((line["list"], line["number"]), {}).setdefault(line["method"], line)
    return [
        (
            next(iter(each.values()))["prompt"],
            [(name, _jpeg(out / line["file"]), _note(line), line["outcome"] == "copy")
             for name, line in each.items()],
        )
        for each in list(first.values())[:SHOWN]
    ]  # fmt: skip


def _note(line: Line) -> str:
    found = [
        f"{name} {one['own']:.2f}" for name, one in line["sscd"].items() if one["own"] is not None
    ]
    return ", ".join([f"likeness {line['score']:.2f}", *found])


def _jpeg(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = BytesIO()
    small.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
