"""What a guarded sampling leaves behind: a report that can stand alone, and travels in the picture.

``amg-report/2`` is a JSON object. Keys may be added; these stay:

=================== ===============================================================================
schema              "amg-report/2"; what was "amg-report/1" is still read: it has no codes
amg                 version of the plugin
versions            {"torch": …, "python": …, and what the host adds, such as "comfyui": …}
index               {"name", "hash", "count"}: which pictures were guarded against
descriptor          how they were compared: {"id", "metric", "preprocessing", "scales", …}
settings            preset, strengths, "schedule" (thresholds); see `run.Settings`
seed                of the run, or null
evaluations         model evaluations that the guard saw in the first drawing
guarded_evaluations those it acted on, a number a sample
largest_similarity  a number a sample
neighbors           {row id: {"source", "caption"}} of every nearest picture on the way
steps               the curve of the first drawing; see `run.StepRecord`
judged_by           what decoded the finished pictures: "vae", or the guard's decoder; "" if nothing
not_judged          why the finished pictures were not measured, in English; "" if they were
not_judged_code     the same as a code: one of NOT_JUDGED, or ""
verdicts            one a sample, of what left: {"sample", "attempt", "copy", "words", and the fields of
                    `verdict.Verdict`: outcome, checks, reason, similarity, threshold, neighbor, source,
                    caption, …}. outcome: "no_copy", "cannot_tell", "copy" (left as it is) or "blanked"
                    (a copy, replaced by nothing). words: the same in English
attempts            every drawing, the first too: {"samples", "verdicts"}, and of the later ones
                    "settings", "steps" and "seed"
unseen_steps        steps, of all drawings, at which the guard was not asked; of hosts that tell
blanked_previews    samples whose second output was a copy and is blank, for `if_still_copied` other
                    than "say so"; of hosts that tell
left_out            only of a report in a picture: what was too long or too private for it, see `travelling`
=================== ===============================================================================
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import AMGError
from .files import brief
from .limits import COPY
from .messages import ENGLISH, Message, message
from .messages import words as in_words
from .retry import Attempt, Outcome
from .run import SamplingRun
from .similarity.verdict import CANNOT_TELL, NO_COPY, message_of, reason_of

SCHEMA = "amg-report/2"
EARLIER = ("amg-report/1",)
_NAMES = {"closeness": "score", "closeness_threshold": "score_threshold"}  # of EARLIER -> of SCHEMA
_OUTCOMES = {"clean": NO_COPY, "unsure": CANNOT_TELL}
NOT_JUDGED = NOTHING_DRAWN, NOTHING_DECODES, NOT_FINISHED, NOT_ENDED = (
    "nothing_drawn", "nothing_decodes", "not_finished", "not_ended",
)  # fmt: skip
BLANKED = "blanked"  # the outcome of a copy that left as a blank
LIMIT = 24_000  # characters in a picture: EXIF, where some programs put them, holds 64 KB of all
KEY = "amg_report"  # of a picture's metadata
SAY, BLANK, STOP = POLICIES = ("say so", "blank", "stop")
# What a picture carries: an index can be private, and a picture is made to be shown.
ANONYMOUS, FULL, OFF = TELLS = ("anonymous", "full", "off")
_SHAPE = {
    "schema": str, "amg": str, "versions": dict, "index": dict, "descriptor": dict,
    "settings": dict, "evaluations": int, "guarded_evaluations": list,
    "largest_similarity": list, "neighbors": dict, "steps": list, "judged_by": str,
    "not_judged": str, "verdicts": list, "attempts": list,
}  # fmt: skip
_OPEN = (  # keys that hold no names
    *_SHAPE, "not_judged_code", "seed", "if_still_copied", "acted_on", "host", "unseen_steps",
    "blanked_previews",
)  # fmt: skip


def compose(
    run: dict[str, Any],
    outcome: Outcome | None = None,
    *,
    judged_by: str = "",
    not_judged: str = "",
    if_still_copied: str = SAY,
    seed: int | None = None,
    seeds: list[int | None] | None = None,
    versions: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The report of one run.

    Parameters
    ----------
    run : dict
        Of the first drawing, as `SamplingRun.report` makes it.
    outcome : Outcome, optional
        Of the closed loop; without it `not_judged`, one of NOT_JUDGED, says why.
    if_still_copied : one of POLICIES
        What happens to copies that stayed.
    seeds : list, optional
        The seed of each drawing.
    more
        Further keys, JSON-able.
    """
    python = {"torch": torch.__version__, "python": platform.python_version()}
    head = {"schema": SCHEMA, "amg": __version__, "versions": python | (versions or {})}
    because = in_words(message(not_judged)) if not_judged else ""
    written = head | run | {"seed": seed, "judged_by": judged_by}
    written |= {"not_judged": because, "not_judged_code": not_judged}
    written |= {"if_still_copied": if_still_copied, "verdicts": [], "attempts": []} | more
    if outcome is not None:
        blank = {"outcome": BLANKED} if if_still_copied == BLANK else {}
        written["verdicts"] = [
            {"sample": i, "attempt": kept} | verdict.to_json() | (blank if verdict.copy else {})
            for i, (verdict, kept) in enumerate(zip(outcome.verdicts, outcome.kept, strict=True))
        ]
        every = seeds or [seed] * len(outcome.attempts)
        pairs = zip(outcome.attempts, every, strict=True)
        written["attempts"] = [_attempt(number, *pair) for number, pair in enumerate(pairs)]
    return written


def _attempt(number: int, attempt: Attempt, seed: int | None) -> dict[str, Any]:
    written: dict[str, Any] = {
        "samples": attempt.samples,
        "verdicts": [verdict.to_json() for verdict in attempt.verdicts],
    }
    if number > 0:
        written |= {"seed": seed} | {key: attempt.report[key] for key in ("settings", "steps")}
    return written


def travelling(report: dict[str, Any], tells: str = ANONYMOUS) -> dict[str, Any]:
    """As it goes into a picture: numbers to 4 decimals, and no longer than LIMIT if it can be.

    tells : ANONYMOUS, without what `anonymous` takes out, or FULL.

    Left out in turn, and named in "left_out" as "names" is: the terms' sizes at each step, the curves
    of later drawings, neighbours on the way, the curve. Verdicts, index, settings and versions always stay.
    """

    def without(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in step.items() if key != "moved"} for step in steps]

    written: dict[str, Any] = _rounded(anonymous(report) if tells == ANONYMOUS else report)
    attempts = written["attempts"]
    shorter: dict[str, Callable[[], dict[str, Any]]] = {
        "steps.moved": lambda: {
            "steps": without(written["steps"]),
            "attempts": [
                a | {"steps": without(a["steps"])} if "steps" in a else a for a in attempts
            ],
        },
        "attempts.steps": lambda: {
            "attempts": [{k: v for k, v in a.items() if k != "steps"} for a in attempts]
        },
        "neighbors": lambda: {"neighbors": {}},
        "steps": lambda: {"steps": []},
    }
    for name, change in shorter.items():
        if len(json.dumps(written)) <= LIMIT:
            break
        written = written | change() | {"left_out": [*written.get("left_out", []), name]}
    return written


def anonymous(report: dict[str, Any]) -> dict[str, Any]:
    """The report without a name or a caption of the index; "left_out" names "names".

    Who has the index can check it all the same: the hash says which index it is, and row ids say which
    pictures. To anybody else both say nothing, not even whether a picture that he has is in there.
    """

    def verdict(found: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in found.items() if not isinstance(value, str)}
        kept |= {
            "outcome": found["outcome"],
            "reason": found["reason"],
            "source": "",
            "caption": "",
        }
        return kept | {"words": in_words(message_of(kept))}

    def attempt(made: dict[str, Any]) -> dict[str, Any]:
        kept = {key: made[key] for key in ("samples", "seed", "settings", "steps") if key in made}
        return kept | {"verdicts": [verdict(found) for found in made["verdicts"]]}

    written = {key: value for key, value in report.items() if key in _OPEN}
    return written | {
        "index": {key: report["index"][key] for key in ("hash", "count")} | {"name": ""},
        "neighbors": {},
        "verdicts": [verdict(found) for found in report["verdicts"]],
        "attempts": [attempt(made) for made in report["attempts"]],
        "left_out": [*report.get("left_out", []), "names"],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def check(report: dict[str, Any]) -> None:
    """AMGError, naming the key, unless `report` has the schema's shape."""
    if not isinstance(report, dict) or report.get("schema") not in (SCHEMA, *EARLIER):
        raise AMGError(f"This is no {SCHEMA}: it may come from a newer version of the plugin.")
    for key, kind in _SHAPE.items():
        if not isinstance(report.get(key), kind):
            raise AMGError(f"The report is damaged: {key} is not a {kind.__name__}.")


def current(report: dict[str, Any]) -> dict[str, Any]:
    """A checked report of EARLIER with the names of SCHEMA; its verdicts keep the words they came with."""
    if report["schema"] == SCHEMA:
        return report

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {_NAMES.get(key, key): renamed(each) for key, each in value.items()}
        return [renamed(each) for each in value] if isinstance(value, list) else value

    def verdict(found: dict[str, Any]) -> dict[str, Any]:
        return found | {"outcome": _OUTCOMES.get(found["outcome"], found["outcome"])}

    verdicts = [verdict(found) for found in report["verdicts"]]
    new: dict[str, Any] = renamed(report | {"schema": SCHEMA, "verdicts": verdicts})
    return new


def drawings(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, report with the steps of that drawing) of every drawing, for `plot.curve`."""
    name = report["index"]["name"]
    found = [(f"likeness to {name}", report)]
    for number, attempt in enumerate(report["attempts"][1:], 1):
        again = f"{_pictures(attempt['samples'])} drawn again, {number}: likeness to {name}"
        found.append((again, report | {"steps": attempt["steps"]}))
    return found


def step(run: SamplingRun) -> list[Message]:
    """The latest step of a run, for a live display."""
    if not run.records:
        return [message("looking")]
    record, number, total = run.records[-1], len(run.records), run.expected_steps
    return [
        message("step", step=number, total=total)
        if total
        else message("step_of_unknown", step=number),
        message("seen", score=max(0.0, *record.score)),
        message("guarding", active=sum(record.active), count=len(record.active)),
    ]


def words(report: dict[str, Any], language: str = ENGLISH) -> str:
    """What became of the run, in one line for the artist."""
    return in_words(story(report), language)


def story(report: dict[str, Any]) -> list[Message]:
    """What became of the run."""
    gaps = _gaps(report)
    if report["not_judged"]:
        return [message("not_judged"), _why(report), *gaps]
    verdicts = report["verdicts"]
    bad = _copies(report)
    lines = [message("measured", count=len(verdicts)), _seen_by(report)]
    if bad:
        lines = [_still(bad), message_of(bad[0])]
        lines += [message("replaced")] if bad[0]["outcome"] == BLANKED else []
    elif any(v["outcome"] == NO_COPY for v in verdicts):
        lines.append(message("no_copy"))
    lines += [
        message("cannot_tell_of", picture=v["sample"] + 1, reason=reason_of(v))
        for v in verdicts
        if v["outcome"] == CANNOT_TELL
    ]
    again = [v for v in verdicts if v["attempt"] > 0 and v not in bad]
    lines += [
        message(
            "drawn_again_one", picture=v["sample"] + 1, before=_before(report, v), after=_close(v)
        )
        for v in again
    ]
    if not bad and not again and verdicts:
        closest = max(map(_close, verdicts))
        lines.append(message("closest", score=closest, limit=COPY))
    return lines + gaps


def story_of_one(report: dict[str, Any]) -> list[Message]:
    """The same of a report on one picture, which who reads it has before him."""
    (found,) = report["verdicts"]
    if found["copy"]:
        lines = [message("still_a_copy"), message_of(found)]
        return lines + ([message("replaced")] if found["outcome"] == BLANKED else [])
    first = message_of(found) if found["outcome"] == CANNOT_TELL else message("no_copy")
    if found["attempt"] > 0:
        again = message("drawn_again", before=_before(report, found), after=_close(found))
        return [first, again]
    return [first, message("closest", score=_close(found), limit=COPY)]


def refusal(report: dict[str, Any]) -> str:
    """What to tell an artist who asked for a stop: the picture, its neighbour, what to change."""
    first, *rest = _copies(report)
    more = f" (and {len(rest)} more of the batch)" if rest else ""
    return (
        f"Stopped: picture {first['sample'] + 1} of {len(report['verdicts'])}{more} is still too "
        f"close to {first['source']} in index {report['index']['name']} after "
        f"{len(report['attempts'])} drawing(s). {first['words']}. Choose preset strong, raise "
        f"retries, turn on new_noise, or change prompt or seed. To get the picture all the same, "
        f"set if_still_copied to '{SAY}'; if it may be copied, use Mute Pictures."
    )


def of_picture(path: str | Path) -> dict[str, dict[str, Any]]:
    """The reports in a saved picture's metadata, by the id of the node that made each.

    Raises
    ------
    AMGError
        There is none in this file, or it is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            text = picture.info.get(KEY)
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise AMGError(
            f"{path} cannot be read as a picture ({brief(error)}). Take the file that Save Image wrote."
        ) from error
    if text is None:
        raise AMGError(
            f"{path} carries no report: it was not drawn under guard, or was saved by a program "
            f"that drops metadata. Take the file that Save Image wrote."
        )
    try:
        reports: dict[str, dict[str, Any]] = json.loads(text)
        for report in reports.values():
            check(report)
        return {node: current(report) for node, report in reports.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise AMGError(
            f"The report in {path} is damaged ({brief(error)}). Take the file that Save Image wrote."
        ) from error


def _copies(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [v for v in report["verdicts"] if v["copy"]]


def _still(bad: list[dict[str, Any]]) -> Message:
    pictures = [v["sample"] + 1 for v in bad]
    if len(pictures) == 1:
        return message("still_a_copy_one", picture=pictures[0])
    return message("still_a_copy_more", pictures=pictures)


def _gaps(report: dict[str, Any]) -> list[Message]:
    lines = []
    if report.get("unseen_steps", 0):
        lines.append(message("unseen_steps", count=report["unseen_steps"]))
    if report.get("blanked_previews"):
        pictures = [i + 1 for i in report["blanked_previews"]]
        lines.append(message("blanked_previews", pictures=pictures))
    return lines


def _why(report: dict[str, Any]) -> Message:
    """Why nothing was judged."""
    code = report.get("not_judged_code")
    return (
        message(code) if code in NOT_JUDGED else message("as_written", words=report["not_judged"])
    )


def _pictures(samples: list[int]) -> str:
    return ("picture " if len(samples) == 1 else "pictures ") + ", ".join(
        str(i + 1) for i in samples
    )


def _close(verdict: dict[str, Any]) -> float:
    close: float = verdict["score"]
    return max(0.0, close)


def _before(report: dict[str, Any], verdict: dict[str, Any]) -> float:
    """Likeness of the first drawing of that picture."""
    first = report["attempts"][0]
    return _close(first["verdicts"][first["samples"].index(verdict["sample"])])


def _seen_by(report: dict[str, Any]) -> Message:
    by = report["judged_by"]
    return message("by_vae") if by == "vae" else message("by_decoder", decoder=by)
