"""What the artist sees: live text on a node, pictures as IMAGE."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Front end 1.27 draws such a text as HTML, newer ones make links of [[label|address]]. Names and
# captions are whatever somebody called a picture, so what opens markup gets its look-alike: an entity
# would be read as &lt; where the text is shown as it is.
_PLAIN = str.maketrans("<>", "‹›")
MARK = "\u2063"  # no width, and never typed: it ends every live text


def text_on(node_id: str | None) -> Callable[[str], None]:
    """A function that shows a text, never markup, on that node in the browser.

    Nothing without a server.
    """

    def show(text: str) -> None:
        module = sys.modules.get("server")  # never imported here: it is heavy, and tests do without
        server = getattr(getattr(module, "PromptServer", None), "instance", None)
        if server is not None and node_id is not None:
            plain = re.sub(r"\[(?=\[)", "[ ", text.translate(_PLAIN))
            server.send_progress_text(plain + MARK, node_id)

    return show


def is_live(text) -> bool:
    """Whether a widget's value is a live text of ours, which some front ends save among widgets.

    Workflows that were saved before there was a mark hold texts without it: all of these had a
    " · ", or ended in "…".
    """
    return isinstance(text, str) and (text.endswith((MARK, "…")) or " · " in text)


def with_pictures(hidden, key: str, value: dict) -> None:
    """Let every picture that this prompt saves later carry `value` in its metadata.

    Under `key`, by the id of the node. Nothing where the prompt came without metadata, as prompts
    sent by programs do: the host then passes no dictionary on.
    """
    if hidden.extra_pnginfo is not None and hidden.unique_id is not None:
        hidden.extra_pnginfo[key] = hidden.extra_pnginfo.get(key, {}) | {hidden.unique_id: value}


def preview(pictures: Tensor, side: int) -> list[dict]:
    """Save pictures (B, H, W, 3) in [0, 1] for the page, their longer side at most `side` pixels.

    Where the host's own previews go, the temp folder that it empties: one {"filename", "subfolder",
    "type"} a picture, as its route /view wants it.
    """
    from comfy_api.latest import ui

    if max(pictures.shape[1:3]) > side:
        share = side / max(pictures.shape[1:3])
        small = torch.nn.functional.interpolate(
            pictures.movedim(-1, 1), scale_factor=share, mode="area"
        )
        pictures = small.movedim(1, -1)
    return ui.PreviewImage(pictures).as_dict()["images"]


def image(picture) -> Tensor:
    """PIL picture -> IMAGE (1, H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32))[None] / 255


def images(pictures: list) -> Tensor:
    """PIL pictures of any sizes -> IMAGE (B, H, W, 3), each fitted into the largest, on black."""
    from PIL import Image, ImageOps

    width = max(p.width for p in pictures)
    height = max(p.height for p in pictures)
    fitted = [ImageOps.pad(p.convert("RGB"), (width, height), Image.LANCZOS) for p in pictures]
    return torch.cat([image(p) for p in fitted])
