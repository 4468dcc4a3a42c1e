"""One core, three hosts: ComfyUI's hook and the adapters here draw the same from the same noise."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from webui import Processing

from amg_demo.sample import noise_levels
from amg_webui import entry

ROOT, COMFYUI = Path(__file__).parents[2], os.environ.get("COMFYUI_PATH", "")
PROMPT, SEEDS = "fox face on violet rays", [50, 51]


@pytest.fixture(scope="module")
def pack():
    """The pack's ComfyUI half, imported as a package of another name."""
    if not COMFYUI:
        pytest.skip("needs ComfyUI: set COMFYUI_PATH to its folder")
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    where = {"submodule_search_locations": [str(ROOT)]}
    spec = importlib.util.spec_from_file_location("amg_pack", ROOT / "__init__.py", **where)
    sys.modules["amg_pack"] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return lambda name: importlib.import_module("amg_pack." + name)


def comfyui_draws(pack, demo, folder, preset):
    """Latents of the model's own space, and which steps were guarded."""
    import comfy.sample
    import comfy.samplers

    hook, opening = pack("nodes.hook"), pack("nodes.opening")
    model, clip, vae, *_ = pack("nodes.demo").DemoModelNode.execute().args
    matcher = opening.open_matcher(folder)
    settings = pack("amg_core.presets").settings(preset, matcher.metric)
    report = hook.Report()
    guarded = hook.attach(model, matcher, settings, clip=clip, vae=vae, report=report)
    sigmas, _ = noise_levels(demo, 5)
    noise = torch.stack(
        [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    )
    noise = (
        noise * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
    )  # this host scales it up from unit variance
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            guarded, noise, 4.0, comfy.samplers.sampler_object("euler"), sigmas, *texts,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
    return model.model.process_latent_in(out), report.latest


@pytest.mark.parametrize("preset", ["main", "paper"])
def test_the_same_seeds_draw_the_same(host, pack, models, preset):
    wanted, report = comfyui_draws(pack, host.demo, models / "amg_indexes" / "demo", preset)
    p = Processing(host, [PROMPT] * 2, SEEDS)
    entry.begin(p, ({"enabled": True, "index": "demo", "preset": preset},))
    latents, run = p.sample(), p.amg_guard.runs[0]
    entry.end(p)
    assert [step["active"] for step in report["steps"]] == [r.active for r in run.records]
    assert any(any(step["active"]) for step in report["steps"])
    assert torch.allclose(latents, wanted, atol=1e-3)
