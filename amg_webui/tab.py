"""The tab AMG Index: builds an index from a folder, and finds a picture in one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from amg_core.descriptors.registry import DEFAULT, described, for_new, guarding
from amg_core.errors import AMGError
from amg_core.limits import COPY

from . import lookup

SHOWN = 5  # number of pictures that a search shows
stopping = threading.Event()  # set by the button Stop, in another thread than the build


def build(folder: str, name: str, descriptor: str, tell: Callable[[float, str], None]) -> str:
    """Make the index `name` from the pictures in `folder`, and report progress by `tell(share, words)`.

    Returns the result as a sentence. A build that was stopped can be continued.
    """
    from amg_core import index

    def progress(done: int, total: int, source: str) -> None:
        if stopping.is_set():
            raise AMGError(
                "Stopped. Finished pictures are kept: press Build again to continue from there."
            )
        tell(done / total if total else 0.0, f"{done} of {total or '?'}: {source}")

    stopping.clear()
    try:
        given = folder.strip().strip('"')
        if not given:
            raise AMGError(
                "Folder of pictures: it is empty. Give a folder, a .zip, a .tar or a list."
            )
        target = lookup.index_folder(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = for_new(descriptor, lookup.weights)
        index.build(Path(given).expanduser(), target, made, progress=progress)
        with index.Index.open(target) as opened:
            return (
                f"Index {target.name}: {opened.count} pictures, in {target}. To choose it in txt2img and "
                f"img2img, press the arrows beside Index there."
            )
    except AMGError as error:
        return str(error)


def find(picture, name: str) -> tuple[str, list[tuple]]:
    """A Pillow picture -> the verdict in words, and (thumbnail, caption) of the nearest of index `name`."""
    from amg_core.messages import message
    from amg_core.similarity.verdict import verdict

    from .shared import as_tensor, said

    if picture is None:
        return "There is no picture yet. Give one above.", []
    try:
        matcher = lookup.open_matcher(name)
        pixels = as_tensor(picture)
        (found,) = verdict(matcher, pixels)
        index = matcher.index
        rows = dict.fromkeys([found.neighbor, *matcher.candidates(matcher.finished(pixels), SHOWN)])
        shown = [(index.thumbnail(i), index.caption(i) or index.source(i)) for i in rows]
    except AMGError as error:
        return str(error), []
    close = message("closest", score=found.likeness, limit=COPY)
    return said([found.message(), close]), shown[:SHOWN]


def create(gr) -> list[tuple]:
    """The return value of the host's `on_ui_tabs`."""
    from modules.ui_common import create_refresh_button

    names = lookup.index_names()
    with gr.Blocks(analytics_enabled=False) as page:
        with gr.Tab("Build"):
            folder = gr.Textbox(
                label="Folder of pictures",
                info="The pictures to stay away from: a folder, a .zip, a .tar or a list. Captions come "
                "from .txt files beside the pictures, metadata.jsonl or .csv.",
            )
            name = gr.Textbox(
                label="Name",
                info="Name of the index. It becomes a folder of that name in models/amg_indexes.",
            )
            eyes = guarding()
            choices = [kind.name for kind in eyes]
            descriptor = gr.Dropdown(
                choices, value=DEFAULT, label="Descriptor", info=described(eyes)
            )
            with gr.Row():
                start, stop = gr.Button("Build", variant="primary"), gr.Button("Stop")
            said = gr.Textbox(label="Result")
        with gr.Tab("Search"):
            picture = gr.Image(type="pil", label="Picture", height=320)
            with gr.Row():
                index = gr.Dropdown(names, value=names[0], label="Index")
                create_refresh_button(
                    index, lambda: None, lambda: {"choices": lookup.index_names()}, "amg_refresh"
                )
            look, words = gr.Button("Search", variant="primary"), gr.Textbox(label="Verdict")
            gallery = gr.Gallery(label="Nearest pictures", columns=SHOWN)

        def run(folder, name, descriptor, progress=gr.Progress()):  # noqa: B008 - how gradio asks
            summary = build(folder, name, descriptor, lambda share, at: progress(share, desc=at))
            return summary, gr.update(choices=lookup.index_names())

        start.click(fn=run, inputs=[folder, name, descriptor], outputs=[said, index])
        stop.click(fn=stopping.set, inputs=[], outputs=[])
        look.click(fn=find, inputs=[picture, index], outputs=[words, gallery])
    return [(page, "AMG Index", "amg_index")]
