"""Contact sheets: pictures in a grid with a few lines of text under each. Drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, EDGE = 160, 10, 14  # pixels: side of a picture, between cells, around the sheet
INK, FAINT, BACK = (32, 33, 38), (118, 120, 128), (250, 250, 250)
MARK = {"": None, "keep": (30, 130, 60), "drop": (196, 30, 30), "query": (40, 90, 200)}
MAX_SIDE = 60_000  # pixels; more than that no viewer opens


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet: the lines of text under it, and its frame (a key of `MARK`)."""

    picture: Image.Image
    lines: Sequence[str] = ()
    mark: str = ""


def draw(
    query: Image.Image | None,
    rows: Sequence[tuple[Image.Image, Sequence[str]]],
    *,
    heading: str = "",
    query_lines: Sequence[str] = ("query",),
    columns: int = 6,
    cell: int = CELL,
) -> Image.Image:
    """The query picture, then what was found for it, in reading order.

    Parameters
    ----------
    query : Image or None
        Drawn first, with a blue frame.
    rows : sequence of (Image, lines of text)
        Nearest first. Text that is too long is cut with an ellipsis.
    heading : str
        One line on top.
    columns, cell : int
        Pictures a line, and the side in pixels that a picture is fitted into.

    Returns
    -------
    RGB image.
    """
    cells = [Cell(picture, lines) for picture, lines in rows]
    if query is not None:
        cells.insert(0, Cell(query, query_lines, "query"))
    return groups([("", cells)], heading=heading, columns=columns, cell=cell)


def groups(
    parts: Sequence[tuple[str, Sequence[Cell]]],
    *,
    heading: str = "",
    columns: int = 6,
    cell: int = CELL,
) -> Image.Image:
    """Several titled groups of pictures below each other, `columns` pictures a line.

    A sheet ends at 60,000 pixels of height: the groups that no longer fit are counted at its foot.
    """
    font, small = _font(13), _font(11)
    step = small.getbbox("Ág")[3] + 3
    widest = max((len(cells) for _, cells in parts), default=1)
    columns = max(1, min(columns, widest))
    width = max(2 * EDGE + columns * (cell + GAP) - GAP, 3 * cell)
    heights = [_height(title, cells, columns, cell, step) for title, cells in parts]
    top = EDGE + (28 if heading else 0)
    shown, bottom = 0, top
    while shown < len(parts) and bottom + heights[shown] < MAX_SIDE:
        bottom += heights[shown]
        shown += 1
    left_out = len(parts) - shown
    image = Image.new("RGB", (width, bottom + EDGE + (24 if left_out else 0)), BACK)
    brush = ImageDraw.Draw(image)
    if heading:
        brush.text((EDGE, EDGE), fit(heading, font, width - 2 * EDGE), fill=INK, font=font)
    for (title, cells), height in zip(parts[:shown], heights, strict=False):
        y = top
        if title:
            brush.text((EDGE, y), fit(title, font, width - 2 * EDGE), fill=INK, font=font)
            y += 22
        lines = _lines(cells)
        for place, one in enumerate(cells):
            x = EDGE + place % columns * (cell + GAP)
            _cell(image, brush, one, x, y + place // columns * _pitch(lines, cell, step), cell,
                  small, step)  # fmt: skip
        top += height
    if left_out:
        brush.text((EDGE, bottom), f"… and {left_out} more groups", fill=FAINT, font=font)
    return image


def fit(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """`text` on one line, cut with an ellipsis so that it is at most `width` pixels wide."""
    text = _drawable(" ".join(text.split())[:400], font)
    dots = _drawable("…", font)
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle] + dots) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + dots


def _cell(image, brush, one: Cell, x: int, y: int, cell: int, font, step: int) -> None:
    small = one.picture.convert("RGB")
    scale = min(cell / small.width, cell / small.height, 4.0)  # tiny pictures are enlarged 4 times
    size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
    small = small.resize(size, Image.Resampling.LANCZOS)
    at = (x + (cell - small.width) // 2, y + (cell - small.height) // 2)
    image.paste(small, at)
    colour = MARK[one.mark]
    if colour:
        box = (at[0] - 3, at[1] - 3, at[0] + small.width + 2, at[1] + small.height + 2)
        brush.rectangle(box, outline=colour, width=3)
    for n, line in enumerate(one.lines):
        text = fit(line, font, cell)
        brush.text((x, y + cell + 5 + n * step), text, fill=FAINT if n else INK, font=font)


def _lines(cells: Sequence[Cell]) -> int:
    return max((len(one.lines) for one in cells), default=0)


def _pitch(lines: int, cell: int, step: int) -> int:
    return cell + GAP + 5 + lines * step


def _height(title: str, cells: Sequence[Cell], columns: int, cell: int, step: int) -> int:
    rows = -(-len(cells) // columns)
    return (22 if title else 0) + rows * _pitch(_lines(cells), cell, step) + GAP


# Pillow's own font knows ASCII only. Windows, macOS, Linux; those with most letters first.
FONTS = ("msyh.ttc", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "arial.ttf")


@cache
def _font(size: int):
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    try:
        return ImageFont.load_default(size=size)
    except TypeError:  # Pillow before 10.1
        return ImageFont.load_default()


def _drawable(text: str, font) -> str:
    """Pillow's old bitmap font knows Latin-1 only, and raises for the rest."""
    if isinstance(font, ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")
