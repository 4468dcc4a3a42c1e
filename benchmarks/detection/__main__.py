"""Detection without an index on the embedded model: `python -m benchmarks.detection`.

Positives are the 32 captions that were trained with ten copies of their picture. Negatives are
captions of the same style: half were in the training set once, half never. γ of the anisotropy
metric is chosen on one half of the prompts and scored on the other, both ways; the calibrated scores
learn from other captions and know no positive. TPR is read at the last point of the ROC curve with
FPR <= 1 %. Brackets: 95 % bootstrap intervals over prompts. See docs/detection.md.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from amg_core.detection.calibration import SCORES, Calibration
from amg_core.detection.statistics import LOW
from amg_core.limits import ZNCC
from amg_core.similarity import verifier
from amg_demo import model as demo
from amg_demo.__main__ import training_set

from .. import harness
from . import drawing, roc

NEAR_ZERO = 0.001  # the paper's t ≈ 0 to the letter
STEPS, CFG = 20, 4.0
COUNTS = (1, 2, 4)


def parse() -> argparse.Namespace:
    about = {"out": "detection_results", "first": 300_000}
    parser = harness.parser("benchmarks.detection", __doc__, **about)
    parser.add_argument("--each", type=int, default=200, help="negatives of each of the two kinds")
    parser.add_argument("--calibration", type=int, default=72, help="captions to calibrate on")
    return harness.parse(parser)


class Detectors:
    """Rows of figures under three truths: the list; the list without negatives that really draw a
    copy; and what is drawn, where whatever draws a copy is a positive."""

    def __init__(self, labels: np.ndarray, copied: np.ndarray):
        everything = np.ones(len(labels), bool)
        self.groups = {"list": labels, "cleaned": labels, "drawn": copied}
        self.kept = {"list": everything, "cleaned": labels | ~copied, "drawn": everything}
        self.rows: list[dict] = []

    def add(self, name: str, n: int, passes: str, scores: np.ndarray, note: str = "") -> None:
        row = {"name": name, "n": n, "passes": passes, "note": note}
        for group, labels in self.groups.items():
            keep = self.kept[group]
            positives, negatives = scores[labels & keep], scores[~labels & keep]
            for key, figure in (("auc", roc.auc), ("tpr", roc.tpr_at)):
                bounds = roc.interval(figure, positives, negatives)
                row[f"{group} {key}"] = (figure(positives, negatives), *bounds)
        self.rows.append(row)

    def __str__(self) -> str:
        columns = [f"{group} {key}" for group in self.groups for key in ("auc", "tpr")]
        lines = []
        for row in self.rows:
            cells = (f"{f:.3f} [{a:.3f}, {b:.3f}]" for f, a, b in (row[c] for c in columns))
            lines.append([row["name"], str(row["n"]), row["passes"], *cells, row["note"]])
        return harness.markdown(["", "n", "passes", *columns, ""], lines)


def main() -> int:
    arguments = parse()
    watch = harness.Watch()
    model = demo.load()
    training, captions, copies = training_set(demo.PICTURES)
    prompts = drawing.choose(captions, copies, arguments.each, arguments.calibration)
    texts = prompts.memorised + prompts.negatives
    labels = np.arange(len(texts)) < len(prompts.memorised)
    z = drawing.noises(arguments.first, max(COUNTS))

    print(f"Looking at {len(texts)} prompts and {arguments.calibration} to calibrate …", flush=True)
    measured = drawing.measure(model, texts, z, LOW)
    near_zero = drawing.measure(model, texts, z, NEAR_ZERO)
    usual = drawing.measure(model, prompts.calibration, z, LOW)
    print(f"Drawing {len(texts)} pictures …", flush=True)
    pictures, walked, halfway = drawing.draw(model, texts, z[:1], STEPS, CFG)
    limit = ZNCC
    nearest, which = map(np.array, zip(*(_nearest(p, training) for p in pictures), strict=True))
    copied = nearest > limit
    own = copied & np.array([captions[i] == t for i, t in zip(which, texts, strict=True)])
    pairs = zip(halfway[: labels.sum()], texts, strict=False)
    halfway = [_nearest(p, training[[captions.index(text)]])[0] for p, text in pairs]

    table = Detectors(labels, copied)
    ratios = {}
    for n in COUNTS:
        column = {
            name: np.array([each[n - 1][name] for each in measured])
            for name in measured[0][n - 1]
        }  # fmt: skip
        zero = np.array([each[n - 1]["alignment"] for each in near_zero])
        table.add("norm, first step (Wen)", n, "1", column["norm"])
        if n == 1:
            table.add("norm, mean over all steps (Wen)", n, str(STEPS), walked.mean(1).numpy())
        for name, cosine in (
            ("anisotropy, paper", column["alignment"]),
            (f"anisotropy, paper, t = {NEAR_ZERO}", zero),
            ("anisotropy, authors' code", column["alignment_pixelwise"]),
        ):
            scores, ratios[f"{name}, n = {n}"] = roc.crossed(column["norm"], cosine, labels)
            table.add(name, n, "2", scores)
        table.add("alignment alone, paper", n, "1", column["alignment"])
        table.add("norm, first step, without colours", n, "1", column["toneless_norm"])
        table.add("norm near zero noise", n, "1", column["low_norm"])
        if n > 1:
            table.add("agreement", n, "1", column["agreement"])
        calibration = Calibration("demo", (4, 16, 16), max(COUNTS), LOW, usual, [])
        for kind in SCORES:
            if kind not in ("combined", "anisotropy"):
                continue
            scale = calibration.scale(kind, n)
            verdicts = [scale.judge(each) for each in measured]
            alarms = np.array([verdict.suspicious for verdict in verdicts])
            ordinary = ~labels & ~copied
            note = (
                f"verdict at 1 %: {alarms[labels].sum()} of {labels.sum()} found, "
                f"{alarms[ordinary].sum()} of {ordinary.sum()} false"
            )
            scores = np.array([verdict.score for verdict in verdicts])
            table.add(f"calibrated: {kind}", n, "2", scores, note)
    print(f"\n{table}\n")
    explained = _why(texts, labels, copied, nearest, measured, walked.numpy(), limit, ratios)
    explained += (
        f"\n{own[~labels].sum()} of the {copied[~labels].sum()} copies by negatives are of their own "
        f"training picture. Half-way, what memorised prompts' runs predict without the prompt has ZNCC "
        f"{np.mean(halfway):.2f} with it."
    )
    times = {
        n: drawing.seconds(model, texts[0], n, LOW, STEPS) for n in (1, 4)
    }  # fmt: skip
    explained += "\nMilliseconds a prompt: " + "; ".join(
        f"n = {n}: one pass {1e3 * t['one']:.0f}, probe of two passes {1e3 * t['two']:.0f}, "
        f"{STEPS} steps {1e3 * t['all']:.0f}"
        for n, t in times.items()
    )
    print(explained)
    results = {
        "rows": table.rows, "seconds": times, "limit": limit, "gamma2/gamma1": ratios,
        "prompts": [
            {"text": text, "memorised": bool(m), "zncc": float(near), "measured": each}
            for text, m, near, each in zip(texts, labels, nearest, measured, strict=True)
        ],
    }  # fmt: skip
    harness.write(arguments.out, results, f"{table}\n\n{explained}\n")
    print(f"{watch.seconds:.0f} s in all; everything is in {arguments.out}")
    return 0


def _nearest(picture: torch.Tensor, training: torch.Tensor) -> tuple[float, int]:
    """Correlation with the nearest training picture, blind to brightness and contrast; which it is."""
    found = verifier.zncc(picture[None].expand_as(training), training)
    return float(found.max()), int(found.argmax())


def _why(texts, labels, copied, nearest, measured, walked, limit, ratios) -> str:
    """What stands behind the table."""
    once = np.arange(len(texts)) < labels.sum() + (~labels).sum() // 2
    kinds = {"seen once": ~labels & once, "never seen": ~labels & ~once}
    lines = [
        f"Pictures drawn from one noise are copies (ZNCC above {limit:.2f}): "
        f"{copied[labels].sum()} of {labels.sum()} memorised prompts, "
        + ", ".join(f"{copied[k].sum()} of {k.sum()} {name}" for name, k in kinds.items())
    ]
    n = max(COUNTS)
    rows = {name: np.array([each[n - 1][name] for each in measured]) for name in measured[0][n - 1]}
    ordinary = ~labels & ~copied
    chosen = [text for text, keep in zip(texts, ordinary, strict=True) if keep]
    words = {"colour": [t.split()[-2] for t in chosen], "pattern": [t.split()[-1] for t in chosen],
             "subject": [t.split(" on ")[0] for t in chosen]}  # fmt: skip
    lines.append(f"n = {n}, AUC against negatives seen once | never seen | variance among negatives "
                 "explained by colour, pattern, subject:")  # fmt: skip
    for name, values in rows.items():
        apart = " | ".join(f"{roc.auc(values[labels], values[k]):.3f}" for k in kinds.values())
        shares = ", ".join(f"{roc.explained(values[ordinary], w):.2f}" for w in words.values())
        lines.append(f"  {name:<20} {apart} | {shares}")
    steps = " ".join(f"{roc.auc(w[labels], w[~labels]):.2f}" for w in walked.T)
    lines.append(f"AUC of the norm at each sampling step, first to last: {steps}")
    lines.append("γ2/γ1 chosen by the two halves:")
    lines += [f"  {name:<40} {a:.3g}, {b:.3g}" for name, (a, b) in ratios.items()]
    suspects = [i for i in np.argsort(-rows["agreement"]) if not labels[i]][:8]
    lines.append("Negatives of the highest agreement (ZNCC of what they draw):")
    lines += [f"  {texts[i]} ({nearest[i]:.2f})" for i in suspects]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
