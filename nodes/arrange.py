"""Combine Indexes, Mute Pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase

from comfy_api.latest import io

from ..amg_core.errors import AMGError
from . import live, show
from .index import index_output, summary_output
from .opening import as_matcher
from .types import INDEX, MemorizationIndex, place

SOCKETS = 4
SHOWN = 20  # excluded pictures named in a summary


class CombineIndexesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_CombineIndexes",
            display_name="AMG Combine Indexes",
            **place(INDEX),
            description="Joins several indexes into one, so that a picture is guarded against "
            "all of them at once. Nothing is copied or written to disk.",
            inputs=[
                MemorizationIndex.Input(
                    "index_1",
                    tooltip="The first index. All indexes must be made with the same descriptor.",
                ),
                *(
                    MemorizationIndex.Input(
                        f"index_{number}",
                        optional=True,
                        tooltip="Another index, made with the same descriptor. To join more than "
                        "four, combine the results of two of these nodes.",
                    )
                    for number in range(2, SOCKETS + 1)
                ),
            ],
            outputs=[
                index_output(
                    "All indexes as one. Connect it to AMG Sampler, Apply AMG or Similarity "
                    "Probe. A picture that is excluded (muted) in one of them is excluded here."
                )
            ],
        )

    @classmethod
    def execute(cls, index_1, index_2=None, index_3=None, index_4=None) -> io.NodeOutput:
        matchers = [
            matcher for matcher in (index_1, index_2, index_3, index_4) if matcher is not None
        ]
        members = {}
        for matcher in matchers:
            for index in matcher.index.members:
                _check_same(members, index)
                members.setdefault((index.path, index.hash), index)
        if len(matchers) == 1:
            return io.NodeOutput(index_1)
        # The files are shared, so they are not closed here.
        return io.NodeOutput(as_matcher(list(members.values()), index_1.descriptor))


def _check_same(members: dict, index) -> None:
    from ..amg_core.index.format import describe

    for first in members.values():
        if first.spec != index.spec:
            raise AMGError(
                f"Index {first.name} was made with descriptor {describe(first.spec)} and index "
                f"{index.name} with {describe(index.spec)}, and only indexes of one descriptor "
                "can be combined. Build one of them again with the descriptor of the other."
            )


class MutePicturesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_MutePictures",
            display_name="AMG Mute Pictures",
            **place(INDEX),
            description="Excludes (mutes) pictures of an index that may be copied: your own "
            "work, public-domain art. They stay in the index and stay excluded when it is built "
            "again. With undo they are guarded against again.",
            inputs=[
                MemorizationIndex.Input(
                    "index",
                    tooltip="The index that holds these pictures. It is changed on "
                    "disk, so the change is there for every workflow that opens it.",
                ),
                io.String.Input(
                    "patterns",
                    default="",
                    multiline=True,
                    tooltip="Names of pictures, one a line, as Similarity Probe and the report "
                    "show them. * stands for anything: mine/*.png. If empty, nothing is changed, "
                    "and the summary lists what is excluded (muted).",
                ),
                io.String.Input(
                    "reason",
                    default="",
                    tooltip="Why these pictures may be copied, for people who look later. For "
                    "example: my own photographs. It is kept in the index.",
                ),
                io.Boolean.Input(
                    "undo",
                    default=False,
                    label_on="guard again",
                    label_off="mute",
                    tooltip="On: these pictures are guarded against again.",
                ),
            ],
            outputs=[
                index_output(
                    "The index without the excluded (muted) pictures, opened again.", "changed"
                ),
                summary_output("All pictures that are excluded (muted) in the index now, and why."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, index, patterns: str, reason: str, undo: bool) -> io.NodeOutput:
        from ..amg_core.index import Index

        lines = [line.strip() for line in patterns.splitlines() if line.strip()]
        opened = [(member.path, member.spec) for member in index.index.members]
        if lines:
            with ExitStack() as stack:  # opened again, because another node may have changed them
                now = [stack.enter_context(Index.open(*each)) for each in opened]
                chosen = _chosen(Index.combine(now), lines)
                for member in now:
                    _change(member, chosen, reason.strip(), undo)
        matcher = as_matcher([Index.open(*each) for each in opened], index.descriptor)
        text = _muted(matcher.index)
        show.text_on(cls.hidden.unique_id)(text)
        return io.NodeOutput(matcher, text, ui=live.lines(cls, text.splitlines()))


def _files(index) -> Iterator[tuple[str, str]]:
    """(SHA-256, name) of every file, with the further names of each picture."""
    for record in index.records():
        yield record.sha256, record.source
    for alias in index.aliases():
        yield index.record(alias.id).sha256, alias.source


def _chosen(index, patterns: list[str]) -> set[str]:
    """SHA-256 of the pictures that match. AMGError names a pattern that matches none."""
    means = {pattern: _matcher(pattern) for pattern in patterns}
    idle, chosen = set(patterns), set()
    for sha256, source in _files(index):
        hits = [pattern for pattern in patterns if means[pattern](source)]
        if hits:
            chosen.add(sha256)
            idle.difference_update(hits)
    if idle:
        raise AMGError(
            f"patterns: no picture in index {index.name} is called {sorted(idle)[0]!r}. Copy the "
            f"name from Similarity Probe, or use * for any part of it. Upper and lower case are "
            f"the same."
        )
    return chosen


def _matcher(pattern: str) -> Callable[[str], bool]:
    wanted = pattern.lower()
    return lambda source: source.lower() == wanted or fnmatchcase(source.lower(), wanted)


def _change(member, chosen: set[str], reason: str, undo: bool) -> None:
    """Mute or unmute pictures in one index folder. If nothing changes, it is not written."""
    from ..amg_core.index import mute, unmute

    muted = member.manifest.muted
    if undo:
        change = chosen & set(muted)
        if change:
            unmute(member.path, lambda entry: entry.sha256 in change)
        return
    change = {sha256 for sha256 in chosen if muted.get(sha256) != reason}
    if change:
        mute(member.path, lambda entry: entry.sha256 in change, reason)


def _muted(index) -> str:
    lines = [f"{len(index.muted)} of {index.count} pictures in {index.name} are excluded (muted)."]
    for i, reason in sorted(index.muted.items())[:SHOWN]:
        lines.append(f"  {index.source(i)}  {reason}".rstrip())
    if len(index.muted) > SHOWN:
        lines.append("  …")
    return "\n".join(lines)
