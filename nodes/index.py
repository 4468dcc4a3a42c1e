"""Load Memorization Index, Build Memorization Index, Index from Images."""

from __future__ import annotations

import os
import time

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..amg_core.descriptors.registry import described, guarding, named
from ..amg_core.errors import AMGError
from ..amg_core.messages import Message, message
from . import latents, live, paths, show
from .opening import CHOICES, descriptor_of, make_descriptor, open_matcher
from .types import INDEX, MemorizationIndex, place

SHOWN = 5  # skipped pictures named in a summary
MODES = ["replace", "add"]


def descriptor_input() -> io.Input:
    return io.Combo.Input(
        "descriptor",
        options=CHOICES,
        default=CHOICES[0],
        tooltip=f"How pictures are compared. {described(guarding(latents=True))}",
    )


def index_output(tooltip: str, id: str = "index") -> io.Output:
    """The output for an index. `id` must differ from "index" if an input has that name."""
    return MemorizationIndex.Output(id, display_name="index", tooltip=tooltip)


def summary_output(tooltip: str) -> io.Output:
    return io.String.Output("summary", display_name="summary", tooltip=tooltip)


class LoadIndexNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_LoadIndex",
            display_name="AMG Load Memorization Index",
            **place(INDEX),
            description="Opens a saved index: the pictures that your drawings must not copy.",
            inputs=[
                io.Combo.Input(
                    "index_name",
                    options=paths.index_names(),
                    tooltip="The index to open, from models/amg_indexes. New or changed files in "
                    "it are checked first, once: about a second for each gigabyte. Press R after "
                    "you build a new index.",
                ),
            ],
            outputs=[
                index_output(
                    "Connect it to AMG Sampler, Apply AMG or Similarity Probe. The guard "
                    "protects only from the pictures in this index."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, index_name: str | None) -> str:
        if index_name is None:  # the value comes over a wire
            return "linked"
        try:
            state = os.stat(paths.find_index(index_name) / paths.MANIFEST)
        except (AMGError, OSError):
            return "none"
        return f"{state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, index_name: str) -> io.NodeOutput:
        return io.NodeOutput(open_matcher(paths.find_index(index_name)))


class BuildIndexNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_BuildIndex",
            display_name="AMG Build Memorization Index",
            **place(INDEX),
            description="Makes an index of the pictures to stay away from, out of a folder (such "
            "as the training set of a LoRA), an archive or a list. Building it again costs only "
            "the new pictures. If you stop a build, the old index stays as it is and the next "
            "run continues.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="The pictures to stay away from: a folder with its subfolders, a single "
                    "picture, a .zip or .tar, or a list (.csv, .jsonl, .parquet). Give an absolute "
                    "path, or one below ComfyUI's input folder. Captions come from .txt files "
                    "beside the pictures, metadata.jsonl or .csv.",
                ),
                io.String.Input(
                    "name",
                    default="my-index",
                    tooltip="Name of the index, a folder in models/amg_indexes. An index of the "
                    "same name is updated: it will hold exactly these pictures.",
                ),
                descriptor_input(),
                *latents.inputs(),
            ],
            outputs=[
                index_output(
                    "The new index. Connect it to AMG Sampler, Apply AMG or Similarity Probe."
                ),
                summary_output(
                    "How many pictures the index holds, how many are new, and which were "
                    "skipped. Skipped pictures are NOT guarded."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None, name: str | None, descriptor: str | None, vae=None, model=None
    ) -> str:
        """Changes when files are added to or removed from a folder, or when an archive or list changes.

        The host passes None for values that come over a wire.
        """
        if folder is None:
            return "linked"
        try:
            top = paths.picture_folder(folder)
            state = os.stat(top)
            times = [state.st_mtime_ns]
            times += [os.stat(place).st_mtime_ns for place, _, _ in os.walk(top)]
        except (AMGError, OSError):
            return "none"
        size = "" if top.is_dir() else f" {state.st_size}"
        return f"{max(times)} {len(times)}{size}"

    @classmethod
    def execute(
        cls, folder: str, name: str, descriptor: str, vae=None, model=None
    ) -> io.NodeOutput:
        from ..amg_core.index import build

        source, target = paths.picture_folder(folder), paths.new_index(name)
        made = make_descriptor(descriptor, vae, model)
        return _embed(build, source, target, made, cls)


class IndexFromImagesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_IndexFromImages",
            display_name="AMG Index from Images",
            **place(INDEX),
            description="Makes an index of pictures that are already in the workflow, or adds "
            "them to an index. Use it for pictures from Load Image, or for what you have just "
            "drawn and do not want to see again.",
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures to stay away from: a batch, or a list of any length. "
                    "In a list the sizes may differ.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What the pictures show, for deduplication. One line is for all "
                    "pictures. Several lines are one for each picture, and an empty line means "
                    "no caption. A list of texts is one for each picture. May stay empty.",
                ),
                io.String.Input(
                    "name",
                    default="my-index",
                    tooltip="Name of the index, a folder in models/amg_indexes.",
                ),
                descriptor_input(),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default=MODES[0],
                    tooltip="replace: the index will hold exactly these pictures. add: it keeps "
                    "what it has, and a picture that it has already is not added twice. Both "
                    "make the index if there is none.",
                ),
                *latents.inputs(),
            ],
            outputs=[
                index_output("The whole index, including the pictures that were in it before."),
                summary_output("How many pictures the index holds, and how many of them are new."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            is_input_list=True,  # otherwise a list of pictures would replace the index again and again
        )

    @classmethod
    def execute(
        cls, images, captions, name, descriptor, mode, vae=(None,), model=(None,)
    ) -> io.NodeOutput:
        """Every input comes as a list."""
        from ..amg_core.index import Index, add, build
        from ..amg_core.index.format import describe

        (name, descriptor, mode), net = (name[0], descriptor[0], mode[0]), (vae[0], model[0])
        if mode not in MODES:
            raise AMGError(
                f"mode: {mode!r} is not one of the choices. Choose one of {', '.join(MODES)}."
            )
        source, target = pictures_of(images, captions), paths.new_index(name)
        there = paths.index_to_add_to(name) if mode == "add" else None
        if there is None:
            made = make_descriptor(descriptor, *net)
            return _embed(build, source, target, made, cls)
        with Index.open(there) as old:
            spec = old.spec
        if spec.kind != descriptor:
            raise AMGError(
                f"Index {there} was built with descriptor {describe(spec)}, and descriptor here "
                f"is {descriptor}. Choose {spec.kind} to add to it, or give another name."
            )
        if named(descriptor).space == "latent" and None in net:
            make_descriptor(descriptor, *net)  # raises an error that says what to connect
        made = descriptor_of(spec, *net)
        return _embed(add, source, there, made, cls, adding=True)


def pictures_of(images: list, captions: list[str]):
    """A source with the pictures of a list of IMAGE batches, and their captions.

    Raises
    ------
    AMGError
        There are no pictures, or the number of captions does not fit.
    """
    from ..amg_core.index.sources import Chain, Pictures

    counts = [len(batch) for batch in images]
    if not sum(counts):
        raise AMGError("images: the batch is empty. Connect at least one picture.")
    texts = captions_for(captions, sum(counts))
    parts = []
    for batch, count in zip(images, counts, strict=True):
        if count:
            parts.append(("", Pictures(batch, texts[:count], "images")))
            texts = texts[count:]
    return Chain(parts, "images")


def captions_for(captions: list[str], count: int) -> list[str]:
    """A caption for each of `count` pictures: from the lines of one text, or else one from each text."""
    lines = captions[0].strip().splitlines() if len(captions) == 1 else captions
    lines = [" ".join(line.split()) for line in lines] or [""]
    if len(lines) == 1:
        return lines * count
    if len(lines) != count:
        raise AMGError(
            f"captions: there are {len(lines)} for {count} pictures. Write one line for all of "
            "them, one line for each, or nothing."
        )
    return lines


class Progress:
    """Moves the host's progress bar, or counts in text if the total is unknown. Can be interrupted."""

    def __init__(self, tell):
        self.tell, self.bar, self.shown = tell, None, time.monotonic()
        self.done = 0

    def __call__(self, done: int, total: int, _picture: str) -> None:
        self.done = done
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total > 0:
            self.bar = self.bar or comfy.utils.ProgressBar(total)
            self.bar.update_absolute(done, total)
        elif time.monotonic() - self.shown >= 1:
            self.shown = time.monotonic()
            self.tell(f"{done} pictures so far…")


def _embed(make, source, target, descriptor, node, adding=False) -> io.NodeOutput:
    """Run `build` or `add` for the class `node` with a progress bar. Returns the index and a summary."""
    tell = show.text_on(node.hidden.unique_id)
    progress = Progress(tell)
    device = comfy.model_management.get_torch_device()
    try:
        report = make(source, target, descriptor, progress=progress, device=device)
    except comfy.model_management.InterruptProcessingException:
        tell(
            f"Stopped after {progress.done} pictures. They are kept: run the node again and it "
            "continues from there. Until then an index of that name stays as it was."
        )
        raise
    finally:
        with torch.inference_mode(False):
            descriptor.to("cpu")
    shown = live.lines(node, summary(report, adding))
    (text,) = shown["text"]
    tell(text)
    return io.NodeOutput(open_matcher(target, descriptor), text, ui=shown)


def summary(report, adding: bool) -> list[str | list[Message]]:
    """A `BuildReport` in lines, as `live.lines` takes them. `adding`: the index was there before."""
    name, seconds = report.path.name, report.seconds
    if report.count == 1:
        lines: list = [[message("index_holds_one", name=name, seconds=seconds)]]
    else:
        lines = [[message("index_holds", count=report.count, name=name, seconds=seconds)]]
    if (kept := report.reused - report.duplicates) and not adding:
        lines.append([message("index_kept", new=report.embedded, kept=kept)])
    elif kept:
        lines.append([message("index_had", new=report.embedded, kept=kept)])
    if report.removed:
        lines.append([message("index_removed", count=report.removed)])
    if report.duplicates:
        lines.append([message("index_twice", count=report.duplicates)])
    lines.append([message("index_captioned", count=report.captioned, files=report.files)])
    if report.skipped:
        lines.append([message("index_skipped", count=len(report.skipped))])
        lines += [f"  {source}: {reason}" for source, reason in report.skipped[:SHOWN]]
        if len(report.skipped) > SHOWN:
            lines.append("  …")
    return lines + list(report.notes)
