"""A LoRA guarded with its own training set: `python -m benchmarks.lora`. See docs/guide.md.

The demo's LoRA has learnt eight pictures by heart. Their captions are drawn plain and under guard with
an index of these eight; so are prompts that have its trigger words and a subject it was never shown,
and prompts of the demo model itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import create
from amg_core.descriptors.latent import LatentDescriptor
from amg_core.descriptors.tensors import tensors_sha256
from amg_core.limits import COPY, ZNCC, ZNCC_PAIR
from amg_core.similarity import verifier
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from amg_demo import midnight
from amg_demo import model as demo
from amg_demo.__main__ import BATCH, choose_prompts, draw, training_set
from amg_demo.adapter import with_lora
from amg_demo.evaluate import share
from amg_demo.sheet import sheet
from amg_demo.train_lora import lora_pictures

from . import harness
from .tables.grade import on_views

RETRIES = 2  # as the node has it


def matchers(model: demo.DemoModel, folder: Path) -> dict[str, Matcher]:
    """The guard's eye, one of another family that judges, and one on the model's own training set."""
    encoder = model.encoder
    latent = LatentDescriptor(
        encoder, "demo", tensors_sha256(encoder.state_dict()), 4, side=128, scales=(8, 16)
    )
    made = {}
    for name, pictures, eye in (
        ("pixel", demo.LORA_PICTURES, create("pixel")),
        ("latent", demo.LORA_PICTURES, latent),
        ("model", demo.PICTURES, create("pixel")),
    ):
        decoder = ModuleDecoder("demo", model.decoder, 4) if name == "pixel" else None
        made[name] = harness.matcher(pictures, folder / name, eye, decoder)
    return made


def figures(pictures: Tensor, own: Tensor | None, eyes: dict[str, Matcher], plain: Tensor) -> dict:
    """Percentages of copies by each judge, correlation with the caption's own picture (None: with any)."""
    training = lora_pictures()[0]
    every = verifier.zncc_matrix(pictures, torch.cat([training, training.flip(-1)]))
    nearest = every.amax(dim=1)
    mine = nearest if own is None else every.gather(1, own[:, None])[:, 0]
    views = on_views(eyes["pixel"], pictures)
    other = eyes["latent"].match_pictures(pictures).score
    correlated = mine > (ZNCC if own is None else ZNCC_PAIR)
    return {
        "verdict %": share(torch.tensor([v.copy for v in verdict(eyes["pixel"], pictures)])),
        "own measure %": share(eyes["pixel"].match_pictures(pictures).score > COPY),
        "on views %": share(views > COPY),
        "other family %": share(other > COPY),
        "ZNCC mean": float(mine.mean()),
        "ZNCC worst": float(mine.max()),
        "ZNCC %": share(correlated),
        "any unseen judge %": share((views > COPY) | (other > COPY) | correlated),
        "of the model's set %": share(eyes["model"].match_pictures(pictures).score > COPY),
        "same as plain %": share((pictures == plain).flatten(1).all(dim=1)),
    }


def run(first: int, rounds: int, steps: int, presets_: list[str], out: Path) -> dict:
    training, captions = lora_pictures()
    taken = {text.removesuffix(f" {midnight.TRIGGER}") for text in captions}
    _, texts, copies = training_set(demo.PICTURES)
    model = with_lora()
    others = [name for name in model.labels["subject"] if name not in taken]
    groups = {
        "learnt captions": captions * rounds,
        "trigger, new subjects": [f"{name} {midnight.TRIGGER}" for name in others],
        "no trigger": choose_prompts(texts, copies)[1],
    }
    own = {"learnt captions": torch.arange(len(captions)).repeat(rounds)}
    report, columns = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        eyes = matchers(model, Path(folder))
        for group, prompts in groups.items():
            seeds = [first + i for i in range(len(prompts))]
            plain = None
            for name in ["plain", *presets_]:
                chosen = None if name == "plain" else presets.settings(name, "nl2")
                watcher = None if name == "plain" else eyes["pixel"]
                drawn, _, seconds, again = draw(
                    model, prompts, seeds, watcher, chosen, RETRIES, steps=steps, cfg_scale=4.0
                )
                plain = drawn if plain is None else plain
                subjects = torch.tensor(
                    [
                        model.labels["subject"].index(p.split(" on ")[0].split(" at ")[0])
                        for p in prompts
                    ]
                )
                with torch.inference_mode():
                    graded = model.scorer(drawn)["subject"].softmax(dim=1)
                row = figures(drawn, own.get(group), eyes, plain)
                row["subject"] = float(graded.gather(1, subjects[:, None]).mean())
                row |= {"drawn again": len(again), "s/picture": seconds / len(prompts)}
                report[f"{group}, {name}"] = row
                columns.setdefault(group, {})[name] = drawn
    keys = list(next(iter(report.values())))
    lines = [
        [name, *(f"{row[k]:.0f}" if k.endswith("%") else f"{row[k]:.2f}" for k in keys)]
        for name, row in report.items()
    ]
    table = harness.markdown([f"{len(captions) * rounds} pictures", *keys], lines)
    print(table)
    print(
        f"ZNCC limits: nearest of all {ZNCC:.2f}, a given one {ZNCC_PAIR:.2f}. Batches of {BATCH}."
    )
    harness.write(out, report, table)
    for group, pictures in columns.items():
        rows = slice(0, 8)
        shown = {"training picture": training} if group == "learnt captions" else {}
        sheet(groups[group][rows], shown | {k: v[rows] for k, v in pictures.items()}, {}).save(
            out / f"{group}.png"
        )
    return report


def main() -> int:
    about = {"out": "lora_results", "first": 450_000, "steps": 20}
    parser = harness.parser("benchmarks.lora", __doc__, **about)
    parser.add_argument("--rounds", type=int, default=4, help="seeds a learnt caption")
    parser.add_argument("--presets", nargs="+", default=["main"], choices=presets.PRESETS)
    arguments = harness.parse(parser)
    run(arguments.first, arguments.rounds, arguments.steps, arguments.presets, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
