"""Forge's Hires. fix, drawn again: it leaves a generator, LoRAs and a checkpoint of its own."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from webui import ImageRNG, Processing, module

from amg_webui import entry

KEYS, SEEDS = ["fox face on violet rays", "frog face on yellow checks"], [50, 51]
pytestmark = pytest.mark.parametrize("host", ["forge", "forge real"], indirect=True)


class DecodedSamples(list):
    """What the host hands over after a second pass."""

    already_decoded = True


class Hires(Processing):
    """`StableDiffusionProcessingTxt2Img` with Hires. fix, another checkpoint and other LoRAs."""

    def __init__(self, host, prompts, seeds, **more):
        super().__init__(host, prompts, seeds, steps=10, **more)
        self.enable_hr, self.hr_cfg, self.disable_extra_networks = True, 4.0, False
        self.extra_network_data = ["of the prompt"]
        self.firsts: list[torch.Tensor] = []
        self.drew_with: list[str] = []
        self.own = host.model
        host.model.sd_checkpoint_info = SimpleNamespace(filename="first.safetensors")
        host.model.forge_objects_after_applying_lora = host.objects

    @torch.no_grad()
    def sample(self):
        noise = self.rng.next()
        self.firsts.append(noise)
        self.drew_with.append(self.sd_model.sd_checkpoint_info.filename)
        latents = self.host.draw(self, noise)
        self.is_hr_pass = True
        self.host.state.job_no += 1
        self.rng = ImageRNG(latents.shape[1:], self.seeds)
        info = SimpleNamespace(filename="second.safetensors")
        self.sd_model = SimpleNamespace(**vars(self.own) | {"sd_checkpoint_info": info})
        self.is_hr_pass = False
        return DecodedSamples(self.host._decode(None, latents))


@pytest.fixture
def hires(host, monkeypatch):
    """Draws with the options given; tells what the host was asked to undo."""
    activated, reloaded = [], []

    def run(options, classic=False):
        p = Hires(host, KEYS, SEEDS)
        networks = SimpleNamespace(activate=lambda _p, data: activated.append(data))

        def again():
            reloaded.append(1)
            p.sd_model = p.own

        models = SimpleNamespace(forge_model_reload=again)
        if classic:
            models = SimpleNamespace(reload_model_weights=again, SkipWritingToConfig=nullcontext)
        for name, made in {"extra_networks": networks, "sd_models": models}.items():
            module("modules." + name, **vars(made))
        monkeypatch.setattr(sys.modules["modules.devices"], "autocast", nullcontext, raising=False)
        host.state.job_no = 0
        entry.begin(p, ({"enabled": True, "index": "demo"} | options,))
        return p, p.sample(), activated, reloaded

    return run


@pytest.mark.parametrize("classic", [False, True])
def test_hires_fix_is_drawn_again_as_it_was_drawn_first(hires, classic):
    p, drawn, activated, reloaded = hires({"retries": 1, "preset": "paper"}, classic)
    outcome = p.amg_guard.outcome
    assert len(p.firsts) == len(outcome.attempts) == 2, "one of the two is a copy at first"
    assert torch.equal(*p.firsts), "the second drawing begins with the noise of the first"
    assert p.drew_with == ["first.safetensors"] * 2
    assert activated == [["of the prompt"]] and reloaded == [1]
    assert p.host.state.job_no == 1, "the progress bar goes back too"
    assert isinstance(drawn, DecodedSamples) and len(drawn) == 2


def test_pictures_that_passed_are_kept_to_the_last_bit(hires):
    _, first, _, _ = hires({})
    p, again, _, _ = hires({"retries": 1})
    kept = p.amg_guard.outcome.kept
    assert 0 in kept
    for i, attempt in enumerate(kept):
        assert torch.equal(first[i], again[i]) == (attempt == 0)
