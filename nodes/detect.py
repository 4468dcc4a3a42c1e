"""Prompt Probe and Calibrate Prompt Probe: check before drawing whether a prompt is memorised."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
from comfy_api.latest import io

from ..amg_core.detection import calibration as calibrations
from ..amg_core.detection import tokens
from ..amg_core.detection.calibration import Calibration, Suspicion
from ..amg_core.detection.statistics import LOW
from ..amg_core.errors import AMGError
from ..amg_core.messages import words as in_words
from . import live, paths, probing, show
from .types import CHECK, PromptVerdict, place

ORDINARY = Path(__file__).with_name("ordinary_prompts.txt")
IF_SUSPICIOUS, ALWAYS, NEVER = WORDS = ("if suspicious", "always", "never")
SEEDS = 4


@dataclass(frozen=True)
class JudgedPrompt:
    """The value of a PROMPT_VERDICT wire."""

    verdict: Suspicion
    key_words: str


class PromptProbeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_PromptProbe",
            display_name="AMG Prompt Check (Prompt Probe)",
            **place(CHECK),
            description="Says whether a prompt probably draws a memorised training picture, "
            "before anything is drawn and without an index. Put it in front of a sampler. If you "
            "also connect a guarded model, only suspicious prompts are drawn under guard.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will draw, with its LoRAs. Run Calibrate Prompt "
                    "Probe on it once before.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt to test. It comes out unchanged."
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The negative prompt. It comes out unchanged. Without clip it also "
                    "stands for an empty prompt: then leave its text empty, or the verdict will "
                    "be wrong.",
                ),
                io.Combo.Input(
                    "score",
                    options=list(calibrations.SCORES),
                    default=next(iter(calibrations.SCORES)),
                    tooltip="What is measured. combined: everything, recommended. anisotropy: "
                    "norm and alignment, as in the paper of 2026. norm: as in the paper of 2024. "
                    "agreement: how alike the first guesses from different noises are. All cost "
                    "the same.",
                ),
                io.Int.Input(
                    "seeds",
                    default=SEEDS,
                    min=1,
                    max=16,
                    tooltip="How many noises are used, at most as many as the calibration has. "
                    "More gives a steadier result and takes longer: the probe costs as much as "
                    "two sampling steps of this many pictures.",
                ),
                io.Float.Input(
                    "false_alarms",
                    default=0.01,
                    min=0.0001,
                    max=0.5,
                    step=0.001,
                    round=0.0001,
                    tooltip="Share of ordinary prompts that may be called suspicious: 0.01 = one "
                    "in a hundred. A larger share finds more memorised prompts and also stops "
                    "more ordinary ones.",
                ),
                io.Combo.Input(
                    "words",
                    options=list(WORDS),
                    default=IF_SUSPICIOUS,
                    tooltip="When to find the trigger words, by leaving out each word in turn: "
                    "if suspicious, always or never. Needs clip and text. Costs one more probe "
                    "for every word (16 groups of words at most).",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The text of the prompt once more, to find the trigger words. "
                    "Connect the text that the prompt was encoded from.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the prompt. It encodes an empty prompt to "
                    "compare with, and the prompt without each word.",
                ),
                io.Model.Input(
                    "guarded_model",
                    optional=True,
                    tooltip="The same model from Apply AMG. It comes out as MODEL if the prompt "
                    "is suspicious. Otherwise the plain model comes out, and sampling costs "
                    "nothing extra.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "chosen_model",
                    display_name="MODEL",
                    tooltip="The model to draw with: guarded_model if it is connected and the "
                    "prompt is suspicious, otherwise model. Neither is changed.",
                ),
                io.Conditioning.Output(
                    "same_positive", display_name="positive", tooltip="The prompt, unchanged."
                ),
                io.Conditioning.Output(
                    "same_negative",
                    display_name="negative",
                    tooltip="The negative prompt, unchanged.",
                ),
                io.Boolean.Output(
                    "suspicious",
                    display_name="suspicious",
                    tooltip="True if the prompt scores so high that fewer ordinary prompts than "
                    "false_alarms reach it. Connect it to any switch.",
                ),
                io.Float.Output(
                    "probability",
                    display_name="probability",
                    tooltip="Share of ordinary prompts that score lower. If the calibration was "
                    "given memorised prompts: the probability that this is one, if both kinds "
                    "were equally likely before.",
                ),
                io.Float.Output(
                    "spreads",
                    display_name="score",
                    tooltip="How far the score is from that of ordinary prompts, in units of "
                    "their spread: 0 is the middle of them, 3 is rare.",
                ),
                io.String.Output(
                    "verdict", display_name="verdict", tooltip="The verdict in a sentence."
                ),
                io.String.Output(
                    "key_words",
                    display_name="words",
                    tooltip="The trigger words: those that matter most, and how far the score "
                    "falls without each. Empty if they were not searched for.",
                ),
                PromptVerdict.Output(
                    "prompt_verdict",
                    display_name="PROMPT_VERDICT",
                    tooltip="The complete verdict, for the node Guard.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> str:
        """Changes with the calibrations, because another calibration may give another verdict."""
        return " ".join(paths.calibrations())

    @classmethod
    def execute(
        cls, model, positive, negative, score, seeds, false_alarms, words, text="", clip=None,
        guarded_model=None,
    ) -> io.NodeOutput:  # fmt: skip
        calibration = calibration_of(model)
        scale = calibration.scale(score, seeds)
        if words == ALWAYS and (clip is None or not text.strip()):
            raise AMGError(
                "words: the trigger words cannot be found without clip and text. Connect clip "
                "and give the text of the prompt, or set words to never."
            )
        nothing = negative if clip is None else probing.encode(clip, "")

        def judge(prompt) -> Suspicion:
            measured = probing.measure(
                model, prompt, nothing, calibration.shape, seeds, calibration.low
            )
            return scale.judge(measured, false_alarms)

        verdict = judge(positive)
        wanted = words == ALWAYS or (words == IF_SUSPICIOUS and verdict.suspicious)
        found = []
        if wanted and clip is not None and text.strip():
            parts = tokens.leave_out(text, lambda part: judge(probing.encode(clip, part)).score)
            found = tokens.messages(parts)
        key_words, sentence = in_words(found), in_words([*verdict.messages(), *found])
        show.text_on(cls.hidden.unique_id)(sentence)
        guarded = guarded_model is not None and verdict.suspicious
        return io.NodeOutput(
            guarded_model if guarded else model, positive, negative, verdict.suspicious,
            verdict.probability, verdict.score, in_words(verdict.messages()), key_words,
            JudgedPrompt(verdict, key_words),
            ui=live.lines(cls, [[*verdict.messages(), *found]]),
        )  # fmt: skip


class CalibratePromptProbeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_CalibratePromptProbe",
            display_name="AMG Calibrate Prompt Probe",
            **place(CHECK),
            description="Measures what ordinary prompts score on a model, so that Prompt Probe "
            "can say how unusual a prompt is. Run it once for each model, and again after you "
            "change a LoRA or its strength. The result is kept in models/amg/prompt_probe.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to calibrate, with its LoRAs, as you will use it."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size that the model was made for, such as "
                    "512 x 512. Prompt Probe then uses this size, whatever size you draw later.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="Ordinary prompts in your style, one a line, 16 or more, without "
                    "titles of well-known pictures. If empty, the list of this pack is used. "
                    "Each costs one probe.",
                ),
                io.Int.Input(
                    "seeds",
                    default=SEEDS,
                    min=2,
                    max=16,
                    tooltip="How many noises each prompt is tested with. Prompt Probe can use as "
                    "many or fewer. More takes longer.",
                ),
                io.String.Input(
                    "memorised",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Prompts that you know to draw copies, one a line, if you have some. "
                    "Then probability also takes them into account. Usually left empty.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "same_model",
                    display_name="MODEL",
                    tooltip="The model, unchanged. Connect Prompt Probe to it, so that the "
                    "calibration runs first.",
                ),
                io.String.Output(
                    "summary",
                    display_name="summary",
                    tooltip="The scores above which a prompt is suspicious, and the file they "
                    "are kept in.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, latent_image, prompts, seeds, memorised="") -> io.NodeOutput:
        ordinary, known = _lines(prompts or ORDINARY.read_text("utf-8")), _lines(memorised)
        if len(ordinary) < calibrations.FEWEST:
            raise AMGError(
                f"prompts: there are {len(ordinary)}, which is too few. Give at least "
                f"{calibrations.FEWEST} ordinary prompts, one a line, or none to use the list of "
                "this pack."
            )
        shape = probing.latent_shape(model, latent_image["samples"])
        texts = [probing.encode(clip, text) for text in ["", *ordinary, *known]]
        nothing, say = texts[0], show.text_on(cls.hidden.unique_id)
        bar = comfy.utils.ProgressBar(len(texts) - 1)
        measured = []
        for text in texts[1:]:
            measured.append(probing.measure(model, text, nothing, shape, seeds, LOW))
            bar.update(1)
            say(f"prompt {len(measured)} of {len(texts) - 1} · calibrating")
        count = len(ordinary)
        key = probing.model_key(model)
        calibration = Calibration(key, shape, seeds, LOW, measured[:count], measured[count:])
        file = paths.calibration_file(key)
        calibrations.save(calibration, file)
        summary = _summary(calibration, file)
        say(summary.splitlines()[0])
        return io.NodeOutput(model, summary, ui=live.lines(cls, summary.splitlines()))


def calibration_of(model) -> Calibration:
    """The calibration of that model. If there is none, AMGError names the file and the next step."""
    file = paths.calibration_file(probing.model_key(model))
    if not file.is_file():
        raise AMGError(
            f"model: this model, with these LoRAs, has no calibration ({file}). Run Calibrate "
            "Prompt Probe on it once. This takes some minutes."
        )
    return calibrations.load(file)


def _lines(text: str) -> list[str]:
    """The distinct lines that are not empty, in order."""
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _summary(calibration: Calibration, file: Path) -> str:
    size = "x".join(str(side) for side in calibration.shape)
    lines = [
        f"calibrated on {len(calibration.ordinary)} ordinary prompts · {calibration.seeds} noises "
        f"each · latents {size}"
    ]
    for kind in calibrations.SCORES:
        scale = calibration.scale(kind)
        line = f"{kind}: suspicious above {scale.threshold():.1f} (1 % false alarms)"
        if calibration.memorised:
            found = sum(scale.judge(each).suspicious for each in calibration.memorised)
            line += f", finds {found} of the {len(calibration.memorised)} memorised prompts"
        lines.append(line)
    return "\n".join([*lines, f"saved in {os.fspath(file)}"])
