"""Events for the page while pictures are sampled: one small event after each model evaluation.

They are sent as JSON under one name, `EVENT`, to the browser that queued the prompt. All have ``"node"``,
the execution id of a node ("12:3" is node 3 in the subgraph of node 12), ``"class"``, its node id, and
``"prompt"``, the id of the prompt that is executed, because a page can have many workflows open with the
same node ids. There are three kinds:

- ``{"kind": "step", "attempt", "retries", "step", "total", "score_threshold", "score",
  "threshold", "similarity", "active", "neighbor", "neighbors", "copy_above"}``:
  `step` counts model evaluations from 1,
  `total` is the expected number or null. The rest is as in `run.StepRecord`, one entry for each sample.
  `neighbors` has the fields of `entry` for each id, and the place where the host saved that picture if it
  is in no index that can be opened.
- ``{"kind": "begin", "messages", "words"}``: a run has begun.
- ``{"kind": "end", "messages", "words", "verdicts", "neighbors", "misses"}``: the result of the run, and
  one verdict for each finished picture, none if they were not checked. `misses` is what the descriptor
  overlooks, in the form of `said`.

Likeness and composition are on the scale of `metrics.likeness`, on which `copy_above` is the limit of both.

`messages` are codes (see `amg_core.messages`), which the page turns into words. `words` are the same in
English, for a page that lacks a code. The live text on the node says the same, for pages without events.

What a node leaves behind is in its `ui` output, which the host keeps in its cache and its history, so the
page can show it again at any time. Each is a list with one entry, which has ``"class"``:

- ``"amg_report"`` (`result`): a finished run in the form of a report, as far as the page shows it.
- ``"amg_said"`` (`lines`): the result of the other nodes, a sentence for each line.
- ``"amg_grid"``: the drawings of Strength Grid, with the widgets of a sampler that draws so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

from ..amg_core import messages
from ..amg_core import report as reports
from ..amg_core.limits import COPY
from ..amg_core.messages import Message
from ..amg_core.run import SamplingRun
from ..amg_core.similarity.verdict import Verdict
from . import show

EVENT = "amg.step"
APPLY = "AMG_Apply"
LONGEST = 300  # largest number of characters of a caption or name that is sent
CURVE = ("score_threshold", "score", "threshold", "similarity", "active", "neighbor")  # of a step
VERDICT = (
    "similarity", "threshold", "score", "zncc", "zncc_threshold", "source", "caption", "copy",
    "outcome", "checks", "reason", "likeness", "composition", "near",
)  # fmt: skip
CHECKED = ("outcome", "near", "nearest")  # of a verdict, as the panel of a run shows it


def events_of(node, pictures: dict[str, dict] | None = None) -> Callable[[dict], None]:
    """A function that sends the events of a node, or does nothing if there is no server.

    `node` is the class that the host executes, with its hidden inputs. If the function is used after the
    execution, as in a guarded model, the schema must say `not_idempotent`. Otherwise the host may reuse the
    output of one node for an equal node with another id, in another workflow.

    `pictures` is for an index that exists only during the run. It maps the hash of a row to the place where
    the host saved its picture, {"filename", "subfolder", "type"}.
    """
    whose = {"node": node.hidden.unique_id, "class": node.define_schema().node_id}

    def send(event: dict) -> None:
        server = show.server()
        if not event or server is None or whose["node"] is None:
            return
        _place(event.get("neighbors", {}), pictures)
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
        **{key: _shown(getattr(record, key)) for key in CURVE},
        "neighbors": entries(index, dict.fromkeys(record.neighbor)),
        "copy_above": COPY,
    }


def begin(sentences: Iterable[Message]) -> dict:
    """The event before the first step."""
    return {"kind": "begin"} | said(sentences)


def end(report: dict, near: dict[str, dict] | None = None) -> dict:
    """The event at the end of the run with this report. `near`: `entries` of its neighbors."""
    keys = ("sample", "attempt", "nearest", *VERDICT)
    verdicts = [{key: _shown(found[key]) for key in keys} for found in report["verdicts"]]
    near = {key: dict(each) for key, each in (near or {}).items()}
    result = {"verdicts": verdicts, "neighbors": near, "misses": said(reports.misses(report))}
    return unguarded(reports.story(report)) | result


def rows_of(report: dict) -> list[int]:
    """The rows of the index that a report names."""
    best = [each["row"] for found in report["verdicts"] for each in found["nearest"]]
    return list(dict.fromkeys([*map(int, report["neighbors"]), *best]))


def unguarded(sentences: Iterable[Message]) -> dict:
    """The event at the end of a run in which no picture was checked."""
    return {"kind": "end"} | said(sentences) | {"verdicts": []}


def result(
    node,
    report: dict,
    near: dict[str, dict] | None = None,
    *,
    sentences: Iterable[Message] | None = None,
    pictures: dict[str, dict] | None = None,
    drawn_by: str | None = None,
) -> dict:
    """The `ui` output of a node for a finished run.

    Parameters
    ----------
    node : class
        As for `events_of`.
    report : dict
        The report of the run, see `amg_core.report`.
    near : dict, optional
        `entries` of its neighbors.
    sentences : iterable of Message, optional
        What is said of the run, in place of the report's own story.
    pictures : dict, optional
        As for `events_of`.
    drawn_by : str, optional
        The execution id of the node on which the run is shown, an Apply AMG. Without it on `node`.
    """
    near = {key: dict(each) for key, each in (near or {}).items()}
    _place(near, pictures)
    kind = node.define_schema().node_id
    whose = {"class": kind} if drawn_by is None else {"class": APPLY, "node": drawn_by}

    def curve(steps: list[dict]) -> list[dict]:
        return [{key: _shown(each[key]) for key in CURVE} for each in steps]

    attempts = [{"steps": curve(each["steps"])} for each in report["attempts"][1:]]
    verdicts = [{key: _shown(each[key]) for key in CHECKED} for each in report["verdicts"]]
    told = said(reports.story(report) if sentences is None else sentences)
    shown = whose | {
        "steps": curve(report["steps"]), "attempts": [{}, *attempts], "verdicts": verdicts,
        "retries": report.get("retries"), "neighbors": near, "story": told["messages"],
        "words": told["words"], "copy_above": COPY, "misses": said(reports.misses(report)),
    }  # fmt: skip
    return {"text": (told["words"],), "amg_report": [shown]}


def words_only(node, sentences: Iterable[Message]) -> dict:
    """The `ui` output of a node that drew without comparing anything."""
    nothing: dict = {"steps": [], "attempts": [], "verdicts": []}
    return result(node, nothing, sentences=sentences)


def lines(node, each_line: Iterable[str | Iterable[Message]]) -> dict:
    """The `ui` output of a node whose result is text. Each line is a text or some messages."""
    every = [_as_written(line) if isinstance(line, str) else said(line) for line in each_line]
    kind = node.define_schema().node_id
    text = "\n".join(line["words"] for line in every)
    return {"text": (text,), "amg_said": [{"class": kind, "lines": every}]}


def _as_written(text: str) -> dict:
    return {"messages": [{"code": "as_written", "words": text}], "words": text}


def said(sentences: Iterable[Message]) -> dict:
    """The fields "messages" and "words" of an event."""
    sentences = list(sentences)
    return {"messages": _shown(messages.to_json(sentences)), "words": messages.words(sentences)}


def verdict(found: Verdict) -> dict:
    """A `Verdict` on a finished picture as short JSON."""
    return {key: _shown(getattr(found, key)) for key in VERDICT} | said([found.message()])


def entries(index, rows: Iterable[int]) -> dict[str, dict]:
    """`entry` of each of these rows, by its number as text."""
    return {str(i): entry(index, i) for i in rows}


def _place(near: dict[str, dict], pictures: dict[str, dict] | None) -> None:
    """Note in `entries` where the host saved the pictures of an index that ends with the run."""
    for each in near.values():
        if pictures and each["sha256"] in pictures:
            each["picture"] = pictures[each["sha256"]]


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
