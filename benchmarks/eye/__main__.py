"""How well descriptors recognise edited copies: `python -m benchmarks.eye`.

Needs folders of pictures: photographs and tuxpaint stamps that nothing was trained on, and drawings
to lie around them in the index (see `pictures`). Prints the tables and writes them, all figures and
contact sheets of the worst mistakes into a folder. About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from amg_core.errors import AMGError

from . import alarms, forming, live, recall, verdicts
from .eyes import Eye, ProductEye
from .pictures import PHOTOGRAPH, library
from .rivals import RIVALS, NotInstalled, rival
from .tables import Setting, Table

TABLES: dict[str, Callable[[Setting], Table]] = {
    "1": live.run,
    "2": alarms.run,
    "3": recall.run,
    "4": verdicts.run,
    "5": forming.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eye", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    folders = {"type": Path, "nargs": "+", "required": True, "metavar": "DIR"}
    parser.add_argument("--photographs", **folders, help="to be recognised")
    parser.add_argument("--stamps", **folders, help="of tuxpaint; the held-out half is recognised")
    parser.add_argument("--drawings", **folders, help="around them in the index")
    parser.add_argument("--out", type=Path, default=Path("eye_results"), help="folder of results")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument(
        "--autoencoder", type=Path, metavar="DIR", help="of taef2_*.pth, for table 1"
    )
    _add_eyes(parser)
    parser.add_argument("--rows", type=int, default=3000, help="drawings in the index")
    parser.add_argument("--queries", type=int, default=100, help="at most, per edit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        _run(arguments)
    except (AMGError, ValueError) as error:
        print(f"error: {error}")
        return 1
    return 0


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
    started = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    eyes = _eyes(arguments)
    pictures = library(
        arguments.photographs, arguments.stamps, arguments.drawings, rows=arguments.rows,
        queries=arguments.queries, seed=arguments.seed,
    )  # fmt: skip
    photographs = sum(pictures.rows[row].kind == PHOTOGRAPH for row in pictures.sources)
    stamps, seconds = len(pictures.sources) - photographs, time.perf_counter() - started
    print(f"{len(pictures.rows)} rows, read in {seconds:.0f} s", flush=True)
    print(f"To be recognised: {photographs} photographs and {stamps} stamps", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for eye in eyes:
            begun = time.perf_counter()
            eye.learn(pictures.rows, Path(folder))
            print(f"{eye.name}: learnt in {time.perf_counter() - begun:.0f} s", flush=True)
        setting = Setting(pictures, eyes, arguments.out, arguments.seed, arguments.autoencoder)
        tables: dict[str, Table] = {}
        for number in arguments.tables:
            tables[number] = TABLES[number](setting)
            seconds = time.perf_counter() - started
            _write(arguments.out, tables, seconds)
            print(f"\n{tables[number].text}\n{seconds:.0f} s so far", flush=True)
    print(f"\n{seconds:.0f} s in all; results are in {arguments.out.resolve()}")


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


def _write(out: Path, tables: dict[str, Table], seconds: float) -> None:
    (out / "tables.md").write_text("\n".join(t.text for t in tables.values()), encoding="utf-8")
    figures = {f"table_{number}": table.figures for number, table in tables.items()}
    (out / "figures.json").write_text(json.dumps(figures | {"seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
