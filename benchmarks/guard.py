"""Guard without an index, on the embedded model: `python -m benchmarks.guard`. See docs/guard.md.

Every prompt is drawn twice from the noise of other seeds, as the node *Guard* does. How alike the two
are tells keys from other prompts; where they are one picture, that picture is all the index there is.
The tables' judges, which know the training pictures, grade what is drawn then.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amg_core import limits, presets
from amg_core.descriptors import DEFAULT, create
from amg_core.index.sources import Pictures
from amg_core.similarity.matcher import Matcher

from . import harness
from .detection.roc import auc
from .tables import report
from .tables.domains import Domain, text_world
from .tables.grade import Judges
from .tables.methods import RETRIES, Drawings, Method, draw

REFERENCES = 2


def own_index(domain: Domain, pictures: Tensor, folder: Path) -> Matcher:
    """A probe on an index of drawn pictures (n, 3, H, W)."""
    drawn = Pictures(pictures.movedim(1, -1), "", "drawn from another seed")
    return harness.matcher(drawn, folder, create(DEFAULT), domain.matchers["pixel"].decoder)


def agreement(domain: Domain, pair: Tensor, folder: Path) -> float:
    """Likeness of the second of two pictures to an index of the first alone."""
    matcher = own_index(domain, pair[:1], folder)
    return float(matcher.match_pictures(pair[1:]).score)


def run(first: int, steps: int, out: Path, models: Path) -> dict:
    domain, watch = text_world(models), harness.Watch()
    judges, plain = Judges(domain), Method("plain")
    captions = domain.memorised + domain.others
    count = len(domain.memorised)
    group = (torch.arange(len(captions)) >= count).long()
    seeds = [first + i for i in range(len(captions))]
    unguarded = draw(domain, plain, captions, seeds, steps)
    references = [
        draw(domain, plain, captions, [s + 100_000 * (k + 1) for s in seeds], steps).pictures
        for k in range(REFERENCES)
    ]
    pairs = torch.stack(references, dim=1)
    with tempfile.TemporaryDirectory() as folder:
        alike = [agreement(domain, p, Path(folder) / f"a{i}") for i, p in enumerate(pairs)]
        guarded = Drawings(torch.empty(0))
        pictures = []
        for i, text in enumerate(captions):
            if alike[i] < limits.ONE_PICTURE:
                pictures.append(unguarded.pictures[i : i + 1])
                guarded.acted.append(False)
                continue
            alone = replace(
                domain, matchers={"pixel": own_index(domain, pairs[i], Path(folder) / f"b{i}")}
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
    found = {
        "first": first, "alike": alike, "prompts": captions, "tables": tables,
        "auc": auc(np.array(keys), np.array(rest)),
        "keys": [min(keys), max(keys)], "others": [min(rest), max(rest)],
        "redrawn": guarded.redrawn, "seconds": watch.seconds,
    }  # fmt: skip
    text = "\n".join(f"### {title}\n\n{report.markdown(table)}" for title, table in tables.items())
    harness.write(out, found, text)
    print(f"\n{text}")
    report.save_sheet(
        out / "sheet.png", judges, rows | {"Guard": rows["Guard, no index"]}, "Guard", captions, own
    )
    print(
        f"\nTwo drawings of one prompt: keys {min(keys):.2f} to {max(keys):.2f}, others {min(rest):.2f} "
        f"to {max(rest):.2f}, AUC {found['auc']:.3f}; {guarded.redrawn} drawn again."
    )
    return found


def main() -> int:
    about = {"out": "guard_results", "first": 440_000, "steps": 20}
    parser = harness.parser("benchmarks.guard", __doc__, **about)
    parser.add_argument("--models", type=Path, default=harness.CACHE, help="indexes are kept here")
    arguments = harness.parse(parser)
    run(arguments.first, arguments.steps, arguments.out, arguments.models)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
