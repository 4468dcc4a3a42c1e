"""Output for the artist: live text on a node, pictures as IMAGE."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Front end 1.27 shows such a text as HTML, and newer ones turn [[label|address]] into links. Names and
# captions can be any text, so characters that open markup are replaced by similar ones. An entity would
# show as &lt; in front ends that do not use HTML.
_PLAIN = str.maketrans("<>", "‹›")
MARK = "\u2063"  # invisible and never typed: the end mark of every live text


def server():
    """The host's server, or None. It is not imported, because it is large and tests run without it."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def text_on(node_id: str | None) -> Callable[[str], None]:
    """A function that shows a text, never as markup, on that node in the browser.

    It does nothing if there is no server.
    """

    def show(text: str) -> None:
        host = server()
        if host is not None and node_id is not None:
            plain = re.sub(r"\[(?=\[)", "[ ", text.translate(_PLAIN))
            host.send_progress_text(plain + MARK, node_id)

    return show


def is_live(text) -> bool:
    """Whether a widget's value is a live text, which some front ends save among the widgets.

    Older workflows have live texts without the mark. All of these contain " · " or end in "…".
    """
    return isinstance(text, str) and (text.endswith((MARK, "…")) or " · " in text)


def with_pictures(hidden, key: str, value: dict) -> None:
    """Write `value` into the metadata of every picture that this prompt saves later.

    It is stored under `key`, by the id of the node. Prompts from programs often come without metadata. Then
    the host passes no dictionary, and nothing is written.
    """
    if hidden.extra_pnginfo is not None and hidden.unique_id is not None:
        hidden.extra_pnginfo[key] = hidden.extra_pnginfo.get(key, {}) | {hidden.unique_id: value}


def preview(pictures: Tensor, side: int) -> list[dict]:
    """Save pictures (B, H, W, 3) in [0, 1] for the page, with a longer side of at most `side` pixels.

    They go to the host's temp folder, as its own previews. Returns {"filename", "subfolder", "type"} for
    each picture, as the host's route /view takes it.
    """
    from comfy_api.latest import ui

    if max(pictures.shape[1:3]) > side:
        share = side / max(pictures.shape[1:3])
        small = torch.nn.functional.interpolate(
            pictures.movedim(-1, 1), scale_factor=share, mode="area"
        )
        pictures = small.movedim(1, -1)
    return ui.PreviewImage(pictures).as_dict()["images"]


def text_file(text: str) -> dict:
    """Save a text in the host's temp folder, as `preview` does with pictures.

    A front end in App mode shows only results that are files. The name is made of the text, so that the
    same text is one file.
    """
    import folder_paths

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"amg_verdict_{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    (folder / name).write_text(text, encoding="utf-8")
    return {"filename": name, "subfolder": "", "type": "temp"}


def image(picture) -> Tensor:
    """PIL picture -> IMAGE (1, H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32))[None] / 255


def images(pictures: list) -> Tensor:
    """PIL pictures of any sizes -> IMAGE (B, H, W, 3), each fitted into the largest size, on black."""
    from PIL import Image, ImageOps

    width = max(p.width for p in pictures)
    height = max(p.height for p in pictures)
    fitted = [ImageOps.pad(p.convert("RGB"), (width, height), Image.LANCZOS) for p in pictures]
    return torch.cat([image(p) for p in fitted])
