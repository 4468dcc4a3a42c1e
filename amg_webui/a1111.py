"""Automatic1111: the guard in the three callbacks of its CFG denoiser.

`on_cfg_denoiser` gets inputs and texts, `on_cfg_denoised` the separate predictions, and `on_cfg_after_cfg`
the guided one, which is the only one that may be replaced. k-diffusion samplers predict x̂0. DDIM, PLMS
and UniPC predict ε, which is converted to x̂0 and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amg_core import hosts
from amg_core.errors import AMGError

from . import lookup, shared
from .texts import OtherTexts, Text

active: shared.Guard | None = (
    None  # the guard of the current generation; None: the callbacks do nothing
)
_step: _Step | None = None


@dataclass
class _Step:
    """The data of the first two callbacks of a step."""

    params: object
    predictions: Tensor | None = None


class A1111:
    """See `shared.Host`."""

    def __init__(self, guard: shared.Guard):
        self.guard, self.p = guard, guard.p
        self._denoiser = None
        self.run = None

    def check(self) -> None:
        model, p = self.p.sd_model, self.p
        if getattr(model, "is_sd3", False):
            raise AMGError(
                "Stable Diffusion 3 cannot be guarded in Automatic1111. Use Forge or ComfyUI, or "
                "turn Anti-Memorization Guidance off."
            )
        edit = getattr(p, "image_cfg_scale", None) not in (None, 1.0)
        if getattr(model, "cond_stage_key", "") == "edit" and edit:
            raise AMGError(
                "InstructPix2Pix with an Image CFG scale makes three predictions, which the "
                "guard cannot handle. Set Image CFG scale to 1, or turn Anti-Memorization "
                "Guidance off."
            )

    def decoder(self):
        model = self.p.sd_model
        xl = bool(getattr(model, "is_sdxl", False))
        scale = float(getattr(model, "scale_factor", 0.13025 if xl else 0.18215))
        return lookup.decoder(
            "taesdxl_decoder" if xl else "taesd_decoder",
            channels=4,
            vae=lambda: getattr(model, "first_stage_model", None),
            enter=lambda latent: latent / scale,
            colours=lookup.COLOURS["sdxl" if xl else "sd"],
        )

    def encode(self, words: str) -> Text:
        return shared.encode(self.p.sd_model, words, self.p)

    def attach(self) -> None:
        global active
        active, self._denoiser = self.guard, None

    def detach(self) -> None:
        global active, _step
        active = _step = None

    def stash(self) -> object:
        from modules import shared as host

        return self.p.rng, host.state.job_no, shared.which_model(self.p)

    def rewind(self, stashed: object) -> None:
        from modules import shared as host

        p = self.p
        rng, host.state.job_no, model = stashed
        shared.same_noise(p, rng)
        if shared.which_model(p) != model:  # Hires. fix or the refiner has loaded another
            from modules import sd_models, sd_samplers

            with sd_models.SkipWritingToConfig():
                sd_models.reload_model_weights()
            p.setup_conds()
            if hasattr(p, "init_latent"):  # img2img makes its sampler only once
                p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        if getattr(p, "enable_hr", False) and not getattr(p, "disable_extra_networks", True):
            from modules import devices, extra_networks

            p.is_hr_pass = False
            with devices.autocast():
                extra_networks.activate(p, p.extra_network_data)

    def open(self, denoiser):
        """The sampling run of this pass, for which the host has made this denoiser."""
        if denoiser is not self._denoiser:
            self._denoiser, self.run = denoiser, self.guard.open()
        return self.run


def on_cfg_denoiser(params) -> None:
    """Called before the model is evaluated. Denoisers of other generations are ignored."""
    global _step
    mine = active is not None and getattr(params.denoiser, "p", None) is active.p
    _step = _Step(params) if mine else None


def on_cfg_denoised(params) -> None:
    """Called with the predictions, conditional ones first. The host uses this very tensor afterwards."""
    if _step is not None:
        _step.predictions = params.x


def on_cfg_after_cfg(params) -> None:
    """Replaces the guided prediction. The host ignores exceptions here, so they interrupt the run."""
    global _step
    step, _step = _step, None
    if step is None or active is None:
        return
    guard = active
    try:
        if guard.error is None:
            params.x = guided(guard, step.params, step.predictions, params.x)
    except Exception as error:
        guard.error = error
    if guard.error is not None:
        from modules import sd_samplers_common

        raise sd_samplers_common.InterruptedException  # the error itself is raised when sampling has ended


def guided(guard: shared.Guard, step, out: Tensor, leaving: Tensor) -> Tensor:
    """Steer the prediction of one step.

    Parameters
    ----------
    step : CFGDenoiserParams
        x, σ (or timesteps) and texts of the batch, conditional rows first.
    out : Tensor (N + B, C, H, W)
        Predictions for every prompt of every sample, then without prompt.
    leaving : Tensor (B, C, H, W)
        The result of guidance and, in inpainting, blending. If nothing is too close, it is returned.
    """
    shared.stop_if_interrupted()
    denoiser = step.denoiser
    args = denoiser.sampler.sampler_extra_args
    weights = [[part.weight for part in each] for each in args["cond"].batch]
    batch = len(weights)
    first = [sum(map(len, weights[:i])) for i in range(batch)]
    x, level = step.x[-batch:], step.sigma[-batch:]
    alphas = getattr(
        denoiser, "alphas", None
    )  # only samplers in timesteps have it, which predict ε

    def denoised(prediction: Tensor) -> Tensor:
        return denoiser.get_pred_x0(x, prediction, level)

    uncond = denoised(out[-batch:])
    cond = torch.stack(
        [_composed(out, out[-batch + i], first[i], weights[i]) for i in range(batch)]
    )
    cond = denoised(cond)
    scale = float(args["cond_scale"]) * float(getattr(denoiser, "cond_scale_miltiplier", 1.0))
    blended = denoiser.mask is not None and not denoiser.mask_before_denoising
    free = leaving  # before the given part of an inpainting was put in
    if blended:
        free = out[-batch:] + scale * (cond - out[-batch:])
    prediction = denoised(free)
    if alphas is None:
        sigma, t = hosts.noise_level(level, _levels(guard.p.sd_model.alphas_cumprod))
    else:
        known = alphas[level.to(torch.long)].float()
        sigma, t = ((1 - known) / known).sqrt(), float(level[0]) / (len(alphas) - 1)

    # If the host skipped it to save time, the unconditional prediction is a copy of the other.
    uncond = None if torch.equal(cond, uncond) else uncond
    run = guard.host.open(denoiser)
    guard.on_device(run, x.device)
    with shared.full_precision(x):
        new = run.step(
            prediction,
            cond=cond,
            uncond=uncond,
            cfg_scale=1.0 if uncond is None else scale,
            sigma=sigma,
            t=t,
            composite=_compositor(denoiser),
            texts=_texts(guard, step, out, first, batch, denoised, uncond),
        )
    guard.tell(run)
    if new is prediction:
        return leaving
    if alphas is None and not blended:
        return new
    change = new - prediction
    if alphas is not None:  # dε = −dx̂0·√ᾱ/√(1 − ᾱ)
        change = -change / sigma.to(change).view(-1, 1, 1, 1)
    return leaving + (change * denoiser.nmask if blended else change)


def _composed(out: Tensor, uncond: Tensor, start: int, weights: list[float]) -> Tensor:
    """D_c of a sample whose prompt has several parts with AND: D_u + Σ w·(D_k − D_u)."""
    if weights == [1.0]:
        return out[start]
    parts = [w * (out[start + k] - uncond) for k, w in enumerate(weights)]
    return uncond + sum(parts)


def _levels(alphas_cumprod: Tensor) -> Tensor:
    alphas = alphas_cumprod.float()
    return ((1 - alphas) / alphas).sqrt()


def _texts(guard, step, out, first: list[int], batch: int, denoised, uncond) -> OtherTexts:
    denoiser, host = step.denoiser, shared.as_host(out)
    x, level, image = step.x[-batch:], step.sigma[-batch:], step.image_cond[first]
    adm = (
        getattr(getattr(guard.p.sd_model, "model", None), "conditioning_key", "") == "crossattn-adm"
    )

    def evaluate(text: Text) -> Tensor:
        shared.stop_if_interrupted()
        cond = text.host()
        if not isinstance(cond, dict):
            cond = {"c_crossattn": [cond]}
        cond |= {"c_adm": image} if adm else {"c_concat": [image]}
        with host():
            return denoised(denoiser.inner_model(x, level, cond=cond))

    def encode(words: str) -> Text:
        with host():
            return guard.text(words)

    prompt = Text.of(step.text_cond)[first]
    return OtherTexts(prompt, uncond, encode, evaluate, shared.prompts(guard.p))


def _compositor(denoiser):
    """A function from a prediction to the whole latent, with the given part of an inpainting put in."""
    if denoiser.mask is None:
        return hosts.composited(None, None)
    return hosts.composited(denoiser.nmask, denoiser.init_latent * denoiser.mask)
