"""What the page draws while pictures are sampled: one small event after each model evaluation.

Sent as JSON under one name, `EVENT`, to the browser that queued the prompt. Two kinds:

- ``{"node", "kind": "step", "attempt", "retries", "step", "total", "threshold", "similarity",
  "active", "neighbor", "neighbors"}``: `step` counts model evaluations from 1, `total` is what was
  expected or null; `similarity`, `active` and `neighbor` have one entry a sample; `neighbors` says of
  each id what `entry` does.
- ``{"node", "kind": "end", "words", "verdicts"}``: what the finished pictures measured, one verdict a
  sample; none where nothing was judged, and `words` says why.

A page that does not listen loses nothing: the live text says the same in words.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from ..amg_core import report as reports
from ..amg_core.session import Session
from ..amg_core.verdict import Verdict

EVENT = "amg.step"
LONGEST = 300  # characters of a caption or a name that are sent
VERDICT = (
    "similarity", "threshold", "closeness", "zncc", "zncc_threshold", "source", "caption", "copy",
    "words",
)  # fmt: skip


def events_of(node_id: str | None) -> Callable[[dict], None]:
    """A function that sends events of that node (its execution id); does nothing without a server."""

    def send(event: dict) -> None:
        module = sys.modules.get("server")  # never imported here: it is heavy, and tests do without
        server = getattr(getattr(module, "PromptServer", None), "instance", None)
        if event and server is not None and node_id is not None:
            server.send_sync(EVENT, {"node": node_id} | event, server.client_id)

    return send


def step(session: Session, attempt: int = 0, retries: int = 0) -> dict:
    """The latest step of a run; {} before the first one, and where the guard did not look.

    attempt : int, 0 for the first drawing; retries : int, how many more there may be.
    """
    if not session.records:
        return {}
    record, index = session.records[-1], session.probe.searcher.index
    return {
        "kind": "step",
        "attempt": attempt,
        "retries": retries,
        "step": len(session.records),
        "total": session.expected_steps,
        "threshold": _finite(record.threshold),
        "similarity": [_finite(value) for value in record.similarity],
        "active": list(record.active),
        "neighbor": list(record.neighbor),
        "neighbors": {str(i): entry(index, i) for i in dict.fromkeys(record.neighbor)},
    }


def end(told: dict) -> dict:
    """What became of the run whose report `told` is."""
    keys = ("sample", "attempt", "outcome", *VERDICT)
    verdicts = [{key: _shown(found[key]) for key in keys} for found in told["verdicts"]]
    return {"kind": "end", "words": reports.words(told), "verdicts": verdicts}


def verdict(found: Verdict) -> dict:
    """A `Verdict` on a finished picture, JSON-able and no longer than it need be."""
    return {key: _shown(getattr(found, key)) for key in VERDICT}


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
    return value[:LONGEST] if isinstance(value, str) else value
