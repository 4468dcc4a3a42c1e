"""Contact sheet of the demo: training picture | plain | guarded, a row a prompt."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

CELL, GAP, LABEL = 128, 4, 30
INK, BACK, BAD, GOOD = (30, 30, 34), (250, 250, 250), (196, 30, 30), (30, 130, 60)


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB."""
    return Image.fromarray((picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy(), "RGB")


def sheet(
    prompts: list[str], columns: dict[str, Tensor], notes: dict[str, list[tuple[str, bool]]]
) -> Image.Image:
    """Draw two blocks of rows side by side.

    prompts : one a row; columns : heading -> pictures (B, 3, H, W); notes : heading -> (text, is it a
    copy) a picture, printed beneath it in red or green.
    """
    block = len(columns) * (CELL + GAP) + 3 * GAP
    rows = -(-len(prompts) // 2)
    image = Image.new("RGB", (2 * block, 22 + rows * (CELL + LABEL + GAP)), BACK)
    draw = ImageDraw.Draw(image)
    for i, prompt in enumerate(prompts):
        left, top = (i % 2) * block + GAP, 22 + (i // 2) * (CELL + LABEL + GAP)
        draw.text((left, top + CELL + 15), prompt, fill=INK)
        for j, (heading, pictures) in enumerate(columns.items()):
            x = left + j * (CELL + GAP)
            if i < 2:
                draw.text((x, 6), heading, fill=INK)
            image.paste(to_image(pictures[i]).resize((CELL, CELL)), (x, top))
            if heading in notes:
                text, copy = notes[heading][i]
                draw.text((x, top + CELL + 2), text, fill=BAD if copy else GOOD)
    return image


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one height next to each other."""
    out = np.concatenate([np.asarray(image) for image in images], axis=1)
    return Image.fromarray(out)
