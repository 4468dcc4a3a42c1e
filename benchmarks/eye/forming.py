"""Table 5: how early does the gate open on what is only half formed?

Two ways to a half-formed prediction. *Drawing*: the embedded model draws its 32 memorised prompts and 32
others (16 captions it saw once, 16 it never saw), and a run of *main* at strength 0 watches. *Noised*:
photographs are encoded, noised to σ and denoised by that model without a prompt, at several sizes: half of
them are in the index. The smaller the picture, the more of it a noise level hides.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import create
from amg_core.run import SamplingRun
from amg_demo import model as demo
from amg_demo.__main__ import choose_prompts, training_set
from amg_demo.sample import sample

from .. import harness
from ..harness import Table, Watch, between, markdown
from .eyes import NumberedRows, ProductEye, whole
from .live import COPIES, photograph
from .pictures import PHOTOGRAPH
from .setting import Setting

STEPS, BATCH, FIRST_SEED = 20, 16, 480_000
SIZES = (128, 256, 512)
SIGMAS = (4.0, 2.0, 1.0, 0.6, 0.3, 0.1)
OFF = {"despecification": 0.0, "deduplication": 0.0, "dissimilarity": 0.0}


def run(setting: Setting) -> Table:
    watch, figures = Watch(), {}
    lines: tuple[list, list] = ([], [])
    network = demo.load()
    decoder = ModuleDecoder("demo", network.decoder, 4)
    with tempfile.TemporaryDirectory() as folder:
        for eye in whole(setting.eyes):
            figures[eye.name] = {
                "drawn": drawn(network, decoder, eye, Path(folder) / eye.name),
                "noised": noised(setting, network, decoder, eye, Path(folder) / f"{eye.name}-own"),
            }
            lines[0].append(_drawn_line(eye.name, figures[eye.name]["drawn"]))
            for size, found in figures[eye.name]["noised"].items():
                lines[1].append(_noised_line(f"{eye.name}, {size} px", found))
            watch.tell(f"{eye.name}, half-formed")
    first = [
        "descriptor", "memorised: opened on the right picture", "first step: median / latest",
        "seen once: opened", "never seen: opened",
    ]  # fmt: skip
    second = ["descriptor, size", *(f"σ {sigma}" for sigma in SIGMAS), "not in the index, at any σ"]
    text = (
        f"### Table 5: half-formed predictions\n\nThe embedded model's prompts, {STEPS} steps, preset "
        f"main; steps are counted from 1.\n\n{markdown(first, lines[0])}\n"
        f"Photographs noised to σ and denoised without a prompt: opened on the right one, of {COPIES} in "
        f"the index; last, opened on one of {COPIES} that are not (95 % interval).\n\n"
        f"{markdown(second, lines[1])}"
    )
    return Table(text, figures)


def drawn(network, decoder, eye: ProductEye, folder: Path) -> dict:
    """At which step the gate opened first on each prompt's own picture, and on any: 0 for never."""
    _, captions, copies = training_set(demo.PICTURES)
    memorised, others = choose_prompts(captions, copies)
    prompts = memorised + others
    descriptor = create(eye.kind, eye.weights)
    matcher = harness.matcher(demo.PICTURES, folder, descriptor, decoder)
    own, opened = [], []
    for start in range(0, len(prompts), BATCH):
        texts = prompts[start : start + BATCH]
        sampling = SamplingRun(matcher, presets.settings("main", matcher.metric, **OFF))
        seeds = list(range(FIRST_SEED + start, FIRST_SEED + start + len(texts)))
        sample(network, texts, seeds, steps=STEPS, cfg_scale=4.0, guide=sampling.step)
        for i, text in enumerate(texts):
            steps = [s for s, r in enumerate(sampling.records, 1) if r.active[i]]
            named = [
                s
                for s in steps
                if matcher.index.caption(sampling.records[s - 1].neighbor[i]) == text
            ]
            opened.append(min(steps, default=0))
            own.append(min(named, default=0))
    count, once = len(memorised), len(memorised) + len(others) // 2
    return {"own": own[:count], "once": opened[count:once], "never": opened[once:]}


@torch.no_grad()
def noised(setting: Setting, network, decoder, eye: ProductEye, folder: Path) -> dict:
    """By size, "right": how many opened on the right one at each σ; "strangers": at any; "count"."""
    library = setting.collection
    photographs = [r for r in library.sources if library.rows[r].kind == PHOTOGRAPH]
    inside, outside = photographs[:COPIES], photographs[COPIES : 2 * COPIES]
    hidden = frozenset().union(*(library.families[row] for row in outside))
    rows = [r for r in inside + [r for r in library.families if r not in inside] if r not in hidden]
    descriptor = create(eye.kind, eye.weights)
    shown = NumberedRows([library.rows[r] for r in rows])
    matcher = harness.matcher(shown, folder, descriptor, decoder)
    names = [rows[int(record.source)] for record in matcher.index.records()]
    empty = network.encode([""])
    found: dict = {}
    for size in SIZES:
        noise = torch.Generator().manual_seed(setting.seed)
        right, strangers = np.zeros(len(SIGMAS), dtype=int), 0
        for row in inside + outside:
            latent = network.encoder(photograph(library.rows[row].load(), (size, size)))
            sampling = SamplingRun(matcher, presets.settings("main", matcher.metric, **OFF))
            for sigma in SIGMAS:
                level = torch.tensor([sigma])
                given = latent + sigma * torch.randn(latent.shape, generator=noise)
                made: Tensor = network.denoise(given, level, empty)
                sampling.step(made, cond=made, uncond=made, cfg_scale=4.0, sigma=level, t=0.5)
            opened = [r.active[0] for r in sampling.records]
            if row in outside:
                strangers += any(opened)
                continue
            named = [names[r.neighbor[0]] in library.families[row] for r in sampling.records]
            right += np.array(opened) & np.array(named)
        found[size] = {"right": right.tolist(), "strangers": strangers, "count": len(outside)}
    return found


def _drawn_line(name: str, one: dict) -> list[str]:
    steps = [s for s in one["own"] if s]
    middle = f"{np.median(steps):.0f} / {max(steps)}" if steps else "–"
    shares = [f"{sum(map(bool, one[k]))} of {len(one[k])}" for k in ("own", "once", "never")]
    return [name, shares[0], middle, *shares[1:]]


def _noised_line(name: str, one: dict) -> list[str]:
    hits, count = one["strangers"], one["count"]
    alarms = f"{hits} of {count} ({between(hits, count)} %)"
    return [name, *map(str, one["right"]), alarms]
