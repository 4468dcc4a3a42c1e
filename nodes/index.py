"""Load Memorization Index, Build Memorization Index."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..amg_core import descriptors
from ..amg_core.errors import AMGError
from . import paths, show
from .types import CATEGORY, MemorizationIndex

SHOWN = 5  # skipped pictures named in a summary


def open_probe(folder: Path):
    """A `Probe` (without decoder) on the index in `folder`.

    Raises
    ------
    AMGError
        No index, a damaged one, or the weights of its descriptor are absent or others.
    """
    from ..amg_core.index import Index
    from ..amg_core.index.search import Searcher
    from ..amg_core.probe import Probe

    index = Index.open(folder)
    descriptor = make_descriptor(index.spec.id)
    index.check_descriptor(descriptor.spec)
    return Probe(Searcher(index), descriptor)


def make_descriptor(name: str):
    """The descriptor called `name` or with that id ("sscd_disc_mixup"), weights from models/amg."""
    kind = name.split("_")[0]
    return descriptors.create(kind, paths.sscd_weights() if kind == "sscd" else None)


class LoadIndexNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_LoadIndex",
            display_name="Load Memorization Index",
            category=CATEGORY,
            description="Opens an index: the pictures that a generation must not copy.",
            inputs=[
                io.Combo.Input(
                    "index_name",
                    options=paths.index_names(),
                    tooltip="Which index to open, from models/amg_indexes. Every file in it is "
                    "checked first: about a second a gigabyte. Press R after building a new one.",
                ),
            ],
            outputs=[
                MemorizationIndex.Output(
                    "index",
                    display_name="index",
                    tooltip="Connect to AMG Sampler, Apply AMG or Similarity Probe. Guards only "
                    "against pictures in this index.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, index_name: str | None) -> str:
        if index_name is None:  # comes over a wire
            return "linked"
        try:
            state = os.stat(paths.find_index(index_name) / paths.MANIFEST)
        except (AMGError, OSError):
            return "none"
        return f"{state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, index_name: str) -> io.NodeOutput:
        return io.NodeOutput(open_probe(paths.find_index(index_name)))


class BuildIndexNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_BuildIndex",
            display_name="Build Memorization Index",
            category=CATEGORY,
            description="Makes an index of a folder of pictures, for instance the training set "
            "of a LoRA. An interrupted build leaves the old index as it was.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder of the pictures to stay away from, with its subfolders: an "
                    "absolute path, or one below ComfyUI's input folder. Captions are read from "
                    ".txt files beside the pictures or from metadata.jsonl or .csv.",
                ),
                io.String.Input(
                    "name",
                    default="my-index",
                    tooltip="Name of the index, a folder in models/amg_indexes. An index of the "
                    "same name is replaced.",
                ),
                io.Combo.Input(
                    "descriptor",
                    options=list(descriptors.IDS),
                    default=descriptors.IDS[0],
                    tooltip="How pictures are compared. pixel: layout and colour, needs no "
                    "download, thousands of pictures a minute. sscd: recognises copied objects "
                    "too, needs Meta's weights in models/amg, a few pictures a second on a CPU.",
                ),
            ],
            outputs=[
                MemorizationIndex.Output(
                    "index",
                    display_name="index",
                    tooltip="The new index, ready for AMG Sampler, Apply AMG or Similarity Probe.",
                ),
                io.String.Output(
                    "summary",
                    display_name="summary",
                    tooltip="How many pictures it holds, and which were skipped and are NOT "
                    "guarded.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None, name: str | None, descriptor: str | None
    ) -> str:
        """Changes when files are added to or removed from a folder that is typed in.

        The host gives None for what comes over a wire.
        """
        if folder is None:
            return "linked"
        try:
            top = paths.picture_folder(folder)
            times = [os.stat(top).st_mtime_ns]
            times += [os.stat(place).st_mtime_ns for place, _, _ in os.walk(top)]
        except (AMGError, OSError):
            return "none"
        return f"{max(times)} {len(times)}"

    @classmethod
    def execute(cls, folder: str, name: str, descriptor: str) -> io.NodeOutput:
        from ..amg_core.index import build

        source, target = paths.picture_folder(folder), paths.new_index(name)
        tell = show.text_on(cls.hidden.unique_id)
        bar: list[comfy.utils.ProgressBar] = []

        def progress(done: int, total: int, _picture: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if not bar:
                bar.append(comfy.utils.ProgressBar(total))
            bar[0].update_absolute(done)

        device = comfy.model_management.get_torch_device()
        embedder = make_descriptor(descriptor)
        report = build(source, target, embedder, progress=progress, device=device)
        text = summary(report)
        tell(text)
        return io.NodeOutput(open_probe(target), text)


def summary(report) -> str:
    """A `BuildReport` in a few lines."""
    lines = [f"{report.count} pictures in {report.path} ({report.seconds:.1f} s)."]
    if report.skipped:
        lines.append(f"{len(report.skipped)} skipped, these are NOT guarded:")
        lines += [f"  {source}: {reason}" for source, reason in report.skipped[:SHOWN]]
        if len(report.skipped) > SHOWN:
            lines.append("  …")
    return "\n".join(lines + list(report.notes))
