"""How well descriptors recognise edited copies: `python -m benchmarks.eye`.

Needs folders of pictures: photographs and tuxpaint stamps that nothing was trained on, and drawings
to lie around them in the index (see `pictures`). Prints the tables and writes them, all figures and
contact sheets of the worst mistakes into a folder. Under twenty minutes on two quiet cores. With
`--full`, as docs/descriptors.md has it, a hundred pictures are edited, and table 1 goes up to 1024 px:
over an hour. Table 5 (`--tables 5`) takes five minutes more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import harness
from ..harness import Table
from . import alarms, forming, live, recall, verdicts
from .eyes import Eye, ProductEye
from .pictures import PHOTOGRAPH, library
from .rivals import RIVALS, NotInstalled, rival
from .setting import Setting

TABLES: dict[str, Callable[[Setting], Table]] = {
    "1": live.run,
    "2": alarms.run,
    "3": recall.run,
    "4": verdicts.run,
    "5": forming.run,
}


def main() -> int:
    parser = harness.parser("benchmarks.eye", __doc__, out="eye_results", seed=0)
    folders = {"type": Path, "nargs": "+", "required": True, "metavar": "DIR"}
    parser.add_argument("--photographs", **folders, help="to be recognised")
    parser.add_argument("--stamps", **folders, help="of tuxpaint; the held-out half is recognised")
    parser.add_argument("--drawings", **folders, help="around them in the index")
    parser.add_argument("--tables", nargs="+", default=["1", "2", "3", "4"], choices=TABLES)
    parser.add_argument(
        "--autoencoder", type=Path, metavar="DIR", help="of taef2_*.pth, for table 1"
    )
    _add_eyes(parser)
    parser.add_argument("--rows", type=int, default=3000, help="drawings in the index")
    parser.add_argument("--full", action="store_true", help="all pictures and sizes, as documented")
    parser.add_argument("--queries", type=int, help="at most, per edit; 40, with --full 100")
    arguments = harness.parse(parser)
    return harness.status(lambda: _run(arguments))


def _add_eyes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--descriptors",
        nargs="*",
        default=["compact", "compact+parts", "pixel"],
        metavar="NAME",
        help="of the product",
    )
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=FILE",
        help="measure a descriptor with these weights; NAME may be compact@note, to tell several",
    )  # fmt: skip
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)


def _run(arguments: argparse.Namespace) -> None:
    watch = harness.Watch()
    arguments.out.mkdir(parents=True, exist_ok=True)
    eyes = _eyes(arguments)
    pictures = library(
        arguments.photographs, arguments.stamps, arguments.drawings, rows=arguments.rows,
        queries=arguments.queries or (100 if arguments.full else 40), seed=arguments.seed,
    )  # fmt: skip
    photographs = sum(pictures.rows[row].kind == PHOTOGRAPH for row in pictures.sources)
    stamps = len(pictures.sources) - photographs
    print(f"{len(pictures.rows)} rows, read in {watch.seconds:.0f} s", flush=True)
    print(f"To be recognised: {photographs} photographs and {stamps} stamps", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for eye in eyes if "3" in arguments.tables else ():
            own = harness.Watch()
            eye.learn(pictures.rows, Path(folder))
            print(f"{eye.name}: learnt in {own.seconds:.0f} s", flush=True)
        setting = Setting(
            pictures, eyes, arguments.out, arguments.seed, arguments.autoencoder, arguments.full
        )
        tables: dict[str, Table] = {}
        for number in arguments.tables:
            tables[number] = TABLES[number](setting)
            figures = {f"table_{number}": table.figures for number, table in tables.items()}
            text = "\n".join(table.text for table in tables.values())
            harness.write(arguments.out, figures | {"seconds": watch.seconds}, text)
            print(f"\n{tables[number].text}\n{watch.seconds:.0f} s so far", flush=True)
    print(f"\n{watch.seconds:.0f} s in all; results are in {arguments.out.resolve()}")


def _eyes(arguments: argparse.Namespace) -> list[Eye]:
    given = dict(pair.split("=", 1) for pair in arguments.weights)
    weights = {name: Path(file) for name, file in given.items()}
    names = dict.fromkeys([*arguments.descriptors, *weights])
    eyes: list[Eye] = [ProductEye(name, weights.get(name)) for name in names]
    for name in arguments.rivals:
        try:
            eyes.append(rival(name, arguments.threads))
        except NotInstalled as absent:
            print(f"Left out: {absent}")
    return eyes


if __name__ == "__main__":
    raise SystemExit(main())
