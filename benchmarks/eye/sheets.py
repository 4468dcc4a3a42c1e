"""Contact sheets: what was missed, and what was taken for something else."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

from .pictures import Library

SIDE, GAP, LINE, ACROSS = 150, 6, 14, 3


def miss_sheet(library: Library, answers: list, shown: Callable, limit: float) -> Image.Image:
    """For each answer: the query, its source, and what was named instead."""
    groups = []
    for a in answers:
        images = [shown(a), library.rows[a.source].load()]
        if a.named in library.families[a.source]:
            note = f"its own, at {a.similarity:.3f}: too low"
        else:
            images.append(library.rows[a.named].load())
            note = f"named at {a.similarity:.3f} {library.rows[a.named].path.stem}"
        groups.append((images, [a.edit, note]))
    return _sheet(groups, 3, f"Misses: query, source, named instead. Threshold {limit:.3f}")


def false_alarm_sheet(
    library: Library, answers: list, shown: Callable, limit: float
) -> Image.Image:
    """For each answer: the query, and the row that is nearest where its source is not indexed."""
    groups = []
    for a in answers:
        named = library.rows[a.unrelated_named]
        notes = [a.edit, f"{a.unrelated:.3f} {named.path.stem}"]
        groups.append(([shown(a), named.load()], notes))
    return _sheet(groups, 2, f"False alarms: query, row that was named. Threshold {limit:.3f}")


def _sheet(groups: list, columns: int, title: str) -> Image.Image:
    wide, high = columns * (SIDE + GAP) + 2 * GAP, SIDE + 2 * LINE + 2 * GAP
    rows = -(-len(groups) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * wide, rows * high + 2 * LINE), (110, 110, 110))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "white")
    for number, (images, notes) in enumerate(groups):
        x, y = number % ACROSS * wide + GAP, number // ACROSS * high + 2 * LINE
        for column, image in enumerate(images):
            small = image.copy()
            small.thumbnail((SIDE, SIDE))
            sheet.paste(small, (x + column * (SIDE + GAP), y))
        for line, note in enumerate(notes):
            text = note[: wide // 7].encode("latin-1", "replace").decode("latin-1")
            draw.text((x, y + SIDE + line * LINE), text, "white")
    return sheet
