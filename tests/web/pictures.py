"""Pictures of the page that somebody has looked at, and how a new one is compared with them.

The picture of a node on its help page is the reference for that node; references/ has a few views more.

    python -m tests.web.pictures            draw all; write those that are missing or look different
    python -m tests.web.pictures AMG_Guard  only those whose name has this in it

Look at what it wrote before you commit it. It needs what tests/web needs, and this version of the front
end, since each has a look of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

FRONT_END = "1.58.1"
ACCEPT = "AMG_PICTURES"  # the environment variable by which the test writes what looks different

# What still counts as the same picture. Measured: two runs at most 2; other fonts and glyph settings of
# the machine at most 3, and up to 66 if studio.py did not see to them. Breakages: a threshold line in
# another colour 50, a lost threshold 66, a slider's smallest step 83, a lost line 108. A digit that
# changed stays below, 1 to 17.
LEVEL, SHIFT, WINDOW_SIDE, LIMIT = 16, 2, 16, 24


def difference(one: Image.Image, other: Image.Image) -> tuple[int, tuple[int, int]]:
    """How much two pictures differ where they differ most, and where that is.

    The number of pixels of one 16 x 16 window that stand out, in any colour, by more than LEVEL of 255
    from all that the other picture has within SHIFT pixels; both lightly blurred. So edges and glyphs may
    lie a pixel elsewhere, but no line, word or colour may be another. Above LIMIT it is a different
    picture. 256 where the sizes differ by more than 3 pixels.
    """
    if max(abs(a - b) for a, b in zip(one.size, other.size, strict=True)) > 3:
        return WINDOW_SIDE**2, (0, 0)
    size = tuple(map(min, one.size, other.size))
    soft = [each.crop((0, 0, *size)).filter(ImageFilter.GaussianBlur(1)) for each in (one, other)]
    both = ImageChops.lighter(_outside(*soft), _outside(*soft[::-1]))
    marked = (np.asarray(both).max(2) > LEVEL).astype(np.int32)
    total = np.pad(marked.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    w = WINDOW_SIDE
    count = total[w:, w:] - total[:-w, w:] - total[w:, :-w] + total[:-w, :-w]
    y, x = np.unravel_index(count.argmax(), count.shape)
    return int(count[y, x]), (int(x), int(y))


def _outside(one: Image.Image, other: Image.Image) -> Image.Image:
    """How far each value of `one` lies outside those of `other` around it."""
    low = other.filter(ImageFilter.MinFilter(2 * SHIFT + 1))
    high = other.filter(ImageFilter.MaxFilter(2 * SHIFT + 1))
    return ImageChops.lighter(ImageChops.subtract(one, high), ImageChops.subtract(low, one))


def side_by_side(one: Image.Image, other: Image.Image, at: tuple[int, int]) -> Image.Image:
    """Both, with a frame around the window at `at`."""
    made = Image.new("RGB", (one.width + other.width + 8, max(one.height, other.height)), "magenta")
    for picture, x in ((one, 0), (other, one.width + 8)):
        made.paste(picture, (x, 0))
        box = (at[0] + x - 2, at[1] - 2, at[0] + x + WINDOW_SIDE + 1, at[1] + WINDOW_SIDE + 1)
        ImageDraw.Draw(made).rectangle(box, outline="magenta", width=2)
    return made


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "WEBP", lossless=True, quality=100, method=6)


def main(names: list[str]) -> int:
    import pytest

    os.environ[ACCEPT] = "1"
    chosen = ["-k", " or ".join(names)] if names else []
    test = Path(__file__).with_name("test_pictures.py")
    return pytest.main([f"{test}::test_it_looks_as_it_did", "-q", "-rs", *chosen])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
