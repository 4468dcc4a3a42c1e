"""The embedded model as a pipeline: a memorised prompt is guarded, exactly as by the demo's own sampler."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers transformers")

import torch

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import create
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.run import SamplingRun
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from amg_demo import model as demo
from amg_demo.pipeline import SIDE, pipeline, timesteps
from amg_demo.sample import euler, noise_levels
from amg_diffusers import guard

STEPS, SEED, CFG = 20, 1000, 4.0
COPIES, OTHERS = 1, 11  # memorised pictures, and others of the training set


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The model, its pipeline, a matcher on some of its pictures, and a memorised caption."""
    folder = tmp_path_factory.mktemp("embedded")
    lines = (demo.PICTURES / "metadata.jsonl").read_text("utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: -row["duplicates"])
    (folder / "pictures").mkdir()
    for row in [*rows[:COPIES], *rows[-OTHERS:]]:
        file = shutil.copy(demo.PICTURES / row["file_name"], folder / "pictures")
        (folder / "pictures" / file).with_suffix(".txt").write_text(row["text"])
    build(folder / "pictures", folder / "index", create("compact"))
    model = demo.load()
    decoder = ModuleDecoder("demo", model.decoder, demo.LATENT_CHANNELS, factor=demo.DOWNSCALE)
    matcher = Matcher(Searcher(Index.open(folder / "index")), create("compact"), decoder)
    return model, pipeline(model), matcher, rows[0]["text"]


def noise():
    shape = (demo.LATENT_CHANNELS, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))[None]


def draw(embedded, prompt, **more):
    model, pipe, *_ = embedded
    sigmas, _ = noise_levels(model, STEPS)
    latents = noise() * sigmas[0] / pipe.scheduler.init_noise_sigma
    return pipe(
        prompt,
        timesteps=timesteps(model, STEPS),
        num_inference_steps=None,
        latents=latents,
        guidance_scale=CFG,
        **more,
    )[0]


def test_a_memorised_prompt_is_guarded_as_in_the_demo(embedded):
    model, pipe, matcher, prompt = embedded
    plain = draw(embedded, prompt, output_type="pt")
    assert verdict(matcher, plain.float())[0].copy
    with guard(pipe, matcher, decoder=matcher.decoder) as guarded:
        drawn = draw(embedded, prompt, output_type="latent")
    assert not guarded.report["verdicts"][0]["copy"]
    assert guarded.report["guarded_evaluations"][0] > 0 and guarded.report["left_out_words"][0]

    run = SamplingRun(matcher, presets.settings("main", matcher.metric))
    own = euler(
        model, model.encode([prompt]), [SEED], drawn.shape[1:], steps=STEPS, cfg_scale=CFG, guide=run.step,
        prompts=[prompt],
    )  # fmt: skip
    assert guarded.report["left_out_words"] == run.report()["left_out_words"]
    assert torch.allclose(drawn, own, atol=1e-3)


def test_another_prompt_is_the_same_to_the_last_bit(embedded):
    _, pipe, matcher, _ = embedded
    prompt = "nothing of the kind"
    plain = draw(embedded, prompt, output_type="pt")
    with guard(pipe, matcher, decoder=matcher.decoder) as guarded:
        assert torch.equal(draw(embedded, prompt, output_type="pt"), plain)
    assert (
        guarded.report["guarded_evaluations"] == [0] and not guarded.report["verdicts"][0]["copy"]
    )
