"""Contact sheet of the demo: training picture | plain | guarded, a row a prompt."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from amg_core import sheet as contact


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB."""
    return Image.fromarray((picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy(), "RGB")


def sheet(
    prompts: list[str], columns: dict[str, Tensor], notes: dict[str, list[tuple[str, bool]]]
) -> Image.Image:
    """Two prompts beside each other, each with its pictures.

    prompts : titles; columns : heading -> pictures (B, 3, H, W); notes : heading -> (text, is it a
    copy) a picture, printed beneath it in red or green.
    """

    def tile(i: int, heading: str) -> contact.Tile:
        lines: list[str | tuple[str, contact.Colour]] = [heading]
        if heading in notes:
            text, copy = notes[heading][i]
            lines.append((text, contact.BAD if copy else contact.GOOD))
        return contact.Tile(to_image(columns[heading][i]), lines)

    groups = [
        contact.Group([tile(i, heading) for heading in columns], prompt)
        for i, prompt in enumerate(prompts)
    ]
    return contact.draw(groups, columns=len(columns), side=128, across=2)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one height next to each other."""
    out = np.concatenate([np.asarray(image) for image in images], axis=1)
    return Image.fromarray(out)
