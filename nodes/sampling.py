"""AMG Sampler, Apply AMG and AMG Report."""

from __future__ import annotations

import json

import comfy.samplers
from comfy_api.latest import io

from ..amg_core import presets
from ..amg_core import report as reports
from ..amg_core.errors import AMGError
from ..amg_core.schedule import KINDS, Schedule
from . import decoding, hook, live, show
from .types import ADVANCED, CATEGORY, Drawn, MemorizationIndex, ReportHandle

AS_PRESET = "preset"
RETRIES = 2


def index_input() -> io.Input:
    return MemorizationIndex.Input(
        "index",
        tooltip="The pictures to stay away from: from Load or Build Memorization Index. Pictures "
        "that are not in it are not guarded against.",
    )


def strength_inputs() -> list[io.Input]:
    """The widgets that AMG Sampler and Apply AMG share."""
    return [
        io.Combo.Input(
            "preset",
            options=list(presets.PRESETS),
            default=presets.PRESETS[0],
            tooltip="main: the recommended balance. strong: acts earlier and harder, pictures "
            "stray further from the prompt. gentle: later and softer, nearer to the prompt, more "
            "is drawn again. paper: its three terms only. reference: the authors' constants.",
        ),
        _strength(
            "despecification",
            "Loosens the grip of a prompt that leads to a known picture. Needs cfg above 1; from "
            "the first guarded step on each step costs one more model call, the first about seven "
            "more. 0 = off, 1 = the preset; above 2 pictures may lose the prompt.",
        ),
        _strength(
            "deduplication",
            "Steers away from what the caption of the nearest known picture would draw. Needs "
            "clip, captions in the index and cfg above 1; costs one more model call on every "
            "other guarded step. 0 = off, 1 = the preset, up to 2 is safe.",
        ),
        _strength(
            "dissimilarity",
            "Changes the picture itself until it no longer resembles the nearest known one. "
            "Costs a few decodings on guarded steps. 0 = off, 1 = the preset, above 2 may leave "
            "stains.",
        ),
    ]


def optional_inputs() -> list[io.Input]:
    return [
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The text encoder of your prompt, to read captions of the index for "
            "deduplication. Without it deduplication is off. It stays where it is: no video "
            "memory is used.",
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Judges the finished picture as you will see it: one decoding. Where no TAESD "
            "file is in models/vae_approx it also lets the guard see sharp pictures, which costs a "
            "copy of its decoder in memory, and time on every step.",
        ),
    ]


def loop_inputs() -> list[io.Input]:
    """The widgets for finished copies, optional and last, so that older workflows still work."""
    return [
        io.Combo.Input(
            "if_still_copied",
            options=list(reports.POLICIES),
            default=reports.SAY,
            optional=True,
            tooltip="What becomes of a picture that is a copy after all retries. say so: it comes "
            "out, and node, log and report tell. blank: an empty latent comes out in its "
            "place. stop: the workflow ends with an error, nothing comes out.",
        ),
        io.Int.Input(
            "retries",
            **ADVANCED,
            default=RETRIES,
            min=0,
            max=10,
            optional=True,
            tooltip="How often at most a finished picture that is a copy is drawn again, more "
            "strongly each time. Only then it costs time: each time as much as the first "
            "drawing. 0 = measure and tell.",
        ),
        io.Boolean.Input(
            "new_noise",
            **ADVANCED,
            default=True,
            optional=True,
            label_on="last retry",
            label_off="never",
            tooltip="On: the last retry starts from the noise of another seed, for pictures that "
            "stay copies with their own. Such a picture changes altogether; the report says so.",
        ),
    ]


def picture_input() -> io.Input:
    """The widget for the report in saved pictures. It is always the last input."""
    return io.Combo.Input(
        "report_in_picture",
        **ADVANCED,
        options=list(reports.TELLS),
        default=reports.ANONYMOUS,
        optional=True,
        tooltip="What saved pictures carry of the report in their metadata. anonymous: what was "
        "measured, the hash of the index and numbers of its pictures. full: names and captions of its "
        "pictures, too. off: nothing.",
    )


def tells_of(report_in_picture: str) -> str:
    """The widget's value, or the default for a live text, see `loop_of`. AMGError for other values."""
    if show.is_live(report_in_picture):
        return reports.ANONYMOUS
    check_choice("report_in_picture", report_in_picture, reports.TELLS)
    return report_in_picture


def write_into_pictures(hidden, report: dict, tells: str) -> None:
    """Write the report, as far as the artist wants, into pictures that are saved later."""
    if tells != reports.OFF:
        show.with_pictures(hidden, reports.KEY, reports.travelling(report, tells))


def loop_of(if_still_copied: str, retries: int, new_noise: bool) -> hook.Loop:
    """The settings for retries. AMGError for an unknown policy.

    Some front ends save the live text of a node after its widgets, and then give it to the widget that was
    appended first. Such a text counts as the default.
    """
    if show.is_live(if_still_copied):
        if_still_copied = reports.SAY
    check_choice("if_still_copied", if_still_copied, reports.POLICIES)
    return hook.Loop(retries, if_still_copied, new_noise)


def wishes_are_known(if_still_copied: str | None, report_in_picture: str | None) -> bool | str:
    """The host's validation before it queues. None is a value that comes from another node."""
    for value, known in ((if_still_copied, reports.POLICIES), (report_in_picture, reports.TELLS)):
        if not (value is None or show.is_live(value) or value in known):
            return f"{value!r} is unknown. Choose one of {', '.join(known)}."
    return True


def _strength(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(
        name, default=1.0, min=0.0, max=3.0, step=0.05, round=0.01, display_mode=io.NumberDisplay.slider,
        tooltip=tooltip,
    )  # fmt: skip


def report_output() -> io.Output:
    return io.String.Output(
        "report",
        display_name="report",
        tooltip="What the guard saw and did at each step and what the finished pictures measured, "
        "as JSON, with name and hash of the index: the proof to keep with the picture.",
    )


def curve_output() -> io.Output:
    return io.Image.Output(
        "curve",
        display_name="curve",
        tooltip="Likeness to the nearest picture, step by step, against the threshold in red. "
        "Dots mark steps where the guard acted. One picture for each drawing.",
    )


class SamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_Sampler",
            display_name="AMG Sampler",
            category=CATEGORY,
            description="KSampler with Anti-Memorization Guidance: it watches every step and "
            "steers away only while the picture comes too close to one in the index. With the "
            "same seed, an innocent picture is the very picture that KSampler makes.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that draws. LoRA and other patches are kept."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed. The same seed as in KSampler starts from the same "
                    "noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Number of denoising steps. The guard looks at every one; more steps "
                    "give it more chances to leave in time. 20 to 50 is usual.",
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the picture follows the prompt. At 1 only dissimilarity "
                    "can act. High values copy more; 4 to 8 is usual.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The algorithm. Any works; some, such as heun and dpmpp_sde, call "
                    "model and guard twice a step.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise is taken away over the steps. Any works.",
                ),
                io.Conditioning.Input("positive", tooltip="What you want to see."),
                io.Conditioning.Input("negative", tooltip="What you do not want to see."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from. Inpainting: the guard judges the whole "
                    "picture and changes only the masked part.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much is redrawn. Low values keep the given picture, and give "
                    "the guard little room to leave it.",
                ),
                index_input(),
                *strength_inputs(),
                *optional_inputs(),
                *loop_inputs(),
                picture_input(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="The denoised latent, for VAE Decode."
                ),
                report_output(),
                curve_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            not_idempotent=True,  # otherwise an equal node with another id reuses the result
        )

    @classmethod
    def validate_inputs(
        cls, if_still_copied=reports.SAY, report_in_picture=reports.ANONYMOUS
    ) -> bool | str:
        return wishes_are_known(if_still_copied, report_in_picture)

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
        denoise, index, preset, despecification, deduplication, dissimilarity, clip=None, vae=None,
        if_still_copied=reports.SAY, retries=RETRIES, new_noise=True, report_in_picture=reports.ANONYMOUS,
    ) -> io.NodeOutput:  # fmt: skip
        from nodes import common_ksampler

        check_choice("sampler_name", sampler_name, comfy.samplers.KSampler.SAMPLERS)
        check_choice("scheduler", scheduler, comfy.samplers.KSampler.SCHEDULERS)
        settings = presets.settings(
            preset, index.metric, despecification=despecification, deduplication=deduplication,
            dissimilarity=dissimilarity,
        )  # fmt: skip
        loop = loop_of(if_still_copied, retries, new_noise)
        tells = tells_of(report_in_picture)
        # At denoise 0 the host runs no step. The report then says that nothing was compared.
        report = hook.Report(hook.undrawn(index, settings, loop))
        guarded = hook.attach(
            model, index, settings, clip=clip, vae=vae, loop=loop, report=report,
            on_step=show.text_on(cls.hidden.unique_id), on_event=live.events_of(cls),
        )  # fmt: skip
        (latent,) = common_ksampler(
            guarded, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
            denoise=denoise,
        )  # fmt: skip
        write_into_pictures(cls.hidden, report.latest, tells)
        return io.NodeOutput(latent, *outputs_of(report))


class ApplyNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_Apply",
            display_name="Apply AMG",
            category=CATEGORY,
            description="Puts the guard on a model, for any sampler node. All settings are here; "
            "AMG Sampler has the few that matter. A model carries one guard: for several indexes use "
            "Combine Indexes.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed itself."),
                index_input(),
                *strength_inputs(),
                io.Combo.Input(
                    "thresholds",
                    **ADVANCED,
                    options=[AS_PRESET, "custom"],
                    default=AS_PRESET,
                    tooltip="preset: how close is too close comes from the preset. custom: from "
                    "schedule, threshold_start, threshold_end and margin below.",
                ),
                io.Combo.Input(
                    "schedule",
                    **ADVANCED,
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="custom thresholds: how the threshold rises from first to last step. "
                    "exponential stays low for longest, parabolic rises earlier, constant "
                    "is threshold_end all the time. No cost.",
                ),
                io.Float.Input(
                    "threshold_start",
                    **ADVANCED,
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="custom thresholds: at pure noise. 0 = as alike as pictures that are not in "
                    "the index, 0.4 = as one in a hundred of these, 1 = the same picture. The "
                    "guard acts above it: lower guards more and changes more.",
                ),
                io.Float.Input(
                    "threshold_end",
                    **ADVANCED,
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="custom thresholds: at the finished picture, on the same scale. The finished "
                    "picture is called a copy above 0.4, whatever is set here.",
                ),
                io.Combo.Input(
                    "form",
                    **ADVANCED,
                    options=[AS_PRESET, "projection", "gradient", "repulsion"],
                    default=AS_PRESET,
                    tooltip="How dissimilarity moves the picture. repulsion: off the known picture, where "
                    "no prompt leads elsewhere. projection: just far enough, at any resolution. "
                    "gradient: the fixed push of the paper, needs tuning.",
                ),
                io.Float.Input(
                    "exit",
                    **ADVANCED,
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Strength of the early way out: a prompt that leads to a known "
                    "picture keeps only its first words, and the picture is pushed away "
                    "from what the others add. Multiplies with despecification. 0 = off, "
                    "1 = the preset; above 1.5 pictures may lose the prompt. paper and "
                    "reference have none.",
                ),
                io.Float.Input(
                    "start_percent",
                    **ADVANCED,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the sampling after which the guard begins. Keep 0: copies "
                    "are decided in the first steps. Later saves time and misses some.",
                ),
                io.Float.Input(
                    "end_percent",
                    **ADVANCED,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the sampling after which the guard ends. Below 1 saves "
                    "time; the last steps then go unwatched.",
                ),
                io.Float.Input(
                    "margin",
                    **ADVANCED,
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="custom thresholds and form projection: how far below the threshold a "
                    "picture is brought, in units of similarity. Larger acts less often "
                    "and changes more; 0.05 to 0.2.",
                ),
                io.Int.Input(
                    "iterations",
                    **ADVANCED,
                    default=0,
                    min=0,
                    max=20,
                    tooltip="form projection: how often at most a guarded step measures and "
                    "corrects. 0 = the preset. Each time costs one decoding forth and "
                    "back.",
                ),
                io.Combo.Input(
                    "decoder",
                    **ADVANCED,
                    options=decoding.CHOICES,
                    default=decoding.CHOICES[0],
                    tooltip="How the guard sees latents. auto: TAESD from models/vae_approx, else "
                    "preview colours, else the connected vae. taesd is fast and sharp, linear "
                    "free and coarse; vae takes longer than the step itself. A latent index "
                    "needs none.",
                ),
                *optional_inputs(),
                *loop_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    "guarded",
                    display_name="MODEL",
                    tooltip="The guarded model, for any sampler node.",
                ),
                ReportHandle.Output(
                    "run",
                    display_name="run",
                    tooltip="What the guard saw and did: for AMG Report.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the guarded model sends events to this node, see `live.events_of`
        )

    @classmethod
    def validate_inputs(cls, if_still_copied=reports.SAY) -> bool | str:
        return wishes_are_known(if_still_copied, None)

    @classmethod
    def execute(
        cls, model, index, preset, despecification, deduplication, dissimilarity, thresholds,
        schedule, threshold_start, threshold_end, form, exit, start_percent, end_percent, margin,
        iterations, decoder, clip=None, vae=None, if_still_copied=reports.SAY, retries=RETRIES,
        new_noise=True,
    ) -> io.NodeOutput:  # fmt: skip
        check_choice("thresholds", thresholds, [AS_PRESET, "custom"])
        check_choice("schedule", schedule, KINDS)
        check_choice("decoder", decoder, decoding.CHOICES)
        changes: dict = {}
        if thresholds == "custom":
            changes["schedule"] = custom_schedule(schedule, threshold_start, threshold_end)
            changes["margin"] = margin
        if form != AS_PRESET:
            changes["form"] = form
        if iterations > 0:
            changes["iterations"] = iterations
        settings = presets.settings(
            preset, index.metric, despecification=despecification, deduplication=deduplication,
            dissimilarity=dissimilarity, exit=exit, start_percent=start_percent,
            end_percent=end_percent, **changes,
        )  # fmt: skip
        report = hook.Report()
        guarded = hook.attach(
            model, index, settings, clip=clip, vae=vae, decoder=decoder,
            loop=loop_of(if_still_copied, retries, new_noise), report=report,
            on_step=show.text_on(cls.hidden.unique_id), on_event=live.events_of(cls),
        )  # fmt: skip
        return io.NodeOutput(guarded, report)


class ReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_Report",
            display_name="AMG Report",
            category=CATEGORY,
            description="Shows what a model guarded by Apply AMG saw and did in its latest "
            "sampling, and writes it into the pictures that are saved.",
            inputs=[
                ReportHandle.Input("run", tooltip="The output run of Apply AMG."),
                io.AnyType.Input(
                    "after",
                    tooltip="Anything made by the sampler, such as its LATENT: the report is "
                    "read when that is finished.",
                ),
                picture_input(),
            ],
            outputs=[
                report_output(),
                curve_output(),
                Drawn.Output(
                    "through",
                    display_name="through",
                    tooltip="What came in at after, unchanged. Go on from here to Save Image, and "
                    "the report is in the metadata of the saved picture.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, run: hook.Report, after, report_in_picture=reports.ANONYMOUS) -> io.NodeOutput:
        tells, written = tells_of(report_in_picture), outputs_of(run)
        write_into_pictures(cls.hidden, run.latest, tells)
        return io.NodeOutput(*written, after)


def check_choice(name: str, value: str, options) -> None:
    """Raise AMGError unless widget `name` has one of its options, which the host does not check."""
    if value not in options:
        raise AMGError(f"{name}: {value!r} is unknown here. Choose one of {', '.join(options)}.")


def custom_schedule(kind: str, start: float, end: float) -> Schedule:
    """A `Schedule` whose thresholds a picture can pass. Otherwise AMGError names the widget."""
    for name, value in (("threshold_start", start), ("threshold_end", end)):
        if not value < 1:  # also true for NaN
            raise AMGError(
                f"{name}: {value} would never guard, because only the very same picture is at 1. "
                f"Give 0.1 to 0.5, or set thresholds to 'preset'."
            )
    return Schedule(kind, start, end)


def outputs_of(report: hook.Report) -> tuple:
    """The report of the latest run as JSON text, and a curve for each drawing as IMAGE."""
    from ..amg_core.plot import curve

    if report.latest is None:
        raise AMGError(
            "There is no sampling to report on yet. Connect `after` of AMG Report to the LATENT "
            "of the sampler that uses the guarded model, and give that sampler at least one step."
        )
    curves = [curve(written, title=title) for title, written in reports.drawings(report.latest)]
    return json.dumps(report.latest), show.images(curves)
