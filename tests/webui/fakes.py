"""What CI has instead of the two hosts: their callback order and the fields they hand over, and no more.

Recorded from A1111 1.10 (`CFGDenoiser.forward`) and Forge (`sampling_function_inner`); the tests run on the
real ones too, where WEBUI_PATH and FORGE_PATH name their folders.
"""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import torch

Scheduled = namedtuple("Scheduled", ["end_at_step", "cond"])


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None):
        super().__init__(prompts)


def reconstruct_multicond_batch(cond, _step):
    tensors = [part.schedules[0].cond for each in cond.batch for part in each]
    lists, k = [], 0
    for each in cond.batch:
        lists.append([(k + j, part.weight) for j, part in enumerate(each)])
        k += len(each)
    return lists, torch.stack(tensors)


def reconstruct_cond_batch(cond, _step):
    return torch.stack([schedule[0].cond for schedule in cond])


def script_callbacks() -> dict:
    """Three lists of callbacks; exceptions are swallowed, as the host does."""
    names, space, swallowed = ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg"), {}, []
    for name in names:
        kept: list = []
        space["on_" + name] = kept.append

        def fire(params, kept=kept):
            for callback in kept:
                try:
                    callback(params)
                except Exception as error:
                    swallowed.append(error)

        space[name + "_callback"] = fire
    return space | {"swallowed": swallowed}


class A1111Denoiser(torch.nn.Module):
    def __init__(self, sampler):
        super().__init__()
        self.sampler, self.p, self.step, self.mask_before_denoising = sampler, None, 0, False
        self.mask = self.nmask = self.init_latent = None

    def get_pred_x0(self, x_in, x_out, sigma):
        return x_out

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        from modules import prompt_parser, sd_samplers_common, shared
        from modules import script_callbacks as calls

        if shared.state.interrupted or shared.state.skipped:
            raise sd_samplers_common.InterruptedException
        lists, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask_before_denoising and self.mask is not None:
            x = x * self.nmask + self.init_latent * self.mask

        def repeated(rows):
            return torch.cat(
                [rows[i : i + 1] for i, each in enumerate(lists) for _ in each] + [rows]
            )

        params = SimpleNamespace(
            x=repeated(x), image_cond=repeated(image_cond), sigma=repeated(sigma), sampling_step=0,
            total_sampling_steps=1, text_cond=tensor, text_uncond=uncond, denoiser=self,
        )  # fmt: skip
        calls.cfg_denoiser_callback(params)
        both = {"c_crossattn": [torch.cat([tensor, uncond])], "c_concat": [params.image_cond]}
        out = self.inner_model(params.x, params.sigma, cond=both)
        calls.cfg_denoised_callback(SimpleNamespace(x=out))
        free = out[-len(x) :].clone()
        for i, parts in enumerate(lists):
            for k, weight in parts:
                free[i] += (out[k] - out[-len(x) + i]) * (weight * cond_scale)
        if not self.mask_before_denoising and self.mask is not None:
            free = free * self.nmask + self.init_latent * self.mask
        leaving = SimpleNamespace(x=free, sampling_step=0, total_sampling_steps=1)
        calls.cfg_after_cfg_callback(leaving)
        self.step += 1
        return leaving.x


class A1111TimestepsDenoiser(A1111Denoiser):
    """DDIM, PLMS, UniPC: ε in and out, blending before."""

    def __init__(self, sampler):
        from modules import shared

        super().__init__(sampler)
        self.alphas, self.mask_before_denoising = shared.sd_model.alphas_cumprod, True

    def get_pred_x0(self, x_in, x_out, sigma):
        a = self.alphas[sigma.to(dtype=int)][:, None, None, None]
        return (x_in - (1 - a).sqrt() * x_out) / a.sqrt()


class Condition:
    def __init__(self, cond):
        self.cond = cond


def calc_cond_uncond_batch(model, cond, uncond, x, timestep, _options):
    """Every part apart, weighted by its strength; zeros where there is nothing to run."""

    def run(parts):
        if parts is None:
            return torch.zeros_like(x)
        total = sum(part.get("strength", 1.0) for part in parts)
        conds = [{k: v.cond for k, v in part["model_conds"].items()} for part in parts]
        outs = [model.apply_model(x, timestep, **each) for each in conds]
        strengths = [part.get("strength", 1.0) for part in parts]
        return sum(s * out for s, out in zip(strengths, outs, strict=True)) / total

    return run(cond), run(uncond)


def sampling_function_inner(model, x, timestep, uncond, cond, scale, model_options, seed=None):
    strength = sum(part.get("strength", 1) for part in cond)
    ran = None if scale == 1.0 else uncond
    c, u = calc_cond_uncond_batch(model, cond, ran, x, timestep, model_options)
    out = u + (c - u) * scale * strength
    for hook in model_options.get("sampler_post_cfg_function", []):
        args = {
            "denoised": out, "cond": cond, "uncond": uncond, "model": model, "uncond_denoised": u,
            "cond_denoised": c, "sigma": timestep, "model_options": model_options, "input": x,
        }  # fmt: skip
        out = hook(args)
    return out


class Patcher:
    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self):
        other = type(self)(self.model)
        other.model_options = dict(self.model_options)
        return other

    def set_model_sampler_post_cfg_function(self, hook, disable_cfg1_optimization=False):
        hooks = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*hooks, hook]
