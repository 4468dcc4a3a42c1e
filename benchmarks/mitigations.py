"""Every mitigation without an index, alone, on the embedded model: `python -m benchmarks.mitigations`.

32 memorised prompts and 32 others, one picture each, the same seeds and batches in every row. One table
of Markdown with 95 % intervals; sheets and every figure in `--out`. See docs/mitigations.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from amg_core import presets
from amg_core.detection import predictions as of
from amg_core.detection import statistics
from amg_core.errors import AMGError
from amg_core.mitigation import embeddings
from amg_core.mitigation.adaptation import Score, adapt
from amg_core.mitigation.prompts import METHODS, RECIPES, Recipe, below, randomise
from amg_core.mitigation.transition import Transition, guidance_norm, guided_by
from amg_core.run import SamplingRun, Settings
from amg_demo.evaluate import sscd_embedding
from amg_demo.sheet import sheet
from benchmarks import harness
from benchmarks.tables import report
from benchmarks.tables.domains import Domain, text_world
from benchmarks.tables.grade import Judges, kid_interval, paired_difference, unseen
from benchmarks.tables.methods import sample

BATCH = 16
FIRST = 410_000
UNTIL = 0.35  # share of the sampling: τ = 650, between the authors' 500 and 700
ANISOTROPY_TARGETS = (
    1.85,
    1.25,
)  # the same shares of what ordinary prompts score, 2.26 in the middle
LATER = (0.35, 0.5, 0.7)
TARGETS = (1.5, 1.0)  # of the Wen score; ordinary prompts of this model score about 1.7
SHEET = 16

Contexts = Callable[[Domain, list[str], list[int]], Tensor]
Step = Callable[..., Tensor]  # the signature of `SamplingRun.step`
Metric = Callable[[Domain, int, Tensor], Score]  # of a seed and the embedding of no prompt


@dataclass(frozen=True)
class Mitigation:
    """One row.

    context : what the model is asked, from captions and seeds, (B, T, C).
    steps : makes what changes each prediction, for one batch; None changes nothing.
    """

    name: str
    context: Contexts
    steps: Callable[[Domain], list[Step]] = lambda domain: []


def mitigations() -> list[Mitigation]:
    """All rows; add more here, or with `with_amg`."""
    return [
        Mitigation("plain", plain),
        *(Mitigation(f"GNI {s:g}", partial(noisy, s)) for s in (0.1, 0.5)),
        *(
            Mitigation(f"{method}, {which}", partial(randomised, method, RECIPES[which][method]))
            for method in METHODS
            for which in RECIPES
        ),
        *(
            Mitigation(f"{method}, 2 rounds", partial(randomised, method, Recipe(repeats=2)))
            for method in METHODS
        ),
        *(Mitigation(f"adapted to {t:g}", partial(adapted, t, wen)) for t in TARGETS),
        *(
            Mitigation(f"adapted to anisotropy {t:g}", partial(adapted, t, anisotropy))
            for t in ANISOTROPY_TARGETS
        ),
        Mitigation("padding, 70 % zeroed", unpadded),
        *(delayed(f"delayed, until {u:g}", 0.0, False, u) for u in LATER),
        delayed("delayed, dynamic", 0.0, True),
        delayed("delayed, dynamic, cfg 1", 1.0, True),
        delayed("opposite -2, until 0.35", -2.0, False),
        delayed("opposite -2, dynamic", -2.0, True),
        delayed("opposite -4, until 0.35", -4.0, False),
    ]


def with_amg(row: Mitigation, settings: Settings, name: str, eye: str = "pixel") -> Mitigation:
    """`row`, and the guard after it: a session of its own for each batch."""

    def steps(domain: Domain) -> list[Step]:
        return [*row.steps(domain), SamplingRun(domain.matchers[eye], settings).step]

    return replace(row, name=f"{row.name} + {name}", steps=steps)


# ---------------------------------------------------------------- what is asked


def plain(domain: Domain, captions: list[str], seeds: list[int]) -> Tensor:
    return domain.encode(captions)


def noisy(scale: float, domain: Domain, captions: list[str], seeds: list[int]) -> Tensor:
    """Relative to the embedding's own deviation, which is about CLIP's."""
    made = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    return embeddings.gaussian_noise(domain.encode(captions), scale, made, relative=True)


def randomised(
    method: str, recipe: Recipe, domain: Domain, captions: list[str], seeds: list[int]
) -> Tensor:
    words = sorted({w for text in domain.data.captions for w in text.split()})
    changed = [
        randomise(
            text, method, recipe, torch.Generator().manual_seed(seed + 1),
            lambda g: words[below(len(words), g)],
        )
        for text, seed in zip(captions, seeds, strict=True)
    ]  # fmt: skip
    return domain.encode(changed)


def unpadded(domain: Domain, captions: list[str], seeds: list[int]) -> Tensor:
    """70 % of the padding zeroed. This model's encoder pads with a token of its own, unlike CLIP."""
    count = domain.encode([""]).shape[1]
    padding = torch.arange(count) >= torch.tensor([[len(c.split())] for c in captions])
    made = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    return embeddings.zero_padding(domain.encode(captions), padding, embeddings.MASKED, made)


def adapted(
    target: float, metric: Metric, domain: Domain, captions: list[str], seeds: list[int]
) -> Tensor:
    """For the very noise each picture starts from; at most 10 steps of 0.05."""
    with torch.inference_mode(False):
        context, empty = domain.encode(captions).clone(), domain.encode([""]).clone()
        rows = [
            adapt(row[None], metric(domain, seed, empty), target).embedding
            for row, seed in zip(context, seeds, strict=True)
        ]
    return torch.cat(rows)


def wen(domain: Domain, seed: int, empty: Tensor) -> Score:
    """The norm of the guidance vector at the first step, of one picture."""
    sigma = domain.sigmas[-1:].clone()
    noise = torch.randn(domain.shape, generator=torch.Generator().manual_seed(seed))
    x = noise[None] * sigma
    with torch.no_grad():
        uncond = domain.denoise(x, sigma, empty)
    return lambda prompt: guidance_norm(domain.denoise(x, sigma, prompt), uncond, sigma)[0]


def anisotropy(domain: Domain, seed: int, empty: Tensor) -> Score:
    """`statistics.anisotropy` with the paper's weight for Stable Diffusion 1.4, of one picture."""
    noise = torch.randn(domain.shape, generator=torch.Generator().manual_seed(seed))[None]
    last = len(domain.sigmas) - 1
    sigmas = [domain.sigmas[i : i + 1].clone() for i in (last, round(statistics.LOW * last))]
    xs = [of.unrescaled(noise, float((1 + s**2) ** -0.5)) for s in sigmas]
    with torch.no_grad():
        unconds = [domain.denoise(x, s, empty) for x, s in zip(xs, sigmas, strict=True)]

    def score(prompt: Tensor) -> Tensor:
        high, low = (
            of.Predictions(x, float(s), domain.denoise(x, s, prompt), uncond, of.V)
            for x, s, uncond in zip(xs, sigmas, unconds, strict=True)
        )
        return statistics.anisotropy(high, low)[0]

    return score


# ---------------------------------------------------------------- how it is guided


def delayed(name: str, scale: float, dynamic: bool, until: float = UNTIL) -> Mitigation:
    """cfg is `scale` until the transition."""

    def steps(domain: Domain) -> list[Step]:
        run = Transition(dynamic)

        def step(denoised, *, cond, uncond, cfg_scale, sigma, t, **_) -> Tensor:
            norm = guidance_norm(cond, uncond, sigma)
            waiting = run.waiting(norm, float(sigma[0]), early=1 - t < until)
            return guided_by(denoised, cond, uncond, cfg_scale, scale, waiting)

        return [step]

    return Mitigation(name, plain, steps)


def in_turn(changes: list[Step]) -> Step:
    """Several changes of a prediction one after the other, as post-CFG functions of a host are."""

    def step(denoised: Tensor, **known) -> Tensor:
        for change in changes:
            denoised = change(denoised, **known)
        return denoised

    return step


# ---------------------------------------------------------------- drawing and grading


def draw(
    domain: Domain, row: Mitigation, captions: list[str], seeds: list[int], steps: int
) -> tuple[Tensor, float]:
    """Pictures (B, 3, H, W) and CPU seconds a picture, preparing the prompt included."""
    start, pictures = time.process_time(), []
    for i in range(0, len(captions), BATCH):
        part = slice(i, i + BATCH)
        with torch.no_grad():
            context = row.context(domain, captions[part], seeds[part])
        latents = sample(
            domain, context, captions[part], seeds[part], steps, in_turn(row.steps(domain))
        )
        pictures.append(domain.decode(latents))
    return torch.cat(pictures), (time.process_time() - start) / len(captions)


def columns(grades, judges: Judges, plain_grades, group: Tensor, seconds: float) -> dict:
    """{column: (value, low, high)}: first the memorised prompts, then the others."""
    memorised, others = (report.pick(grades, group == g) for g in (0, 1))
    before = report.pick(plain_grades, group == 0)
    lost = paired_difference(memorised.alignment.numpy(), before.alignment.numpy())
    sscd = memorised.sscd_own
    return {
        "own measure: copies %": report.percentage(memorised.score > report.COPY),
        "ZNCC with own, mean": report.mean(memorised.zncc_own),
        "ZNCC with own % > limit": report.percentage(memorised.zncc_own > memorised.zncc_limit),
        "other family %": report.percentage(memorised.other > report.COPY),
        "on views %": report.percentage(memorised.views > report.COPY),
        "any unseen judge %": report.percentage(unseen(memorised)),
        "SSCD with own, mean": None if sscd is None else report.mean(sscd),
        "alignment": report.mean(memorised.alignment),
        "minus plain": lost,
        "KID": kid_interval(memorised.features, judges.real),
        "others: alignment": report.mean(others.alignment),
        "others: KID": kid_interval(others.features, judges.real),
        "others: unchanged %": report.percentage(others.same),
        "CPU s/picture": (seconds, None, None),
    }


def run(arguments: argparse.Namespace, rows: Sequence[Mitigation], domain: Domain) -> dict:
    """Draw and grade `rows` (the first of them plain); what figures.json holds."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    judges = Judges(domain, None if arguments.sscd is None else sscd_embedding(arguments.sscd))
    asked = list(domain.prompts(1, arguments.first))
    captions, seeds = [text for text, _, _ in asked], [seed for _, seed, _ in asked]
    group = torch.tensor([g for _, _, g in asked])
    table, pictures, notes, each = {}, {}, {}, {}
    own = first = first_grades = None
    for row in rows:
        print(f"drawing {len(asked)} pictures: {row.name}", flush=True)
        drawn, seconds = draw(domain, row, captions, seeds, arguments.steps)
        if own is None:
            own, first = judges.own(drawn, captions), drawn
        grades = judges.grade(drawn, captions, own, first)
        first_grades = first_grades or grades
        table[row.name] = columns(grades, judges, first_grades, group, seconds)
        pictures[row.name] = drawn
        notes[row.name] = grades.zncc_own
        each[row.name] = {
            k: getattr(grades, k).tolist()
            for k in ("score", "zncc_own", "other", "views", "alignment", "same")
        }
        result = {
            "seeds": seeds, "prompts": captions, "group": group.tolist(), "steps": arguments.steps,
            "zncc_limit": judges.own_limit, "table": table, "pictures": each,
        }  # fmt: skip
        harness.write(out, result, report.markdown(table))
    save_sheets(out, judges, pictures, notes, captions, own, group)
    print(f"\nZNCC limit with the own picture: {judges.own_limit:.2f}\n")
    print(report.markdown(table), flush=True)
    return result


def save_sheets(out: Path, judges: Judges, pictures, notes, captions, own, group) -> None:
    """Training picture | one column a row, in sheets of four rows' pictures each."""
    names = [name for name in pictures if name != "plain"]
    for g, label in ((0, "memorised"), (1, "others")):
        chosen = (group == g).nonzero()[:SHEET, 0]
        for part in range(0, len(names), 4):
            shown = {"training picture": judges.training[own.ids[chosen]]}
            marks = {}
            for name in ("plain", *names[part : part + 4]):
                shown[name] = pictures[name][chosen]
                values = notes[name][chosen].tolist()
                marks[name] = [(f"ZNCC {z:.2f}", z > judges.own_limit) for z in values]
            texts = [captions[i] for i in chosen.tolist()]
            sheet(texts, shown, marks).save(out / f"sheet_{label}_{part // 4 + 1}.png")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    about = {"out": "mitigation_results", "first": FIRST, "steps": 20}
    parser = harness.parser("benchmarks.mitigations", __doc__, **about)
    parser.add_argument("--models", type=Path, default=harness.CACHE, help="indexes are kept here")
    parser.add_argument("--only", nargs="+", help="rows to draw beside plain (default all)")
    parser.add_argument("--amg", nargs="+", default=[], help="presets: each row with the guard too")
    parser.add_argument("--sscd", type=Path, help="Meta's sscd_disc_mixup file")
    return harness.parse(parser, arguments)


def chosen(only: Sequence[str] | None) -> list[Mitigation]:
    """The rows called for, plain first. AMGError for a name that is none."""
    rows = mitigations()
    if unknown := set(only or []) - {row.name for row in rows}:
        known = " | ".join(row.name for row in rows)
        raise AMGError(f"No such row: {' | '.join(sorted(unknown))}. There are: {known}.")
    return [row for row in rows if row.name == "plain" or not only or row.name in only]


def guarded(rows: Sequence[Mitigation], presets_named: Sequence[str]) -> list[Mitigation]:
    """`rows`, and each of them once more with every preset of the guard."""
    return [
        *rows,
        *(
            with_amg(row, presets.settings(name, "nl2"), f"AMG {name}")
            for name in presets_named
            for row in rows
        ),
    ]


def main() -> int:
    arguments = parse()

    def work() -> None:
        rows = guarded(chosen(arguments.only), arguments.amg)
        domain = text_world(arguments.models)
        run(arguments, rows, replace(domain, memorised=domain.kinds["subject first"]))

    return harness.status(work)


if __name__ == "__main__":
    raise SystemExit(main())
