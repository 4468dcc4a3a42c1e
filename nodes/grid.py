"""Strength Grid: draws the same noise at several strengths and thresholds, for a choice by eye."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.samplers
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..amg_core import presets
from ..amg_core import sheet as contact
from ..amg_core.errors import AMGError
from ..amg_core.messages import Message, message
from ..amg_core.run import Settings
from ..amg_core.similarity.metrics import likeness
from . import hook, live, show
from .sampling import check_choice, denoise_input, drawing_inputs
from .types import EXPERT, MemorizationIndex, place

TERMS = ("despecification", "deduplication", "dissimilarity")
ALL = "all three"
MOST = 48  # drawings; more are probably a typing mistake
LARGEST = 3.0  # largest strength, as on the sliders of the terms
SLIDER = 2.0  # largest strength on the one slider for all three
MARGIN = 0.05  # of custom thresholds: the default of Apply AMG
SIDE = 256  # pixels of a picture on the sheet
# For each outcome of a verdict the words, their colour and that of the frame.
OUTCOMES = {
    "copy": ("COPY", contact.BAD),
    "cannot_tell": ("cannot tell", contact.UNSURE),
    "no_copy": ("no copy", contact.GOOD),
    None: ("not checked", contact.FAINT),
}
NEAR = ("no copy, but close", contact.UNSURE)
SHOWN = (  # of a row, on the page
    "picture", "strength", "threshold_scale", "same_as", "judged", "outcome", "near", "likeness",
    "composition", "source",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One drawing: its settings, the picture (H, W, 3) in [0, 1], and the measurements.

    `verdict` is an entry of "verdicts" in the report, or None if the picture was not checked. `same_as` is
    the strength, in the same row, of the first drawing that gave this very picture, or None.
    """

    strength: float
    scale: float
    picture: Tensor
    verdict: dict | None
    same_as: float | None = None

    def to_row(self) -> dict:
        """The row of the table, JSON-serialisable."""
        row = {"strength": self.strength, "threshold_scale": self.scale, "same_as": self.same_as}
        if self.verdict is None:
            return row | {"judged": False}
        keys = (
            "outcome", "similarity", "score", "zncc", "likeness", "composition", "near", "copy",
            "source", "words",
        )  # fmt: skip
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
                    tooltip="The same as a table to read: for each picture its settings, likeness "
                    "and composition (0 to 1, a copy above 0.4) and the verdict.",
                ),
                io.String.Output(
                    "data",
                    display_name="data",
                    tooltip="The same as JSON, for programs, with the figures as they were measured.",
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
            idle: list[Cell] = []  # of a drawing on which the guard did not act
            for strength in columns:
                if idle and strength > 0:  # then no other strength changes anything either
                    cells.append([replace(cell, strength=strength) for cell in idle])
                    continue
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
                idle = cells[-1] if _was_idle(report, strength) else []
        heading = f"{preset} · {strength_of} · seed {seed}"
        batch = [compared(one) for one in zip(*cells, strict=True)]
        shown = show.images([sheet(one, len(columns), heading) for one in batch])
        table = [cell.to_row() | {"picture": i + 1} for i, one in enumerate(batch) for cell in one]
        told = ui.PreviewImage(shown, cls=cls).as_dict() | live.lines(cls, sentences(table))
        line(told["text"][0])
        drawn_by = {
            "seed": seed, "steps": steps, "cfg": cfg, "sampler_name": sampler_name,
            "scheduler": scheduler, "denoise": denoise,
        }  # fmt: skip
        uses = {
            (scale, strength): use_of(preset, index.metric, strength_of, strength, scale, drawn_by)
            for scale in rows
            for strength in columns
        }
        cells_shown = [
            {key: row[key] for key in SHOWN if key in row}
            | {"use": uses[row["threshold_scale"], row["strength"]]}
            for row in table
        ]
        told["amg_grid"] = [{"class": cls.define_schema().node_id, "cells": cells_shown}]
        return io.NodeOutput(shown, as_text(table), json.dumps(table), ui=told)


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


def use_of(
    preset: str, metric: str, term: str, strength: float, scale: float, drawn_by: dict
) -> dict[str, dict]:
    """The widgets of AMG Sampler and of Apply AMG that draw with these settings: {node id: {name: value}}.

    AMG Sampler has no thresholds of its own, and custom ones of Apply AMG are on the scale of likeness. A
    node that cannot have the settings is missing. `drawn_by` has the widgets of KSampler.
    """
    terms = dict.fromkeys(TERMS, 1.0)
    together = strength if term == ALL and strength <= SLIDER else 1.0
    if together != strength:
        terms |= dict.fromkeys(TERMS if term == ALL else (term,), strength)
    widgets = {"preset": preset, "strength": together} | terms
    if scale == 1:
        plain = {"thresholds": "preset"}
        return {"AMG_Sampler": drawn_by | widgets, "AMG_Apply": widgets | plain}
    made = settings_of(preset, metric, term, strength, scale)
    schedule = made.schedule
    if made.own_units or max(schedule.start, schedule.end) >= 1:
        return {}
    custom = {
        "thresholds": "custom", "schedule": schedule.kind, "threshold_start": schedule.start,
        "threshold_end": schedule.end, "margin": MARGIN,
    }  # fmt: skip
    return {"AMG_Apply": widgets | custom}


def _was_idle(report: hook.Report, strength: float) -> bool:
    """Whether a guarded drawing was left as it is. At strength 0 it always is, and that says nothing."""
    return bool(strength > 0 and report.latest) and not any(report.latest["guarded_evaluations"])


def compared(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells, with `same_as` where an earlier one of the same row has the very same picture."""
    made: list[Cell] = []
    for cell in cells:
        same = (
            other.strength
            for other in made
            if other.scale == cell.scale and torch.equal(other.picture, cell.picture)
        )
        made.append(replace(cell, same_as=next(same, None)))
    return made


def sheet(cells, columns: int, heading: str = ""):
    """Cells in reading order -> an RGB picture with settings, likeness and verdict under each.

    Pictures are fitted into squares of 256 pixels. The frame is red for a copy, orange if the checks cannot
    tell or the picture is near a limit, green for no copy, and grey if it was not checked.
    """
    group = contact.Group([_framed(cell) for cell in cells])
    return contact.draw([group], heading=heading, columns=columns, side=SIDE)


def _framed(cell: Cell) -> contact.Tile:
    """The picture in the colour of its verdict, and the lines under it."""
    found = cell.verdict
    word, colour = OUTCOMES[found and found["outcome"]]
    lines = [f"strength {cell.strength:g}  threshold x{cell.scale:g}"]
    if found is not None:
        lines.append(
            f"likeness {likeness(found['score']):.2f}  composition {found['composition']:.2f}"
        )
        if found["near"]:
            word, colour = NEAR
    if cell.same_as is not None:
        lines.append(f"same picture as strength {cell.same_as:g}")
    picture = Image.fromarray((cell.picture * 255).round().byte().numpy())
    return contact.Tile(picture, [*lines, (word, colour)], colour)


def _verdicts(report: hook.Report, count: int) -> list[dict | None]:
    """The verdict on each picture of the latest run, None for pictures that were not checked."""
    found: list[dict | None] = [None] * count
    for verdict in report.latest["verdicts"] if report.latest else []:
        found[verdict["sample"]] = verdict
    return found


def sentences(table: list[dict]) -> list[list[Message]]:
    """What is said on the node: how many are copies, and rows in which no strength changed anything."""
    copies = sum(row.get("copy", False) for row in table)
    unchecked = sum(not row["judged"] for row in table)
    if unchecked:
        lines = [message("grid_unchecked", unchecked=unchecked, count=len(table))]
    else:
        lines = [message("grid_copies", copies=copies, count=len(table))]
    return [lines, *([message("grid_same", scale=f"{each:g}")] for each in _same_rows(table))]


def _same_rows(table: list[dict]) -> list[float]:
    """The threshold factors at which several strengths all draw the same picture."""
    scales = dict.fromkeys(row["threshold_scale"] for row in table)
    found = []
    for scale in scales:
        row = [each for each in table if each["threshold_scale"] == scale]
        strengths = list(dict.fromkeys(each["strength"] for each in row))
        if len(strengths) > 1 and all(
            each["same_as"] == strengths[0] for each in row if each["strength"] != strengths[0]
        ):
            found.append(scale)
    return found


HEADINGS = ("picture", "threshold", "strength", "likeness", "composition", "verdict", "nearest")


def as_text(table: list[dict]) -> str:
    """The rows as a table in Markdown, which is read well as plain text too."""
    lines = [HEADINGS, *map(_line, table)]
    wide = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    ruled = [lines[0], tuple("-" * width for width in wide), *lines[1:]]
    padded = ([text.ljust(width) for text, width in zip(line, wide, strict=True)] for line in ruled)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _line(row: dict) -> tuple[str, ...]:
    head = str(row["picture"]), f"x {row['threshold_scale']:g}", f"{row['strength']:g}"
    same = "" if row["same_as"] is None else f" (same picture as strength {row['same_as']:g})"
    if not row["judged"]:
        return *head, "", "", OUTCOMES[None][0] + same, ""
    word = NEAR[0] if row["near"] else OUTCOMES[row["outcome"]][0]
    figures = f"{row['likeness']:.2f}", f"{row['composition']:.2f}"
    return *head, *figures, word + same, row["source"].replace("|", "/")
