"""Guard without an index, on the embedded model: `python -m benchmarks.guard`. See docs/guard.md.

Every prompt is drawn twice from the noise of other seeds, as the node *Guard* does. How alike the two
are tells keys from other prompts; where they are one picture, that picture is all the index there is.
The tables' judges, which know the training pictures, grade what is drawn then.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amg_core import limits, presets
from amg_core.descriptors import DEFAULT, create
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.index.sources import Pictures
from amg_core.probe import Probe

from .detection.roc import auc
from .tables import report
from .tables.__main__ import CACHE
from .tables.grade import Judges
from .tables.methods import RETRIES, Drawing, Method, draw
from .tables.worlds import World, text_world

REFERENCES = 2


def own_index(world: World, pictures: Tensor, folder: Path) -> Probe:
    """A probe on an index of drawn pictures (n, 3, H, W)."""
    build(Pictures(pictures.movedim(1, -1), "", "drawn from another seed"), folder, create(DEFAULT))
    decoder = world.probes["pixel"].decoder
    return Probe(Searcher(Index.open(folder)), create(DEFAULT), decoder)


def agreement(world: World, pair: Tensor, folder: Path) -> float:
    """Closeness of the second of two pictures to an index of the first alone."""
    probe = own_index(world, pair[:1], folder)
    return float(probe.look_at_pictures(pair[1:]).closeness)


def run(first: int, steps: int, out: Path, models: Path) -> dict:
    world, started = text_world(models), time.perf_counter()
    judges, plain = Judges(world), Method("plain")
    captions = world.memorised + world.others
    count = len(world.memorised)
    group = (torch.arange(len(captions)) >= count).long()
    seeds = [first + i for i in range(len(captions))]
    unguarded = draw(world, plain, captions, seeds, steps)
    references = [
        draw(world, plain, captions, [s + 100_000 * (k + 1) for s in seeds], steps).pictures
        for k in range(REFERENCES)
    ]
    pairs = torch.stack(references, dim=1)
    with tempfile.TemporaryDirectory() as folder:
        alike = [agreement(world, p, Path(folder) / f"a{i}") for i, p in enumerate(pairs)]
        guarded = Drawing(torch.empty(0))
        pictures = []
        for i, text in enumerate(captions):
            if alike[i] < limits.ONE_PICTURE:
                pictures.append(unguarded.pictures[i : i + 1])
                guarded.acted.append(False)
                continue
            alone = replace(
                world, probes={"pixel": own_index(world, pairs[i], Path(folder) / f"b{i}")}
            )
            method = Method("Guard", presets.settings("main", "nl2"), retries=RETRIES)
            drawn = draw(alone, method, [text], [seeds[i]], steps)
            pictures.append(drawn.pictures)
            guarded.acted += drawn.acted
            guarded.redrawn += drawn.redrawn
        guarded.pictures = torch.cat(pictures)
    own = judges.own(unguarded.pictures, captions)
    tables, rows = {}, {}
    for name, drawn in (("plain", unguarded), ("Guard, no index", guarded)):
        grades = judges.grade(drawn.pictures, captions, own, unguarded.pictures)
        rows[name] = report.Row(Method(name), drawn, grades, group)
    tables["memorised"] = {
        name: report.honest_columns(row, group == 0, judges)
        | {k: v for k, v in report.paper_columns(row, group == 0, judges.real).items()
           if k in ("KID", "alignment")}
        for name, row in rows.items()
    }  # fmt: skip
    tables["others"] = {k: report.dormant_columns(row, group == 1) for k, row in rows.items()}
    keys, rest = alike[:count], alike[count:]
    told = {
        "first": first, "alike": alike, "prompts": captions, "tables": tables,
        "auc": auc(np.array(keys), np.array(rest)),
        "keys": [min(keys), max(keys)], "others": [min(rest), max(rest)],
        "redrawn": guarded.redrawn, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(told), encoding="utf-8")
    for title, table in tables.items():
        print(f"\n### {title}\n\n{report.markdown(table)}")
    report.save_sheet(
        out / "sheet.png", judges, rows | {"Guard": rows["Guard, no index"]}, "Guard", captions, own
    )
    print(
        f"\nTwo drawings of one prompt: keys {min(keys):.2f} to {max(keys):.2f}, others {min(rest):.2f} "
        f"to {max(rest):.2f}, AUC {told['auc']:.3f}; {guarded.redrawn} drawn again."
    )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("guard_results"))
    parser.add_argument("--models", type=Path, default=CACHE, help="indexes are kept here")
    parser.add_argument("--first", type=int, default=440_000, help="seed of the first picture")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    arguments = parser.parse_args()
    run(arguments.first, arguments.steps, arguments.out, arguments.models)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
