"""What all programs here and in `training` share: options, time, indexes, intervals, tables, files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amg_core.decoders import Decoder
from amg_core.descriptors.base import Descriptor
from amg_core.errors import AMGError
from amg_core.images import to_tensor  # noqa: F401 (the programs take it from here)
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.index.sources.base import Source
from amg_core.similarity.matcher import Matcher
from index_tools import intervals

CACHE = Path(__file__).parent / "tables" / ".cache"  # of trained models and their indexes


# ---------------------------------------------------------------- options


def parser(
    program: str, about: str, *, out: str | None = None, seed: int | None = None,
    first: int | None = None, steps: int | None = None,
) -> argparse.ArgumentParser:  # fmt: skip
    """A parser with --threads, and those of the common options that have a default here."""
    made = argparse.ArgumentParser(
        prog=f"python -m {program}", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    if out is not None:
        made.add_argument("--out", type=Path, default=Path(out), help="folder of results")
    if seed is not None:
        made.add_argument("--seed", type=int, default=seed)
    if first is not None:
        made.add_argument("--first", type=int, default=first, help="seed of the first picture")
    if steps is not None:
        made.add_argument("--steps", type=int, default=steps, help="denoising steps")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> Any:
    """The options; the number of threads is set."""
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options


def status(work: Callable[[], object]) -> int:
    """Do the work; the exit status of the program, 1 where an error says what to do."""
    try:
        work()
    except (AMGError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}")
        return 1
    return 0


# ---------------------------------------------------------------- time


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def tell(self, what: str) -> None:
        """A line of progress."""
        print(f"{self.seconds:5.0f} s  {what}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what is measured


def matcher(
    pictures: Source | Path, folder: Path, descriptor: Descriptor, decoder: Decoder | None = None
) -> Matcher:
    """A probe on an index of these pictures, which is built in `folder`."""
    build(pictures, folder, descriptor, workers=1)
    return Matcher(Searcher(Index.open(folder)), descriptor, decoder)


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """A finished table: its text in Markdown, and all its figures, for JSON."""

    text: str
    figures: dict


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, in [0, 1]."""
    if not count:
        return 0.0, 1.0
    _, low, high = intervals.share(hits, count)
    return low / 100, high / 100


def between(hits: int, count: int, digits: int = 0) -> str:
    """The interval of a share in words: "3–17", in percent."""
    return "–".join(f"{100 * end:.{digits}f}" for end in wilson(hits, count))


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heading, ["---"] + ["---:"] * (len(heading) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def write(out: Path, figures: Mapping[str, object], text: str | None = None) -> None:
    """figures.json, and tables.md where there is a text, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    if text is not None:
        (out / "tables.md").write_text(text, encoding="utf-8")
