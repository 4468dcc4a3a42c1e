"""Draws and grades: one prompt after the other, by each method, with all its seeds at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg_core.errors import AMGError
from amg_core.similarity.verdict import verdict
from amg_demo.sheet import to_image
from index_tools.evaluate import ClipScorer

from . import detectors, records
from .judges import Embed, References
from .methods import Drawn, Method
from .model import Model, Spent, measured
from .prompts import Prompt

MEMORISED, HARD, ORDINARY = LISTS = ("memorised", "hard", "ordinary")
DETECTORS = "detectors"  # the name under which their scores are kept


class Asked(NamedTuple):
    """A prompt of one of `LISTS`, and which training pictures are its own, (N,) bool."""

    list: str
    prompt: Prompt
    own: Tensor


@dataclass(frozen=True)
class Judges:
    """What grades. `clip` None: no CLIP score."""

    embed: Mapping[str, Embed]
    references: References
    clip: ClipScorer | None = None


def seeds_of(prompt: Prompt, first: int, count: int) -> list[int]:
    """Its seeds, the same for every method, and different for each prompt of a list."""
    return [first + count * prompt.number + i for i in range(count)]


def units(
    asked: Sequence[Asked], methods: Sequence[Method], done: set[tuple[str, str, int]]
) -> Iterator[tuple[Asked, Method]]:
    """What is still to be drawn. A prompt's methods follow each other, plain first."""
    for one in asked:
        for method in methods:
            if (method.name, one.list, one.prompt.number) not in done:
                yield one, method


def draw(
    model: Model, judges: Judges, one: Asked, method: Method, seeds: Sequence[int], out: Path
) -> list[records.Line]:
    """One line for each picture of a prompt by a method. The pictures are saved under `out`."""
    drawn, spent = measured(model, lambda: method.draw(model, one.prompt.text, seeds))
    return [
        _line(model, judges, one, method.name, seed, drawn, i, spent, out)
        for i, seed in enumerate(seeds)
    ]


def _line(
    model: Model, judges: Judges, one: Asked, method: str, seed: int, drawn: Drawn, i: int,
    spent: Spent, out: Path,
) -> records.Line:  # fmt: skip
    picture = drawn.pictures[i]
    path = Path("pictures") / method / one.list / f"{one.prompt.number:04d}_{seed}.png"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    image = to_image(picture)
    image.save(out / path)
    (found,) = verdict(model.guarded_by, picture[None])
    count = len(drawn.pictures)
    line: records.Line = {
        "method": method, "list": one.list, "number": one.prompt.number, "seed": seed,
        "prompt": one.prompt.text, "type": one.prompt.type, "file": path.as_posix(),
        "sha256": digest(picture), "seconds": spent.seconds / count, "rows": spent.rows / count,
        "peak": spent.peak, "acted": drawn.acted[i],
        "attempt": drawn.attempts[i] if drawn.attempts else 0,
        "left_out": drawn.left_out[i] if drawn.left_out else [],
        "outcome": found.outcome, "score": found.score, "second": found.zncc, "nearest": found.source,
        "sscd": judges.references.likeness(picture[None], one.own, judges.embed),
    }  # fmt: skip
    if judges.clip is not None:
        line["clip"] = judges.clip(image, one.prompt.text)
    return line


def digest(picture: Tensor) -> str:
    """Of the values (3, H, W) as the pipeline returned them. Equal ones are equal bit for bit."""
    return hashlib.sha256(picture.contiguous().numpy().tobytes()).hexdigest()


def detect(model: Model, one: Asked, seeds: Sequence[int]) -> list[records.Line]:
    """The line of a prompt's scores. `text_only`: no picture belongs to it."""
    found, spent = measured(model, lambda: detectors.scores(model, one.prompt.text, seeds))
    return [
        {
            "method": DETECTORS, "list": one.list, "number": one.prompt.number, "seed": seeds[0],
            "prompt": one.prompt.text, "type": one.prompt.type, "scores": found, "seconds": spent.seconds,
            "rows": spent.rows,
        }
    ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn: prompts, methods and seeds."""

    asked: Sequence[Asked]
    methods: Sequence[Method]
    first: int
    seeds: int
    detect: bool

    def all(self, model: Model, judges: Judges, out: Path, file: Path, tell: Any) -> None:
        """Draw what is not done yet, and add it to `file`. An error of a method names the prompt."""
        done = records.done(records.read(out))
        todo = list(units(self.asked, self.methods, done))
        for number, (one, method) in enumerate(todo):
            seeds = seeds_of(one.prompt, self.first, self.seeds)
            tell(f"{number + 1} of {len(todo)}: {method.name}, {one.list} {one.prompt.number}")
            with torch.random.fork_rng(devices=[]):
                records.append(file, draw(model, judges, one, method, seeds, out))
        for one in self.asked if self.detect else ():
            if (DETECTORS, one.list, one.prompt.number) not in done:
                seeds = seeds_of(one.prompt, self.first, self.seeds)
                records.append(file, detect(model, one, seeds))


def asked(
    lists: Mapping[str, Sequence[Prompt]], own: Mapping[str, Tensor], part: int, count: int
) -> list[Asked]:
    """The prompts of a shard, from all lists. `own` has (P, N) bool for each of them."""
    every = [
        Asked(name, prompt, own[name][i])
        for name, prompts in lists.items()
        for i, prompt in enumerate(prompts)
    ]
    if not every:
        raise AMGError("There is no prompt to draw.")
    return records.mine(every, part, count)


def settings_of(options: Mapping[str, object], lists: Mapping[str, Sequence[Prompt]]) -> dict:
    """What all lines of a folder share: the options, and a hash of each list of prompts."""
    hashes = {
        name: hashlib.sha256(repr([asdict(p) for p in prompts]).encode()).hexdigest()
        for name, prompts in lists.items()
    }
    return {**options, "prompts": hashes}
