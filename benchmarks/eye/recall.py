"""Table 3: how often an edited picture is recognised, at one false alarm in a hundred.

Every source is edited in every way. An edited picture is recognised if the row nearest to it, or to
its mirror image, is its own source (or of its family, see `pictures`) and more similar than the
threshold.

The threshold of a descriptor is the 99 % quantile of how similar unrelated pictures are to the row
nearest to them. `compact` was trained on the drawings in the index, so drawings cannot tell what
unrelated pictures are to it. Therefore the unrelated ones are the very pictures that are to be
recognised, photographs and held-out stamps, unedited and in every edit, each asked for in the index
without its own family: all descriptors see the same ones. They are many looks at few pictures, and
half-formed or blurred ones are among them, which resemble more than finished ones do.

Where an edit brings other pictures in (a collage), they are others of its kind, and leave the index
for that query: naming them would not be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from amg_core.sheet import Group, Tile, draw

from ..harness import Table, Watch, markdown, wilson
from . import edits
from .pictures import PHOTOGRAPH, STAMP, Library
from .setting import Setting

FALSE_ALARMS = 0.01


@dataclass(frozen=True)
class Answer:
    """What one descriptor made of one edited picture.

    source, named : row numbers; unrelated, unrelated_named : similarity and row without its family.
    """

    edit: str
    source: int
    similarity: float
    named: int
    unrelated: float
    unrelated_named: int


def run(setting: Setting) -> Table:
    library, answers = setting.collection, _ask(setting)
    figures: dict = {"sources": len(library.sources), "rows": len(library.rows), "eyes": {}}
    for eye in setting.eyes:
        mine = answers[eye.name]
        limit = threshold([a.unrelated for a in mine])
        figures["eyes"][eye.name] = _figures(library, mine, limit)
        _sheets(setting, eye.name, mine, limit)
    figures["answers"] = {name: [asdict(a) for a in mine] for name, mine in answers.items()}
    return Table(_text(figures), figures)


def threshold(unrelated: list[float]) -> float:
    """At most `FALSE_ALARMS` of these lie above it."""
    return float(np.quantile(unrelated, 1 - FALSE_ALARMS, method="higher"))


def edited(setting: Setting, edit: str, source: int):
    """The edited picture, and the rows of other pictures that are in it."""
    library, seed = setting.collection, (setting.seed, source)
    partners = _partners(library, source, edits.PARTNERS.get(edit, 0), seed)
    images = [library.rows[row].load() for row in partners]
    return edits.apply(edit, library.rows[source].load(), images, seed), partners


def right(library: Library, answer: Answer) -> bool:
    return answer.named in library.families[answer.source]


def _partners(library: Library, source: int, count: int, seed: tuple[int, ...]) -> list[int]:
    """`count` other sources of the same kind."""
    kind = library.rows[source].kind
    others = [row for row in library.sources if library.rows[row].kind == kind and row != source]
    return np.random.default_rng(seed).permutation(others)[:count].tolist()


def _ask(setting: Setting) -> dict[str, list[Answer]]:
    library, watch = setting.collection, Watch()
    answers: dict[str, list[Answer]] = {eye.name: [] for eye in setting.eyes}
    for edit in edits.EDITS:
        for source in setting.collection.sources:
            image, partners = edited(setting, edit, source)
            inside = frozenset().union(*(library.families[row] for row in partners))
            without = [inside - library.families[source], inside | library.families[source]]
            for eye in setting.eyes:
                own, other = eye.nearest(eye.look(image), without)
                answers[eye.name].append(Answer(edit, source, *own, *other))
        watch.tell(edit)
    return answers


def _figures(library: Library, answers: list[Answer], limit: float) -> dict:
    per_edit = {e: _share(library, [a for a in answers if a.edit == e], limit) for e in edits.EDITS}
    changed = [a for a in answers if a.edit != edits.UNEDITED]
    kinds = {
        kind: _share(library, [a for a in changed if library.rows[a.source].kind == kind], limit)
        for kind in (PHOTOGRAPH, STAMP)
    }
    every = _share(library, changed, limit)
    return {"threshold": limit, "edits": per_edit, "kinds": kinds, "all": every}


def _share(library: Library, answers: list[Answer], limit: float) -> dict:
    count = len(answers)
    first = [a for a in answers if right(library, a)]
    hits = sum(a.similarity > limit for a in first)
    low, high = wilson(hits, count)
    alarms = sum(a.unrelated > limit for a in answers)
    return {
        "count": count,
        "recall": hits / max(1, count),
        "interval": [low, high],
        "rank1": len(first) / max(1, count),
        "false_alarms": alarms / max(1, count),
    }


def _text(figures: dict) -> str:
    eyes = figures["eyes"]
    lines = [_line(edit, eyes, lambda e, key=edit: e["edits"][key]) for edit in edits.EDITS]
    lines += [
        _line("**all edits, photographs**", eyes, lambda e: e["kinds"][PHOTOGRAPH]),
        _line("**all edits, stamps**", eyes, lambda e: e["kinds"][STAMP]),
        _line("**all edits**", eyes, lambda e: e["all"]),
    ]
    lines.append(["threshold", *(f"{eye['threshold']:.3f}" for eye in eyes.values())])
    note = (
        f"Recognised at 1 % false alarms (95 % interval) / nearest whatever the threshold, in "
        f"%. {figures['sources']} sources per edit, {figures['rows']} rows. Lines in bold hold the same "
        f"pictures again and again: no intervals.\n\n"
    )
    return "### Table 3: edited copies\n\n" + note + markdown(["edit", *eyes], lines)


def _line(name: str, eyes: dict, pick: Callable[[dict], dict]) -> list[str]:
    cells = []
    for eye in eyes.values():
        one = pick(eye)
        low, high = one["interval"]
        interval = "" if name.startswith("*") else f" ({100 * low:.0f}–{100 * high:.0f})"
        cells.append(f"{100 * one['recall']:.0f}{interval} / {100 * one['rank1']:.0f}")
    return [name, *cells]


def _sheets(setting: Setting, name: str, answers: list[Answer], limit: float) -> None:
    """Misses in the edits that are recognised best come first; false alarms by similarity."""
    library = setting.collection
    found = [right(library, a) and a.similarity > limit for a in answers]
    counts = {e: sum(f for f, a in zip(found, answers, strict=True) if a.edit == e)
              for e in edits.EDITS}  # fmt: skip
    missed = [a for a, f in zip(answers, found, strict=True) if not f]
    missed.sort(key=lambda a: (-counts[a.edit], right(library, a), -a.similarity))
    alarms = sorted(answers, key=lambda a: -a.unrelated)

    def tiles(a: Answer, *rows: int) -> list[Tile]:
        images = [edited(setting, a.edit, a.source)[0], *(library.rows[r].load() for r in rows)]
        return [Tile(image) for image in images]

    def miss(a: Answer) -> Group:
        if right(library, a):
            return Group(tiles(a, a.source), f"{a.edit}: its own, at {a.similarity:.3f}: too low")
        return Group(
            tiles(a, a.source, a.named), f"{a.edit}: {_named(library, a.similarity, a.named)}"
        )

    def alarm(a: Answer) -> Group:
        title = _named(library, a.unrelated, a.unrelated_named)
        return Group(tiles(a, a.unrelated_named), f"{a.edit}: {title}")

    sheets = {
        "misses": (map(miss, _few(missed, "edit", 2)), "Misses: query, source, named instead"),
        "false_alarms": (map(alarm, _few(alarms, "source", 1)), "False alarms: query, row named"),
    }
    for kind, (groups, heading) in sheets.items():
        sheet = draw([*groups], heading=f"{heading}. Threshold {limit:.3f}", columns=3, across=3)
        sheet.save(setting.out / f"{kind}_{name}.png")


def _named(library: Library, similarity: float, row: int) -> str:
    return f"named at {similarity:.3f} {library.rows[row].path.stem}"


def _few(answers: list[Answer], attribute: str, most: int, count: int = 24) -> list[Answer]:
    """The first `count`, no more than `most` with the same value of an attribute."""
    taken: dict = {}
    kept = []
    for answer in answers:
        key = getattr(answer, attribute)
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= most:
            kept.append(answer)
    return kept[:count]
