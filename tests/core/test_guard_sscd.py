"""The whole guard with the cosine metric: SSCD's network (random weights) on real pictures."""

import json
from types import SimpleNamespace

import pytest
import torch

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors.sscd import SSCDDescriptor
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.run import SamplingRun
from amg_core.schedule import Schedule
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from amg_demo import model as demo
from amg_demo.__main__ import training_set
from tests.index.helpers import demo_pictures


@pytest.fixture(scope="module")
def domain(sscd_state, tmp_path_factory):
    descriptor = SSCDDescriptor(sscd_state, "0" * 64, side=224)
    folder = demo_pictures(tmp_path_factory.mktemp("few"), 4)
    build(folder, folder / "index", descriptor, batch=4)  # batches are filled up
    model = demo.load()
    decoder = ModuleDecoder("demo", model.decoder, 4)
    matcher = Matcher(Searcher(Index.open(folder / "index")), descriptor, decoder)
    pictures = training_set(demo.PICTURES)[0][[0, 3]]
    with torch.no_grad():
        return matcher, pictures, model.encoder(pictures)


def arguments(latents):
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return {
        "denoised": latents + 0.05 * noise, "cond": latents + 0.05 * noise, "uncond": 0.5 * noise,
        "cfg_scale": 4.0, "sigma": torch.full((len(latents),), 0.3), "t": 0.5,
        "texts": SimpleNamespace(
            words=torch.full((len(noise),), 2), separable=False, reduced=lambda kept: 0.3 * noise,
            left_out=lambda kept: [""] * len(kept),
            captions=True, neighbor=lambda captions: 0.1 * noise,
        ),
    }  # fmt: skip


def test_verdicts_find_the_pictures_themselves(domain):
    matcher, pictures, _ = domain
    verdicts = verdict(matcher, pictures)
    assert [v.neighbor for v in verdicts] == [0, 3] and all(v.copy for v in verdicts)
    assert verdicts[0].similarity > 0.999


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_steers_and_stays_finite(domain, name):
    matcher, _, latents = domain
    low = Schedule("constant", -1.0, -1.0)  # a network that has learnt nothing finds all alike
    run = SamplingRun(matcher, presets.settings(name, "cosine", schedule=low, own_units=True))
    given = arguments(latents[:1])
    out = run.step(**given)
    assert torch.isfinite(out).all() and not torch.equal(out, given["denoised"])
    assert run.records[0].active == [True]
    json.dumps(run.report())


def test_dormant_is_identity(domain):
    matcher, _, latents = domain
    run = SamplingRun(
        matcher, presets.settings("main", "cosine", schedule=Schedule("constant", 2, 2))
    )
    given = arguments(latents[:1])
    assert run.step(**given) is given["denoised"]
