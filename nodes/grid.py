"""Strength Grid: draws the same noise at several strengths and thresholds, for a choice by eye."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import comfy.samplers
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..amg_core import presets
from ..amg_core import sheet as contact
from ..amg_core.errors import AMGError
from ..amg_core.run import Settings
from . import hook, live, show
from .sampling import check_choice, denoise_input, drawing_inputs
from .types import EXPERT, MemorizationIndex, place

TERMS = ("despecification", "deduplication", "dissimilarity")
ALL = "all three"
MOST = 48  # drawings; more are probably a typing mistake
LARGEST = 3.0  # largest strength, as on the sliders
SIDE = 256  # pixels of a picture on the sheet
# For each outcome of a verdict the words, their colour and that of the frame.
OUTCOMES = {
    "copy": ("COPY", contact.BAD),
    "cannot_tell": ("cannot tell", contact.UNSURE),
    "no_copy": ("no copy", contact.GOOD),
    None: ("not checked", contact.FAINT),
}


@dataclass(frozen=True)
class Cell:
    """One drawing: its settings, the picture (H, W, 3) in [0, 1], and the measurements.

    `verdict` is an entry of "verdicts" in the report, or None if the picture was not checked.
    """

    strength: float
    scale: float
    picture: Tensor
    verdict: dict | None

    def to_row(self) -> dict:
        """The row of the table, JSON-serialisable."""
        row = {"strength": self.strength, "threshold_scale": self.scale}
        if self.verdict is None:
            return row | {"judged": False}
        keys = ("outcome", "similarity", "score", "zncc", "copy", "source", "words")
        return row | {"judged": True} | {key: self.verdict[key] for key in keys}


class StrengthGridNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_StrengthGrid",
            display_name="AMG Strength Grid",
            **place(EXPERT),
            description="Draws the same noise at several strengths and thresholds of the guard, "
            "and puts the pictures on one sheet with likeness and verdict. Use it to choose the "
            "settings by eye. Each picture of the sheet costs a whole sampling.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that draws. Connect it without Apply "
                    "AMG: this node guards it itself.",
                ),
                MemorizationIndex.Input(
                    "index",
                    tooltip="The pictures to stay away from, from Load or Build Memorization "
                    "Index.",
                ),
                io.Conditioning.Input("positive", tooltip="What you want to see."),
                io.Conditioning.Input("negative", tooltip="What you do not want to see."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from. Each picture of a batch gives one sheet, "
                    "and is drawn at every setting.",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="Turns the latents into pictures, which are checked as you see them.",
                ),
                *drawing_inputs(
                    seed="The random seed. All pictures of a sheet start from the same noise. "
                    "Use the seed of the picture that you want to tune.",
                    steps="Number of denoising steps of each drawing. Use the number of your "
                    "sampler.",
                    cfg="How closely the picture follows the prompt. Use the cfg of your "
                    "sampler. 4 to 8 is usual.",
                    sampler_name="The sampling algorithm. Use that of your sampler.",
                    scheduler="How the noise is removed over the steps. Use the scheduler of your "
                    "sampler.",
                ),
                denoise_input("How much is redrawn. Use the value of your sampler."),
                io.Combo.Input(
                    "preset",
                    options=list(presets.PRESETS),
                    default=presets.PRESETS[0],
                    tooltip="The preset that strengths and thresholds multiply, as in AMG Sampler.",
                ),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1, 2",
                    tooltip="The columns of the sheet: strengths, separated by commas. 0 = off, "
                    "1 = the preset. Up to 2 is safe, 3 is the most.",
                ),
                io.Combo.Input(
                    "strength_of",
                    options=[ALL, *TERMS],
                    default=ALL,
                    tooltip="The slider of AMG Sampler that the strengths set. The other two "
                    "stay at 1. With 'all three' they move together.",
                ),
                io.String.Input(
                    "threshold_scales",
                    default="1",
                    tooltip="The rows of the sheet: factors on the thresholds of the preset, "
                    "separated by commas. 1 = the preset, 0.5 to 1.2 is usual. A smaller factor "
                    "guards more and changes more.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of your prompt. It reads captions of the index for "
                    "deduplication. Without it deduplication is off. It also lets the guard "
                    "leave out single words; without it the guard keeps only the first words.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="The contact sheet, one for each picture of the batch: strengths "
                    "from left to right, threshold factors from top to bottom. A red frame is a "
                    "copy.",
                ),
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="The same as JSON: for each picture its settings, similarity, "
                    "likeness (0 = as alike as pictures that are not in the index, 1 = the same "
                    "picture) and verdict.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, index, positive, negative, latent_image, vae, seed, steps, cfg, sampler_name,
        scheduler, denoise, preset, strengths, strength_of, threshold_scales, clip=None,
    ) -> io.NodeOutput:  # fmt: skip
        from nodes import common_ksampler

        check_choice("sampler_name", sampler_name, comfy.samplers.KSampler.SAMPLERS)
        check_choice("scheduler", scheduler, comfy.samplers.KSampler.SCHEDULERS)
        check_choice("strength_of", strength_of, (ALL, *TERMS))
        columns = numbers("strengths", strengths, largest=LARGEST)
        rows = numbers("threshold_scales", threshold_scales)
        if len(columns) * len(rows) > MOST:
            raise AMGError(
                f"strengths × threshold_scales: {len(columns)} × {len(rows)} drawings are more than "
                f"the {MOST} that fit on a sheet. Give fewer values."
            )
        line = show.text_on(cls.hidden.unique_id)
        cells: list[list[Cell]] = []  # by drawing, then by picture of the batch
        for scale in rows:
            for strength in columns:
                line(f"drawing {len(cells) + 1} of {len(columns) * len(rows)}…")
                report = hook.Report()
                guarded = hook.attach(
                    model, index, settings_of(preset, index.metric, strength_of, strength, scale),
                    clip=clip, vae=vae, loop=hook.Loop(), report=report,
                    graph=cls.hidden.prompt,
                )  # fmt: skip
                (latent,) = common_ksampler(
                    guarded, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                    latent_image, denoise=denoise,
                )  # fmt: skip
                found = _verdicts(report, len(latent["samples"]))
                pictures = vae.decode(latent["samples"])[..., :3].float().clamp(0, 1).cpu()
                cells.append(
                    [Cell(strength, scale, *pair) for pair in zip(pictures, found, strict=True)]
                )
        heading = f"{preset} · {strength_of} · seed {seed}"
        batch = list(zip(*cells, strict=True))
        shown = show.images([sheet(one, len(columns), heading) for one in batch])
        table = [cell.to_row() | {"picture": i + 1} for i, one in enumerate(batch) for cell in one]
        line(_words(table))
        told = ui.PreviewImage(shown, cls=cls).as_dict() | live.lines(cls, [_words(table)])
        return io.NodeOutput(shown, json.dumps(table), ui=told)


def numbers(name: str, text: str, largest: float = math.inf) -> list[float]:
    """The distinct numbers in a text such as "0, 0.5, 1", in order.

    They are separated by commas, semicolons, spaces or lines. AMGError names the widget if there are
    none, or if one is no finite number from 0 to `largest`.
    """
    found: list[float] = []
    for word in text.replace(",", " ").replace(";", " ").split():
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and 0 <= value <= largest):
            limit = "0 or more" if largest == math.inf else f"0 to {largest:g}"
            raise AMGError(
                f"{name}: {word!r} cannot be used. Give numbers of {limit}, with a point for "
                "decimals and a comma between them, such as 0, 0.5, 1."
            )
        if value not in found:
            found.append(value)
    if not found:
        raise AMGError(f"{name}: there is no number. Give at least one, such as 1.")
    return found


def settings_of(preset: str, metric: str, term: str, strength: float, scale: float) -> Settings:
    """The preset, with one term or all multiplied by `strength`, and its thresholds by `scale`."""
    chosen = dict.fromkeys(TERMS if term == ALL else (term,), strength)
    made = presets.settings(preset, metric, **chosen)
    if scale == 1:
        return made
    schedule = made.schedule
    return replace(
        made, schedule=replace(schedule, start=schedule.start * scale, end=schedule.end * scale)
    )


def sheet(cells, columns: int, heading: str = ""):
    """Cells in reading order -> an RGB picture with settings, likeness and verdict under each.

    Pictures are fitted into squares of 256 pixels. The frame is red for a copy, orange if only the
    second check says copy, green for no copy, and grey if the picture was not checked.
    """
    group = contact.Group([_framed(cell) for cell in cells])
    return contact.draw([group], heading=heading, columns=columns, side=SIDE)


def _framed(cell: Cell) -> contact.Tile:
    """The picture in the colour of its verdict, and the lines under it."""
    found = cell.verdict
    word, colour = OUTCOMES[found and found["outcome"]]
    lines = [f"strength {cell.strength:g}  threshold x{cell.scale:g}"]
    if found is not None:
        close = max(0.0, found["score"])
        lines.append(f"likeness {close:.2f}")
    picture = Image.fromarray((cell.picture * 255).round().byte().numpy())
    return contact.Tile(picture, [*lines, (word, colour)], colour)


def _verdicts(report: hook.Report, count: int) -> list[dict | None]:
    """The verdict on each picture of the latest run, None for pictures that were not checked."""
    found: list[dict | None] = [None] * count
    for verdict in report.latest["verdicts"] if report.latest else []:
        found[verdict["sample"]] = verdict
    return found


def _words(table: list[dict]) -> str:
    """The line on the node."""
    copies = sum(row.get("copy", False) for row in table)
    judged = sum(row["judged"] for row in table)
    if judged < len(table):
        return f"{len(table) - judged} of {len(table)} pictures could not be checked"
    return f"{copies} of {len(table)} pictures are copies"
