"""Events for the page while pictures are sampled: one small event after each model evaluation.

They are sent as JSON under one name, `EVENT`, to the browser that queued the prompt. All have ``"node"``,
the execution id of a node ("12:3" is node 3 in the subgraph of node 12), ``"class"``, its node id, and
``"prompt"``, the id of the prompt that is executed, because a page can have many workflows open with the
same node ids. There are three kinds:

- ``{"kind": "step", "attempt", "retries", "step", "total", "score_threshold", "score",
  "threshold", "similarity", "active", "neighbor", "neighbors"}``: `step` counts model evaluations from 1,
  `total` is the expected number or null. The rest is as in `run.StepRecord`, one entry for each sample.
  `neighbors` has the fields of `entry` for each id, and the place where the host saved that picture if it
  is in no index that can be opened.
- ``{"kind": "begin", "messages", "words"}``: a run has begun.
- ``{"kind": "end", "messages", "words", "verdicts"}``: the result of the run, and one verdict for each
  finished picture, none if they were not checked.

`messages` are codes (see `amg_core.messages`), which the page turns into words. `words` are the same in
English, for a page that lacks a code. The live text on the node says the same, for pages without events.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

from ..amg_core import messages
from ..amg_core import report as reports
from ..amg_core.messages import Message
from ..amg_core.run import SamplingRun
from ..amg_core.similarity.verdict import Verdict
from . import show

EVENT = "amg.step"
LONGEST = 300  # largest number of characters of a caption or name that is sent
VERDICT = (
    "similarity", "threshold", "score", "zncc", "zncc_threshold", "source", "caption", "copy",
    "outcome", "checks", "reason",
)  # fmt: skip


def events_of(node, pictures: dict[str, dict] | None = None) -> Callable[[dict], None]:
    """A function that sends the events of a node, or does nothing if there is no server.

    `node` is the class that the host executes, with its hidden inputs. If the function is used after the
    execution, as in a guarded model, the schema must say `not_idempotent`. Otherwise the host may reuse the
    output of one node for an equal node with another id, in another workflow.

    `pictures` is for an index that exists only during the run. It maps the hash of a row to the place where
    the host saved its picture, {"filename", "subfolder", "type"}.
    """
    whose = {"node": node.hidden.unique_id, "class": node.define_schema().node_id}
    saved = pictures or {}

    def send(event: dict) -> None:
        server = show.server()
        if not event or server is None or whose["node"] is None:
            return
        for near in event.get("neighbors", {}).values():
            if near["sha256"] in saved:
                near["picture"] = saved[near["sha256"]]
        server.send_sync(EVENT, whose | {"prompt": _prompt()} | event, server.client_id)

    return send


def _prompt() -> str | None:
    """The id of the prompt that the host is executing."""
    module = sys.modules.get("comfy_execution.utils")
    context = None if module is None else module.get_executing_context()
    return None if context is None else context.prompt_id


def step(run: SamplingRun, attempt: int = 0, retries: int = 0) -> dict:
    """The event for the latest step of a run. {} before the first one, or if the guard compared nothing.

    `attempt` is 0 for the first drawing. `retries` is the largest number of retries.
    """
    if not run.records:
        return {}
    record, index = run.records[-1], run.matcher.index
    return {
        "kind": "step",
        "attempt": attempt,
        "retries": retries,
        "step": len(run.records),
        "total": run.expected_steps,
        "score_threshold": _finite(record.score_threshold),
        "score": [_finite(value) for value in record.score],
        "threshold": _finite(record.threshold),
        "similarity": [_finite(value) for value in record.similarity],
        "active": list(record.active),
        "neighbor": list(record.neighbor),
        "neighbors": {str(i): entry(index, i) for i in dict.fromkeys(record.neighbor)},
    }


def begin(sentences: Iterable[Message]) -> dict:
    """The event before the first step."""
    return {"kind": "begin"} | said(sentences)


def end(report: dict) -> dict:
    """The event at the end of the run with this report."""
    keys = ("sample", "attempt", *VERDICT)
    verdicts = [{key: _shown(found[key]) for key in keys} for found in report["verdicts"]]
    return unguarded(reports.story(report)) | {"verdicts": verdicts}


def unguarded(sentences: Iterable[Message]) -> dict:
    """The event at the end of a run in which no picture was checked."""
    return {"kind": "end"} | said(sentences) | {"verdicts": []}


def said(sentences: Iterable[Message]) -> dict:
    """The fields "messages" and "words" of an event."""
    sentences = list(sentences)
    return {"messages": _shown(messages.to_json(sentences)), "words": messages.words(sentences)}


def verdict(found: Verdict) -> dict:
    """A `Verdict` on a finished picture as short JSON."""
    return {key: _shown(getattr(found, key)) for key in VERDICT} | said([found.message()])


def entry(index, i: int) -> dict:
    """Row i of an index: {"index", "id", "sha256", "source", "caption"}.

    In combined indexes, name and id are those of the member that has the picture.
    """
    local, owner = i, index
    for owner in index.members:
        if local < owner.count:
            break
        local -= owner.count
    record = index.record(i)
    return {
        "index": owner.name,
        "id": local,
        "sha256": record.sha256,
        "source": _shown(record.source),
        "caption": _shown(record.caption),
    }


def _finite(value: float) -> float | None:
    """`value`, or None if it is not finite, because JSON has no NaN."""
    return value if math.isfinite(value) else None


def _shown(value):
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return value[:LONGEST] if isinstance(value, str) else value
