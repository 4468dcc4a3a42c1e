"""Every guider of a ComfyUI core, with every sampler, in every way to use them: asleep and awake.

    COMFYUI_PATH=… python -m benchmarks.matrix
    COMFYUI_PATH=… python -m benchmarks.matrix --samplers euler ddim --out FOLDER

The embedded model, in a real ComfyUI. A cell is a guider, a sampler and a way: from noise, from a picture
at denoise 0.5, with most of a picture masked off (inpainting), with a prompt for an area, with two
prompts combined, with prompts for parts of the time. Each cell draws two pictures in one batch, an
innocent one and one whose prompt draws a stored picture (and that picture, where the way takes
one), three times from one seed (one by one where the host's own sums go over the batch, `COUPLED`):
without a guard, with a guard of strength 0, and guarded as AMG Sampler guards by default.

What has to hold:

equal     what the guard of strength 0 draws, and what the guard draws of a picture on which it never acted,
          is what is drawn without a guard, to the last bit
no escape a finished picture that is a copy is never called none. Copies are found by a judge that steers
          nothing and has no vote: the correlation of 16x16 grey pixels with a stored picture, or with
          its mirror image, above `limits.ZNCC`

Prints what broke either rule, and the counts; ends with 1 where something did. A cell that the host cannot
draw without a guard is counted, and nothing else is asked of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import guiders, harness
from .guard_cost import host

SIDE, CELLS = 128, 16
KEYS = 8  # captions of stored pictures, in turn
INDEXED = 24  # pictures in the index
WAYS = ("plain", "img2img", "inpaint", "area", "combined", "timed")
OUTCOMES = {"no_copy": "no copy", "cannot_tell": "cannot tell", "copy": "copy"}  # of a verdict
MIDDLE = "a"
OTHER = "crab"
COUPLED = ("PerpNegGuider", "dpm_adaptive")  # what it draws of one depends on the other

GUIDERS = {
    "CFGGuider": lambda model, p, domain: guiders.plain(model, p, domain.prompt("")),
    "BasicGuider": lambda model, p, domain: guiders.basic(model, p),
    "DualCFGGuider": lambda model, p, domain: guiders.dual(
        model, p, domain.prompt(MIDDLE), domain.prompt("")
    ),
    "DualCFGGuider nested": lambda model, p, domain: guiders.dual(
        model, p, domain.prompt(MIDDLE), domain.prompt(""), 2.0, 2.0, nested=True
    ),
    "PerpNegGuider": lambda model, p, domain: guiders.perpneg(
        model, p, domain.prompt(OTHER), domain.prompt("")
    ),
}


@dataclass
class Cell:
    """A guider, a sampler, a way; and the numbers of the innocent picture and of the stored one."""

    guider: str
    sampler: str
    way: str
    innocent: int
    key: int

    def __str__(self) -> str:
        return f"{self.guider}, {self.sampler}, {self.way}, key {self.key}"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    host.load("cpu")
    import comfy.samplers
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    logging.getLogger().setLevel(logging.ERROR)
    samplers = options.samplers or comfy.samplers.KSampler.SAMPLERS
    cells = [
        (guider, sampler, way)
        for sampler in samplers
        for way in WAYS
        for guider in GUIDERS
    ]  # fmt: skip
    numbered = [Cell(*cell, number % KEYS, number % KEYS) for number, cell in enumerate(cells)]
    chosen, counts = numbered[options.first :: options.every], Counter()
    print(f"{len(chosen)} of {len(cells)} cells, {options.steps} steps, index {options.descriptor}")
    with tempfile.TemporaryDirectory() as folder:
        domain = Domain(Path(folder), options)
        started = time.monotonic()
        for number, cell in enumerate(chosen):
            if time.monotonic() - started > 60 * options.minutes:
                print(f"stopped after {number} cells")
                break
            counts.update(domain.tried(cell))
            if number % 10 == 9:
                print(f"{number + 1} cells, {time.monotonic() - started:.0f} s", flush=True)
    wrong = _print(counts)
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("benchmarks.matrix", __doc__, steps=8)
    parser.set_defaults(threads=1)
    parser.add_argument("--samplers", nargs="+", help="all that the host lists")
    parser.add_argument(
        "--every", type=int, default=1,
        help="only every so many cells; 29: each sampler, and each guider in each way, at least once",
    )  # fmt: skip
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so many")
    parser.add_argument("--descriptor", default="compact", help="as in Build Memorization Index")
    parser.add_argument("--out", type=Path, help="folder for the pictures of what went wrong")
    return harness.parse(parser, arguments)


class Domain:
    """Model, text encoder, VAE, pictures and an index of the stored ones."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        import folder_paths

        from .end_to_end import _run

        self.options = options
        folder_paths.models_dir = str(folder / "models")
        host.module("nodes.paths").register()
        self.model, self.clip, self.vae, pictures, _ = _run("nodes.demo", "DemoModelNode")
        lines = Path(pictures, "metadata.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        known = [row for row in rows if row["file_name"].startswith("memorised")][:INDEXED]
        once = [row for row in rows if row["duplicates"] == 1][:: len(rows) // KEYS][:KEYS]
        self.captions = {
            "key": [row["text"] for row in known], "innocent": [row["text"] for row in once]
        }  # fmt: skip
        self.stored, self.others = (
            torch.cat(
                [harness.to_tensor(Image.open(Path(pictures, row["file_name"]))) for row in group]
            )
            for group in (known, once)
        )
        self.index, _ = _run(
            "nodes.index", "IndexFromImagesNode", images=[self.stored.movedim(1, -1)], name=["stored"],
            captions=self.captions["key"], descriptor=[options.descriptor], mode=["replace"],
            vae=[None], model=[None],
        )  # fmt: skip
        self._prompts: dict[tuple[str, ...], list] = {}

    def prompt(self, *texts: str) -> list:
        """CONDITIONING of a batch of prompts."""
        if texts not in self._prompts:
            with torch.inference_mode():
                made = [
                    self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0]
                    for text in texts
                ]
            cond = torch.cat([cond for cond, _ in made])
            self._prompts[texts] = [[cond, made[0][1]]]
        return self._prompts[texts]

    def tried(self, cell: Cell) -> Counter:
        """What came of a cell."""
        together = cell.guider not in COUPLED and cell.sampler not in COUPLED
        found, batches = Counter(cells=1), [(0, 1)] if together else [(0,), (1,)]
        for batch in batches:
            found += self._tried(cell, batch)
        return found

    def _tried(self, cell: Cell, batch: tuple[int, ...]) -> Counter:
        found = Counter()
        try:
            plain, _ = self.drawn(cell, batch, None)
        except Exception as error:
            print(f"the host cannot draw {cell}: {type(error).__name__}: {error}", flush=True)
            return Counter(["refused by the host"])
        off, written = self.drawn(cell, batch, 0.0)
        if not torch.equal(off, plain) or written["unseen_steps"]:
            found["not equal"] += 1
            print(f"not equal at strength 0: {cell}", flush=True)
        found += self._copies(cell, plain, written, "unsteered")
        guarded, written = self.drawn(cell, batch, 1.0)
        found["unseen steps"] += written["unseen_steps"]
        again = {i for attempt in written["attempts"][1:] for i in attempt["samples"]}
        for i, evaluations in enumerate(written["guarded_evaluations"]):
            acted = bool(evaluations) or i in again
            found["guard acted" if acted else "guard never acted"] += 1
            if not acted and not torch.equal(guarded[i], plain[i]):
                found["not equal"] += 1
                print(f"not equal though the guard never acted: {cell}, {batch[i]}", flush=True)
        return found + self._copies(cell, guarded, written, "guarded")

    def drawn(
        self, cell: Cell, batch: tuple[int, ...], strength: float | None
    ) -> tuple[Tensor, dict]:
        """Latents and report of a run; strength None is without a guard.

        batch : which are drawn, 0 = the innocent picture, 1 = that of the key.
        """
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

        model, report = self.model, host.module("nodes.hook").Report()
        if strength is not None:
            model = self._guarded(report, strength)
        positive, latent, denoise = self._way(cell, batch)
        guider = GUIDERS[cell.guider](model, positive, self)
        sampling = self.model.get_model_object("model_sampling")
        steps = self.options.steps
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", round(steps / denoise))
        sigmas = sigmas[-steps - 1 :]
        sampler = comfy.samplers.sampler_object(cell.sampler)
        noise = Noise_RandomNoise(7 + cell.key)
        with torch.inference_mode():
            out = SamplerCustomAdvanced.sample(
                SamplerCustomAdvanced, noise, guider, sampler, sigmas, latent
            )
        return out[0]["samples"].clone(), report.latest or {}

    def _guarded(self, report, strength: float):
        metric = self.index.metric
        settings = host.module("amg_core.presets").settings(
            "main", metric, despecification=strength, deduplication=strength,
            dissimilarity=strength, exit=strength,
        )  # fmt: skip
        return host.module("nodes.hook").attach(
            self.model, self.index, settings, clip=self.clip, vae=self.vae, report=report,
            loop=host.module("nodes.sampling").loop_of("say so", 2, True),
        )  # fmt: skip

    def _way(self, cell: Cell, batch: tuple[int, ...]) -> tuple[list, dict, float]:
        """Positive prompt, latent and denoise of a cell, by the host's own nodes."""
        import nodes

        both = self.captions["innocent"][cell.innocent], self.captions["key"][cell.key]
        texts, latent = [both[i] for i in batch], {}
        positive = self.prompt(*texts)
        latent["samples"] = torch.zeros(len(batch), 4, CELLS, CELLS)
        if cell.way in ("img2img", "inpaint"):
            pictures = torch.cat([self.others[[cell.innocent]], self.stored[[cell.key]]])
            with torch.inference_mode():
                latent["samples"] = self.vae.encode(pictures.movedim(1, -1)[list(batch)])
        if cell.way == "inpaint":
            latent["noise_mask"] = torch.zeros(1, 1, SIDE, SIDE)
            latent["noise_mask"][..., :24] = 1
        if cell.way == "area":
            (whole,) = nodes.ConditioningSetArea().append(positive, SIDE, SIDE, 0, 0, 1.0)
            (low,) = nodes.ConditioningSetArea().append(
                self.prompt(MIDDLE), SIDE, SIDE // 4, 0, 3 * SIDE // 4, 0.5
            )
            (positive,) = nodes.ConditioningCombine().combine(whole, low)
        if cell.way == "combined":
            (positive,) = nodes.ConditioningCombine().combine(
                positive, self.prompt(*(f"{text} {MIDDLE}" for text in texts))
            )
        if cell.way == "timed":
            timed = nodes.ConditioningSetTimestepRange().set_range
            (first,) = timed(positive, 0.0, 0.5)
            (second,) = timed(self.prompt(*(f"{text} {MIDDLE}" for text in texts)), 0.5, 1.0)
            (positive,) = nodes.ConditioningCombine().combine(first, second)
        return positive, latent, 0.5 if cell.way == "img2img" else 1.0

    def _copies(self, cell: Cell, latents: Tensor, written: dict, run: str) -> Counter:
        """The copies among the finished pictures, and what the report calls them."""
        judge, limit = (
            host.module("amg_core.similarity.verifier"),
            host.module("amg_core.limits").ZNCC,
        )
        with torch.inference_mode():
            pictures = self.vae.decode(latents).movedim(-1, 1).clamp(0, 1)
            both = torch.cat([self.stored, self.stored.flip(-1)])
            likeness, which = judge.zncc_matrix(pictures, both).max(dim=1)
        found = Counter()
        for i, verdict in enumerate(written["verdicts"]):
            says = OUTCOMES[verdict["outcome"]]
            copy, own = float(likeness[i]) > limit, int(which[i]) % len(self.stored)
            found[f"{run}, a copy, called {says}"] += copy
            found[f"{run}, no copy, called {says}"] += not copy
            if copy and says == "no copy":
                words = f"likeness {verdict['score']:.2f}, second check {verdict['zncc']:.2f}"
                print(f"escaped, {run}: {cell}: ZNCC {likeness[i]:.2f} with {own}, {words}")
                self._keep(f"{run} {cell} {i}", pictures[i], self.stored[own])
        return found

    def _keep(self, name: str, picture: Tensor, stored: Tensor) -> None:
        if self.options.out is None:
            return
        self.options.out.mkdir(parents=True, exist_ok=True)
        pair = torch.cat([stored, picture], dim=-1).movedim(0, -1)
        image = Image.fromarray((pair * 255).round().byte().numpy())
        image.save(self.options.out / f"{name}.png")


def _print(counts: Counter) -> int:
    """The figures; how many cells or pictures broke a rule."""
    width = max(map(len, counts))
    for name in sorted(counts):
        print(f"{name:{width + 2}}{counts[name]:6}")
    escapes = [n for name, n in counts.items() if name.endswith("a copy, called no copy")]
    return counts["not equal"] + sum(escapes)


if __name__ == "__main__":
    sys.exit(main())
