"""The guard in both hosts' own order of callbacks, against the host-neutral sampler of the demo."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image
from webui import Processing

from amg_core import presets
from amg_core.errors import AMGError
from amg_core.prompt import split
from amg_core.run import SamplingRun
from amg_demo.model import PICTURES
from amg_demo.sample import sample
from amg_webui import a1111, entry, lookup
from amg_webui.shared import as_tensor

KEYS = ["fox face on violet rays", "frog face on yellow checks"]
SEEDS = [50, 51]
ON = {"enabled": True, "index": "demo"}


def draw(host, prompts=KEYS, seeds=SEEDS, options=ON, **more):
    """One generation as the host runs it: (latents, p). Ends like the host's `process_images`."""
    p = Processing(host, prompts, seeds, **more)
    entry.begin(p, (options,))
    try:
        return p.sample(), p
    finally:
        p.guard_of_test = getattr(p, "amg_guard", None)
        entry.end(p)


def neutral(host, prompts, preset, steps=5, seeds=SEEDS):
    """The same run without any host: pictures, and its session."""
    from amg_core.decoders import ModuleDecoder
    from amg_core.similarity.matcher import Matcher

    known = lookup.open_matcher("demo")
    matcher = Matcher(known.searcher, known.descriptor, ModuleDecoder("demo", host.demo.decoder, 4))
    run = SamplingRun(matcher, presets.settings(preset, matcher.metric))
    return sample(host.demo, prompts, seeds, steps=steps, guide=run.step), run


def pictures(host, latents):
    return torch.cat([host.demo.decoder(latent[None]) for latent in latents]).clamp(0, 1)


def test_a_real_host_is_the_real_one(host):
    if host.path is None:
        return
    names = {"a1111": ["modules.sd_samplers_cfg_denoiser", "modules.script_callbacks"],
             "forge": ["modules.sd_samplers_cfg_denoiser", "backend.sampling.sampling_function",
                       "backend.patcher.unet"]}  # fmt: skip
    for name in names[host.name]:
        assert sys.modules[name].__file__.startswith(str(host.path))


@pytest.mark.parametrize("preset", ["main", "paper"])
def test_it_draws_what_the_core_draws(host, preset):
    wanted, run = neutral(host, KEYS, preset)
    latents, p = draw(host, options=ON | {"preset": preset})
    assert torch.allclose(pictures(host, latents), wanted, atol=2e-4)
    (own,) = p.guard_of_test.runs
    assert [r.active for r in own.records] == [r.active for r in run.records]
    assert any(any(r.active) for r in own.records)
    assert not host.errors


def test_off_or_with_nothing_to_guard_against_not_a_bit_changes(host):
    plain, _ = draw(host, options={"enabled": False})
    nothing = {"despecification": 0, "deduplication": 0, "dissimilarity": 0}
    assert torch.equal(draw(host, options=ON | nothing)[0], plain)
    dormant = {"thresholds": "custom", "threshold_start": 1.0, "threshold_end": 1.0}
    state = torch.get_rng_state()
    latents, p = draw(host, options=ON | dormant)
    assert torch.equal(latents, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert "sample" not in vars(p) and p.amg_guard is None and a1111.active is None


def test_a_sample_does_not_depend_on_its_batch(host):
    both, _ = draw(host)
    alone, _ = draw(host, KEYS[1:], SEEDS[1:])
    assert torch.allclose(both[1:], alone, atol=1e-4)
    turned, _ = draw(host, KEYS[::-1], SEEDS[::-1])
    assert torch.allclose(turned.flip(0), both, atol=1e-4)


def test_ddim_is_guarded_as_euler_is(host):
    """On ε in timesteps DDIM (η = 0) is Euler: converted there and back, the pictures agree."""
    latents, p = draw(host, timesteps=True)
    wanted, run = neutral(host, KEYS, "main")
    assert torch.allclose(pictures(host, latents), wanted, atol=2e-3)
    assert [r.active for r in p.guard_of_test.runs[0].records] == [r.active for r in run.records]


def test_parts_joined_by_and(host):
    """Two halves of one prompt are that prompt."""
    whole, _ = draw(host, options=ON | {"preset": "paper"})
    halves, _ = draw(
        host, [[k, k] for k in KEYS], options=ON | {"preset": "paper"}, weights=[[0.5, 0.5]] * 2
    )
    assert torch.allclose(whole, halves, atol=1e-3)


def test_single_words_are_left_out_of_a_prompt_that_is_one_text(host):
    """With AND there is no text that could be encoded anew: then only last tokens are left out."""
    prompt = split(KEYS[0])
    count = len(prompt.parts)
    shorter = {prompt.keep([j != i for j in range(count)]) for i in range(count)}
    host.encoded.clear()
    draw(host)
    assert shorter <= set(host.encoded)
    host.encoded.clear()
    draw(host, [[k, k] for k in KEYS], weights=[[0.5, 0.5]] * 2)
    assert not shorter & set(host.encoded)


def test_inpainting_judges_the_whole_and_changes_the_masked_part(host):
    with Image.open(PICTURES / "memorised-000.webp") as picture:
        known = host.demo.encoder(as_tensor(picture)).expand(2, -1, -1, -1)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1  # kept
    strict = ON | {"thresholds": "custom", "threshold_start": 0.0, "threshold_end": 0.0}
    kwargs = {"mask": mask, "init_latent": known, "denoising_strength": 0.75}
    seen = []
    original = SamplingRun.step

    def step(self, denoised, **more):
        seen.append(more["composite"](denoised)[..., :8])
        return original(self, denoised, **more)

    SamplingRun.step = step
    try:
        latents, _ = draw(host, options=strict, **kwargs)
    finally:
        SamplingRun.step = original
    plain, _ = draw(host, options={}, **kwargs)
    assert seen and all(torch.allclose(each, known[..., :8]) for each in seen)
    assert torch.allclose(latents[..., :8], plain[..., :8], atol=1e-5)
    assert not torch.equal(latents[..., 8:], plain[..., 8:])


def test_at_cfg_1_the_prompt_is_reduced(host):
    _, p = draw(host, cfg_scale=1.0)
    moved = {name for r in p.guard_of_test.runs[0].records for name in r.moved}
    assert {"despecification", "away"} <= moved and "deduplication" not in moved


def test_captions_are_read_by_the_hosts_encoder(host):
    draw(host, options=ON | {"preset": "paper"})
    assert set(KEYS) <= set(host.encoded)
    if host.name == "forge":
        assert host.loaded and all(hasattr(unet, "model_options") for unet in host.loaded)


def test_an_interrupt_ends_the_run(host):
    p = Processing(host, KEYS, SEEDS)
    entry.begin(p, (ON,))
    tell, count = p.amg_guard.tell, []

    def after(run):
        tell(run)
        count.append(1)
        host.state.interrupted = len(count) == 3

    p.amg_guard.tell = after
    p.sample()
    assert len(count) == 3 and "AMG: step 3" in host.state.textinfo


def test_a_guard_that_fails_stops_the_generation(host, monkeypatch):
    def broken(*_, **__):
        raise ValueError("nan")

    monkeypatch.setattr(SamplingRun, "step", broken)
    with pytest.raises(ValueError, match="nan"):
        draw(host)
    assert a1111.active is None
    hooks = (
        host.objects.unet.model_options.get("sampler_post_cfg_function", [])
        if host.name == "forge"
        else []
    )
    assert not hooks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enabled": True, "index": "gone"}, "no index named 'gone'"),
        (ON | {"preset": "odd"}, "preset: 'odd'"),
        (ON | {"thresholds": "custom", "threshold_start": 2.0}, "threshold_start"),
        (ON | {"strength": 1}, "strength is no setting"),
    ],
)
def test_what_cannot_be_guarded_is_not_drawn(host, options, words):
    p = Processing(host, KEYS, SEEDS)
    entry.begin(p, (options,))  # the host would swallow an exception here
    with pytest.raises(AMGError, match=words):
        p.sample()


def test_a_sampler_that_never_asks_is_refused_by_name(host, monkeypatch):
    monkeypatch.setattr(type(host), "draw", lambda self, p, noise: noise)
    with pytest.raises(AMGError, match="Sampler Euler did not ask"):
        draw(host)


def test_hires_is_a_pass_of_its_own(host):
    p = Processing(host, KEYS, SEEDS)
    p.enable_hr = True
    entry.begin(p, (ON,))
    once = p.host.draw

    def twice(noise):
        latents = once(p, noise)
        if host.name == "forge":  # the host asks twice for this pass
            entry.before_pass(p)
        q = p.init_latent, p.denoising_strength
        p.init_latent, p.denoising_strength = latents, 0.5
        latents = once(p, torch.zeros_like(noise))
        p.init_latent, p.denoising_strength = q
        return latents

    guard = p.amg_guard
    guard.sample(lambda: twice(p.rng.next()))
    assert [len(run.records) for run in guard.runs] == [5, 3]
    p.batch_index = 1
    pp = type("pp", (), {"image": Image.new("RGB", (128, 128))})()
    entry.finished(p, pp)
    assert guard.reports[-1]["evaluations"] == 8 and len(guard.reports[-1]["steps"]) == 8
    entry.end(p)


def test_the_generation_of_another_extension_is_left_alone(host):
    """A detailer draws with a `p` of its own in the middle of ours."""
    if host.name != "a1111":
        return
    plain, _ = draw(host, options={})
    ours, other = Processing(host, KEYS, SEEDS), Processing(host, KEYS, SEEDS)
    entry.begin(ours, (ON,))
    ours.amg_guard.host.attach()
    assert torch.equal(other.sample(), plain)
    entry.end(ours)
    ours.host.state.interrupted = False
    a1111.active = None


def test_the_contract_of_hosts_is_fulfilled():
    from amg_core.hosts import Generation
    from amg_webui.shared import Batch
    from amg_webui.texts import OtherTexts

    assert issubclass(Batch, Generation)
    assert {"words", "separable", "captions", "reduced", "left_out", "neighbor"} <= set(
        dir(OtherTexts)
    )  # hosts.Texts
