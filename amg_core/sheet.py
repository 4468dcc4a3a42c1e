"""Contact sheets: groups of pictures with lines of text under each, drawn with Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

Colour: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

SIDE, GAP, EDGE = 160, 10, 14  # pixels: side of a picture, between tiles, around the sheet
INK, FAINT, BACK = (32, 33, 38), (118, 120, 128), (250, 250, 250)
GOOD, UNSURE, BAD, ASKED = (30, 130, 60), (190, 110, 0), (196, 30, 30), (40, 90, 200)
MAX_SIDE = 60_000  # pixels; viewers cannot open larger pictures
MAX_ZOOM = 4.0  # the largest enlargement of tiny pictures


@dataclass(frozen=True)
class Tile:
    """One picture, the lines of text under it with the colour of the first, and the colour of its frame."""

    picture: Image.Image
    lines: Sequence[str | tuple[str, Colour]] = ()
    frame: Colour | None = None


@dataclass(frozen=True)
class Group:
    """Tiles that belong together, in reading order, with one line of text above."""

    tiles: Sequence[Tile]
    title: str = ""


def draw(
    groups: Sequence[Group],
    *,
    heading: str = "",
    columns: int = 6,
    side: int = SIDE,
    across: int = 1,
) -> Image.Image:
    """Draw all groups in reading order.

    Pictures are fitted into squares, and tiny ones are enlarged up to four times. Text that is too long is
    cut with an ellipsis. A sheet is at most 60,000 pixels high. Its last line has the number of groups
    that did not fit.

    Parameters
    ----------
    heading : str
        One line at the top.
    columns : int
        Pictures in each row of a group.
    side : int
        Side, in pixels, of the square for a picture. The text grows with it.
    across : int
        Number of groups beside each other.

    Returns
    -------
    RGB image.
    """
    small = _font(max(11, side // 18))
    large = _font(max(11, side // 18) + 2)
    step, title_step = (round(1.35 * _size(font)) for font in (small, large))
    columns = max(1, min(columns, max((len(group.tiles) for group in groups), default=1)))
    across = max(1, min(across, len(groups)))
    wide = max(columns * (side + GAP) - GAP, 3 * side if across == 1 else 0)
    apart = wide + 3 * GAP
    rows = [groups[i : i + across] for i in range(0, len(groups), across)]
    top = EDGE + (2 * title_step if heading else 0)
    ends = [top]
    for row in rows:
        height = max(_height(group, columns, side, step, title_step) for group in row)
        if ends[-1] + height > MAX_SIDE:
            break
        ends.append(ends[-1] + height)
    left_out = sum(map(len, rows[len(ends) - 1 :]))
    width, foot = wide + (across - 1) * apart, title_step if left_out else 0
    image = Image.new("RGB", (width + 2 * EDGE, ends[-1] + EDGE + foot), BACK)
    brush = ImageDraw.Draw(image)
    if heading:
        brush.text((EDGE, EDGE), fit(heading, large, width), fill=INK, font=large)
    if left_out:
        note = fit(f"… and {left_out} more groups", large, width)
        brush.text((EDGE, ends[-1]), note, fill=FAINT, font=large)
    for row, y in zip(rows, ends[:-1], strict=False):
        for place, group in enumerate(row):
            x, under = EDGE + place * apart, y + (title_step if group.title else 0)
            if group.title:
                brush.text((x, y), fit(group.title, large, wide), fill=INK, font=large)
            for n, tile in enumerate(group.tiles):
                right, down = n % columns, n // columns
                at = (x + right * (side + GAP), under + down * _pitch(group, side, step))
                _draw_tile(image, brush, tile, at, side, small, step)
    return image


def fit(text: str, font: Font, width: int) -> str:
    """`text` on one line of at most `width` pixels, cut with an ellipsis if needed."""
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


def _draw_tile(
    image: Image.Image, brush: ImageDraw.ImageDraw, tile: Tile, place: tuple[int, int], side: int,
    font: Font, step: int,
) -> None:  # fmt: skip
    x, y = place
    small = tile.picture.convert("RGB")
    scale = min(side / small.width, side / small.height, MAX_ZOOM)
    size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
    at = (x + (side - size[0]) // 2, y + (side - size[1]) // 2)
    image.paste(small.resize(size, Image.Resampling.LANCZOS), at)
    if tile.frame:
        box = (at[0] - 3, at[1] - 3, at[0] + size[0] + 2, at[1] + size[1] + 2)
        brush.rectangle(box, outline=tile.frame, width=3)
    for n, line in enumerate(tile.lines):
        text, colour = (line, FAINT if n else INK) if isinstance(line, str) else line
        under = (x, y + side + 5 + n * step)
        brush.text(under, fit(text, font, side), fill=colour, font=font)


def _pitch(group: Group, side: int, step: int) -> int:
    lines = max((len(tile.lines) for tile in group.tiles), default=0)
    return side + GAP + 5 + lines * step


def _height(group: Group, columns: int, side: int, step: int, title_step: int) -> int:
    rows = -(-len(group.tiles) // columns)
    return (title_step if group.title else 0) + rows * _pitch(group, side, step) + GAP


# Fonts of Windows, macOS and Linux, those with most letters first. Pillow's own font has only ASCII.
FONTS = ("msyh.ttc", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "arial.ttf")


@cache
def _font(size: int) -> Font:
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    try:
        return ImageFont.load_default(size=size)
    except TypeError:  # Pillow before 10.1
        return ImageFont.load_default()


def _size(font: Font) -> float:
    return font.size if isinstance(font, ImageFont.FreeTypeFont) else 11


def _drawable(text: str, font: Font) -> str:
    """`text`, with "?" for letters that Pillow's old bitmap font lacks. It raises outside Latin-1."""
    if isinstance(font, ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")
