"""Forge and its forks: the guard as a post-CFG hook on the UNet patcher. All samplers predict x̂0 there.

`backend` is the package of Forge (lllyasviel) and Neo. Classic has the same under `ldm_patched`.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from amg_core import hosts
from amg_core.errors import AMGError

from . import lookup, shared
from .texts import OtherTexts, Text

HOOKS = "sampler_post_cfg_function"


class Forge:
    """See `shared.Host`."""

    def __init__(self, guard: shared.Guard):
        self.guard, self.p = guard, guard.p

    def check(self) -> None:
        switch = getattr(self.p, "refiner_switch_at", None)
        if getattr(self.p, "refiner_checkpoint_info", None) is not None and switch not in (None, 1):
            raise AMGError(
                "Refiner: Forge changes the model during the run, and the guard does not follow. "
                "Turn the refiner off, or Anti-Memorization Guidance."
            )

    def decoder(self):
        model = self.p.sd_model
        vae = model.forge_objects.vae
        network = vae.first_stage_model
        channels = int(getattr(vae, "latent_channels", 4))
        xl = bool(getattr(model, "is_sdxl", False))
        name = "taesdxl_decoder" if xl else "taesd_decoder"
        if channels != 4:
            name = "taesd3_decoder" if getattr(model, "is_sd3", False) else "taef1_decoder"
        classic = 0.13025 if xl else 0.18215
        found = lookup.decoder(
            name,
            channels=channels,
            vae=lambda: network,
            enter=getattr(network, "process_out", lambda latent: latent / classic),
            colours=lookup.COLOURS["sdxl" if xl else "sd"] if channels == 4 else None,
        )
        _let_gradients_pass(found)
        return found

    def encode(self, words: str) -> Text:
        """Encode one text. The host may unload the UNet for this, which is then loaded again."""
        p = self.p
        text = shared.encode(p.sd_model, words, p)
        unet = p.sd_model.forge_objects.unet
        _memory().load_models_gpu([unet])
        return text

    def attach(self) -> None:
        """Does nothing, because the host makes a new patcher before each pass, see `hook`."""

    def hook(self) -> None:
        """Called before every sampling pass. For a hires pass it is called twice, and the second counts."""
        guard, objects = self.guard, self.p.sd_model.forge_objects
        unet, run = objects.unet.clone(), guard.open()
        _unhook(unet)
        guard.text("")  # while the text encoder is still loaded

        def guard_step(args: dict) -> Tensor:
            return guided(guard, run, args)

        guard_step.amg = True
        unet.set_model_sampler_post_cfg_function(guard_step)
        objects.unet = unet

    def detach(self) -> None:
        _unhook(self.p.sd_model.forge_objects.unet)

    def stash(self) -> object:
        from modules import shared as host

        p = self.p
        objects = p.sd_model.forge_objects.shallow_copy()
        return p.rng, host.state.job_no, shared.which_model(p), objects

    def rewind(self, stashed) -> None:
        from modules import shared as host

        p = self.p
        rng, host.state.job_no, model, objects = stashed
        shared.same_noise(p, rng)
        if not getattr(p, "enable_hr", False):
            p.sd_model.forge_objects = objects.shallow_copy()
            return
        p.is_hr_pass = False
        if shared.which_model(p) != model:  # Hires. fix has loaded its own checkpoint
            _chosen_checkpoint()
        if not getattr(p, "disable_extra_networks", True):  # and its own LoRAs
            from modules import devices, extra_networks

            with devices.autocast():
                extra_networks.activate(p, p.extra_network_data)
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()


def _let_gradients_pass(decoder) -> None:
    """Let gradients pass through the guard's copy of the VAE. Neo runs each layer in inference mode."""
    network = getattr(decoder, "network", None)
    for part in network.modules() if isinstance(network, nn.Module) else ():
        forward = type(part).forward
        while getattr(getattr(forward, "__code__", None), "co_name", "") == "decorate_context":
            forward = forward.__wrapped__
            part.forward = MethodType(forward, part)


def _chosen_checkpoint() -> None:
    """Load the checkpoint of the first pass again, as the host does before each batch."""
    from modules import sd_models

    if hasattr(sd_models, "forge_model_reload"):
        sd_models.forge_model_reload()
        return
    with sd_models.SkipWritingToConfig():  # Classic
        sd_models.reload_model_weights()


def _unhook(unet) -> None:
    """Remove the guard from a patcher, in place."""
    hooks = unet.model_options.get(HOOKS, [])
    if any(getattr(hook, "amg", False) for hook in hooks):
        unet.model_options[HOOKS] = [hook for hook in hooks if not getattr(hook, "amg", False)]


def _memory():
    try:
        from backend import memory_management
    except ImportError:
        from ldm_patched.modules import model_management as memory_management
    return memory_management


def _sampling():
    """The host's `calc_cond_uncond_batch`."""
    try:
        from backend.sampling.sampling_function import calc_cond_uncond_batch
    except ImportError:
        from ldm_patched.modules.samplers import calc_cond_uncond_batch
    return calc_cond_uncond_batch


def guided(guard: shared.Guard, run, args: dict) -> Tensor:
    """The post-CFG function.

    `args` has denoised, cond(_denoised), uncond(_denoised), sigma, input and model.
    """
    shared.stop_if_interrupted()
    p, denoised = guard.p, args["denoised"]
    if denoised.ndim != 4:
        raise AMGError(
            f"This model makes latents of shape {tuple(denoised.shape)}, and the guard reads only "
            "those of still pictures. Turn Anti-Memorization Guidance off."
        )
    predictor = getattr(args["model"], "predictor", None) or args["model"].model_sampling
    flow = getattr(predictor, "prediction_type", "") == "const"
    sigma, t = hosts.noise_level(args["sigma"], None if flow else predictor.sigmas)
    cond, uncond = args["cond_denoised"], args["uncond_denoised"]
    # At cfg 1, or if the host skipped it to save time, the unconditional prediction is zeros.
    asked = bool(args["uncond"]) and bool(torch.count_nonzero(uncond))
    uncond = uncond if asked else None
    guard.on_device(run, denoised.device)
    with shared.full_precision(denoised):
        out = run.step(
            denoised,
            cond=cond,
            uncond=uncond,
            cfg_scale=_scale(p, args) if asked else 1.0,
            sigma=sigma,
            t=t,
            composite=_compositor(p, denoised),
            texts=_texts(guard, args, len(denoised), uncond),
        )
    guard.tell(run)
    return out


def _scale(p, args: dict) -> float:
    """s0, from the arguments of newer forks, or else from the generation. Parts with AND are added."""
    scale = args.get("cond_scale")
    if scale is None:
        hires = getattr(p, "is_hr_pass", False) and hasattr(p, "hr_cfg")
        scale = p.hr_cfg if hires else p.cfg_scale
    return float(scale) * sum(float(part.get("strength", 1.0)) for part in args["cond"])


def _texts(guard: shared.Guard, args: dict, batch: int, uncond) -> OtherTexts:
    template, host = args["cond"][0], shared.as_host(args["input"])
    conds = template["model_conds"]
    vector = conds["y"].cond if "y" in conds else None

    def evaluate(text: Text) -> Tensor:
        shared.stop_if_interrupted()
        changed = {"c_crossattn": text.tokens, "y": text.vector}
        made = {
            key: type(value)(changed[key]) if changed.get(key) is not None else value
            for key, value in conds.items()
        }
        cond = {k: v for k, v in template.items() if k != "strength"} | {"model_conds": made}
        with host():
            return _sampling()(
                args["model"], [cond], None, args["input"], args["sigma"], args["model_options"]
            )[0]

    def encode(words: str) -> Text:
        with host():
            return guard.text(words)

    prompt = Text(conds["c_crossattn"].cond, vector).batch(batch)
    return OtherTexts(prompt, uncond, encode, evaluate, shared.prompts(guard.p))


def _compositor(p, like: Tensor):
    """A function from a prediction to the whole latent. The host puts the given part in after this hook."""
    denoiser = getattr(getattr(p, "sampler", None), "model_wrap_cfg", None)
    if getattr(denoiser, "mask", None) is None:
        return hosts.composited(None, None)
    known = denoiser.init_latent.to(like) * denoiser.mask.to(like)
    return hosts.composited(denoiser.nmask.to(like), known)
