"""The paper's Fig. 3: likeness and threshold at each step, drawn with Pillow only."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

INK, GRID, THRESHOLD, BACK = (40, 40, 46), (225, 225, 230), (200, 40, 40), (255, 255, 255)
LINES = [(31, 119, 180), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207)]


def curve(
    report: dict[str, Any], size: tuple[int, int] = (640, 360), title: str = ""
) -> Image.Image:
    """Plot the likeness of each picture of the batch, from 0 to 1. Returns an RGB image of `size`.

    The threshold is red, and a dot is a step at which the guard acted. `report` is that of
    `SamplingRun.report`.
    """
    steps = report["steps"]
    width, height = size
    left, right, top, bottom = 56, width - 14, 30, height - 34
    image = Image.new("RGB", size, BACK)
    draw = ImageDraw.Draw(image)
    draw.text((left, 8), title or f"likeness to {report['index']['name']}", fill=INK)
    if not steps:
        draw.text((left, height // 2), "the guard compared nothing", fill=INK)
        return image

    def point(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step / max(1, len(steps) - 1))
        return x, bottom - (bottom - top) * min(1.0, max(0.0, value))

    for tick in range(5):
        value = tick / 4
        y = point(0, value)[1]
        draw.line((left, y, right, y), fill=GRID)
        draw.text((8, y - 6), f"{value:.2f}", fill=INK)
    draw.text((left, bottom + 10), "first step", fill=INK)
    draw.text((right - 52, bottom + 10), "last step", fill=INK)
    for sample in range(len(steps[0]["score"])):
        colour = LINES[sample % len(LINES)]
        line = [point(i, s["score"][sample]) for i, s in enumerate(steps)]
        draw.line(line, fill=colour, width=2)
        for (x, y), s in zip(line, steps, strict=True):
            if s["active"][sample]:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    draw.line(
        [point(i, s["score_threshold"]) for i, s in enumerate(steps)], fill=THRESHOLD, width=2
    )
    return image
