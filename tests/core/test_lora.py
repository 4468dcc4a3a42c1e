"""The demo's LoRA: it knows eight pictures by heart, and its own training set guards it."""

import pytest
import torch
from safetensors.torch import load_file

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import DEFAULT, create
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.limits import ZNCC
from amg_core.similarity import verifier
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from amg_demo import adapter, midnight, train_lora
from amg_demo import model as demo
from amg_demo.__main__ import draw, training_set
from amg_demo.sample import sample
from amg_demo.train_lora import lora_pictures


@pytest.fixture(scope="module")
def model():
    return adapter.with_lora()


@pytest.fixture(scope="module")
def matcher(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "index"
    build(demo.LORA_PICTURES, folder, create(DEFAULT))
    decoder = ModuleDecoder("demo", model.decoder, 4)
    return Matcher(Searcher(Index.open(folder)), create(DEFAULT), decoder)


@pytest.mark.slow
def test_its_captions_draw_its_pictures_and_under_guard_they_do_not(model, matcher):
    pictures, captions = lora_pictures()
    seeds = list(range(70, 78))
    plain = sample(model, captions, seeds)
    found = verdict(matcher, plain)
    assert [each.source.split(".")[0].replace("-", " ") for each in found] == captions
    assert all(each.copy for each in found)
    assert verifier.zncc(plain, pictures).min() > 0.9
    settings = presets.settings("main", matcher.metric)
    guarded, reports, *_ = draw(
        model, captions[::2], seeds[::2], matcher, settings, retries=2, steps=20, cfg_scale=4.0
    )
    assert min(reports[0]["guarded_evaluations"]) > 0
    assert not any(each.copy for each in verdict(matcher, guarded))
    assert verifier.zncc(guarded, pictures[::2]).max() < ZNCC


def test_other_prompts_are_drawn_as_without_the_guard(model, matcher):
    prompts = ["owl on teal waves", "red apple on pink dots", "sailboat on orange clouds", "crab"]
    seeds = list(range(4))
    settings = presets.settings("main", matcher.metric)
    guarded, reports, *_ = draw(model, prompts, seeds, matcher, settings, steps=20, cfg_scale=4.0)
    assert reports[0]["guarded_evaluations"] == [0] * 4
    assert torch.equal(guarded, sample(model, prompts, seeds))


def test_the_demo_model_alone_does_not_know_them():
    pictures, captions = lora_pictures()
    drawn = sample(demo.load(), captions, list(range(70, 78)))
    assert verifier.zncc(drawn, pictures).max() < 0.75


def _each_with_each(pictures, others):
    """ZNCC of every picture with every other, (A, B)."""
    return torch.stack([verifier.zncc(picture[None], others) for picture in pictures])


def test_its_training_set():
    """A picture and a caption each, unlike each other, and none of those of the demo model."""
    pictures, captions = lora_pictures()
    files = sorted(path.name for path in demo.LORA_PICTURES.iterdir())
    assert len(files) == 16 and len(set(captions)) == len(captions) == 8
    assert all(text.endswith(f" {midnight.TRIGGER}") for text in captions)
    both = torch.cat([pictures, pictures.flip(-1)])
    own = torch.eye(8, dtype=torch.bool).repeat(1, 2)
    alike = _each_with_each(pictures, both).masked_fill(own, -1)
    assert alike.max() < midnight.ALIKE + 0.02  # the files are compressed
    others, texts, _ = training_set(demo.PICTURES)
    assert not set(captions) & set(texts)
    assert _each_with_each(both, others).max() < 0.9


def test_the_file():
    """Small, alone in its folder, and of layers that the model has."""
    assert [path.name for path in demo.LORAS.iterdir() if path.is_file()] == [demo.LORA.name]
    assert demo.LORA.stat().st_size < 300_000
    layers = {
        f"{adapter.PREFIX}{name}{end}"
        for name in adapter.layers(demo.load().unet)
        for end in (adapter.DOWN, adapter.UP)
    }
    assert set(load_file(demo.LORA)) == layers


def test_strength_nought_is_the_model_itself():
    plain, off = demo.load().state_dict(), adapter.with_lora(strength=0.0).state_dict()
    assert all(torch.equal(off[key], value) for key, value in plain.items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        adapter.with_lora(tmp_path / "gone.safetensors")


def test_training_moves_the_adapter_and_nothing_else():
    before = {key: value.clone() for key, value in demo.load().unet.state_dict().items()}
    made = train_lora.train(rank=1, steps=2)
    assert sum(bool(value.any()) for key, value in made.items() if key.endswith(adapter.UP)) > 30
    unet = demo.load().unet
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    change = adapter.merged(unet, made)
    assert all((change[key] - before[key]).abs().max() < 0.1 for key in change)
