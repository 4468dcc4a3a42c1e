"""From lines to figures, with 95 % intervals over prompts. Pure functions.

Pictures of one prompt are not independent of each other, so intervals come from prompts that are drawn
anew, each with all of its pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from index_tools import intervals

from .judges import PROTOCOLS
from .prompts import TYPES
from .records import Line
from .run import DETECTORS, HARD, MEMORISED, ORDINARY

Cell = tuple[float, float | None, float | None] | None  # value, low, high; None: not measured
Row = dict[str, Cell]
Groups = Sequence[np.ndarray]  # of each prompt the values of its pictures
GIB = 2**30


def by_prompt(lines: Iterable[Line], value: Callable[[Line], float | None]) -> list[np.ndarray]:
    """Of each prompt the values of its pictures. Those that were not measured are left out."""
    found: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        one = value(line)
        if one is not None:
            found.setdefault((line["list"], line["number"]), []).append(float(one))
    return [np.array(values) for values in found.values()]


def _cell(groups: Groups, figure: Callable[[np.ndarray], float]) -> Cell:
    if not groups:
        return None
    if len({len(values) for values in groups}) == 1:  # as many pictures of each prompt
        low, high = intervals.bootstrap(np.stack(groups), lambda part: figure(part.ravel()))
    else:
        ragged = np.empty(len(groups), object)
        ragged[:] = groups
        low, high = intervals.bootstrap(ragged, lambda part: figure(np.concatenate(list(part))))
    return figure(np.concatenate(list(groups))), low, high


def mean(groups: Groups) -> Cell:
    return _cell(groups, lambda values: float(values.mean()))


def percentile(groups: Groups, percent: float) -> Cell:
    return _cell(groups, lambda values: float(np.percentile(values, percent)))


def largest(groups: Groups) -> Cell:
    """An extreme has no interval."""
    return (float(np.concatenate(list(groups)).max()), None, None) if groups else None


def share(groups: Groups) -> Cell:
    """Percentage of the values that are 1.

    If all or none of them are, the bootstrap would say [0, 0]. Then it is Wilson's interval for the number
    of prompts, as if each had one picture.
    """
    made = _cell(groups, lambda values: 100 * float(values.mean()))
    if made is None or 0 < made[0] < 100:
        return made
    return intervals.share(len(groups) if made[0] else 0, len(groups))


def sscd(protocol: str, which: str) -> Callable[[Line], float | None]:
    return lambda line: line["sscd"].get(protocol, {}).get(which)


def above(value: Callable[[Line], float | None], limit: float) -> Callable[[Line], float | None]:
    def hit(line: Line) -> float | None:
        one = value(line)
        return None if one is None else float(one > limit)

    return hit


def copied(lines: Sequence[Line], protocol: str, which: str) -> Row:
    """The columns of the papers' tables, by one protocol. `which`: "any" picture, or the prompt's "own"."""
    value = sscd(protocol, which)
    groups = by_prompt(lines, value)
    return {
        "pictures": _count(groups),
        "mean": mean(groups),
        "95th percentile": percentile(groups, 95),
        "top 1": largest(groups),
        "% > 0.5": share(by_prompt(lines, above(value, 0.5))),
        "% > 0.4": share(by_prompt(lines, above(value, 0.4))),
    }


def _count(groups: Groups) -> Cell:
    return float(sum(map(len, groups))), None, None


def others(lines: Sequence[Line], plain: Mapping[tuple[str, int, int], str]) -> Row:
    """What does not depend on SSCD. `plain` has the hashes of the plain pictures."""

    def equal(line: Line) -> float | None:
        twin = plain.get(place(line))
        return None if twin is None else float(twin == line["sha256"])

    return {
        "pictures": (float(len(lines)), None, None),
        "own checks: copies %": share(by_prompt(lines, lambda line: line["outcome"] == "copy")),
        "guard acted %": share(by_prompt(lines, lambda line: line["acted"])),
        "bit-identical %": share(by_prompt(lines, equal)),
        "CLIP score": mean(by_prompt(lines, lambda line: line.get("clip"))),
        "s/picture": mean(by_prompt(lines, lambda line: line["seconds"])),
        "rows of the denoiser": mean(by_prompt(lines, lambda line: line["rows"])),
        "peak GiB": largest(by_prompt(lines, lambda line: line["peak"] and line["peak"] / GIB)),
    }


def place(line: Line) -> tuple[str, int, int]:
    return line["list"], line["number"], line["seed"]


def groups_of(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The groups of prompts that are reported apart: VM, TM, all memorised, hard negatives, ordinary."""
    memorised = [line for line in lines if line["list"] == MEMORISED]
    parts = {f"memorised, {kind}": [x for x in memorised if x["type"] == kind] for kind in TYPES}
    parts |= {"memorised": memorised}
    for name, title in ((HARD, "hard negatives"), (ORDINARY, "ordinary")):
        parts[title] = [line for line in lines if line["list"] == name]
    return {title: part for title, part in parts.items() if part}


def tables(lines: Sequence[Line]) -> dict[str, dict[str, Row]]:
    """{title: {method: row}} of everything that was drawn."""
    drawn = [line for line in lines if line["method"] != DETECTORS]
    plain = {place(line): line["sha256"] for line in drawn if line["method"] == "plain"}
    methods = list(dict.fromkeys(line["method"] for line in drawn))
    made: dict[str, dict[str, Row]] = {}
    for title, part in groups_of(drawn).items():
        each = {name: [line for line in part if line["method"] == name] for name in methods}
        each = {name: some for name, some in each.items() if some}
        measured = {name for line in part for name in line["sscd"]}
        for protocol in (one for one in PROTOCOLS if one.name in measured):
            for which in ("own", "any"):
                rows = {name: copied(some, protocol.name, which) for name, some in each.items()}
                if any(row["mean"] for row in rows.values()):
                    made[f"{title}: SSCD ({protocol.name}), {which} picture"] = rows
        made[title] = {name: others(some, plain) for name, some in each.items()}
    return made
