"""The report of a guarded generation, a JSON object that is saved with the picture.

Its schema is ``amg-report/2``. Keys may be added. These stay:

=================== ===============================================================================
schema              "amg-report/2"
amg                 version of the plugin
versions            {"torch": …, "python": …}, and entries of the host, such as "comfyui"
index               {"name", "hash", "count"} of the index
descriptor          spec of the descriptor: {"id", "metric", "preprocessing", "scales", …}
settings            preset, strengths, "schedule" (thresholds), see `run.Settings`
seed                seed of the run, or null
retries             largest number of retries, if the host reports it
evaluations         number of model evaluations that the guard compared in the first drawing
guarded_evaluations number of evaluations at which the guard acted, for each sample
largest_similarity  largest similarity at any evaluation, for each sample
left_out_words      for each sample the words that its reduced prompts lacked, one text for each of them.
                    Not in a report without names
neighbors           {row id: {"source", "caption"}} of every nearest picture at any evaluation
steps               the curve of the first drawing, see `run.StepRecord`
judged_by           decoder of the finished pictures: "vae", or the guard's decoder, "" if none
not_judged          why the finished pictures were not checked, in English, "" if they were
not_judged_code     the same as a code, one of NOT_JUDGED, or ""
verdicts            one for each sample, on its final picture: {"sample", "attempt", "seed", "copy",
                    "words", and the fields of `verdict.Verdict`: outcome, checks, reason, similarity,
                    threshold, neighbor, source, caption, …}. likeness, composition: both checks on
                    the scale that people read (`metrics.likeness`). near: whether it is no copy but
                    near a limit. nearest: `verdict.Near`, not in a report without names and not in
                    attempts. attempt: the drawing that it is from.
                    seed: of the noise that it started from, at the same place of the batch, or null.
                    outcome: "no_copy", "cannot_tell", "copy" (returned as it is) or "blanked" (a copy,
                    replaced by an empty picture). words: the same in English
attempts            every drawing, with the first: {"samples", "verdicts"}, and for later ones also
                    "settings", "steps", "seed" (of the noise that the sampler added), "seeds" (of the
                    noise that each of the samples started from) and "suspects" (samples that were
                    steered from the first step). With these a picture can be drawn again as it is
unseen_steps        number of steps, in all drawings, at which the guard was not called, if the host
                    reports it
blanked_previews    samples whose second output was a copy and was blanked, for `if_still_copied` other
                    than "say so", if the host reports it
before              what the host says of the run before its result, as codes (`messages`), if anything
story               only for a report in a picture: its result as codes, see `story`
left_out            only for a report in a picture: parts that were too long or too private, see
                    `travelling`
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
from .descriptors import registry
from .descriptors.base import DescriptorSpec
from .errors import AMGError
from .files import brief
from .limits import COPY
from .messages import ENGLISH, Message, message, to_json
from .messages import words as in_words
from .retry import Attempt, Outcome
from .run import SamplingRun
from .similarity.metrics import likeness
from .similarity.verdict import CANNOT_TELL, NO_COPY, message_of, reason_of

SCHEMA = "amg-report/2"
NOT_JUDGED = NOTHING_DRAWN, NOTHING_DECODES, NOT_FINISHED, NOT_ENDED = (
    "nothing_drawn", "nothing_decodes", "not_finished", "not_ended",
)  # fmt: skip
BLANKED = "blanked"  # the outcome of a copy that was replaced by an empty picture
LIMIT = 24_000  # characters in a picture: some programs save them as EXIF, which holds 64 KB in all
WORDS = 60  # largest number of characters of words that were left out, in a sentence
KEY = "amg_report"  # the metadata entry in a picture
SAY, BLANK, STOP = POLICIES = ("say so", "blank", "stop")
# How much of the report is saved in a picture: an index can be private, and pictures are shared.
ANONYMOUS, FULL, OFF = TELLS = ("anonymous", "full", "off")
_SHAPE = {
    "schema": str, "amg": str, "versions": dict, "index": dict, "descriptor": dict,
    "settings": dict, "evaluations": int, "guarded_evaluations": list,
    "largest_similarity": list, "neighbors": dict, "steps": list, "judged_by": str,
    "not_judged": str, "verdicts": list, "attempts": list,
}  # fmt: skip
_OPEN = (  # keys that hold no names
    *_SHAPE, "not_judged_code", "seed", "retries", "if_still_copied", "acted_on", "host", "unseen_steps",
    "blanked_previews", "before",
)  # fmt: skip
_OF_ATTEMPT = "samples", "seed", "seeds", "suspects", "settings", "steps"  # the same, of a drawing


def compose(
    run: dict[str, Any],
    outcome: Outcome | None = None,
    *,
    judged_by: str = "",
    not_judged: str = "",
    if_still_copied: str = SAY,
    seed: int | None = None,
    seeds: list[int | None] | None = None,
    starts: list[list[int | None]] | None = None,
    versions: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The report of one run.

    Parameters
    ----------
    run : dict
        `SamplingRun.report` of the first drawing.
    outcome : Outcome, optional
        The result of `retry.until_no_copy`. Without it `not_judged`, one of NOT_JUDGED, says why.
    judged_by : str
        The decoder of the finished pictures.
    if_still_copied : one of POLICIES
        What happens to pictures that are still copies.
    seeds : list, optional
        The seed of each drawing.
    starts : list, optional
        For each drawing the seed of the noise that each sample of the batch started from.
    more
        Further entries for the report, JSON-serialisable.
    """
    python = {"torch": torch.__version__, "python": platform.python_version()}
    head = {"schema": SCHEMA, "amg": __version__, "versions": python | (versions or {})}
    because = in_words(message(not_judged)) if not_judged else ""
    written = head | run | {"seed": seed, "judged_by": judged_by}
    written |= {"not_judged": because, "not_judged_code": not_judged}
    written |= {"if_still_copied": if_still_copied, "verdicts": [], "attempts": []} | more
    if outcome is not None:
        blank = {"outcome": BLANKED} if if_still_copied == BLANK else {}
        starts = starts or [[seed] * len(outcome.verdicts)] * len(outcome.attempts)
        written["verdicts"] = [
            {"sample": i, "attempt": kept, "seed": starts[kept][i]}
            | verdict.to_json()
            | (blank if verdict.copy else {})
            for i, (verdict, kept) in enumerate(zip(outcome.verdicts, outcome.kept, strict=True))
        ]
        every = seeds or [seed] * len(outcome.attempts)
        drawn = zip(outcome.attempts, every, starts, strict=True)
        written["attempts"] = [_attempt(number, *each) for number, each in enumerate(drawn)]
    return written


def _attempt(
    number: int, attempt: Attempt, seed: int | None, starts: list[int | None]
) -> dict[str, Any]:
    written: dict[str, Any] = {
        "samples": attempt.samples,
        "verdicts": [_without_nearest(verdict.to_json()) for verdict in attempt.verdicts],
    }
    if number > 0:
        written |= {"seed": seed, "seeds": [starts[i] for i in attempt.samples]}
        written |= {"suspects": list(attempt.suspects)}
        written |= {key: attempt.report[key] for key in ("settings", "steps")}
    return written


def _without_nearest(verdict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in verdict.items() if key != "nearest"}


def travelling(report: dict[str, Any], tells: str = ANONYMOUS) -> dict[str, Any]:
    """The report for a picture's metadata, with 4 decimals and at most LIMIT characters if possible.

    `tells` is FULL, or ANONYMOUS for a report without names (`anonymous`).

    While it is too long, the following are left out in this order, and listed in "left_out": the sizes of
    the terms at each step, the curves of later drawings, neighbours of single steps, the curve. Verdicts,
    index, settings and versions always stay.
    """

    def without(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in step.items() if key != "moved"} for step in steps]

    written: dict[str, Any] = anonymous(report) if tells == ANONYMOUS else report
    written = _rounded(written | {"story": to_json(story(written))})
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
    """The report without names and captions from the index. "left_out" then contains "names".

    Whoever has the index can still check the report: the hash identifies the index, and row ids identify
    the pictures. To others these say nothing, not even whether a certain picture is in the index.
    """

    def verdict(found: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in found.items() if not isinstance(value, str)}
        kept.pop("nearest", None)
        kept |= {
            "outcome": found["outcome"],
            "reason": found["reason"],
            "source": "",
            "caption": "",
        }
        return kept | {"words": in_words(message_of(kept))}

    def attempt(made: dict[str, Any]) -> dict[str, Any]:
        verdicts = [verdict(found) for found in made["verdicts"]]
        return {key: made[key] for key in _OF_ATTEMPT if key in made} | {"verdicts": verdicts}

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
    """Raise AMGError, with the name of the wrong entry, unless `report` fits the schema."""
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise AMGError(
            f"This is no {SCHEMA} report: it may come from another version of the plugin."
        )
    for key, kind in _SHAPE.items():
        if not isinstance(report.get(key), kind):
            raise AMGError(f"The report is damaged: {key} is not a {kind.__name__}.")


def drawings(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """For each drawing a title and a report with the steps of that drawing, for `plot.curve`."""
    name = report["index"]["name"]
    found = [(f"likeness to {name}", report)]
    for number, attempt in enumerate(report["attempts"][1:], 1):
        again = f"{_pictures(attempt['samples'])} drawn again, {number}: likeness to {name}"
        found.append((again, report | {"steps": attempt["steps"]}))
    return found


def step(run: SamplingRun) -> list[Message]:
    """Messages on the latest step of a run, for a live display."""
    if not run.records:
        return [message("looking")]
    record, number, total = run.records[-1], len(run.records), run.expected_steps
    return [
        message("step", step=number, total=total)
        if total
        else message("step_of_unknown", step=number),
        message("seen", score=likeness(max(record.score))),
        message("guarding", active=sum(record.active), count=len(record.active)),
    ]


def words(report: dict[str, Any], language: str = ENGLISH) -> str:
    """The result of the run in one line, in a language."""
    return in_words(story(report), language)


def story(report: dict[str, Any]) -> list[Message]:
    """Messages on the result of the run, the gravest first."""
    gaps = _gaps(report)
    if report["not_judged"]:
        return [message("not_judged"), _why(report), *gaps]
    verdicts = report["verdicts"]
    bad = _copies(report)
    unsure = [
        message("near_limit_of", picture=v["sample"] + 1, source=v["source"] or str(v["neighbor"]))
        for v in verdicts
        if v.get("near")
    ]
    unsure += [
        message("cannot_tell_of", picture=v["sample"] + 1, reason=reason_of(v))
        for v in verdicts
        if v["outcome"] == CANNOT_TELL
    ]
    if bad:
        lines = [_still(bad), message_of(bad[0])]
        lines += [message("replaced")] if bad[0]["outcome"] == BLANKED else []
        lines += unsure
    else:
        lines = [*unsure, message("measured", count=len(verdicts)), _seen_by(report)]
        lines += [message("no_copy")] if any(v["outcome"] == NO_COPY for v in verdicts) else []
    lines += [
        message(
            "left_out", picture=i + 1, words=" / ".join(brief(words, WORDS) for words in lacking)
        )
        for i, lacking in enumerate(report.get("left_out_words", ()))
        if lacking
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


def misses(report: dict[str, Any]) -> list[Message]:
    """What the descriptor of a checked run overlooks, [] if nothing was checked or that is not known."""
    if not report["verdicts"]:
        return []
    found = registry.of(DescriptorSpec.from_json(report["descriptor"])).misses
    return [] if found is None else [found]


def story_of_one(report: dict[str, Any]) -> list[Message]:
    """The same as `story` for a report on one picture that the reader sees beside it."""
    (found,) = report["verdicts"]
    if found["copy"]:
        lines = [message("still_a_copy"), message_of(found)]
        return lines + ([message("replaced")] if found["outcome"] == BLANKED else [])
    clear = found["outcome"] != CANNOT_TELL and not found.get("near")
    first = message("no_copy") if clear else message_of(found)
    if found["attempt"] > 0:
        again = message("drawn_again", before=_before(report, found), after=_close(found))
        return [first, again]
    return [first, message("closest", score=_close(found), limit=COPY)]


def refusal(report: dict[str, Any]) -> str:
    """The error message for `if_still_copied` "stop": the picture, its neighbour, and what to change."""
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
    """The reports in the metadata of a saved picture, by the id of the node that made each.

    Raises
    ------
    AMGError
        The file has no report, or it is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            text = picture.info.get(KEY)
    except Exception as error:  # decoders can raise anything on damaged files
        raise AMGError(
            f"{path} cannot be read as a picture ({brief(error)}). Take the file that Save Image wrote."
        ) from error
    if text is None:
        raise AMGError(
            f"{path} has no report: it was not drawn under guard, or was saved by a program "
            f"that drops metadata. Take the file that Save Image wrote."
        )
    try:
        reports: dict[str, dict[str, Any]] = json.loads(text)
        for report in reports.values():
            check(report)
        return reports
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
    """Why the finished pictures were not checked."""
    code = report.get("not_judged_code")
    return (
        message(code) if code in NOT_JUDGED else message("as_written", words=report["not_judged"])
    )


def _pictures(samples: list[int]) -> str:
    return ("picture " if len(samples) == 1 else "pictures ") + ", ".join(
        str(i + 1) for i in samples
    )


def _close(verdict: dict[str, Any]) -> float:
    return likeness(verdict["score"])


def _before(report: dict[str, Any], verdict: dict[str, Any]) -> float:
    """Likeness of the first drawing of that picture."""
    first = report["attempts"][0]
    return _close(first["verdicts"][first["samples"].index(verdict["sample"])])


def _seen_by(report: dict[str, Any]) -> Message:
    by = report["judged_by"]
    return message("by_vae") if by == "vae" else message("by_decoder", decoder=by)
