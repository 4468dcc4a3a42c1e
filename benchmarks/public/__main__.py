"""The papers' benchmark on a model of diffusers: `python -m benchmarks.public`.

    python -m benchmarks.public --model MODEL --memorised sdv1_500_memorized.jsonl \\
        --labels memorized_laion_prompts.csv --hard unmemorized_laion_prompts.csv \\
        --ordinary captions_val2017.json --pictures FOLDER --sscd sscd_disc_mixup.torchscript.pt --dry-run

MODEL is a folder, a name on the hub, or "embedded". Lists and pictures are the researcher's own downloads.
The results of an interrupted run are kept: the same command continues it. docs/benchmark.md has the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amg_core import descriptors
from amg_core.descriptors import registry
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.index import Index, build
from amg_core.index.sources import open_source
from amg_core.similarity.matcher import Matcher
from amg_diffusers.opening import open_matcher
from benchmarks import harness
from index_tools import evaluate

from . import cost, detectors, figures, judges, methods, pictures, prompts, records, report, run
from .model import Model, open_pipeline
from .prompts import Prompt

LIST_OPTIONS = (run.MEMORISED, run.HARD, run.ORDINARY)
# Options on which no picture depends.
NO_PART = (
    "threads", "out", "shard", "dry_run", "rate", "tables", "inception", "fid_reference", "methods",
    "no_detectors",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = harness.parser("benchmarks.public", __doc__, out="public_results", first=42, steps=50)
    made.add_argument("--model", help="a folder, a name on the hub, or embedded")
    made.add_argument("--memorised", "--prompts", type=Path, help="a list of memorised prompts")
    made.add_argument("--labels", type=Path, help="a list with their types, VM and TM")
    made.add_argument(
        "--hard", type=Path, help="captions of the training set that are not memorised"
    )
    made.add_argument("--ordinary", type=Path, help="captions of others, such as COCO's")
    made.add_argument("--limit", type=int, help="so many prompts of each list")
    made.add_argument(
        "--pictures", type=Path, help="the training pictures of the memorised prompts"
    )
    made.add_argument("--index", type=Path, help="an index of them (default: made in --out)")
    made.add_argument("--descriptor", default=descriptors.DEFAULT, help="of the index that is made")
    made.add_argument("--decoder", help="a TAESD file for the guard (default: a copy of the VAE)")
    made.add_argument("--methods", nargs="+", default=list(methods.USUAL), metavar="METHOD",
                      help=f"of {', '.join(methods.METHODS)}")  # fmt: skip
    made.add_argument("--no-detectors", action="store_true", help="do not score the prompts")
    made.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    made.add_argument("--cfg", type=float, default=7.5, help="guidance scale")
    made.add_argument("--size", type=int, help="side of a picture (default: the model's)")
    made.add_argument(
        "--scheduler", help="of diffusers, such as DDIMScheduler (default: the model's)"
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--sscd", type=Path, help="Meta's sscd_disc_mixup file")
    made.add_argument("--sscd-large", type=Path, help="Meta's sscd_disc_large file")
    made.add_argument("--clip", type=Path, help="the folder of a CLIP model, for the CLIP score")
    made.add_argument("--inception", type=Path, help="torch-fidelity's weights, for FID")
    made.add_argument("--fid-reference", type=Path, help="pictures with which FID compares")
    made.add_argument("--shard", type=records.shard, default=(1, 1), metavar="I/N", help="e.g. 2/4")
    made.add_argument("--rate", type=float, help="rows of the denoiser a second, for the dry run")
    made.add_argument("--dry-run", action="store_true", help="print costs and what is missing")
    made.add_argument("--tables", action="store_true", help="only make tables of what is drawn")
    return harness.parse(made, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return harness.status(lambda: work(options))


def work(options: argparse.Namespace) -> None:
    if options.tables:
        write(options)
        return
    lists = read(options)
    if options.dry_run:
        print(plan(options, lists))
        return
    for name in ("model", "pictures"):
        if getattr(options, name) is None:
            raise AMGError(f"--{name} is missing. --dry-run says what else is.")
    draw(options, lists)
    write(options)


def read(options: argparse.Namespace) -> dict[str, list[Prompt]]:
    """The lists that are given. AMGError if there are none, or one has no published form."""
    found = {
        name: prompts.read(getattr(options, name), options.limit)
        for name in LIST_OPTIONS
        if getattr(options, name) is not None
    }
    if not found:
        raise AMGError("Give at least one list: --memorised, --hard or --ordinary.")
    if options.labels is not None and run.MEMORISED in found:
        labels = prompts.read(options.labels)
        found[run.MEMORISED] = prompts.labelled(found[run.MEMORISED], labels)
    return found


def missing(options: argparse.Namespace) -> list[str]:
    """What will not be measured, each with what it needs."""
    notes = judges.missing(options.sscd, options.sscd_large)
    if options.clip is None:
        notes.append("CLIP score: --clip FOLDER, a CLIP model of transformers")
    if options.inception is None or options.fid_reference is None:
        notes.append("FID: --inception FILE and --fid-reference PICTURES")
    notes.append("aesthetic score, ImageReward: this program does not have them")
    return notes


def plan(options: argparse.Namespace, lists: dict[str, list[Prompt]]) -> str:
    """The costs of a run, and what is missing for it."""
    lacking = [
        f"--{name}" for name in ("model", "memorised", "hard", "ordinary", "pictures")
        if getattr(options, name) is None
    ]  # fmt: skip
    shown = cost.table(
        methods.chosen(options.methods), {name: len(each) for name, each in lists.items()}, options.seeds,
        options.steps, options.cfg, not options.no_detectors, options.rate, options.shard[1],
    )  # fmt: skip
    given = f"\nNot given: {', '.join(lacking)}.\n" if lacking else ""
    notes = "".join(f"- {note}\n" for note in missing(options))
    return f"{shown}{given}\nNot measured without:\n{notes}"


def draw(options: argparse.Namespace, lists: dict[str, list[Prompt]]) -> None:
    """Draw and grade what this shard has not drawn yet."""
    out: Path = options.out
    # Everything is opened before the folder of results is made: a wrong file costs no time.
    clip = None if options.clip is None else evaluate.clip_scorer(options.clip, options.device)
    embed = judges.embeddings(options.sscd, options.sscd_large, options.device)
    training = pictures.read(options.pictures)
    pipe = open_pipeline(options.model, options.device, options.scheduler)
    kept = {k: str(v) if isinstance(v, Path) else v
            for k, v in vars(options).items() if k not in NO_PART}  # fmt: skip
    records.agree(out, run.settings_of(kept, lists))
    model = Model(pipe, _matcher(options, pipe), options.steps, options.cfg, options.size)
    chosen = methods.chosen(options.methods)
    for method in chosen:
        method.check(model)
    if not options.no_detectors:
        methods.needs_noise(model)
    references = judges.References.of((to_tensor(one.pixels) for one in training), embed)
    grading = run.Judges(embed, references, clip)
    own = {name: _own(name, each, training) for name, each in lists.items()}
    if run.MEMORISED in own:
        known = int(own[run.MEMORISED].any(dim=1).sum())
        print(f"{known} of {len(lists[run.MEMORISED])} memorised prompts have their own picture.")
    work = run.Plan(
        run.asked(lists, own, *options.shard), chosen, options.first,
        options.seeds, not options.no_detectors,
    )  # fmt: skip
    watch = harness.Watch()
    work.all(model, grading, out, records.file_of(out, *options.shard), watch.tell)


def _own(name: str, some: Sequence[Prompt], training: Sequence[pictures.Picture]) -> torch.Tensor:
    """Only memorised prompts have pictures of their own."""
    if name == run.MEMORISED:
        return pictures.own(some, training)
    return torch.zeros(len(some), len(training), dtype=torch.bool)


def _matcher(options: argparse.Namespace, pipe) -> Matcher:
    """On the index that is given, or on one of the pictures, which is made."""
    folder: Path = options.index or options.out / "index"
    if options.index is None:
        weights = options.sscd if options.descriptor == "sscd" else None
        build(options.pictures, folder, descriptors.create(options.descriptor, weights))
    index = Index.open(folder)
    weights = options.sscd if registry.of(index.spec).name == "sscd" else None
    return open_matcher(index, pipe.vae, decoder=options.decoder, weights=weights)


def write(options: argparse.Namespace) -> None:
    """tables.md, page.html and figures.json of all lines in the folder."""
    out: Path = options.out
    lines = records.read(out)
    if not lines:
        raise AMGError(f"{out} has no pictures yet: run without --tables first.")
    tables = figures.tables(lines) | detection(lines) | fid(options, lines)
    settings = records.settings(out)
    text = report.markdown(tables, missing(options))
    harness.write(out, {"settings": settings, "tables": tables}, text)
    shown = report.page(out, f"Results of {settings['model']}", tables, settings, lines)
    (out / "page.html").write_text(shown, "utf-8")
    print(text)
    print(f"\ntables.md, figures.json and page.html are in {out.resolve()}")


def detection(lines: Sequence[records.Line]) -> dict[str, dict[str, figures.Row]]:
    """AUC and TPR of the detectors, against each list of prompts that are not memorised."""
    made: dict[str, dict[str, figures.Row]] = {}
    for name in (run.HARD, run.ORDINARY):
        some = [
            line for line in lines
            if line["method"] == run.DETECTORS and line["list"] in (run.MEMORISED, name)
        ]  # fmt: skip
        labels = [line["list"] == run.MEMORISED for line in some]
        if any(labels) and not all(labels):
            title = f"detectors: {sum(labels)} memorised against {labels.count(False)} {name}"
            made[title] = detectors.figures([line["scores"] for line in some], labels)
    return made


def fid(
    options: argparse.Namespace, lines: Sequence[records.Line]
) -> dict[str, dict[str, figures.Row]]:
    """FID of each method's pictures, for each list. {} without weights."""
    if options.inception is None or options.fid_reference is None:
        return {}
    features = evaluate.inception_features(options.inception, options.device)
    reference = evaluate.features_of(open_source(options.fid_reference), features)
    files: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        if line["method"] != run.DETECTORS:
            rows = files.setdefault(f"FID, {line['list']}", {})
            rows.setdefault(line["method"], []).append(line["file"])

    def row(names: Sequence[str]) -> figures.Row:
        drawn = np.stack([features(_read(options.out / name)) for name in names])
        value = evaluate.fid(drawn, reference) if min(len(drawn), len(reference)) > 1 else None
        return {
            "pictures": (float(len(drawn)), None, None),
            "FID": None if value is None else (value, None, None),
        }

    return {
        title: {name: row(each) for name, each in rows.items()} for title, rows in files.items()
    }


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    sys.exit(main())
