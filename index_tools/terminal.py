"""Code that all commands share: progress, JSON, devices, descriptors, the choice of pictures."""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias

from amg_core.errors import AMGError
from amg_core.optional import optional

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance
    from PIL import Image

    from amg_core.descriptors import Descriptor, DescriptorSpec
    from amg_core.index import Entry, Index

Progress = Callable[[int, int, str], None]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
CAPTION = 100  # characters of a caption that are printed
UNMATCHED = 3  # exit code: no picture matches the choice


class Unmatched(AMGError):
    """No picture matches the choice. The exit code is UNMATCHED."""


class Command(NamedTuple):
    """The module of a command, which is imported when the command runs, and its line in the list."""

    module: str
    line: str


COMMANDS = {
    "build": Command("building", "make an index from pictures, or bring it up to date"),
    "add": Command("building", "add pictures to an index"),
    "import": Command("building", "make an index from existing CLIP embeddings"),
    "remove": Command("changing", "remove pictures from an index"),
    "mute": Command("changing", "exclude pictures that may be copied"),
    "merge": Command("changing", "make one index from several"),
    "info": Command("reading", "what an index holds"),
    "search": Command("searching", "find the nearest pictures, and say which are copies"),
    "verify": Command("reading", "is an index undamaged?"),
    "export": Command("reading", "write an index for other programs"),
    "weights": Command("reading", "check a file of SSCD's weights"),
    "dedup": Command("dedup", "find duplicates, and list which to keep"),
    "eval": Command("evaluate", "how close are generated pictures to an index?"),
    "record": Command("record", "records of finished pictures, and clearance sheets"),
    "completion": Command("completing", "print a script that completes commands in a shell"),
}


def add_command(commands: Commands, name: str, **options: Any) -> argparse.ArgumentParser:
    """The parser of one of COMMANDS. `options` are those of `add_parser`."""
    return commands.add_parser(name, help=COMMANDS[name].line, **options)


def count(text: str) -> int:
    """An argparse type for whole numbers above 0."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


count.__name__ = "number above 0"  # argparse names the type in its message


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, … (%(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_weights(parser: argparse.ArgumentParser) -> None:
    from amg_core.descriptors.registry import kinds

    needed = [f"{kind.name}'s {kind.weights.what}" for kind in kinds() if kind.weights.what]
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help=f"weights of the descriptor: {', '.join(needed)}",
    )


def device(name: str) -> torch.device:
    """The torch device of that name. AMGError if torch cannot use it."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AMGError(f"Device {name!r} cannot be used ({reason}): try --device cpu.") from None


def descriptor_of(spec: DescriptorSpec, weights: Path | None) -> Descriptor:
    """The descriptor that made an index."""
    from amg_core.descriptors import for_spec

    return for_spec(spec, weights)


def print_json(**fields: object) -> None:
    print(json.dumps(fields, indent=1))


def progress_printer(stream: TextIO) -> Progress:
    """A `progress` callback: tqdm's bar if tqdm is installed, or else a line every five seconds."""
    if (module := optional("tqdm")) is None:
        return _lines(stream)
    tqdm = module.tqdm
    bar: list[Any] = []
    _bars.append(bar)
    live = stream.isatty()

    def show(done: int, total: int, source: str) -> None:
        if not bar:
            bar.append(
                tqdm(total=total or None, unit=" pictures", file=stream, smoothing=0.1,
                     mininterval=0.2 if live else 5.0, dynamic_ncols=True)
            )  # fmt: skip
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return show


_bars: list[list[Any]] = []


def close_bars() -> None:
    """Close progress bars, so that further output is below them."""
    while _bars:
        for bar in _bars.pop():
            bar.close()


def _lines(stream: TextIO) -> Progress:
    started = last = time.monotonic()

    def show(done: int, total: int, source: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done != total and now - last < 5.0:
            return
        last = now
        rate = done / max(now - started, 1e-6)
        left = f", {(total - done) / max(rate, 1e-6):.0f} s left" if total else ""
        print(f"{done}/{total or '?'} pictures, {rate:.1f}/s{left}", file=stream, flush=True)

    return show


SELECTION = """\
choice of pictures: patterns for their names ('cats/*.png', '*.webp'), or sha256:HEX, or --picture with
a file (any picture with the same bytes), or --from with a list of one name a line, such as the
drop.txt of dedup. In patterns * stands for any characters, also slashes. In an index of several
sources, names begin with the last part of the source's path: 'photos/a.png'"""


def add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patterns", metavar="PATTERN", nargs="*", help="names or sha256:HEX")
    parser.add_argument(
        "--picture", type=Path, action="append", default=[], metavar="FILE",
        help="pictures with the bytes of this file, under any name; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--caption", action="append", default=[], metavar="PATTERN",
        help="pictures whose whole caption fits: '*red fox*'; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="list", type=Path, action="append", default=[], metavar="LIST",
        help="pictures named in this file, one a line; may be given several times",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only print the chosen pictures")


@dataclass
class Selection:
    """A choice of files of an index.

    `names` and `hashes` are exact. `patterns` and `captions` are for `fnmatch`. `unmet` are names from
    lists that no file has had so far.
    """

    names: set[str]
    hashes: set[str]
    patterns: list[str]
    captions: list[str]
    unmet: set[str]

    def __call__(self, entry: Entry) -> bool:
        self.unmet.discard(entry.source)
        return (
            entry.source in self.names
            or entry.sha256 in self.hashes
            or any(fnmatch.fnmatchcase(entry.source, pattern) for pattern in self.patterns)
            or any(fnmatch.fnmatchcase(entry.caption, pattern) for pattern in self.captions)
        )


def selection(options: argparse.Namespace) -> Selection:
    """The choice by the options of `add_selection`. AMGError if they choose nothing."""
    patterns = [p for p in options.patterns if not p.startswith("sha256:")]
    hashes = {p.removeprefix("sha256:").lower() for p in options.patterns if p not in patterns}
    names = set(patterns)  # a pattern with brackets can also be the name of a file
    try:
        hashes |= {hashlib.sha256(path.read_bytes()).hexdigest() for path in options.picture}
        for path in options.list:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            names.update(line for line in lines if line.strip())
    except OSError as error:
        why = error.strerror or error
        raise AMGError(f"Cannot read {error.filename} ({why}): check the path.") from None
    except UnicodeDecodeError:
        raise AMGError(
            f"Cannot read {path}: the list must be UTF-8 text, one name a line."
        ) from None
    if not (patterns or hashes or names or options.caption):
        raise AMGError("No picture was named: give patterns, --picture, --caption or --from.")

    return Selection(names, hashes, patterns, options.caption, names - set(patterns))


def scale(index: Index, wanted: int | None) -> int:
    """The `wanted` scale, or else the finest. AMGError if the index does not have it."""
    scales = index.spec.scales
    found = scales[-1] if wanted is None else wanted
    if found not in scales:
        known = ", ".join(map(str, scales))
        raise AMGError(f"Index {index.name} has no scale {found}: choose one of {known}.")
    return found


def save(sheet: Image.Image, path: Path) -> None:
    """Save the sheet. AMGError if it cannot be written."""
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise AMGError(f"Cannot write the sheet {path} ({error}): give a .png to write.") from error


def check_new(folder: Path) -> None:
    """AMGError if `folder` is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AMGError(f"{folder} is not empty, and nothing is overwritten: give a new folder.")


def write_csv(
    path: Path, first: str, kind: type[DataclassInstance], rows: Iterable[tuple[object, object]]
) -> None:
    """Write rows of (value of the column `first`, an object of the dataclass `kind`) as CSV."""
    columns = [field.name for field in fields(kind)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((first, *columns))
        for value, row in rows:
            table.writerow((value, *(getattr(row, column) for column in columns)))


def short(caption: str) -> str:
    """A caption on one line of the terminal. Some have thousands of characters."""
    line = " ".join(caption.split())
    return line if len(line) <= CAPTION else line[: CAPTION - 1] + "…"


def print_skipped(skipped: list[tuple[str, str]]) -> None:
    if skipped:
        print(f"{len(skipped)} pictures are NOT in the index:")
        for source, reason in skipped:
            print(f"  {source}: {reason}")


def warn(text: str) -> None:
    print(text, file=sys.stderr)
