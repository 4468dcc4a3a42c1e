"""The paper's tables on models that memorise: `python -m benchmarks.tables`. See docs/tables.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from amg_core.errors import AMGError
from amg_demo.evaluate import sscd_embedding

from .. import harness
from . import domains, methods, report
from .grade import Embed, Judges
from .report import Row
from .train import TrainingRecipe

MODELS = ("text", "cfg1", "flow", "class", "unconditional")
CLEAN = "plain, without its copies"
TITLES = {4: "each term left out", 5: "gate and schedule"}  # of the others, the model's name


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    about = {"out": "tables_results", "first": 420_000, "steps": 20}
    parser = harness.parser("benchmarks.tables", __doc__, **about)
    parser.add_argument(
        "--models", type=Path, default=harness.CACHE, help="trained models are kept here"
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", help="rows to draw beside plain (default all)")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--train-steps", type=int, default=TrainingRecipe.steps)
    parser.add_argument("--sscd", type=Path, help="Meta's sscd_disc_mixup file")
    return harness.parse(parser, arguments)


def main() -> int:
    arguments = parse()
    weights: Path | None = arguments.sscd
    return harness.status(lambda: run(arguments, weights and sscd_embedding(weights)))


def run(arguments: argparse.Namespace, sscd: Embed | None = None) -> dict:
    """Draw and grade every row of the chosen models; returns what figures.json holds."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    watch, results = harness.Watch(), {"arguments": _json(vars(arguments)), "domains": {}}
    makers = {
        "text": (lambda: domains.text_world(arguments.models), methods.text_methods),
        "cfg1": (lambda: domains.text_world(arguments.models, 1.0), methods.text_methods),
        "flow": (lambda: domains.text_world(arguments.models, flow=True), methods.text_methods),
        "class": (
            lambda: domains.class_world(arguments.models, _recipe(arguments), _tell),
            methods.class_methods,
        ),
        "unconditional": (
            lambda: domains.unconditional_world(arguments.models, _recipe(arguments), _tell),
            methods.unconditional_methods,
        ),
    }
    known = {m.name for name in arguments.only for m in makers[name][1]()}
    if unknown := set(arguments.methods or []) - known:
        raise AMGError(
            f"No such row: {' | '.join(unknown)}. There are: {' | '.join(sorted(known))}."
        )
    for name in arguments.only:
        make, rows = makers[name]
        judges = Judges(make(), sscd)
        chosen = [
            m for m in rows()
            if m.name == "plain" or not arguments.methods or m.name in arguments.methods
        ]  # fmt: skip
        drawn = {m.name for m in chosen}
        chosen = [m for m in chosen if not m.after or m.after in drawn]
        results["domains"][name] = table(judges, chosen, arguments, name)
        results["seconds"] = watch.seconds
        harness.write(out, results, _text(results["domains"].values()))
    print(
        f"\n{results['seconds']:.0f} s in all; sheets, curves and figures.json in {out.resolve()}"
    )
    return results


def table(judges: Judges, rows: list[methods.Method], arguments, name: str) -> dict:
    """Draw, grade, print and save one world."""
    domain, out = judges.domain, arguments.out
    asked = list(domain.prompts(arguments.seeds, arguments.first))
    captions, seeds = [caption for caption, _, _ in asked], [seed for _, seed, _ in asked]
    group = torch.tensor([g for _, _, g in asked])
    made: dict[str, Row] = {}
    own = None
    for method in rows:
        n = len(group) if method.others else int((group == 0).sum())  # the memorised come first
        _tell(f"{domain.name}: drawing {n} pictures, {method.name}")
        texts = captions[:n]
        if method.after:
            texts = methods.reduced(texts, seeds, made[method.after].drawn)
        drawn = methods.draw(domain, method, texts, seeds[:n], arguments.steps)
        if own is None:
            own = judges.own(drawn.pictures, captions)
        plain = made["plain"].drawn.pictures if made else drawn.pictures
        grades = judges.grade(drawn.pictures, captions[:n], own.first(n), plain[:n], method.eye)
        made[method.name] = Row(method, drawn, grades, group[:n])
    result = figures(judges, made, captions, seeds)
    for title, part in result["tables"].items():
        print(f"\n### {title}\n\n{report.markdown(part)}", flush=True)
    for guard in (n for n in made if n.startswith("AMG")):
        count = int((made[guard].group == 0).sum())
        print("\n" + report.tell_failures(guard, result["failures"][guard], count), flush=True)
    for guard in (
        n for n in ("AMG main", "AMG strong", "AMG gentle", "paper", "reference") if n in made
    ):
        slug = f"{name}_{guard.replace(' ', '_')}"
        report.save_sheet(out / f"sheet_{slug}.png", judges, made, guard, captions, own)
        report.save_sheet(out / f"others_{slug}.png", judges, made, guard, captions, own, 1)
        report.save_curves(
            out / f"curves_{slug}.png", judges, made[guard], captions, seeds, arguments.steps
        )
    return result


def figures(judges: Judges, made: dict[str, Row], captions: list[str], seeds: list[int]) -> dict:
    """All tables of one world, and what every picture was graded."""
    tables: dict[str, dict] = {}
    plain = made["plain"]
    memorised, others = plain.group == 0, plain.group == 1
    for number in sorted({n for row in made.values() for n in row.method.tables}):
        part = {name: row for name, row in made.items() if number in row.method.tables}
        if len(part) == 1 and len(made) > 1:  # nothing to compare with plain
            continue
        title = f"Table {number}: {TITLES.get(number, judges.domain.name)}"
        tables[f"{title}, {int(memorised.sum())} pictures"] = paper = {
            k: report.paper_columns(row, row.group == 0, judges.real) for k, row in part.items()
        }
        clean = memorised & (plain.grades.score <= report.COPY)
        if clean.sum() >= report.FEW:  # the quality that is left where nothing is copied
            paper[CLEAN] = report.paper_columns(plain, clean, judges.real)
        limits = f"ZNCC limits: own {judges.own_limit:.2f}, any {judges.limit:.2f}"
        tables[f"{title}: unseen judges ({limits})"] = {
            k: report.honest_columns(row, row.group == 0, judges) for k, row in part.items()
        }
        tables[f"{title}: method minus plain, paired"] = {
            k: report.against_plain(row, plain)
            for k, row in part.items() if k != "plain"
        }  # fmt: skip
        for kind, texts in judges.domain.kinds.items():
            these = memorised & torch.tensor([caption in texts for caption in captions])
            tables[f"{title}: {kind}, {int(these.sum())} pictures"] = {
                k: report.kind_columns(row, these) for k, row in part.items()
            }
        if others.any():
            tables[f"{title}: {int(others.sum())} others, to be left alone"] = {
                k: report.dormant_columns(row, others)
                for k, row in part.items() if row.method.others
            }  # fmt: skip
        untouched = memorised & (plain.grades.score <= report.COPY)
        if number in (2, 3) and untouched.any():
            heading = f"{title}: the {int(untouched.sum())} whose unguarded twin is no copy"
            tables[heading] = {k: report.dormant_columns(r, untouched) for k, r in part.items()}
    tables = {title: part for title, part in tables.items() if part}
    return {
        "tables": tables,
        "failures": {
            k: report.failures(row, captions, seeds)
            for k, row in made.items() if k != "plain"
        },
        "redrawn": {k: row.drawn.redrawn for k, row in made.items() if row.method.retries},
        "zncc_limits": {"own": judges.own_limit, "any": judges.limit},
        "pictures": {
            "prompt": captions, "seed": seeds, "group": plain.group.tolist(),
            **{k: _columns(row) for k, row in made.items()},
        },
    }  # fmt: skip


def _columns(row: Row) -> dict[str, list]:
    g = row.grades
    names = ("nl2", "score", "views", "other", "zncc", "zncc_own", "sscd", "sscd_own")
    kept = {n: getattr(g, n) for n in (*names, "alignment", "same")}
    kept = {n: v for n, v in kept.items() if v is not None and not torch.isnan(v).any()}
    return {n: v.tolist() for n, v in kept.items()} | {"acted": row.drawn.acted}


def _text(tables_of_worlds: Iterable[dict]) -> str:
    parts = [part for domain in tables_of_worlds for part in domain["tables"].items()]
    return "\n".join(f"### {title}\n\n{report.markdown(part)}" for title, part in parts)


def _recipe(arguments: argparse.Namespace) -> TrainingRecipe:
    return TrainingRecipe(steps=arguments.train_steps)


def _json(values: dict) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
