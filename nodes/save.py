"""Save Guarded Image: the finished file is checked, recorded, and signed if wanted."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import numpy as np
from comfy_api.latest import io

from ..amg_core import report as reports
from ..amg_core.errors import AMGError
from ..amg_core.messages import Message, message
from ..amg_core.similarity.verdict import message_of
from . import graph, hook, latents, live, paths, show
from .opening import descriptor_of
from .sampling import check_choice
from .types import CHECK, MemorizationIndex, place

OFF, TEST, OWN = CREDENTIALS = ("off", "test certificate", "own certificate")
FORMATS = ("png", "jpeg", "webp")
PRIVACY = (reports.ANONYMOUS, reports.FULL)


def privacy_input() -> io.Input:
    return io.Combo.Input(
        "privacy",
        options=list(PRIVACY),
        default=reports.ANONYMOUS,
        tooltip="What the record says of the index. anonymous: measurements, the hash of the "
        "index and numbers of its pictures. full: also names and captions of its pictures, and "
        "names of model files.",
    )


class SaveImageNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_SaveImage",
            display_name="AMG Save Guarded Image",
            **place(CHECK),
            description="Saves pictures, checks each finished file against an index, and writes "
            "the result into it as a record. The file also says that it was made by AI (IPTC), "
            "keeps the workflow, and can be signed with Content Credentials (C2PA).",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to save."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="How the names of the files begin, as in Save Image. It may have "
                    "folders, and %date:yyyy-MM-dd% and the like.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip="png: every pixel as it was drawn. jpeg and webp: smaller. A jpeg holds "
                    "a workflow of up to 64 KB, and a longer one is saved beside it.",
                ),
                io.Int.Input(
                    "quality",
                    default=95,
                    min=1,
                    max=100,
                    tooltip="For jpeg and webp. 90 to 95 is usual. At 100 a webp is lossless.",
                ),
                io.Combo.Input(
                    "credentials",
                    options=list(CREDENTIALS),
                    default=OFF,
                    tooltip="Content Credentials. off: none. own certificate: certificate.pem and "
                    "key.pem in models/amg/credentials sign the picture. test certificate: a "
                    "self-made one, which proves no identity. Both need the package c2pa-python.",
                ),
                privacy_input(),
                io.Boolean.Input(
                    "model_hashes",
                    default=True,
                    tooltip="On: the record has the SHA-256 of each model file and LoRA of the "
                    "workflow. The first time takes some seconds for each gigabyte. Off: only "
                    "which kinds of files there were.",
                ),
                MemorizationIndex.Input(
                    "index",
                    optional=True,
                    tooltip="The pictures to compare with, from Load Memorization Index. Without "
                    "it nothing is checked, and no record is written.",
                ),
                io.String.Input(
                    "report",
                    force_input=True,
                    optional=True,
                    tooltip="The output report of AMG Sampler, AMG Report or Guard. The record then "
                    "has the settings, and every attempt that was drawn.",
                ),
                *latents.inputs(),
            ],
            outputs=[
                io.String.Output(
                    "records",
                    display_name="records",
                    tooltip="The records of the saved pictures, as a JSON list.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, images, filename_prefix="ComfyUI", format=FORMATS[0], quality=95, credentials=OFF,
        privacy=reports.ANONYMOUS, model_hashes=True, index=None, report=None, vae=None, model=None,
    ) -> io.NodeOutput:  # fmt: skip
        from PIL import Image

        from ..amg_core.record import checked, encoded, stored
        from ..amg_core.record import credentials as signing
        from ..amg_core.similarity.matcher import Matcher

        for name, value, known in (
            ("format", format, FORMATS), ("credentials", credentials, CREDENTIALS),
            ("privacy", privacy, PRIVACY),
        ):  # fmt: skip
            check_choice(name, value, known)
        if images.shape[0] == 0:
            raise AMGError("images: the batch is empty. Connect at least one picture.")
        if index is not None and index.latent and (vae is not None or model is not None):
            index = Matcher(index.searcher, descriptor_of(index.descriptor.spec, vae, model))
        identity = _identity(credentials)
        nodes = list(graph.upstream(cls.hidden.prompt, cls.hidden.unique_id, "images"))
        used, lines = _ingredients(nodes), []
        if used and identity is None:
            names = [one.title for one in used]
            lines.append([message("credentials_left", pictures=names)])
        models = graph.models(nodes, model_hashes) if index is not None else []
        run = _run(report, len(images))
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), images.shape[2], images.shape[1]
        )
        kind, records, saved = encoded.KINDS[format], [], []
        for number, image in enumerate(images):
            pixels = (image.cpu().numpy() * 255.0).clip(0, 255).astype(np.uint8)
            picture = Image.fromarray(pixels)
            file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_"
            file += encoded.ENDINGS[format]
            texts, record = _host_texts(cls.hidden), None
            said: list[Message] = [message("as_written", words=file)]
            if index is None:
                said.append(message("saved_unchecked"))
            else:
                whole = checked.check_picture(
                    index, encoded.encode(picture, kind, {}, quality), privacy=reports.FULL,
                    models=models, report=run, sample=number, versions=hook.versions(),
                )  # fmt: skip
                said.append(message_of(whole["verdicts"][0]))
                record = whole if privacy == reports.FULL else checked.anonymous(whole)
                records.append(record)
                texts[stored.KEY] = json.dumps(record)
            data, beside = _fitted(picture, kind, texts, quality)
            if identity is not None:
                agent = {"name": "ComfyUI", "version": hook.versions().get("comfyui", "unknown")}
                data = signing.sign(
                    data, kind, identity, title=file, record=record, ingredients=used, agent=agent
                )
            stored.write_bytes(Path(folder) / file, data)
            if beside is not None:
                stored.write_bytes(Path(folder) / f"{file}.workflow.json", beside.encode())
                said.append(message("workflow_beside"))
            lines.append(said)
            saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
        if identity is not None:
            lines.append([message("signed_for_tests" if identity.test else "signed")])
        shown = live.lines(cls, lines) | {"images": saved}
        show.text_on(cls.hidden.unique_id)(shown["text"][0])
        return io.NodeOutput(json.dumps(records), ui=shown)


def _identity(choice: str):
    """What signs, or None. AMGError if the package or the certificate is missing."""
    from ..amg_core.record import credentials

    if choice == OFF:
        return None
    return credentials.for_tests() if choice == TEST else _own(credentials)


def _own(credentials):
    return credentials.of_folder(paths.credentials_folder())


def _ingredients(nodes: list) -> list:
    """The pictures with Content Credentials that went into the graph."""
    from ..amg_core.index.picture import Unreadable, read_file
    from ..amg_core.record import credentials

    found = []
    for path in graph.pictures(nodes):
        try:
            data = read_file(path)
        except Unreadable:
            continue
        if credentials.present(data):
            found.append(credentials.Ingredient(path.name, data))
    return found


def _run(report: str | None, count: int) -> dict | None:
    """The report of the run that drew the batch, or None. AMGError if it is about another batch."""
    if not report or report == "{}":
        return None
    try:
        found = json.loads(report)
    except (ValueError, TypeError, RecursionError):
        raise AMGError(
            "report: this is no report. Connect the output report of AMG Sampler."
        ) from None
    reports.check(found)
    if found["verdicts"] and len(found["verdicts"]) != count:
        raise AMGError(
            f"report: it is about {len(found['verdicts'])} pictures, and images has {count}. Connect "
            "the report of the sampler that drew these pictures, or none."
        )
    return found


def _host_texts(hidden) -> dict[str, str]:
    """The entries that Save Image writes: the prompt, and what nodes and page added."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    texts = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return texts | {key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}


def _fitted(picture, kind: str, texts: dict[str, str], quality: int) -> tuple[bytes, str | None]:
    """The file, and the workflow if it is too long for it. The run's report gives way first."""
    from ..amg_core.record import encoded, stored

    short = {key: value for key, value in texts.items() if key != reports.KEY}
    record = {key: value for key, value in texts.items() if key == stored.KEY}
    for entries in (texts, short, record):
        try:
            data = encoded.encode(picture, kind, entries, quality)
        except encoded.TooLong:
            continue
        left = texts.get("workflow", texts.get("prompt")) if entries is record else None
        return data, left
    raise AMGError("format: the record is too long for this format. Choose png.")
