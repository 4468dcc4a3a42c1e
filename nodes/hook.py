"""The guard inside a ComfyUI sampling run: a post-CFG hook, and a wrapper that opens and closes it.

Both are plain functions: the host deep-copies `model_options` on every clone, and would copy index
and networks with a callable object. What a run remembers hangs on the run's own `model_options`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.model_sampling
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..amg_core.errors import AMGError
from ..amg_core.index.search import Searcher
from ..amg_core.probe import Probe
from ..amg_core.session import Session, Settings
from . import decoding, latents
from .conditioning import Predictions

KEY = "amg"
FLOW_SIGMA_MAX = 0.999  # σ/(1 − σ) of pure noise is infinite


@dataclass
class Report:
    """Filled by every sampling run of a guarded model: the report of the latest one."""

    latest: dict | None = None


def attach(
    model,
    probe: Probe,
    settings: Settings,
    *,
    clip=None,
    vae=None,
    decoder: str = "auto",
    report: Report | None = None,
    on_step: Callable[[str], None] | None = None,
):
    """A clone of the ModelPatcher `model` that guards every sampling run.

    An earlier guard is replaced.

    Parameters
    ----------
    probe : Probe
        Index and descriptor; its own decoder is not used. An index of latents needs none.
    clip, vae : optional
        The host's CLIP turns neighbour captions into conditioning; without it, or at cfg 1,
        deduplication is off. The VAE is copied where `decoder` needs it.
    decoder : {"auto", "taesd", "vae", "linear"}
        See `decoding.choose`.
    report : Report, optional
        Receives the report of each run, of interrupted ones too.
    on_step : callable, optional
        Called with one line of text after every model evaluation.

    Raises
    ------
    AMGError
        No decoder for this model; names the file that would help. Or an index of latents that was
        made for another kind of model.
    """
    space = model.get_model_object("latent_format")
    to_picture = None
    if probe.latent:
        latents.check_model(probe, space)
    else:
        to_picture = decoding.choose(space, decoder, vae)
    networks = [net for net in (probe.descriptor, to_picture) if net is not None]
    guarded = detach(model.clone())

    def run(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
            disable_pbar=False, seed=None, *args, **kwargs):  # fmt: skip
        guider = executor.class_obj
        device = guider.model_patcher.load_device
        if report is not None:
            report.latest = None
        if to_picture is None:
            latents.check_latent(probe, noise)
        else:
            decoding.check(to_picture, noise)
        searcher = probe.searcher
        if searcher.device != device:
            searcher = Searcher(searcher.index, device)
        try:
            with torch.inference_mode(False):
                for network in networks:
                    network.to(device)
            watch = Probe(searcher, probe.descriptor, to_picture)
            session = Session(watch, settings, expected_steps=len(sigmas) - 1)
            known = _Known(guider, noise, latent_image, denoise_mask, sigmas, device)
            predictions = Predictions(clip, known.kwargs(seed))
            guider.model_options[KEY] = _step(session, known, predictions, on_step)
            try:
                return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback,
                                disable_pbar, seed, *args, **kwargs)  # fmt: skip
            finally:
                guider.model_options.pop(KEY, None)
                if report is not None:
                    report.latest = _finished(session, to_picture, clip)
        finally:
            with torch.inference_mode(False):
                for network in networks:
                    network.to("cpu")

    def guard(args: dict) -> Tensor:
        step = args["model_options"].get(KEY)
        if step is None:
            raise AMGError(
                "The guard was asked outside of a sampling run that it could watch: a node calls "
                "the model by a way of its own. Use KSampler, SamplerCustomAdvanced or AMG "
                "Sampler."
            )
        return step(args)

    guard.amg = True
    guarded.set_model_sampler_post_cfg_function(guard)
    guarded.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run)
    return guarded


def detach(model):
    """Remove the guard from the ModelPatcher `model`, in place; returns it."""
    hooks = model.model_options.get("sampler_post_cfg_function", [])
    if hooks:
        kept = [hook for hook in hooks if not getattr(hook, "amg", False)]
        model.model_options["sampler_post_cfg_function"] = kept
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    return model


def noise_level(model_sampling, sigma: Tensor) -> tuple[Tensor, float]:
    """The host's σ (B,) as k-diffusion σ (B,), and diffusion time t in [0, 1], 1 = pure noise.

    Flow models: σ/(1 − σ) and t = σ. All others keep σ; t is its place in the model's own table of
    levels: timestep/999 for discrete models, the share of the log-σ range for continuous ones.
    """
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        part = sigma.float().clamp(0, 1)
        inner = part.clamp(max=FLOW_SIGMA_MAX)
        return inner / (1 - inner), float(part[0])
    table = model_sampling.sigmas.float().clamp_min(1e-10).log()
    nearest = (table - sigma.float().clamp_min(1e-10).log()[0].to(table.device)).abs().argmin()
    return sigma.float(), float(nearest) / max(1, len(table) - 1)


class _Known:
    """Inpainting: the part of the picture that is given. Composited before the guard looks."""

    def __init__(self, guider, noise, latent_image, denoise_mask, sigmas, device):
        self.guider, self.sigmas = guider, sigmas
        model = guider.model_patcher.model
        self.latent = latent_image.to(device)
        if torch.count_nonzero(self.latent) > 0:  # as the host: an empty latent is not shifted
            self.latent = model.process_latent_in(self.latent)
        self.mask = None
        if denoise_mask is not None:
            self.mask = comfy.utils.reshape_mask(denoise_mask, noise.shape).to(device)

    def compositor(self, args: dict) -> Callable[[Tensor], Tensor]:
        """Prediction -> the picture it stands for: itself where drawn, the given latent elsewhere.

        Without a mask, the very same tensor.
        """
        if self.mask is None:
            return lambda prediction: prediction
        mask, change = self.mask, args["model_options"].get("denoise_mask_function")
        if change is not None:
            extra = {"model": self.guider, "sigmas": self.sigmas}
            mask = change(args["sigma"], mask, extra_options=extra)
        given = self.latent.to(args["denoised"]) * (1 - mask)
        return lambda prediction: prediction * mask + given

    def kwargs(self, seed) -> dict:
        """What the host passes to `encode_model_conds` for this run."""
        return {"latent_image": self.latent, "denoise_mask": self.mask, "seed": seed}


def _step(session: Session, known: _Known, predictions, on_step) -> Callable[[dict], Tensor]:
    """The post-CFG function of one run."""

    def step(args: dict) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        denoised = args["denoised"]
        sigma, t = noise_level(args["model"].model_sampling, args["sigma"])
        # At cfg 1 the host has no unconditional prediction; its uncond_denoised is zeros.
        guided = bool(args["uncond"]) and bool(args["cond"])
        neighbor = softened = None
        if guided and predictions.clip is not None:
            neighbor = partial(predictions.neighbor, args)
        if guided and args["cond"][0].get("cross_attn") is not None:
            softened = partial(predictions.softened, args)
        out = session.step(
            denoised,
            cond=args["cond_denoised"],
            uncond=args["uncond_denoised"] if guided else None,
            cfg_scale=float(args["cond_scale"]),
            sigma=sigma,
            t=t,
            neighbor_denoised=neighbor,
            softened_denoised=softened,
            composite=known.compositor(args),
        )
        if on_step is not None:
            on_step(session.line())
        return out

    return step


def _finished(session: Session, decoder, clip) -> dict:
    """The session's report, with what only the host knows."""
    seen = "none" if decoder is None else decoder.name
    host = {"decoder": seen, "captions": "encoded" if clip is not None else "no clip"}
    return session.report() | {"host": host}
