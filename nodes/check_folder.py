"""Check a Folder: finished pictures of any program are checked, and get records."""

from __future__ import annotations

import time

import folder_paths
from comfy_api.latest import io

from ..amg_core import report as reports
from ..amg_core.messages import Message, message
from ..amg_core.similarity.verdict import message_of
from . import hook, latents, live, paths, show
from .index import Progress
from .opening import descriptor_of
from .sampling import check_choice
from .save import PRIVACY, privacy_input
from .types import CHECK, MemorizationIndex, place

SHOWN = 30  # pictures named on the node


class CheckFolderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_CheckFolder",
            display_name="AMG Check a Folder",
            **place(CHECK),
            description="Checks all finished pictures of a folder against an index, whatever "
            "program made them, and writes a record beside each. The pictures are not touched.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="The folder of the finished pictures, with its subfolders. Give an "
                    "absolute path, or one below ComfyUI's output folder.",
                ),
                MemorizationIndex.Input(
                    "index",
                    tooltip="The pictures to compare with. The answer no speaks only of this "
                    "index.",
                ),
                privacy_input(),
                io.Boolean.Input(
                    "again",
                    default=False,
                    tooltip="Off: pictures that have a record of this index are left as they are. "
                    "On: all are checked anew.",
                ),
                *latents.inputs(),
            ],
            outputs=[
                io.String.Output(
                    "summary",
                    display_name="summary",
                    tooltip="How many pictures are copies (yes), unsure, and no copies (no), and "
                    "which could NOT be checked.",
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    tooltip="The pictures that are copies or unsure, one line for each.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> str:
        return str(time.time_ns())  # files may have changed, and a second run costs little

    @classmethod
    def execute(
        cls, folder, index, privacy=reports.ANONYMOUS, again=False, vae=None, model=None
    ) -> io.NodeOutput:
        from ..amg_core.record.folder import counts, write_folder
        from ..amg_core.similarity.matcher import Matcher

        check_choice("privacy", privacy, PRIVACY)
        place = folder_paths.get_output_directory()
        path = paths.folder_below(folder, place, "your finished pictures")
        if index.latent and (vae is not None or model is not None):
            index = Matcher(index.searcher, descriptor_of(index.descriptor.spec, vae, model))
        tell = show.text_on(cls.hidden.unique_id)
        written = list(
            write_folder(
                index, path, privacy=privacy, again=again, versions=hook.versions(),
                progress=Progress(tell),
            )
        )  # fmt: skip
        found = counts(written)
        first = message(
            "folder_checked", count=found["count"], copies=found["copies"],
            unsure=found["unsure"], others=found["others"],
        )  # fmt: skip
        lines: list[list[Message]] = [[first]]
        bad = [one for one in written if one.record and one.answer != "no"]
        lines += [_line(one.picture, message_of(one.record["verdicts"][0])) for one in bad[:SHOWN]]
        failed = [one for one in written if one.problem]
        if failed:
            lines.append([message("folder_not_checked", count=len(failed))])
            lines += [_line(one.picture, _plain(one.problem)) for one in failed[:SHOWN]]
        shown = live.lines(cls, lines)
        (text,) = shown["text"]
        tell(text)
        return io.NodeOutput(text, "\n".join(one.picture for one in bad), ui=shown)


def _line(picture: str, found: Message) -> list[Message]:
    return [_plain(picture), found]


def _plain(words: str) -> Message:
    return message("as_written", words=words)
