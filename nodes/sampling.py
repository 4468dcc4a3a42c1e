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
from .types import ADVANCED, EXPERT, START, Drawn, MemorizationIndex, ReportHandle, place

AS_PRESET = "preset"
RETRIES = 2


def drawing_inputs(
    *, seed: str, steps: str, cfg: str, sampler_name: str, scheduler: str
) -> list[io.Input]:
    """The widgets of KSampler except denoise, with these tooltips."""
    return [
        io.Int.Input(
            "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
            tooltip=seed,
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input(
            "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=cfg
        ),
        io.Combo.Input(
            "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip=sampler_name
        ),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip=scheduler),
    ]  # fmt: skip


def denoise_input(tooltip: str) -> io.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def index_input() -> io.Input:
    return MemorizationIndex.Input(
        "index",
        tooltip="The pictures to stay away from, from Load or Build Memorization Index. The "
        "guard protects only from pictures in this index.",
    )


def steering_inputs() -> list[io.Input]:
    """The widgets that AMG Sampler and Apply AMG share. `strength_input` multiplies the last three."""
    return [
        io.Combo.Input(
            "preset",
            options=list(presets.PRESETS),
            default=presets.PRESETS[0],
            tooltip="main: the recommended balance. strong: acts earlier and harder, and follows "
            "the prompt less. gentle: acts later and softer, follows the prompt more, and needs "
            "more retries. paper: only the three terms of the paper. reference: the constants of "
            "the authors' code.",
        ),
        _term(
            "despecification",
            "by words (despecification)",
            "If a prompt draws a stored picture, the guard draws with two reduced prompts in turn, "
            "which lack different trigger words. From the first guarded step on, each step costs "
            "one more model call, the first about one for each word (usually 16 at most). 0 = off, "
            "1 = the preset; above 2 pictures may lose the prompt.",
        ),
        _term(
            "deduplication",
            "by caption (deduplication)",
            "Steers away from what the caption of the nearest picture would draw. Needs clip, "
            "captions in the index and cfg above 1. Costs one more model call on every other "
            "guarded step, with paper and reference on each. 0 = off, 1 = the preset, up to 2 is "
            "safe.",
        ),
        _term(
            "dissimilarity",
            "by picture (dissimilarity)",
            "Changes the picture itself until it no longer resembles the nearest one of the "
            "index. Raise it if copies get through. Costs a few decodings on guarded steps. 0 = "
            "off, 1 = the preset; above 2 pictures may show stains.",
        ),
    ]


def optional_inputs() -> list[io.Input]:
    return [
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The text encoder of your prompt. It reads captions of the index for "
            "deduplication; without it deduplication is off. It also lets the guard leave out "
            "single words; without it the guard keeps only the first words. It is not moved and "
            "takes no video memory. On the CPU a large one takes seconds for each new text.",
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Decodes the finished picture, so that it is checked as you will see it. If "
            "there is neither a TAESD file in models/vae_approx nor preview colours for your "
            "model, the guard also decodes every step with a copy of this VAE, which takes time "
            "and memory.",
        ),
    ]


def loop_inputs() -> list[io.Input]:
    """The widgets for finished copies, optional and last, so that older workflows still work."""
    return [
        io.Combo.Input(
            "if_still_copied",
            display_name="if still a copy",
            options=list(reports.POLICIES),
            default=reports.SAY,
            optional=True,
            tooltip="What happens to a picture that is still a copy after all retries. say so: "
            "it comes out, and the node, the log and the report warn you. blank: an empty latent "
            "comes out in its place. stop: the workflow ends with an error and nothing comes "
            "out. A picture that is only close (cannot tell) always comes out, with a warning.",
        ),
        io.Int.Input(
            "retries",
            **ADVANCED,
            default=RETRIES,
            min=0,
            max=10,
            optional=True,
            tooltip="How often a finished picture that is a copy is drawn again, with more "
            "strength each time. Each retry costs as much as the first drawing. 0 = only measure "
            "and report.",
        ),
        io.Boolean.Input(
            "new_noise",
            **ADVANCED,
            display_name="new noise",
            default=True,
            optional=True,
            label_on="last retry",
            label_off="never",
            tooltip="On: the last retry starts from the noise of another seed, for pictures that "
            "stay copies. A picture that no fewer words lead away from a stored one starts there at "
            "once. It changes completely, and the report names its seed.",
        ),
    ]


def picture_input() -> io.Input:
    """The widget for the report in saved pictures."""
    return io.Combo.Input(
        "report_in_picture",
        **ADVANCED,
        display_name="report in picture",
        options=list(reports.TELLS),
        default=reports.ANONYMOUS,
        optional=True,
        tooltip="What saved pictures carry of the report in their metadata. anonymous: "
        "measurements, the hash of the index and numbers of its pictures. full: also names and "
        "captions of its pictures. off: nothing.",
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


def choices_are_valid(if_still_copied: str | None, report_in_picture: str | None) -> bool | str:
    """The host's validation before it queues. None is a value that comes from another node."""
    for value, known in ((if_still_copied, reports.POLICIES), (report_in_picture, reports.TELLS)):
        if not (value is None or show.is_live(value) or value in known):
            return f"{value!r} is not one of the choices. Choose one of {', '.join(known)}."
    return True


def strength_input() -> io.Input:
    """The one slider that most people need. Optional and last, so that older workflows still work."""
    return io.Float.Input(
        "strength", default=1.0, min=0.0, max=2.0, step=0.05, round=0.01,
        display_mode=io.NumberDisplay.slider, optional=True,
        tooltip="How hard the guard steers away. 0 = off, it only checks. 1 = as the preset does. "
        "Raise it if copies get through; lower it if the picture loses the prompt. It multiplies "
        "the three advanced settings by words, by caption and by picture.",
    )  # fmt: skip


def _term(name: str, label: str, tooltip: str) -> io.Input:
    return io.Float.Input(
        name, default=1.0, min=0.0, max=3.0, step=0.05, round=0.01, display_mode=io.NumberDisplay.slider,
        display_name=label, tooltip=tooltip, **ADVANCED,
    )  # fmt: skip


def report_output() -> io.Output:
    return io.String.Output(
        "report",
        display_name="report",
        tooltip="What the guard measured and did in each step, and the verdict on the finished "
        "pictures, as JSON with name and hash of the index. Keep it with the picture as "
        "evidence.",
    )


def curve_output() -> io.Output:
    return io.Image.Output(
        "curve",
        display_name="curve",
        tooltip="The likeness to the nearest picture, step by step, with the threshold in red. A "
        "dot is a step in which the guard acted. One curve for each drawing.",
    )


class SamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_Sampler",
            display_name="AMG Sampler",
            **place(START),
            description="KSampler with Anti-Memorization Guidance. It compares every step with "
            "the index, and steers away only while the picture comes too close to one of its "
            "pictures. If nothing is close, the same seed gives exactly the picture of KSampler.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that draws. LoRAs and other patches are kept."
                ),
                *drawing_inputs(
                    seed="The random seed. The same seed as in KSampler starts from the same noise.",
                    steps="Number of denoising steps. The guard compares every step, so more "
                    "steps give it more chances to steer away in time. 20 to 50 is usual.",
                    cfg="How closely the picture follows the prompt. High values copy more: "
                    "4 to 8 is usual. At 1, deduplication does nothing.",
                    sampler_name="The sampling algorithm. Any works. Some, such as heun and "
                    "dpmpp_sde, call the model and the guard twice in each step.",
                    scheduler="How the noise is removed over the steps. Any works.",
                ),
                io.Conditioning.Input("positive", tooltip="What you want to see."),
                io.Conditioning.Input("negative", tooltip="What you do not want to see."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from. With an inpainting mask the guard checks "
                    "the whole picture and changes only the masked part.",
                ),
                denoise_input(
                    "How much is redrawn. Low values keep most of the given picture, so "
                    "the guard has little room to steer away from it."
                ),
                index_input(),
                *steering_inputs(),
                *optional_inputs(),
                *loop_inputs(),
                picture_input(),
                strength_input(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="The denoised latent, for VAE Decode."
                ),
                report_output(),
                curve_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            not_idempotent=True,  # otherwise an equal node with another id reuses the result
        )

    @classmethod
    def validate_inputs(
        cls, if_still_copied=reports.SAY, report_in_picture=reports.ANONYMOUS
    ) -> bool | str:
        return choices_are_valid(if_still_copied, report_in_picture)

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
        denoise, index, preset, despecification, deduplication, dissimilarity, clip=None, vae=None,
        if_still_copied=reports.SAY, retries=RETRIES, new_noise=True, report_in_picture=reports.ANONYMOUS,
        strength=1.0,
    ) -> io.NodeOutput:  # fmt: skip
        from nodes import common_ksampler

        check_choice("sampler_name", sampler_name, comfy.samplers.KSampler.SAMPLERS)
        check_choice("scheduler", scheduler, comfy.samplers.KSampler.SCHEDULERS)
        settings = presets.settings(
            preset, index.metric, strength=strength, despecification=despecification,
            deduplication=deduplication, dissimilarity=dissimilarity,
        )  # fmt: skip
        loop = loop_of(if_still_copied, retries, new_noise)
        tells = tells_of(report_in_picture)
        # At denoise 0 the host runs no step. The report then says that nothing was compared.
        report = hook.Report(hook.undrawn(index, settings, loop))
        guarded = hook.attach(
            model, index, settings, clip=clip, vae=vae, loop=loop, report=report,
            on_step=show.text_on(cls.hidden.unique_id), on_event=live.events_of(cls),
            graph=cls.hidden.prompt,
        )  # fmt: skip
        (latent,) = common_ksampler(
            guarded, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
            denoise=denoise,
        )  # fmt: skip
        write_into_pictures(cls.hidden, report.latest, tells)
        shown = live.result(cls, report.latest, report.near)
        return io.NodeOutput(latent, *outputs_of(report), ui=shown)


class ApplyNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_Apply",
            display_name="Apply AMG",
            **place(EXPERT),
            description="Puts the guard on a model, for any sampler node. It has all settings; "
            "AMG Sampler has the few that matter most. A model carries one guard: for several "
            "indexes use Combine Indexes.",
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed itself."),
                index_input(),
                *steering_inputs(),
                io.Combo.Input(
                    "thresholds",
                    **ADVANCED,
                    options=[AS_PRESET, "custom"],
                    default=AS_PRESET,
                    tooltip="preset: the preset says how alike is too alike. custom: schedule, "
                    "threshold_start, threshold_end and margin below say it.",
                ),
                io.Combo.Input(
                    "schedule",
                    **ADVANCED,
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="For custom thresholds: how the threshold rises from the first step "
                    "to the last. exponential stays low for longest, parabolic rises earlier, "
                    "constant is threshold_end in all steps. No cost.",
                ),
                io.Float.Input(
                    "threshold_start",
                    **ADVANCED,
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="For custom thresholds: the threshold in the first step. The guard "
                    "acts above it, so lower guards more and changes more. 0 = as alike as "
                    "pictures that are not in the index, 0.4 = as one in a hundred of these, 1 = "
                    "the same picture.",
                ),
                io.Float.Input(
                    "threshold_end",
                    **ADVANCED,
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="For custom thresholds: the threshold in the last step, on the same "
                    "scale. The finished picture is called a copy above 0.4, whatever you set "
                    "here.",
                ),
                io.Combo.Input(
                    "form",
                    **ADVANCED,
                    options=[AS_PRESET, "projection", "gradient", "repulsion"],
                    default=AS_PRESET,
                    tooltip="How dissimilarity changes the picture. repulsion: steers away from "
                    "the stored picture where a shorter prompt does not help. projection: "
                    "changes just enough, at any resolution. gradient: one step along the gradient "
                    "of the similarity, as in the paper, of limited length.",
                ),
                io.Float.Input(
                    "exit",
                    **ADVANCED,
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Strength of prompt reduction: if a prompt draws a stored picture, "
                    "the guard draws with two reduced prompts in turn, and steers away from what "
                    "the missing words add. Multiplied with despecification. 0 = off, 1 = the "
                    "preset; above 1.5 pictures may lose the prompt. paper and reference have "
                    "none.",
                ),
                io.Float.Input(
                    "start_percent",
                    **ADVANCED,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the sampling after which the guard begins. Keep 0, because "
                    "copies are decided in the first steps. Later saves time and misses some "
                    "copies.",
                ),
                io.Float.Input(
                    "end_percent",
                    **ADVANCED,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the sampling after which the guard ends. Keep 1. Lower "
                    "saves time, but the last steps are not watched.",
                ),
                io.Float.Input(
                    "margin",
                    **ADVANCED,
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="For custom thresholds with form projection: how far below the "
                    "threshold a picture is brought, in units of similarity. Larger acts less "
                    "often and changes more. 0.05 to 0.2 is safe.",
                ),
                io.Int.Input(
                    "iterations",
                    **ADVANCED,
                    default=0,
                    min=0,
                    max=20,
                    tooltip="For form projection: at most this many corrections in a guarded "
                    "step. Each costs one decoding forward and backward. 0 = the preset.",
                ),
                io.Combo.Input(
                    "decoder",
                    **ADVANCED,
                    options=decoding.CHOICES,
                    default=decoding.CHOICES[0],
                    tooltip="How the guard decodes unfinished pictures. auto: TAESD from "
                    "models/vae_approx, else preview colours, else the connected vae. taesd is "
                    "fast and sharp, linear free and coarse, vae slower than the step itself. An "
                    "index of latents needs none.",
                ),
                *optional_inputs(),
                *loop_inputs(),
                strength_input(),
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
                    tooltip="What the guard measured and did. Connect it to AMG Report.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            not_idempotent=True,  # the guarded model sends events to this node, see `live.events_of`
        )

    @classmethod
    def validate_inputs(cls, if_still_copied=reports.SAY) -> bool | str:
        return choices_are_valid(if_still_copied, None)

    @classmethod
    def execute(
        cls, model, index, preset, despecification, deduplication, dissimilarity, thresholds,
        schedule, threshold_start, threshold_end, form, exit, start_percent, end_percent, margin,
        iterations, decoder, clip=None, vae=None, if_still_copied=reports.SAY, retries=RETRIES,
        new_noise=True, strength=1.0,
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
            preset, index.metric, strength=strength, despecification=despecification,
            deduplication=deduplication, dissimilarity=dissimilarity, exit=exit,
            start_percent=start_percent, end_percent=end_percent, **changes,
        )  # fmt: skip
        report = hook.Report(drawn_by=cls.hidden.unique_id)
        guarded = hook.attach(
            model, index, settings, clip=clip, vae=vae, decoder=decoder,
            loop=loop_of(if_still_copied, retries, new_noise), report=report,
            on_step=show.text_on(cls.hidden.unique_id), on_event=live.events_of(cls),
            graph=cls.hidden.prompt,
        )  # fmt: skip
        return io.NodeOutput(guarded, report)


class ReportNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMG_Report",
            display_name="AMG Report",
            **place(EXPERT),
            description="Shows what a model guarded by Apply AMG measured and did in its latest "
            "sampling, and writes it into the saved pictures.",
            inputs=[
                ReportHandle.Input("run", tooltip="The output run of Apply AMG."),
                io.AnyType.Input(
                    "after",
                    tooltip="Anything that the sampler made, such as its LATENT. The report is "
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
                    tooltip="What came in at after, unchanged. Connect Save Image behind it, and "
                    "the saved picture carries the report in its metadata.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, run: hook.Report, after, report_in_picture=reports.ANONYMOUS) -> io.NodeOutput:
        tells, written = tells_of(report_in_picture), outputs_of(run)
        write_into_pictures(cls.hidden, run.latest, tells)
        shown = live.lines(cls, [reports.story(run.latest)])
        shown |= live.result(cls, run.latest, run.near, drawn_by=run.drawn_by)
        return io.NodeOutput(*written, after, ui=shown)


def check_choice(name: str, value: str, options) -> None:
    """Raise AMGError unless widget `name` has one of its options, which the host does not check."""
    if value not in options:
        raise AMGError(
            f"{name}: {value!r} is not one of the choices. Choose one of {', '.join(options)}."
        )


def custom_schedule(kind: str, start: float, end: float) -> Schedule:
    """A `Schedule` whose thresholds a picture can pass. Otherwise AMGError names the widget."""
    for name, value in (("threshold_start", start), ("threshold_end", end)):
        if not value < 1:  # also true for NaN
            raise AMGError(
                f"{name}: {value} would never guard, because only the very same picture reaches "
                "1. Give 0.1 to 0.5, or set thresholds to 'preset'."
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
