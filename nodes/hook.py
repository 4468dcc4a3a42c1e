"""The guard inside a ComfyUI sampling run: a wrapper around the run, and a hook that only records.

Both are plain functions, because the host deep-copies `model_options` on every clone, and with a callable
object it would copy index and networks. The state of a run is stored in the run's own `model_options`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..amg_core import report as reports
from ..amg_core.errors import AMGError
from ..amg_core.messages import message
from ..amg_core.messages import words as in_words
from ..amg_core.retry import until_no_copy
from ..amg_core.run import SamplingRun, Settings
from ..amg_core.similarity.matcher import Matcher
from . import decoding, judging, latents, live, wording
from .drawing import Drawing, GivenPart, Loop, noise_level
from .guiders import HOOKS, KEY

FINISHED = 0.05  # noise that is invisible in a finished picture


@dataclass
class Report:
    """The report of the latest sampling run of a guarded model, for the nodes that hand it on.

    Attributes
    ----------
    latest : dict, optional
        See `amg_core.report`.
    near : dict
        Its neighbors, as `live.entries` gives them.
    drawn_by : str, optional
        The execution id of the node that shows the run, if that is another one than reads the report.
    """

    latest: dict | None = None
    near: dict[str, dict] = field(default_factory=dict)
    drawn_by: str | None = None


def attach(
    model,
    matcher: Matcher,
    settings: Settings,
    *,
    clip=None,
    vae=None,
    decoder: str = "auto",
    loop: Loop | None = None,
    report: Report | None = None,
    on_step: Callable[[str], None] | None = None,
    on_event: Callable[[dict], None] | None = None,
    graph: dict | None = None,
):
    """A clone of the ModelPatcher `model` that guards every sampling run.

    Finished pictures are checked, and copies are drawn again from the same noise, see `amg_core.retry`.

    Parameters
    ----------
    matcher : Matcher
        Index and descriptor. Its own decoder is not used. An index of latents needs none.
    clip, vae : optional
        The host's CLIP encodes neighbour captions. Without it, or at cfg 1, deduplication is off. The VAE
        is copied if `decoder` needs it.
    decoder : {"auto", "taesd", "vae", "linear"}
        See `decoding.choose`. Finished pictures are decoded by `vae` if it is connected.
    loop : Loop, optional
        Without it nothing is drawn again.
    report : Report, optional
        Receives the report of each run, also of interrupted ones.
    on_step : callable, optional
        Called with one line of text after every model evaluation, and with the verdict at the end.
    on_event : callable, optional
        Called at the same times with the events of `live.step` and `live.end`.
    graph : dict, optional
        The graph in the form of the API, in which the texts of prompts are looked up if the server does
        not execute one. Without the text of a prompt, its reduction keeps only its first words.

    Raises
    ------
    AMGError
        The model is guarded already (`check_unguarded`), there is no decoder for it (the message names
        the file to add), an index of latents or a VAE belongs to another kind of model, or copies must
        not come out and there is no decoder for finished pictures. During a run: a picture is still a
        copy and `loop` says stop, or the guider is of an unknown kind (`guiders`).
    """
    check_unguarded(model)
    space = model.get_model_object("latent_format")
    loop = Loop() if loop is None else loop
    judging.check(vae, space)
    if matcher.latent:  # decodes only finished pictures
        latents.check_model(matcher, space)
        to_picture = None if decoding.usable(vae) else decoding.choose_if_any(space)
    else:
        to_picture = decoding.choose(space, decoder, vae)
    if loop.if_still_copied != reports.SAY and to_picture is None and not decoding.usable(vae):
        raise AMGError(
            f"if_still_copied: with '{loop.if_still_copied}' every finished picture has to be "
            f"checked, but {in_words(message(reports.NOTHING_DECODES))}. You can also set "
            f"if_still_copied to '{reports.SAY}'."
        )
    watch = matcher.through(None if matcher.latent else to_picture)
    guarded = model.clone()

    def run(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
            disable_pbar=False, seed=None, *args, **kwargs):  # fmt: skip
        guider = executor.class_obj
        device = guider.model_patcher.load_device
        if report is not None:
            report.latest, report.near = None, {}
        if matcher.latent:
            latents.check_latent(matcher, noise)
        else:
            decoding.check(to_picture, noise)

        def execute(noise, callback, seed):
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback,
                            disable_pbar, seed, *args, **kwargs)  # fmt: skip

        try:
            watch.to(device)
            if matcher.latent and to_picture is not None:
                to_picture.to(device)
            judge = judging.make(watch, guider.model_patcher.model, vae, to_picture)
            known = GivenPart(guider, noise, latent_image, denoise_mask, sigmas, device)
            written = wording.written(wording.running() or graph or {})
            drawing = Drawing(execute, guider, watch, known, clip, written, noise, seed, callback,
                               loop, on_step, on_event, len(sigmas) - 1, judge)  # fmt: skip
            outcome, by = None, "" if judge is None else judge.by
            unjudged = _unfinished(guider, sigmas) or ("" if judge else reports.NOTHING_DECODES)
            reason = unjudged or reports.NOT_ENDED
            try:
                if unjudged:
                    nobody = torch.zeros(len(noise), dtype=torch.bool)
                    drawn = drawing.draw(settings, nobody, nobody).latents
                    drawing.clear_previews()
                else:
                    outcome = until_no_copy(drawing, settings, len(noise), loop.retries)
                    drawing.clear_previews(outcome)
                    reason = ""
            finally:
                composed = _report_of(drawing, outcome, loop, by, reason, matcher, to_picture, clip)
                if report is not None and composed is not None:
                    report.latest = composed
                    report.near = live.entries(matcher.index, live.rows_of(composed))
            if on_step is not None:
                on_step(reports.words(composed))
            if on_event is not None:
                on_event(live.end(composed, {} if report is None else report.near))
            if outcome is None:
                return drawn
            return drawing.settle(outcome, composed)
        finally:
            watch.rest()
            if matcher.latent and to_picture is not None:
                to_picture.to("cpu")

    def record(args: dict) -> Tensor:
        hear = args["model_options"].get(KEY)
        if hear is None:
            raise AMGError(
                "The guard was called outside a sampling run that it can watch: a node calls the "
                "model in its own way. Use KSampler, SamplerCustomAdvanced or AMG Sampler."
            )
        return hear(args)

    record.amg = True
    guarded.set_model_sampler_post_cfg_function(record)
    run.index = matcher.index.name
    # First means outermost, so that caches of other nodes start again in each drawing.
    others = guarded.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    guarded.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: [run]} | others
    return guarded


def check_unguarded(model) -> None:
    """Raise AMGError if the ModelPatcher `model` has a guard. A model can have only one."""
    for run in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise AMGError(
            f"model: it is guarded already, against index {run.index}, and a model carries one "
            "guard. Connect the model as it is before Apply AMG. To guard against several "
            "indexes, connect them to Combine Indexes, and connect that to one AMG node."
        )


def detach(model):
    """Remove the guard from the ModelPatcher `model` in place, and return it.

    For models that are evaluated without drawing a picture.
    """
    hooks = model.model_options.get(HOOKS, [])
    if hooks:
        kept = [hook for hook in hooks if not getattr(hook, "amg", False)]
        model.model_options[HOOKS] = kept
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    return model


def _unfinished(guider, sigmas: Tensor) -> str:
    """Why this run does not finish its pictures, one of `reports.NOT_JUDGED`, or "" if it does."""
    if len(sigmas) < 2:
        return reports.NOTHING_DRAWN
    sampling = guider.model_patcher.get_model_object("model_sampling")
    left = noise_level(sampling, sigmas[-1:])[0]
    if float(left[0]) > FINISHED:
        return reports.NOT_FINISHED
    return ""


def undrawn(matcher: Matcher, settings: Settings, loop: Loop) -> dict:
    """The report of a run without any step."""
    sampling = SamplingRun(matcher, settings, expected_steps=0)
    return reports.compose(
        sampling.report(), not_judged=reports.NOTHING_DRAWN, if_still_copied=loop.if_still_copied,
        versions=_versions(),
    )  # fmt: skip


def _report_of(
    drawing: Drawing, outcome, loop, judge: str, reason, matcher, decoder, clip
) -> dict | None:
    """The report with the host's data, or None if the run ended before it began."""
    if drawing.first is None:
        return None
    seen = "none" if matcher.latent else decoder.name
    return reports.compose(
        drawing.first.report(),
        outcome,
        judged_by=judge if outcome is not None else "",
        not_judged=reason,
        if_still_copied=loop.if_still_copied,
        retries=loop.retries,
        seed=drawing.seed,
        seeds=drawing.seeds if outcome is not None else None,
        starts=drawing.starts if outcome is not None else None,
        versions=_versions(),
        unseen_steps=drawing.unseen,
        blanked_previews=drawing.hidden,
        host={"decoder": seen, "captions": "encoded" if clip is not None else "no clip"},
    )


def _versions() -> dict[str, str]:
    """The host's version, if it can be found."""
    version = getattr(sys.modules.get("comfyui_version"), "__version__", None)
    return {} if version is None else {"comfyui": version}
