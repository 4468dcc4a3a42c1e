"""The guard inside a ComfyUI sampling run: a wrapper around the run, and a hook that only listens.

Both are plain functions: the host deep-copies `model_options` on every clone, and would copy index
and networks with a callable object. What a run remembers hangs on the run's own `model_options`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

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
from . import decoding, judging, latents, live
from .drawing import Drawing, GivenPart, Loop, noise_level
from .guiders import HOOKS, KEY

FINISHED = 0.05  # noise that may be left in a finished picture: no one sees it


@dataclass
class Report:
    """Filled by every sampling run of a guarded model: the report of the latest one."""

    latest: dict | None = None


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
):
    """A clone of the ModelPatcher `model` that guards every sampling run.

    What a run has finished is measured, and drawn again from the same noise while it is a copy: see
    `amg_core.retry`.

    Parameters
    ----------
    probe : Probe
        Index and descriptor; its own decoder is not used. An index of latents needs none.
    clip, vae : optional
        The host's CLIP turns neighbour captions into conditioning; without it, or at cfg 1,
        deduplication is off. The VAE is copied where `decoder` needs it.
    decoder : {"auto", "taesd", "vae", "linear"}
        See `decoding.choose`. Finished pictures are judged through `vae` wherever it is connected.
    loop : Loop, optional
        Without it nothing is drawn again.
    report : Report, optional
        Receives the report of each run, of interrupted ones too.
    on_step : callable, optional
        Called with one line of text after every model evaluation, and with the verdict at the end.
    on_event : callable, optional
        Called at the same moments with what `live.step` and `live.end` make.

    Raises
    ------
    AMGError
        The model is guarded already: see `check_unguarded`. No decoder for this model; names the file
        that would help. Or an index of latents, or a VAE, that was made for another kind of model. Or
        copies are not to come out, and nothing decodes the finished pictures. In a run: a copy that
        stays, if `loop` says stop; a guider that the guard does not understand, see `guiders`.
    """
    check_unguarded(model)
    space = model.get_model_object("latent_format")
    loop = Loop() if loop is None else loop
    judging.check(vae, space)
    if matcher.latent:  # decodes only to judge
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
            report.latest = None
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
            drawing = Drawing(execute, guider, watch, known, clip, noise, seed, callback,
                               loop, on_step, on_event, len(sigmas) - 1, judge)  # fmt: skip
            outcome, by = None, "" if judge is None else judge.by
            unjudged = _unfinished(guider, sigmas) or ("" if judge else reports.NOTHING_DECODES)
            reason = unjudged or reports.NOT_ENDED
            try:
                if unjudged:
                    drawn = drawing.draw(
                        settings, torch.zeros(len(noise), dtype=torch.bool)
                    ).latents
                    drawing.clear_previews()
                else:
                    outcome = until_no_copy(drawing, settings, len(noise), loop.retries)
                    drawing.clear_previews(outcome)
                    reason = ""
            finally:
                composed = _report_of(drawing, outcome, loop, by, reason, matcher, to_picture, clip)
                if report is not None:
                    report.latest = composed
            if on_step is not None:
                on_step(reports.words(composed))
            if on_event is not None:
                on_event(live.end(composed))
            if outcome is None:
                return drawn
            return drawing.settle(outcome, composed)
        finally:
            watch.rest()
            if matcher.latent and to_picture is not None:
                to_picture.to("cpu")

    def guard(args: dict) -> Tensor:
        hear = args["model_options"].get(KEY)
        if hear is None:
            raise AMGError(
                "The guard was called outside a sampling run that it can watch: a node calls the "
                "model in its own way. Use KSampler, SamplerCustomAdvanced or AMG Sampler."
            )
        return hear(args)

    guard.amg = True
    guarded.set_model_sampler_post_cfg_function(guard)
    run.index = matcher.index.name
    # First, which is outermost: caches of other nodes must begin afresh in each drawing.
    others = guarded.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    guarded.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: [run]} | others
    return guarded


def check_unguarded(model) -> None:
    """AMGError if the ModelPatcher `model` carries a guard: a second one would have to drop it."""
    for run in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise AMGError(
            f"model: it is guarded already, against index {run.index}, and a model carries one "
            "guard. Connect the model as it is before Apply AMG. To guard against several "
            "indexes, connect them to Combine Indexes, and connect that to one AMG node."
        )


def detach(model):
    """Remove the guard from the ModelPatcher `model`, in place; returns it.

    For models that are asked something, and draw nothing.
    """
    hooks = model.model_options.get(HOOKS, [])
    if hooks:
        kept = [hook for hook in hooks if not getattr(hook, "amg", False)]
        model.model_options[HOOKS] = kept
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    return model


def _unfinished(guider, sigmas: Tensor) -> str:
    """Why what this run draws is no finished picture, one of `reports.NOT_JUDGED`; "" if it is one."""
    if len(sigmas) < 2:
        return reports.NOTHING_DRAWN
    sampling = guider.model_patcher.get_model_object("model_sampling")
    left = noise_level(sampling, sigmas[-1:])[0]
    if float(left[0]) > FINISHED:
        return reports.NOT_FINISHED
    return ""


def undrawn(matcher: Matcher, settings: Settings, loop: Loop) -> dict:
    """The report where the host runs no step at all."""
    sampling = SamplingRun(matcher, settings, expected_steps=0)
    return reports.compose(
        sampling.report(), not_judged=reports.NOTHING_DRAWN, if_still_copied=loop.if_still_copied,
        versions=_versions(),
    )  # fmt: skip


def _report_of(
    drawing: Drawing, outcome, loop, judge: str, reason, matcher, decoder, clip
) -> dict | None:
    """The report, with what only the host knows; None if the run ended before it began."""
    if drawing.first is None:
        return None
    seen = "none" if matcher.latent else decoder.name
    return reports.compose(
        drawing.first.report(),
        outcome,
        judged_by=judge if outcome is not None else "",
        not_judged=reason,
        if_still_copied=loop.if_still_copied,
        seed=drawing.seed,
        seeds=drawing.seeds if outcome is not None else None,
        versions=_versions(),
        unseen_steps=drawing.unseen,
        blanked_previews=drawing.hidden,
        host={"decoder": seen, "captions": "encoded" if clip is not None else "no clip"},
    )


def _versions() -> dict[str, str]:
    """The host's own version, where it tells."""
    version = getattr(sys.modules.get("comfyui_version"), "__version__", None)
    return {} if version is None else {"comfyui": version}
