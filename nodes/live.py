"""What the page draws while pictures are sampled: one small event after each model evaluation.

Sent as JSON under one name, `EVENT`, to the browser that queued the prompt. All have ``"node"``, the
execution id of a node ("12:3" is node 3 in the subgraph that node 12 is), ``"class"``, its node id, and
``"prompt"``, the id of the prompt that is being executed: pages have many workflows open, whose nodes
have the same ids. Three kinds:

- ``{"kind": "step", "attempt", "retries", "step", "total", "score_threshold", "score",
  "threshold", "similarity", "active", "neighbor", "neighbors"}``: `step` counts model evaluations from 1,
  `total` is what was expected or null; the rest is as in `run.StepRecord`, one entry a sample;
  `neighbors` says of each id what `entry` does, and where the host saved that picture if no index that
  can be opened holds it.
- ``{"kind": "begin", "messages", "words"}``: a run has begun, and this is all there is to tell of it yet.
- ``{"kind": "end", "messages", "words", "verdicts"}``: what became of the run, and of its finished
  pictures one verdict a sample; none where nothing was judged.

`messages` are codes (see `amg_core.messages`), of which the page makes words; `words` are these in
English, for a page that lacks one. A page that does not listen loses nothing: the live text says the same.
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

EVENT = "amg.step"
LONGEST = 300  # characters of a caption or a name that are sent
VERDICT = (
    "similarity", "threshold", "score", "zncc", "zncc_threshold", "source", "caption", "copy",
    "outcome", "checks", "reason",
)  # fmt: skip


def events_of(node, pictures: dict[str, dict] | None = None) -> Callable[[dict], None]:
    """A function that sends events of a node; does nothing without a server.

    node : the class that the host executes, with its hidden inputs. A function that outlives the
    execution, as in a guarded model, is right only if the schema says `not_idempotent`: else the host
    hands what one node made to its like with another id, in another workflow.

    pictures : of an index that ends with the run: hash of a row -> where the host saved its picture,
    {"filename", "subfolder", "type"}.
    """
    whose = {"node": node.hidden.unique_id, "class": node.define_schema().node_id}
    saved = pictures or {}

    def send(event: dict) -> None:
        module = sys.modules.get("server")  # never imported here: it is heavy, and tests do without
        server = getattr(getattr(module, "PromptServer", None), "instance", None)
        if not event or server is None or whose["node"] is None:
            return
        for near in event.get("neighbors", {}).values():
            if near["sha256"] in saved:
                near["picture"] = saved[near["sha256"]]
        server.send_sync(EVENT, whose | {"prompt": _prompt()} | event, server.client_id)

    return send


def _prompt() -> str | None:
    """Id of the prompt that the host is executing now."""
    module = sys.modules.get("comfy_execution.utils")
    context = None if module is None else module.get_executing_context()
    return None if context is None else context.prompt_id


def step(run: SamplingRun, attempt: int = 0, retries: int = 0) -> dict:
    """The latest step of a run; {} before the first one, and where the guard did not look.

    attempt : int, 0 for the first drawing; retries : int, how many more there may be.
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
    """What there is to tell before the first step."""
    return {"kind": "begin"} | said(sentences)


def end(report: dict) -> dict:
    """What became of the run whose report `report` is."""
    keys = ("sample", "attempt", *VERDICT)
    verdicts = [{key: _shown(found[key]) for key in keys} for found in report["verdicts"]]
    return unguarded(reports.story(report)) | {"verdicts": verdicts}


def unguarded(sentences: Iterable[Message]) -> dict:
    """The end of a run in which no picture was judged."""
    return {"kind": "end"} | said(sentences) | {"verdicts": []}


def said(sentences: Iterable[Message]) -> dict:
    """Messages for the page."""
    sentences = list(sentences)
    return {"messages": _shown(messages.to_json(sentences)), "words": messages.words(sentences)}


def verdict(found: Verdict) -> dict:
    """A `Verdict` on a finished picture, JSON-able and no longer than it need be."""
    return {key: _shown(getattr(found, key)) for key in VERDICT} | said([found.message()])


def entry(index, i: int) -> dict:
    """Row i of an index: {"index", "id", "sha256", "source", "caption"}.

    Of several indexes read as one, name and id are those of the member that has the picture.
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
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _shown(value):
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return value[:LONGEST] if isinstance(value, str) else value
