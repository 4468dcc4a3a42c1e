"""AMGGuidance in Modular Diffusers: dormant, acting, saved and loaded, and no hook left."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers transformers")

import diffusers
import torch
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks

from amg_core.errors import AMGError
from amg_core.schedule import Schedule
from amg_diffusers import AMGGuidance

from .tiny import extra_large, flow

ALWAYS = {"schedule": Schedule("constant", -100.0, -100.0)}
NEVER = {"schedule": Schedule("constant", 100.0, 100.0)}
FORMS = {
    "extra large": (extra_large, StableDiffusionXLAutoBlocks),
    "flow": (flow, StableDiffusion3AutoBlocks),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def pipe(request, tokenizer):
    make, blocks = request.param
    given = {name: part for name, part in make(tokenizer).components.items() if part is not None}
    pipe = blocks().init_pipeline()
    pipe.update_components(**{n: part for n, part in given.items() if n in pipe.component_names})
    return pipe


def draw(pipe, prompts=("ab cd", "ef gh ij")):
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    return pipe(
        prompt=list(prompts), num_inference_steps=3, height=16, width=16, generator=seeds,
        output_type="pt", output="images",
    )  # fmt: skip


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def test_inactive_is_classifier_free_guidance(pipe, index):
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    before = draw(pipe)
    guider = AMGGuidance(str(index), guidance_scale=3.0)
    pipe.update_components(guider=guider)
    guider.connect(pipe, **NEVER)
    assert torch.equal(draw(pipe), before)
    assert guider.report["evaluations"] == 3 and guider.report["guarded_evaluations"] == [0, 0]
    denoiser = denoiser_of(pipe)
    assert not denoiser._forward_pre_hooks and not denoiser._forward_hooks
    guider.disconnect()
    assert not pipe.text_encoder._forward_pre_hooks


def test_active_leaves_out_words_and_checks_pictures(pipe, index):
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    before = draw(pipe)
    guider = AMGGuidance(str(index), guidance_scale=3.0)
    pipe.update_components(guider=guider)
    guider.connect(pipe, **ALWAYS)
    pictures = draw(pipe)
    found = guider.check(pictures)
    assert all(not torch.equal(a, b) for a, b in zip(before, pictures, strict=True))
    assert len(found) == 2 and len(guider.report["verdicts"]) == 2
    assert guider.report["guarded_evaluations"] == [3, 3]
    first, second = guider.report["left_out_words"]
    assert first and set(" ".join(first).split()) <= {"ab", "cd"}
    assert second and set(" ".join(second).split()) <= {"ef", "gh", "ij"}
    with pytest.raises(AMGError, match="1 pictures"):
        guider.check(pictures[:1])


def test_no_hook_is_left_if_the_model_fails(pipe, index, monkeypatch):
    guider = AMGGuidance(str(index), guidance_scale=3.0)
    pipe.update_components(guider=guider)
    guider.connect(pipe, **NEVER)
    denoiser = denoiser_of(pipe)
    monkeypatch.setattr(type(denoiser), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(pipe)
    assert not denoiser._forward_pre_hooks


def test_its_configuration_saves_and_loads(tmp_path):
    AMGGuidance("here", "strong", guidance_scale=4.0, exit=0.5).save_pretrained(tmp_path)
    assert (tmp_path / "guider_config.json").is_file()
    loaded = AMGGuidance.from_pretrained(tmp_path)
    assert (loaded.config.index, loaded.config.preset, loaded.config.exit) == (
        "here",
        "strong",
        0.5,
    )
    assert loaded.guidance_scale == 4.0 and loaded.new(guidance_scale=2.0).config.preset == "strong"


def test_unconnected_it_says_what_to_do(pipe, index):
    pipe.update_components(guider=AMGGuidance(str(index)))
    with pytest.raises(AMGError, match=r"guider\.connect"):
        draw(pipe)


def test_without_diffusers_the_error_says_what_to_install():
    code = "import sys; sys.modules['diffusers'] = None; import amg_diffusers; amg_diffusers.AMGGuidance"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "pip install diffusers" in done.stderr
