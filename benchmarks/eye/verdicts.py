"""Table 4: the verdict on finished pictures, by two checks that both always vote.

Half of the held-out pictures are in the index, half are not, with their whole families. Of the first
half, edited, it is counted how many are called copies: by the first check (the descriptor), by the second
(registered correlation, the same whatever the descriptor), by either. Of the second half, unedited and
edited, how many are called copies although they are none: intended are at most 1 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from amg_core.descriptors import create
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import Verdict, verdict

from .. import harness
from ..harness import Table, Watch, between, markdown
from . import edits
from .eyes import NumberedRows, whole
from .recall import edited
from .setting import Setting

ASKED = (
    edits.UNEDITED, "resized to 25 %", "blurred, 2 % of the side", "grey",
    "autoencoder at 128 px", "cropped to 90 %", "cropped to 80 %", "cropped to 70 %",
    "border of 8 %", "text over it", "turned by 15°", "a quarter of a collage", "hue turned by 90°",
    "a quarter replaced", "another over it at 30 %", "as a model copies",
)  # fmt: skip
ALSO_STRANGERS = (edits.UNEDITED, "cropped to 70 %", "as a model copies")


def run(setting: Setting) -> Table:
    library, watch = setting.collection, Watch()
    order = np.random.default_rng(setting.seed).permutation(library.sources).tolist()
    inside, outside = order[: len(order) // 2], order[len(order) // 2 :]
    hidden = frozenset().union(*(library.families[row] for row in outside))
    rows = [row for row in range(len(library.rows)) if row not in hidden]
    figures: dict = {"inside": len(inside), "outside": len(outside), "rows": len(rows), "eyes": {}}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for eye in whole(setting.eyes):
            descriptor = create(eye.kind, eye.weights)
            shown = NumberedRows([library.rows[r] for r in rows])
            matcher = harness.matcher(shown, Path(folder) / eye.name, descriptor)
            found: dict = {}
            for edit in ASKED:
                found[edit] = _counted(setting, matcher, edit, inside)
                watch.tell(f"{eye.name}, {edit}")
            for edit in ALSO_STRANGERS:
                found[f"not in the index, {edit}"] = _counted(setting, matcher, edit, outside)
            figures["eyes"][eye.name] = found
            lines += [_line(eye.name, name, one) for name, one in found.items()]
    note = (
        f"{len(inside)} pictures of the index, {len(outside)} that are not in it, {len(rows)} rows. Called "
        f"a copy, in %; of strangers that is a false alarm, and the intended rate is at most 1 %.\n\n"
    )
    heading = [
        "descriptor, edit",
        "first check",
        "second check",
        "either (95 % interval)",
        "cannot tell",
        "near a limit",
    ]
    return Table("### Table 4: verdicts\n\n" + note + markdown(heading, lines), figures)


def _counted(setting: Setting, matcher: Matcher, edit: str, sources: list[int]) -> dict:
    verdicts = []
    for source in sources:
        image, _ = edited(setting, edit, source)
        verdicts += verdict(matcher, harness.to_tensor(image))
    return {
        "count": len(verdicts),
        "first": sum(_first(v) for v in verdicts),
        "second": sum(v.zncc > v.zncc_threshold for v in verdicts),
        "either": sum(v.copy for v in verdicts),
        "unsure": sum(bool(v.reason) for v in verdicts),
        "near": sum(v.near for v in verdicts),
        "zncc": [round(v.zncc, 3) for v in verdicts],
        "score": [round(v.score, 3) for v in verdicts],
    }


def _first(found: Verdict) -> bool:
    return found.similarity > found.threshold


def _line(name: str, edit: str, one: dict) -> list[str]:
    count = one["count"]
    share = [f"{100 * one[key] / count:.0f}" for key in ("first", "second", "either")]
    share[2] += f" ({between(one['either'], count)})"
    return [f"{name}, {edit}", *share, str(one["unsure"]), str(one["near"])]
