"""A host small enough for a test: the embedded model, drawn by the real or the recorded guidance step.

`A1111` and `Forge` put just enough into `sys.modules` for that step to run. With a folder, the denoiser (or
sampling function and patcher), the callbacks and the prompt parser are the host's own files.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import fakes
import torch
from torch import nn

from amg_demo.model import load
from amg_demo.sample import noise_levels

OURS = ("modules", "backend", "gradio", "fastapi", "lark", "k_diffusion", "diffusers", "tqdm")


class InterruptedException(BaseException):
    """The host's own: nothing that catches `Exception` stops it."""


class ImageRNG:
    """Noise of each sample from its own generator."""

    def __init__(self, shape, seeds, subseeds=None, subseed_strength=0.0, seed_resize_from_h=0,
                 seed_resize_from_w=0):  # fmt: skip
        self.shape, self.seeds, self.subseeds = shape, seeds, subseeds
        self.subseed_strength = subseed_strength
        self.seed_resize_from_h, self.seed_resize_from_w = seed_resize_from_h, seed_resize_from_w
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])


class Scaled(nn.Module):
    """The demo's decoder as a host's autoencoder: pictures about ±1."""

    latent_channels = 4

    def __init__(self, decoder):
        super().__init__()
        self.inner = decoder
        self.post_quant_conv = None
        self.decoder = _Twice(decoder)

    def process_out(self, latent):
        return latent


class _Twice(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.inner = decoder

    def forward(self, latent):
        return self.inner(latent) * 2 - 1


def module(name: str, **names) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(names)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, made)
    return made


class Webui:
    """What both hosts have. `path`: the folder of a real one, or None."""

    def __init__(self, models: Path, path: Path | None):
        self.path, self.errors = path, []
        self._before = {k: v for k, v in sys.modules.items() if k.partition(".")[0] in OURS}
        for name in self._before:
            del sys.modules[name]
        self.demo = load()
        self.encoded: list[str] = []
        self.state = SimpleNamespace(
            interrupted=False, skipped=False, stopping_generation=False, sampling_step=0,
            sampling_steps=0, textinfo="", job_no=0,
        )  # fmt: skip
        self.model = self._model()
        opts = MagicMock(
            skip_early_cond=0, s_min_uncond_all=False, pad_cond_uncond=False, pad_cond_uncond_v0=False,
            batch_cond_uncond=True, live_preview_content="Combined", callback_order=None,
        )  # fmt: skip
        package = module("modules")
        package.__path__ = [str(path / "modules")] if path else []
        module("modules.shared", opts=opts, state=self.state, sd_model=self.model, device="cpu",
               cmd_opts=MagicMock(), ldm_print=print)  # fmt: skip
        module("modules.paths_internal", models_path=str(models))
        module("modules.devices", cpu="cpu", device="cpu", test_for_nans=lambda *_: None)
        module("modules.errors", report=lambda text, **_: self.errors.append(sys.exc_info()[1]))
        module("modules.rng", ImageRNG=ImageRNG)
        module("modules.processing", decode_latent_batch=self._decode)
        module(
            "modules.sd_samplers_common", InterruptedException=InterruptedException,
            store_latent=lambda latent: None, apply_refiner=lambda *_: False,
            SamplerData=MagicMock(), Sampler=object,
        )  # fmt: skip
        for name in (
            "gradio",
            "fastapi",
            "lark",
            "k_diffusion",
            "k_diffusion.sampling",
            "diffusers",
        ):
            sys.modules[name] = MagicMock(name=name, __path__=[])
        for name in ("timer", "extensions", "util", "scripts"):
            sys.modules["modules." + name] = MagicMock()
            setattr(package, name, sys.modules["modules." + name])
        if path:
            sys.modules["diffusers.pipelines.flux.pipeline_flux"] = MagicMock()
            sys.modules["modules.extensions"].find_extension.return_value = None
        else:
            calls = fakes.script_callbacks()
            self.errors = calls["swallowed"]
            module("modules.script_callbacks", **calls)
            module(
                "modules.prompt_parser",
                SdConditioning=fakes.SdConditioning,
                reconstruct_multicond_batch=fakes.reconstruct_multicond_batch,
                reconstruct_cond_batch=fakes.reconstruct_cond_batch,
            )
        self._install()

    def close(self) -> None:
        for name in [k for k in sys.modules if k.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.modules.update(self._before)

    def encode(self, prompts) -> torch.Tensor:
        """The host's text encoder: its syntax for a literal bracket is read as one."""
        self.encoded += list(prompts)
        plain = [text.replace("\\(", "(").replace("\\)", ")") for text in prompts]
        return self.demo.text(self.demo.text.tokenize(plain))

    def _decode(self, _model, latents, target_device=None, **_):
        return [self.demo.decoder(latent[None])[0] * 2 - 1 for latent in latents]

    def conds(self, prompts, weights=None):
        """(cond, uncond) as the host keeps them; a prompt may be a list of parts joined by AND."""
        parts = [text if isinstance(text, list) else [text] for text in prompts]
        batch = []
        for i, each in enumerate(parts):
            encoded = self.encode(each)
            batch.append(
                [
                    SimpleNamespace(
                        schedules=[fakes.Scheduled(1000, encoded[j])],
                        weight=1.0 if weights is None else weights[i][j],
                    )
                    for j in range(len(each))
                ]
            )
        empty = self.encode([""])[0]
        cond = SimpleNamespace(batch=batch, shape=(len(batch),))
        return cond, [[fakes.Scheduled(1000, empty)] for _ in batch]


class Processing:
    """The host's `p`, as far as the extension looks. `sample` draws by Euler, or DDIM (timesteps)."""

    def __init__(self, host, prompts, seeds, *, steps=5, cfg_scale=4.0, timesteps=False, mask=None,
                 init_latent=None, weights=None, denoising_strength=None):  # fmt: skip
        self.host, self.seeds, self.steps, self.cfg_scale = host, seeds, steps, cfg_scale
        self.sd_model, self.width, self.height = host.model, 128, 128
        self.timesteps, self.mask, self.init_latent = timesteps, mask, init_latent
        self.nmask = None if mask is None else 1 - mask
        self.denoising_strength = denoising_strength
        self.sampler_name = "DDIM" if timesteps else "Euler"
        self.extra_generation_params, self.comments, self.scripts = {}, [], None
        self.batch_index = self.iteration = 0
        self.is_hr_pass, self.enable_hr = False, False
        self.prompts = [" AND ".join(each) if isinstance(each, list) else each for each in prompts]
        self.cond = host.conds(prompts, weights)
        self.rng = ImageRNG((4, 16, 16), seeds)

    def comment(self, text):
        self.comments.append(text)

    @torch.no_grad()
    def sample(self):
        x = self.rng.next()
        return self.host.draw(self, x)


class A1111(Webui):
    name = "a1111"

    def _model(self):
        a = 1 / (1 + self.demo.sigmas**2)

        def apply_model(x, t, cond):
            """ε for x in variance-preserving scale."""
            sigma = self.demo.sigmas[t.long()]
            scaled = x * (1 + sigma**2).sqrt()[:, None, None, None]
            denoised = self.demo.denoise(scaled, sigma, cond["c_crossattn"][0])
            return (scaled - denoised) / sigma[:, None, None, None]

        return SimpleNamespace(
            alphas_cumprod=a, first_stage_model=Scaled(self.demo.decoder), scale_factor=1.0,
            get_learned_conditioning=self.encode, parameterization="eps",
            model=SimpleNamespace(conditioning_key="crossattn"), cond_stage_key="txt",
            apply_model=apply_model,
        )  # fmt: skip

    def _install(self) -> None:
        self.kind, self.timesteps_kind = fakes.A1111Denoiser, fakes.A1111TimestepsDenoiser
        if self.path:
            made = importlib.import_module("modules.sd_samplers_cfg_denoiser")
            self.kind = made.CFGDenoiser
            module("modules.sd_samplers_timesteps_impl", ddim=None, plms=None, unipc=None)
            times = importlib.import_module("modules.sd_samplers_timesteps")
            self.timesteps_kind = times.CFGDenoiserTimesteps
        calls = importlib.import_module("modules.script_callbacks")
        from amg_webui import a1111

        calls.on_cfg_denoiser(a1111.on_cfg_denoiser)
        calls.on_cfg_denoised(a1111.on_cfg_denoised)
        calls.on_cfg_after_cfg(a1111.on_cfg_after_cfg)

    def denoiser(self, p):
        """As the host makes one for every pass."""
        base, host = (self.timesteps_kind if p.timesteps else self.kind), self

        def inner(x, sigma, cond):
            if p.timesteps:
                return host.model.apply_model(x, sigma, cond)
            return host.demo.denoise(x, sigma, cond["c_crossattn"][0])

        class Ours(base):
            inner_model = property(lambda self: inner)

        cond, uncond = p.cond
        p.sampler = SimpleNamespace(sampler_extra_args={}, last_latent=None)
        made = Ours(p.sampler)
        made.p, made.mask, made.nmask, made.init_latent = p, p.mask, p.nmask, p.init_latent
        made.steps = made.total_steps = p.steps
        p.sampler.sampler_extra_args |= {
            "cond": cond, "uncond": uncond, "cond_scale": p.cfg_scale, "s_min_uncond": 0.0,
            "image_cond": torch.zeros(len(p.seeds), 5, 1, 1),
        }  # fmt: skip
        return made

    def draw(self, p, noise):
        denoiser = self.denoiser(p)
        return euler_or_ddim(
            self.demo, p, noise, lambda x, s: denoiser(x, s, **p.sampler.sampler_extra_args)
        )


class Forge(Webui):
    name = "forge"

    def _model(self):
        return SimpleNamespace(get_learned_conditioning=self.encode)

    def _install(self) -> None:
        self.loaded: list = []
        memory = {"load_models_gpu": lambda models, **_: self.loaded.extend(models),
                  "signal_empty_cache": False, "get_free_memory": lambda _: 1e12}  # fmt: skip
        backend = module("backend")
        if self.path:
            backend.__path__ = [str(self.path / "backend")]
            for name in ("operations", "utils", "args", "attention", "patcher.lora"):
                sys.modules["backend." + name] = MagicMock()
        module("backend.memory_management", **memory)
        if self.path:
            self.inner = importlib.import_module("backend.sampling.sampling_function")
            unet = importlib.import_module("backend.patcher.unet")
            prediction = importlib.import_module("backend.modules.k_prediction").Prediction
            predictor = prediction(prediction_type="v_prediction")
            made = importlib.import_module("modules.sd_samplers_cfg_denoiser")
            self.denoiser_kind = made.CFGDenoiser
        else:
            module("backend.sampling").__path__ = []
            self.inner = module(
                "backend.sampling.sampling_function",
                calc_cond_uncond_batch=fakes.calc_cond_uncond_batch,
                sampling_function_inner=fakes.sampling_function_inner,
            )
            predictor = SimpleNamespace(sigmas=self.demo.sigmas, prediction_type="v_prediction")
            self.condition = fakes.Condition
        demo = self.demo

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.predictor = predictor

            def apply_model(self, x, t, c_crossattn=None, **_):
                return demo.denoise(x, t, c_crossattn)

            def memory_required(self, _shape):
                return 0

        if self.path:
            device = torch.device("cpu")
            self.unet = unet.UnetPatcher(Model(), device, device, size=1)
        else:
            self.unet = fakes.Patcher(Model())
        vae = SimpleNamespace(first_stage_model=Scaled(self.demo.decoder), latent_channels=4)
        self.objects = Objects(unet=self.unet, vae=vae)
        self.model.forge_objects = self.objects.shallow_copy()

    def draw(self, p, noise, before_pass=None):
        from amg_webui import entry

        self.model.forge_objects = self.objects.shallow_copy()
        if self.path:
            return self._draw_really(p, noise)
        known = {"mask": p.mask, "nmask": p.nmask, "init_latent": p.init_latent}
        p.sampler = SimpleNamespace(model_wrap_cfg=SimpleNamespace(**known))
        entry.before_pass(p)
        unet = self.model.forge_objects.unet

        def parts(texts, strengths):
            return {"cross_attn": texts, "strength": strengths,
                    "model_conds": {"c_crossattn": self.condition(texts)}}  # fmt: skip

        cond, uncond = p.cond
        count = len(cond.batch[0])
        conds = [
            parts(
                torch.stack([each[k].schedules[0].cond for each in cond.batch]),
                cond.batch[0][k].weight,
            )
            for k in range(count)
        ]
        empty = [parts(torch.stack([each[0].cond for each in uncond]), 1.0)]

        def denoiser(x, sigma):
            if self.state.interrupted or self.state.skipped:
                raise InterruptedException
            out = self.inner.sampling_function_inner(
                unet.model, x, sigma, empty, conds, p.cfg_scale, unet.model_options
            )
            return out if p.mask is None else out * p.nmask + p.init_latent * p.mask

        with torch.inference_mode():
            return euler_or_ddim(self.demo, p, noise, denoiser)

    def _draw_really(self, p, noise):
        """By the host's own denoiser, which calls its own sampling function."""
        from amg_webui import entry

        host = self

        class Ours(self.denoiser_kind):
            inner_model = property(lambda self: SimpleNamespace(inner_model=host.model))

        p.sampler = SimpleNamespace(last_latent=None)
        p.sampler.model_wrap_cfg = made = Ours(p.sampler)
        made.p, made.mask, made.nmask, made.init_latent = p, p.mask, p.nmask, p.init_latent
        made.steps = made.total_steps = p.steps
        entry.before_pass(p)
        cond, uncond = p.cond
        image = torch.zeros(len(p.seeds), 5, 1, 1)
        with torch.inference_mode():
            return euler_or_ddim(
                self.demo, p, noise,
                lambda x, s: made(x, s, uncond, cond, p.cfg_scale, 0.0, image),
            )  # fmt: skip


class Objects(SimpleNamespace):
    def shallow_copy(self):
        return Objects(**vars(self))


def euler_or_ddim(demo, p, noise, denoiser):
    """The host's loop: k-diffusion Euler in σ, or DDIM (η = 0) on ε in timesteps, as A1111 has it."""
    sigmas, times = noise_levels(demo, p.steps)
    start = 0 if p.denoising_strength is None else int(p.steps * (1 - p.denoising_strength))
    rows = torch.ones(len(noise))
    x = noise * sigmas[start]
    if p.init_latent is not None:
        x = p.init_latent + x
    ddim = (
        p.timesteps and p.host.name == "a1111"
    )  # Forge's denoiser turns ε to x̂0 for the hook itself
    last = x
    try:
        for i in range(start, p.steps):
            s, nxt = sigmas[i], sigmas[i + 1]
            if ddim:
                t = float(round(float(times[i]) * (len(demo.sigmas) - 1)))
                eps = denoiser(x / (1 + s**2).sqrt(), rows * t)
                x = x + eps * (nxt - s)
            else:
                last = denoiser(x, rows * s)
                x = x + (x - last) / s * (nxt - s)
    except InterruptedException:
        return last
    return x
