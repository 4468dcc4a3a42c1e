"""The node Guard: finds out whether a prompt draws a stored picture, steers away, and checks the result.

A memorised prompt draws its picture from any noise. So a suspicious prompt is drawn twice more, from the
noise of other seeds. If both drawings are the same picture, it is the stored one, and an index of it is
all that the guard needs. Nobody has to know the training pictures of the model. The way out may end in
another stored picture, so the steered picture is tested in the same way: once more, from another seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..amg_core import descriptors, limits, presets
from ..amg_core import report as reports
from ..amg_core.errors import AMGError
from ..amg_core.messages import Message, message, to_json
from ..amg_core.messages import words as in_words
from ..amg_core.similarity.metrics import likeness
from . import decoding, detect, hook, live, opening, probing, sampling, show
from .types import START, MemorizationIndex, PromptVerdict, place

AUTO, DRAW_TWICE, OFF = WAYS = ("auto", "draw twice", "off")
LED = 2  # how often a steered picture is tested, and drawn again if it is a stored one as well
DRAWN = "drawn from another seed"  # the name of such a picture in reports
OTHER_SEEDS = 1_000_003  # added to the seed for the two drawings
THUMB = 256  # longer side, in pixels, of their previews on the page
# Parts of a conditioning, besides the words, that make two drawings alike.
PICTURED = (
    "control", "control_apply_to_uncond", "reference_latents", "concat_latent_image", "concat_mask",
    "concat_image", "unclip_conditioning", "gligen", "mask", "area",
)  # fmt: skip
SAMPLER = (  # inputs shared with AMG Sampler
    "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
    "latent_image", "denoise",
)  # fmt: skip


Story = list[Message]  # results and actions of the node


class GuardNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sampler = sampling.SamplerNode.define_schema().inputs
        common = [slot for slot in sampler if slot.id in SAMPLER]
        return io.Schema(
            node_id="AMG_Guard",
            display_name="AMG Copy Guard",
            **place(START),
            description="A KSampler that finds out by itself whether your prompt draws a stored "
            "picture, steers away from that picture and from your index, and checks the result. "
            "It works without an index, if you have run Calibrate Prompt Probe on the model or "
            "set detect to draw twice.",
            inputs=[
                *common,
                io.Combo.Input(
                    "detect",
                    options=list(WAYS),
                    default=AUTO,
                    tooltip="How the prompt is tested. auto: as Prompt Probe does, for the cost "
                    "of two steps with the calibration's noises (4 pictures unless set). Needs "
                    "Calibrate Prompt Probe. draw twice: draws every prompt twice more and "
                    "compares; takes three times as long for one picture. off: uses only the "
                    "index.",
                ),
                io.Float.Input(
                    "false_alarms",
                    default=0.01,
                    min=0.0001,
                    max=0.5,
                    step=0.001,
                    round=0.0001,
                    tooltip="Share of ordinary prompts that may be suspected. A larger share "
                    "finds more memorised prompts. A false alarm costs two drawings and changes "
                    "nothing, because the guard acts only on what these show.",
                ),
                MemorizationIndex.Input(
                    "index",
                    optional=True,
                    tooltip="Pictures to stay away from in any case, from Load Memorization "
                    "Index. Without it the guard acts only on the stored picture that the prompt "
                    "itself draws.",
                ),
                *sampling.optional_inputs(),
                *sampling.loop_inputs(),
                PromptVerdict.Input(
                    "prompt_verdict",
                    optional=True,
                    tooltip="The verdict of Prompt Probe, if that node is in your graph. Then "
                    "Guard does not test the prompt again.",
                ),
                sampling.picture_input(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="The denoised latent, for VAE Decode."
                ),
                io.String.Output(
                    "said", display_name="said", tooltip="What was found and done, in sentences."
                ),
                sampling.report_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            not_idempotent=True,  # as AMG Sampler
        )

    @classmethod
    def validate_inputs(
        cls, if_still_copied=reports.SAY, report_in_picture=reports.ANONYMOUS
    ) -> bool | str:
        return sampling.choices_are_valid(if_still_copied, report_in_picture)

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
        denoise, detect=AUTO, false_alarms=0.01, index=None, clip=None, vae=None,
        if_still_copied=reports.SAY, retries=sampling.RETRIES, new_noise=True, prompt_verdict=None,
        report_in_picture=reports.ANONYMOUS,
    ) -> io.NodeOutput:  # fmt: skip
        from nodes import common_ksampler

        sampling.check_choice("sampler_name", sampler_name, comfy.samplers.KSampler.SAMPLERS)
        sampling.check_choice("scheduler", scheduler, comfy.samplers.KSampler.SCHEDULERS)
        sampling.check_choice("detect", detect, WAYS)
        hook.check_unguarded(model)
        decoding.check_still(model.get_model_object("latent_format"))
        if detect != OFF and any(len(text) > 1 for text, _ in positive):
            raise AMGError(
                "positive: this is a batch of prompts, and Guard can test only one prompt at a "
                "time. Connect a single prompt, or connect an index and set detect to 'off'."
            )
        if index is not None and index.latent and vae is None and detect != OFF:
            raise AMGError(
                "vae: Guard needs it here, to add its own drawings to an index of latents. "
                "Connect the vae, or set detect to 'off'."
            )
        tells = sampling.tells_of(report_in_picture)
        story, tell = Story(), show.text_on(cls.hidden.unique_id)

        def draw(model, latent, number=seed, share=denoise, texts=(positive, negative)) -> dict:
            (drawn,) = common_ksampler(
                model, number, steps, cfg, sampler_name, scheduler, *texts, latent, denoise=share
            )
            return drawn

        suspected = _suspected(
            story, model, positive, negative, detect, false_alarms, clip, index, prompt_verdict
        )
        stored, send = None, live.events_of(cls)
        texts = _text_only(positive), _text_only(negative)
        if suspected:
            twice = message("drawing_twice")
            tell(in_words(twice))
            send(live.begin([twice]))  # otherwise the page still shows the previous run
            latents = draw(model, _empty(latent_image, 2), _other(seed, 1), 1.0, texts)
            pictures = _decoded(model, latents["samples"], vae)
            if (alike := _likeness(pictures)) < limits.ONE_PICTURE:
                story.append(message("drawings_differ", score=_place(alike)))
            else:
                story.append(message("drawings_agree", score=_place(alike)))
                stored = pictures
        if index is None and stored is None:
            story.append(message("drawn_as_is"))
            said = in_words(story)
            tell(said)
            latent = draw(model, latent_image)
            send(live.unguarded(story))
            return io.NodeOutput(latent, said, "{}", ui=live.words_only(cls, story))
        loop = sampling.loop_of(if_still_copied, retries, new_noise)
        for number in range(LED + 1):
            with _against(index, stored, vae, model) as (matcher, shown):
                settings = presets.settings(presets.PRESETS[0], matcher.metric)
                report = hook.Report(hook.undrawn(matcher, settings, loop))
                curve = live.events_of(cls, shown)

                def show_event(event: dict, report=report, curve=curve) -> None:
                    whole = (
                        live.said(_whole(story, report.latest))
                        if event.get("kind") == "end"
                        else {}
                    )
                    curve(event | whole)

                latent = draw(
                    hook.attach(
                        model, matcher, settings, clip=clip, vae=vae, loop=loop, report=report,
                        on_step=tell, on_event=show_event, graph=cls.hidden.prompt,
                    ),
                    latent_image,
                )  # fmt: skip
                whole = _whole(story, report.latest)
                result = live.result(
                    cls, report.latest, report.near, sentences=whole, pictures=shown
                )
                if stored is None or number == LED:
                    break
                quiet = hook.attach(
                    model, matcher, settings, clip=clip, vae=vae, graph=cls.hidden.prompt
                )
                other = draw(quiet, _empty(latent_image, 1), _other(seed, 2 + number), 1.0, texts)
                pair = torch.cat([latent["samples"][:1], other["samples"]])
                pictures = _decoded(model, pair, vae)
                if (alike := _likeness(pictures)) < limits.ONE_PICTURE:
                    break
                story.append(message("led_to_another", score=_place(alike)))
                stored = torch.cat([stored, pictures])
        written = report.latest
        said = in_words(whole)
        tell(said)
        written |= {"before": to_json(_before(story, written))}
        sampling.write_into_pictures(cls.hidden, written, tells)
        text, *_ = sampling.outputs_of(report)
        return io.NodeOutput(latent, said, text, ui=result)


def _before(story: Story, report: dict) -> Story:
    """The results before the guarded run, and whether that had to steer."""
    acted = any(report["guarded_evaluations"]) or len(report["attempts"]) > 1
    return [*story, message("steered" if acted else "not_steered")]


def _whole(story: Story, report: dict) -> Story:
    """The results before the guarded run, and those of the run."""
    return [*_before(story, report), *reports.story(report)]


def _suspected(
    story: Story, model, positive, negative, way: str, false_alarms: float, clip, index, given
) -> bool:
    """Whether the prompt has to be drawn twice more.

    AMGError if there is neither a way to test the prompt nor an index to compare with.
    """
    if given is not None:
        story += given.verdict.messages()
        return given.verdict.suspicious
    if way == DRAW_TWICE:
        return True
    try:
        calibration = None if way == OFF else detect.calibration_of(model)
    except AMGError as error:
        if index is None:
            raise AMGError(
                f"Guard cannot test this prompt and has no index. {error} You can also set detect "
                f"to {DRAW_TWICE!r}, or connect an index."
            ) from error
        calibration = None
        story.append(message("not_probed"))
    if calibration is None:
        if index is None:
            raise AMGError(
                f"Guard: with detect {OFF!r} and without an index there is nothing to "
                "guard against. Set detect to another choice, or connect an index."
            )
        return False
    nothing = negative if clip is None else probing.encode(clip, "")
    measured = probing.measure(
        model, positive, nothing, calibration.shape, calibration.seeds, calibration.low
    )
    kind = next(iter(detect.calibrations.SCORES))
    verdict = calibration.judge(measured, kind, calibration.seeds, false_alarms)
    story += verdict.messages()
    return verdict.suspicious


def _text_only(conditioning: list) -> list:
    """The prompt without other parts that fix the composition, such as a ControlNet."""
    return [
        [text, {key: value for key, value in more.items() if key not in PICTURED}]
        for text, more in conditioning
    ]


def _empty(latent_image: dict, count: int) -> dict:
    """Empty latents of the same size as the given one."""
    samples = latent_image["samples"]
    return {"samples": torch.zeros_like(samples[:1]).repeat(count, *[1] * (samples.ndim - 1))}


def _other(seed: int, number: int) -> int:
    """The seed of another drawing of the same prompt, 1, 2, …"""
    return (seed + number * OTHER_SEEDS) % 2**64


def _decoded(model, latents: Tensor, vae) -> Tensor:
    """Latents (B, C, H, W) in the host's units -> pictures (B, H, W, 3) in [0, 1]."""
    space = model.get_model_object("latent_format")
    if decoding.usable(vae):
        return vae.decode(latents)[..., :3].float().clamp(0, 1).cpu()
    decoder = decoding.choose(space)
    with torch.inference_mode():
        inside = model.model.process_latent_in(latents.cpu())
        return torch.cat([decoder(one) for one in inside.split(1)]).clamp(0, 1).movedim(1, -1)


def _likeness(two: Tensor) -> float:
    """Of two drawings (2, H, W, 3); from `limits.ONE_PICTURE` on they are one picture."""
    from ..amg_core.index import Index, build
    from ..amg_core.index.sources import Pictures

    plain = descriptors.create(descriptors.DEFAULT)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        build(Pictures(two[:1], "", DRAWN), Path(folder) / "one", plain)
        with Index.open(Path(folder) / "one") as one:
            match = opening.as_matcher([one], plain).match_pictures(two[1:].movedim(-1, 1))
            return float(match.score[0])


def _place(alike: float) -> float:
    """The likeness of two drawings as people read it."""
    return likeness(alike, limits.ONE_PICTURE)


@contextmanager
def _against(index, stored: Tensor | None, vae, model) -> Iterator[tuple[object, dict]]:
    """A matcher on the pictures to stay away from: the index, the stored pictures (N, H, W, 3), or both.

    The second value has the stored pictures for the page, as in `live.events_of`.
    """
    if stored is None:
        yield index, {}
        return
    from ..amg_core.index import Index, build
    from ..amg_core.index.sources import Pictures

    descriptor = descriptors.create(descriptors.DEFAULT) if index is None else index.descriptor
    if index is not None and index.latent:
        descriptor = opening.descriptor_of(index.descriptor.spec, vae, model)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        build(Pictures(stored, "", DRAWN), Path(folder) / "stored", descriptor)
        with Index.open(Path(folder) / "stored") as drawn:
            members = [drawn] if index is None else [*index.index.members, drawn]
            matcher = opening.as_matcher(members, descriptor)
            hashes = [drawn.record(i).sha256 for i in range(drawn.count)]
            saved = show.preview(stored, THUMB)
            yield matcher, dict(zip(hashes, saved, strict=False))  # equal drawings share one row
