"""Draw with and without the guard by the embedded model: `python -m amg_demo`.

It builds an index of the model's training pictures, draws 64 prompts plain and guarded from the same
seeds, prints the figures of the paper's tables, and saves sheets, curves, every picture and results.json.
32 prompts are captions that were duplicated in training together with their picture, 16 were in the
training set once, and 16 are new.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import DEFAULT, create
from amg_core.errors import AMGError
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.limits import COPY, ZNCC
from amg_core.plot import curve
from amg_core.retry import Outcome
from amg_core.similarity import verifier
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict

from . import model as demo
from . import pictures as source
from .evaluate import among_themselves, kid, percentile, score, share, sscd_embedding
from .pictures import training_set
from .sample import closed_loop, sample
from .sheet import sheet, side_by_side, to_image

BATCH = 16


def choose_prompts(
    captions: list[str], copies: Tensor, seed: int = 7
) -> tuple[list[str], list[str]]:
    """(memorised captions, 16 that were seen once followed by 16 that were never seen)."""
    rng = np.random.default_rng(seed)
    memorised = [text for text, n in zip(captions, copies.tolist(), strict=True) if n > 1]
    once = [text for text, n in zip(captions, copies.tolist(), strict=True) if n == 1]
    others, taken = [str(text) for text in rng.choice(once, 16, replace=False)], set(captions)
    while len(others) < 32:
        parts = (source.SUBJECTS, list(source.COLOURS), source.PATTERNS)
        text = source.caption(*(str(rng.choice(part)) for part in parts))
        if text not in taken:
            taken.add(text)
            others.append(text)
    return memorised, others


def draw(
    model, prompts: list[str], seeds: list[int], matcher: Matcher | None, settings=None,
    retries: int = 0, **options,
):  # fmt: skip
    """Pictures, reports, seconds and which were drawn again, a set; plain where `matcher` is None.

    Finished pictures that are copies are drawn again as the node does it, the last time from other
    noise (`amg_core.retry`).
    """
    pictures, reports, again, start = [], [], set(), time.perf_counter()
    for i in range(0, len(prompts), BATCH):
        part = slice(i, i + BATCH)
        if matcher is None:
            pictures.append(sample(model, prompts[part], seeds[part], **options))
            continue
        outcome = guarded(model, prompts[part], seeds[part], matcher, settings, retries, options)
        pictures.append(outcome.latents)
        reports.append(outcome.attempts[0].report)
        again |= {i + n for attempt in outcome.attempts[1:] for n in attempt.samples}
    return torch.cat(pictures), reports, time.perf_counter() - start, again


def guarded(
    model,
    prompts: list[str],
    seeds: list[int],
    matcher: Matcher,
    settings,
    retries: int,
    options: dict,
) -> Outcome:
    """Draw one batch with retries. The latents of `retry.until_no_copy` are pictures here."""
    return closed_loop(
        lambda chosen, guide: sample(model, prompts, chosen, guide=guide, **options),
        partial(verdict, matcher), matcher, settings, seeds, retries=retries, steps=options["steps"],
    )  # fmt: skip


def acted(reports: list[dict]) -> list[bool]:
    """Whether the guard was active at any step, for each picture."""
    return [n > 0 for report in reports for n in report["guarded_evaluations"]]


class Figures:
    """Collects rows of figures and prints them in columns."""

    COLUMNS = (
        ("nL2 p5", "{:.2f}"), ("top1", "{:.2f}"), ("%<1.4", "{:.0f}"), ("%<1.6", "{:.0f}"),
        ("copy %", "{:.0f}"), ("ZNCC p95", "{:.2f}"), ("top1", "{:.2f}"), ("%>limit", "{:.0f}"),
        ("own mean", "{:.2f}"), ("own top1", "{:.2f}"), ("align", "{:.2f}"),
        ("KID", "{:.2f}"), ("same %", "{:.0f}"), ("s/picture", "{:.2f}"),
    )  # fmt: skip

    def __init__(self):
        self.rows: list[tuple[str, list[float | None]]] = []

    def add(self, name: str, figures: list[float | None]) -> None:
        self.rows.append((name, figures))

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [" " * width + "".join(f"{heading:>12}" for heading, _ in self.COLUMNS)]
        for name, figures in self.rows:
            pairs = zip(figures, self.COLUMNS, strict=True)
            cells = ("–" if f is None else form.format(f) for f, (_, form) in pairs)
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m amg_demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder of results")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance scale (default 4)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first picture")
    parser.add_argument(
        "--retries", type=int, default=2, help="for pictures that are copies (default 2)"
    )
    parser.add_argument("--presets", nargs="+", default=["main"], choices=presets.PRESETS,
                        help="guards to compare, the first one is drawn on the sheet")  # fmt: skip
    parser.add_argument(
        "--sscd", type=Path, help="Meta's sscd_disc_mixup file, to add SSCD figures"
    )
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (AMGError, FileNotFoundError) as error:
        print(f"error: {error}")
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model = demo.load()
    descriptor = create(DEFAULT)
    report = build(demo.PICTURES, out / "index", descriptor)
    print(f"Index of {report.count} pictures built in {report.seconds:.1f} s: {report.path}")
    index = Index.open(out / "index")
    matcher = Matcher(Searcher(index), descriptor, ModuleDecoder("demo", model.decoder, 4))
    training, captions, copies = training_set(demo.PICTURES)

    memorised, others = choose_prompts(captions, copies)
    prompts = memorised + others
    seeds = [arguments.seed + i for i in range(len(prompts))]
    subjects = {name: i for i, name in enumerate(model.labels["subject"])}
    labels = torch.tensor([subjects[text.split(" on ")[0]] for text in prompts])
    own = training[[captions.index(text) for text in memorised]]
    with torch.inference_mode():
        singles = model.scorer(training[copies == 1])["features"]
    limit = ZNCC
    groups = {"memorised": slice(0, len(memorised)), "elsewhere": slice(len(memorised), None)}
    options = {"steps": arguments.steps, "cfg_scale": arguments.cfg}

    table = Figures()
    base_nl2, base_zncc = among_themselves(training)
    table.add(
        "training pictures among themselves",
        [percentile(base_nl2, 5), float(base_nl2.min()), share(base_nl2 < 1.4), share(base_nl2 < 1.6), None,
         percentile(base_zncc, 95), float(base_zncc.max()), share(base_zncc > limit)] + [None] * 6,
    )  # fmt: skip
    drawn: dict[str, Tensor] = {}
    grades, guarded_reports, redrawn = {}, {}, {}
    for name in ["plain", *arguments.presets]:
        settings = None if name == "plain" else presets.settings(name, matcher.metric)
        watcher = None if name == "plain" else matcher
        print(f"Drawing {len(prompts)} pictures, {name} …", flush=True)
        pictures, reports, seconds, again = draw(
            model, prompts, seeds, watcher, settings, arguments.retries, **options
        )
        if again:
            print(f"  {len(again)} of them were copies when finished, and drawn again")
        drawn[name], guarded_reports[name], redrawn[name] = pictures, reports, again
        grades[name] = score(pictures, matcher, training, model.scorer, labels)
        same = (pictures == drawn["plain"]).flatten(1).all(dim=1)
        for group, rows in groups.items():
            g = grades[name]
            mine = verifier.zncc(pictures[rows], own) if group == "memorised" else None
            table.add(
                f"{group}, {name}",
                [percentile(g.nl2[rows], 5), float(g.nl2[rows].min()), share(g.nl2[rows] < 1.4),
                 share(g.nl2[rows] < 1.6), share(g.score[rows] > COPY), percentile(g.zncc[rows], 95),
                 float(g.zncc[rows].max()), share(g.zncc[rows] > limit),
                 None if mine is None else float(mine.mean()),
                 None if mine is None else float(mine.max()), float(g.alignment[rows].mean()),
                 kid(g.features[rows], singles), share(same[rows]), seconds / len(prompts)],
            )  # fmt: skip
        save_pictures(out / "pictures" / name, prompts, pictures)
    print()
    print(table)
    print(LEGEND.format(copy=COPY, limit=limit))
    guard = arguments.presets[0]
    touched = torch.tensor(acted(guarded_reports[guard]))
    touched[sorted(redrawn[guard])] = True
    tell_unchanged(drawn, touched, guard, groups["elsewhere"])
    if arguments.sscd is not None:
        print(sscd_table(arguments.sscd, training, drawn, groups))

    for group, rows in groups.items():
        shown = (
            own
            if group == "memorised"
            else training[matcher.match_pictures(drawn["plain"][rows]).ids]
        )
        columns, notes = {"training picture": shown}, {}
        for heading, name in (("plain", "plain"), (f"guarded ({guard})", guard)):
            columns[heading] = drawn[name][rows]
            correlation = verifier.zncc(drawn[name][rows], shown).tolist()
            notes[heading] = [(f"ZNCC {z:.2f}", z > limit) for z in correlation]
        sheet(prompts[rows], columns, notes).save(out / f"sheet_{group}.png")
    off = {"despecification": 0, "deduplication": 0, "dissimilarity": 0}
    _, watched, *_ = draw(
        model,
        prompts[:5],
        seeds[:5],
        matcher,
        presets.settings(guard, matcher.metric, **off),
        **options,
    )
    first = {"steps": [_first(step, 5) for step in guarded_reports[guard][0]["steps"]]}
    plots = [
        curve(watched[0], title="plain: five memorised prompts"),
        curve(guarded_reports[guard][0] | first, title=f"guarded ({guard}): the same"),
    ]
    side_by_side(plots).save(out / "curves.png")
    results = {
        "columns": [heading for heading, _ in Figures.COLUMNS],
        "rows": dict(table.rows),
        "settings": {"steps": arguments.steps, "cfg": arguments.cfg, "seed": arguments.seed},
        "reports": guarded_reports,
    }
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    print(f"\nLook at sheet_memorised.png, sheet_elsewhere.png and curves.png in {out.resolve()}")
    print(f"{time.perf_counter() - started:.0f} s in all")


LEGEND = """
p5, p95: the 5th and 95th percentile, the closest of twenty pictures (the paper's "Top 5%"). nL2 (Eq. 8):
smaller = closer; 1.4 and 1.6 are the paper's thresholds. copy %: the guard's own measure
(nL2 after the best brightness, contrast and tint), likeness above {copy}. ZNCC: a measure that the guard
never uses, independent of brightness, contrast and fine detail; 1 % of different training pictures pass
its limit here, {limit:.2f}. own: ZNCC with the prompt's own training picture alone. align:
probability of the prompt's subject. KID: distance to the pictures that were in training once, 0 = the
same. same %: pictures equal, bit for bit, to plain sampling. Align, KID: by a net that was trained on
none of these."""


def tell_unchanged(drawn: dict[str, Tensor], touched: Tensor, guard: str, rows: slice) -> None:
    """Print whether pictures that were neither steered nor drawn again are identical to the plain ones.

    `touched` (B,) bool are the others.
    """
    still = ~touched
    same = (drawn[guard] == drawn["plain"]).flatten(1).all(dim=1)
    print(
        f"\nThe guard left {int(still[rows].sum())} of {len(still[rows])} pictures elsewhere alone; "
        f"{int((same & still)[rows].sum())} of these are bit-identical to the plain ones."
    )


def save_pictures(folder: Path, prompts: list[str], pictures: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        to_image(picture).save(folder / f"{i:02d} {prompt}.png")


def _first(step: dict, count: int) -> dict:
    """A step record of the first `count` samples alone."""
    return {k: v[:count] if isinstance(v, list) else v for k, v in step.items()}


def sscd_table(
    weights: Path, training: Tensor, drawn: dict[str, Tensor], groups: dict[str, slice]
) -> str:
    """The paper's Table 1 columns, where Meta's weights are present."""
    embed = sscd_embedding(weights)
    rows = embed(training)
    lines = [
        "",
        "SSCD cosine to the nearest training picture: 95th percentile, top 1, % > 0.5, % > 0.4",
    ]
    for name, pictures in drawn.items():
        nearest = (embed(pictures) @ rows.T).amax(dim=1)
        for group, part in groups.items():
            s = nearest[part]
            lines.append(
                f"{group + ', ' + name:<24} {percentile(s, 95):8.2f} {float(s.max()):8.2f} "
                f"{share(s > 0.5):8.0f} {share(s > 0.4):8.0f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
