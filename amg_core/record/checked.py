"""Makes the record of a finished picture, and checks the form of one that was read."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from .. import __version__, limits
from .. import report as reports
from ..errors import AMGError
from ..images import thumbnail, to_tensor
from ..index.format import is_digest
from ..index.picture import decode, stored_pixels
from ..index.reader import Index
from ..messages import words
from ..similarity import verifier
from ..similarity.matcher import Match, Matcher
from ..similarity.verdict import CANNOT_TELL, COPY, NO_COPY, Verdict, message_of, verdict

NEAREST = 5  # pictures of the index in a record
PRIVACY = (reports.ANONYMOUS, reports.FULL)
# Does the picture recreate one of the index? The three answers that buyers ask for.
ANSWERS = {COPY: "yes", NO_COPY: "no", CANNOT_TELL: "unsure"}
YES, NO, UNSURE = ANSWERS.values()
FILE = "file"  # `judged_by`: the finished file was checked
DECIMALS = 4
# Entries that a record has and a report of a run has not, and their types.
SHAPE: dict[str, type] = {
    "picture": dict, "written": str, "privacy": str, "models": list, "nearest": list, "limits": dict,
    "answer": dict, "checksum": str,
}  # fmt: skip
_OF_NEAREST = "row", "similarity", "score", "composition"  # no names
_OF_MODEL = "kind", "sha256", "strengths"  # the same

Record = dict[str, Any]


def check_picture(
    matcher: Matcher,
    data: bytes,
    *,
    beside: bool = False,
    privacy: str = reports.ANONYMOUS,
    models: Sequence[Mapping[str, Any]] = (),
    report: Mapping[str, Any] | None = None,
    sample: int = 0,
    versions: Mapping[str, str] | None = None,
    k: int = NEAREST,
) -> Record:
    """Check a picture file against an index, and make its record.

    Parameters
    ----------
    matcher : Matcher
    data : bytes
        The file.
    beside : bool
        Whether the record will lie beside the file. It then has the hash of the whole file.
    privacy : str
        FULL, or ANONYMOUS for a record without names.
    models : sequence of mappings
        The files that drew it, if they are known: "kind", "name", "sha256", "strengths".
    report : mapping, optional
        The report of the guarded run that drew it, and `sample`, its place in the batch.
    versions : mapping, optional
        Names and versions of further programs.
    k : int
        How many of the nearest pictures it names.

    Raises
    ------
    Unreadable
        The file is damaged or no picture.
    AMGError
        `privacy` is unknown, or the index cannot compare pictures.
    """
    demand_privacy(privacy)
    stored = stored_pixels(data)
    picture = to_tensor(decode(data, "").pixels, matcher.searcher.device)
    (found,) = verdict(matcher, picture)
    index, match = matcher.index, matcher.ranked(picture, k)
    drawn = _of_run(report, sample)
    python = {"torch": torch.__version__, "python": platform.python_version()}
    pixels = {"pixels": stored.sha256, "width": stored.width, "height": stored.height}
    of_file = {"file": hashlib.sha256(data).hexdigest()} if beside else {}
    record: Record = {
        "schema": reports.SCHEMA,
        "amg": __version__,
        "versions": python | dict(versions or {}),
        "index": {
            "name": index.name,
            "hash": index.hash,
            "count": index.count,
            "created": index.created,
            "muted": len(index.muted),
        },
        "descriptor": matcher.descriptor.spec.to_json(),
        **drawn,
        "neighbors": {},
        "steps": [],
        "judged_by": FILE,
        "not_judged": "",
        "not_judged_code": "",
        "verdicts": [_place(drawn["verdicts"]) | found.to_json()],
        "picture": pixels | of_file,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "privacy": reports.FULL,
        "models": [dict(model) for model in models],
        "nearest": _nearest(index, picture, found, match),
        "limits": {
            "likeness": {
                "limit": limits.COPY,
                "similarity": found.threshold,
                "false_alarms": limits.false_alarms(matcher.descriptor.spec, match.scale),
            },
            "composition": {
                "limit": found.zncc_threshold,
                "measured_at": limits.REGISTERED_MEASURED_AT,
                "false_alarms": limits.REGISTERED_FALSE_ALARMS,
            },
        },
        "answer": {"recreates": ANSWERS[found.outcome], "reason": words(found.message())},
    }
    whole = sealed(rounded(record))
    return anonymous(whole) if privacy == reports.ANONYMOUS else whole


def demand_privacy(privacy: str) -> None:
    """AMGError unless it is one of PRIVACY."""
    if privacy not in PRIVACY:
        raise AMGError(f"{privacy!r} is no privacy mode: choose one of {', '.join(PRIVACY)}.")


def _of_run(report: Mapping[str, Any] | None, sample: int) -> Record:
    """What a report says of one sample of its batch. Empty entries without a report."""
    if report is None or not 0 <= sample < len(report["verdicts"]):
        return {
            "settings": {}, "seed": None, "evaluations": 0, "guarded_evaluations": [],
            "largest_similarity": [], "verdicts": [], "attempts": [],
        }  # fmt: skip
    attempts = []
    for made in report["attempts"]:
        if sample in made["samples"]:
            place = made["samples"].index(sample)
            seeds = {"seeds": [made["seeds"][place]]} if "seeds" in made else {}
            attempts.append({"samples": [0], "verdicts": [made["verdicts"][place]]} | seeds)
    drawn: Record = {key: report[key] for key in ("settings", "seed", "evaluations")}
    for key in ("guarded_evaluations", "largest_similarity", "left_out_words"):
        if len(report.get(key, ())) > sample:
            drawn[key] = [report[key][sample]]
    return {"guarded_evaluations": [], "largest_similarity": []} | drawn | {
        "verdicts": [report["verdicts"][sample]], "attempts": attempts, "drawn_with": report["index"],
    }  # fmt: skip


def _place(of_run: Sequence[Mapping[str, Any]]) -> Record:
    """Attempt and seed of the picture, by the verdict of its run."""
    found = of_run[0] if of_run else {"attempt": 0, "seed": None}
    return {"sample": 0, "attempt": found["attempt"], "seed": found["seed"]}


def _nearest(index: Index, picture: torch.Tensor, found: Verdict, match: Match) -> list[Record]:
    """The pictures of a match with both scores, and the one that the verdict names."""
    measured = {
        int(row): (float(similarity), float(score))
        for row, similarity, score in zip(match.ids, match.similarity, match.score, strict=True)
    }
    if found.neighbor not in measured or measured[found.neighbor][1] < found.score:
        measured[found.neighbor] = found.similarity, found.score
    rows = sorted(measured, key=lambda row: -measured[row][1])
    composition: list[float | None] = [None] * len(rows)
    try:
        pictures = [thumbnail(index, row) for row in rows]
        composition = verifier.registered(picture, pictures).score.tolist()
    except AMGError:
        pass  # a picture is absent or damaged: these scores stay null, and the verdict cannot tell
    return [
        {
            "row": row, "sha256": index.record(row).sha256, "source": index.source(row),
            "caption": index.caption(row), "similarity": measured[row][0], "score": measured[row][1],
            "composition": second,
        }
        for row, second in zip(rows, composition, strict=True)
    ]  # fmt: skip


def anonymous(record: Record) -> Record:
    """The record without names and captions of the index, and without names of model files.

    Whoever has the index can still check it: the rows are there, and the hash of the index.
    """
    index = {key: value for key, value in record["index"].items() if key != "name"}
    kept = reports.anonymous(record) | {"index": index | {"name": ""}}
    kept |= {key: record[key] for key in (*SHAPE, "judged_by") if key in record}
    kept["nearest"] = [{key: near[key] for key in _OF_NEAREST} for near in record["nearest"]]
    kept["models"] = [{k: model[k] for k in _OF_MODEL if k in model} for model in record["models"]]
    reason = words(message_of(kept["verdicts"][0]))
    kept["answer"] = record["answer"] | {"reason": reason}
    if "drawn_with" in record:
        kept["drawn_with"] = {"name": ""} | {k: record["drawn_with"][k] for k in ("hash", "count")}
    return sealed(kept | {"privacy": reports.ANONYMOUS})


def rounded(value: Any) -> Any:
    """All numbers with DECIMALS decimals, in lists and objects too."""
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a record without its `checksum`, as JSON with sorted keys and no blanks."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(record: Record) -> Record:
    """The record with its `checksum`. It finds accidents. Only a signature finds forgery."""
    return record | {"checksum": checksum(record)}


def readable(record: object) -> Record:
    """A record that was read from a file, if it has the form of one. Otherwise AMGError."""
    if not isinstance(record, dict):
        raise AMGError("The record is damaged: it is no JSON object.")
    reports.check(record)
    for key, kind in SHAPE.items():
        if not isinstance(record.get(key), kind):
            raise AMGError(f"The record is damaged: {key} is not a {kind.__name__}.")
    picture, answer, index = record["picture"], record["answer"], record["index"]
    by = [record["limits"].get(check) for check in ("likeness", "composition")]
    sound = {
        "picture": is_digest(picture.get("pixels")) and is_digest(picture.get("file", "0" * 64)),
        "answer": answer.get("recreates") in ANSWERS.values() and isinstance(answer.get("reason"), str),
        "index": isinstance(index.get("hash"), str) and _is_row(index.get("count")),
        "nearest": all(isinstance(near, dict) and _is_near(near) for near in record["nearest"]),
        "verdicts": len(record["verdicts"]) == 1 and _is_verdict(record["verdicts"][0]),
        "models": all(isinstance(model, dict) for model in record["models"]),
        "limits": all(isinstance(limit, dict) and _is_share(limit.get("limit")) for limit in by),
    }  # fmt: skip
    for key, good in sound.items():
        if not good:
            raise AMGError(f"The record is damaged: {key} is not as amg-report/2 says.")
    return record


def _is_near(near: Record) -> bool:
    second = near.get("composition")
    numbers = near.get("similarity"), near.get("score"), 0.0 if second is None else second
    return _is_row(near.get("row")) and all(map(_is_number, numbers))


def _is_verdict(found: object) -> bool:
    if not isinstance(found, dict) or not _is_row(found.get("neighbor")):
        return False
    texts = (found.get(key) for key in ("source", "caption", "outcome", "reason", "words"))
    numbers = (found.get(key) for key in ("similarity", "threshold", "score", "zncc"))
    return all(isinstance(text, str) for text in texts) and all(map(_is_number, numbers))


def _is_row(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1  # type: ignore[operator]  # a number


def _is_number(value: object) -> bool:
    """Whether it is a finite number, of a size that scores have."""
    return type(value) in (int, float) and -1e6 < value < 1e6  # type: ignore[operator]  # a number
