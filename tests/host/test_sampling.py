"""The guard in the host's own sampling loop, on small random models."""

from __future__ import annotations

import pytest
import torch

SAMPLERS = ["euler", "dpmpp_2m", "heun", "dpmpp_2s_ancestral", "uni_pc", "lcm"]
KINDS = ["eps", "v", "edm", "flow"]
CALLS = {"heun": 7, "dpmpp_2s_ancestral": 7}  # evaluations in 4 steps


@pytest.fixture
def guard(amg, index, clip, settings):
    def make(model, kind="active", **options):
        options = {"clip": clip, "decoder": "linear"} | options
        return amg.hook.attach(model, index, settings(kind), **options)

    return make


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_and_kind_of_model(amg, tiny, guard, sample, kind, sampler):
    model = tiny(kind)
    plain = sample(model, sampler)
    for quiet in ("dormant", "zero"):
        assert torch.equal(sample(guard(model, quiet), sampler), plain)
    report = amg.hook.Report()
    for acting in ("active", "leaving"):
        guided = sample(guard(model, acting, report=report), sampler)
        assert torch.isfinite(guided).all()
        assert not torch.equal(guided, plain)
    steps = report.latest["steps"]
    assert len(steps) == CALLS.get(sampler, 4)
    assert all(0 <= step["t"] <= 1 for step in steps)
    assert steps[0]["t"] > 0.9


@pytest.mark.parametrize("kind", ["active", "leaving"])
def test_second_run_equals_the_first(tiny, guard, sample, kind):
    model = guard(tiny(), kind)
    assert torch.equal(sample(model), sample(model))


@pytest.mark.parametrize("kind", ["active", "leaving"])
def test_batch_of_four_permutes(tiny, guard, sample, kind):
    """Each picture of a batch is guarded for itself (up to the rounding of batched kernels)."""
    import comfy.sample

    order = torch.tensor([2, 0, 3, 1])
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    model = guard(tiny(), kind)
    original = comfy.sample.prepare_noise
    try:
        comfy.sample.prepare_noise = lambda *_: noise
        straight = sample(model, batch=4)
        comfy.sample.prepare_noise = lambda *_: noise[order]
        permuted = sample(model, batch=4)
    finally:
        comfy.sample.prepare_noise = original
    assert torch.allclose(permuted, straight[order], atol=1e-4, rtol=1e-4)


def test_custom_sampler_and_guiders(amg, tiny, guard, prompts):
    """SamplerCustomAdvanced with CFGGuider and BasicGuider (no unconditional prediction)."""
    import comfy.samplers

    latent = torch.zeros(2, 4, 16, 16)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))

    def draw(model, cfg):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*prompts)
        guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "karras", 4
        )
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            return guider.sample(noise, latent, sampler, sigmas)

    model = tiny()
    for cfg in (5.0, 1.0):
        report = amg.hook.Report()
        plain = draw(model, cfg)
        assert torch.equal(draw(guard(model, "dormant"), cfg), plain)
        guided = draw(guard(model, report=report), cfg)
        assert torch.isfinite(guided).all()
        assert not torch.equal(guided, plain)
        assert len(report.latest["steps"]) == 4


def test_survives_clones_and_is_not_copied(amg, tiny, guard, sample):
    model = guard(tiny())
    again = model.clone().clone()
    hooks = [m.model_options["sampler_post_cfg_function"] for m in (model, again)]
    assert hooks[0][0] is hooks[1][0]
    assert torch.equal(sample(model), sample(again))


def test_other_hooks_stay(amg, tiny, guard, sample):
    def brighter(args):
        return args["denoised"] + 0.01

    model = tiny()
    model.set_model_sampler_post_cfg_function(brighter)
    plain = sample(model)
    assert torch.equal(sample(guard(model, "dormant")), plain)
    assert amg.hook.detach(guard(model)).model_options["sampler_post_cfg_function"] == [brighter]


def test_global_generator_untouched(amg, tiny, guard, sample):
    """Ancestral samplers draw from it: a draw of ours would change the picture."""
    states = []
    model = tiny()
    for guarded in (model, guard(model, "dormant"), guard(model, "active")):
        sample(guarded, "dpmpp_2s_ancestral")
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_choosing_a_decoder_draws_nothing(amg, tiny, index):
    before = torch.get_rng_state()
    amg.decoding.choose(tiny().model.latent_format)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_loaded_during_the_run(amg, tiny, guard, sample, monkeypatch):
    """Other texts are encoded where the text encoder rests; the host loads its model once, before."""
    import comfy.model_management

    loads, steps = [], []
    real = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda *a, **k: (loads.append(len(steps)), real(*a, **k))[1],
    )
    amg.conditioning._encoded.clear()
    report = amg.hook.Report()
    sample(guard(tiny(), "leaving", report=report, on_step=steps.append))
    assert len(steps) == 5  # the verdict last
    assert loads == [0]
    assert report.latest["host"]["captions"] == "encoded"
    assert amg.conditioning._encoded


def test_live_text(tiny, guard, sample):
    lines = []
    sample(guard(tiny(), on_step=lines.append))
    assert len(lines) == 5
    assert all(line.startswith("step") for line in lines[:4])
    assert lines[4].startswith("checked 2 of 2 · decoded by linear · no copy")


def test_live_events(amg, tiny, guard, sample):
    """What the page draws: one event an evaluation, as the report has it, and the verdict last."""
    events, report = [], amg.hook.Report()
    sample(guard(tiny(), on_event=events.append, report=report))
    assert [event["kind"] for event in events] == ["step"] * 4 + ["end"]
    for number, (event, step) in enumerate(zip(events, report.latest["steps"], strict=False), 1):
        assert (event["step"], event["total"], event["attempt"]) == (number, 4, 0)
        for key in ("similarity", "threshold", "active", "neighbor"):
            assert event[key] == step[key]
    assert len(events[-1]["verdicts"]) == 2


def test_interrupt_ends_within_a_step(amg, tiny, guard, sample):
    import comfy.model_management as management

    lines = []

    def stop(line):
        lines.append(line)
        if len(lines) == 2:
            management.interrupt_current_processing()

    report = amg.hook.Report()
    model = guard(tiny(), on_step=stop, report=report)
    with pytest.raises(management.InterruptProcessingException):
        sample(model, steps=8)
    assert len(lines) == 2
    assert len(report.latest["steps"]) == 2
    assert amg.hook.KEY not in model.model_options
    lines[:] = [""] * 5  # and the model can be used again
    assert torch.isfinite(sample(model)).all()


def test_errors_propagate_and_leave_nothing(amg, tiny, guard, sample):
    def fail(_line):
        raise ZeroDivisionError

    model = guard(tiny(), on_step=fail)
    with pytest.raises(ZeroDivisionError):
        sample(model)
    assert amg.hook.KEY not in model.model_options


def test_networks_return_to_the_cpu(amg, tiny, index, settings, sample):
    """Also after an interrupt: the run moves decoder and descriptor, and must take them back."""
    moves = []

    class Spy:
        name, channels = "spy", 4

        def __call__(self, latent, at_least=None):
            raise RuntimeError("stop here")

        def to(self, device):
            moves.append(str(device))
            return self

    latent_format = tiny().model.latent_format
    latent_format.amg_decoder = Spy
    model = tiny()
    model.model.latent_format = latent_format
    with pytest.raises(RuntimeError, match="stop here"):
        sample(amg.hook.attach(model, index, settings("active")))
    assert moves == ["cpu", "cpu"]


def test_outside_of_a_run_is_an_error(amg, tiny, guard):
    (hook,) = guard(tiny()).model_options["sampler_post_cfg_function"]
    with pytest.raises(amg.AMGError, match="KSampler"):
        hook({"model_options": {}})


def test_inpaint_looks_at_the_whole_and_keeps_the_rest(amg, tiny, guard, sample):
    given = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    latent = {"samples": given, "noise_mask": mask}
    model, report = tiny(), amg.hook.Report()
    plain = sample(model, latent=latent)
    assert torch.equal(sample(guard(model, "dormant", report=report), latent=latent), plain)
    guided = sample(guard(model), latent=latent)
    assert not torch.equal(guided, plain)
    assert torch.allclose(guided[..., 8:], given[..., 8:], atol=1e-4)


def test_inpaint_composites_before_looking(amg, tiny, index, settings, sample, monkeypatch):
    """With nothing masked in, the guard sees the given latent whatever the model predicts."""
    seen = []
    model = tiny()
    real = amg.hook.Matcher.match

    def spy(self, latents, sigma):
        seen.append(latents.clone())
        return real(self, latents, sigma)

    monkeypatch.setattr(amg.hook.Matcher, "match", spy)
    given = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8))
    latent = {"samples": given, "noise_mask": torch.zeros(1, 1, 128, 128)}
    sample(amg.hook.attach(model, index, settings("dormant")), latent=latent)
    expected = model.model.process_latent_in(given)
    assert len(seen) == 4
    assert all(torch.allclose(each, expected, atol=1e-5) for each in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_level(amg, tiny, kind):
    sampling = tiny(kind).model.model_sampling
    high, t_high = amg.hook.noise_level(sampling, sampling.sigma_max.reshape(1))
    low, t_low = amg.hook.noise_level(sampling, sampling.sigma_min.reshape(1))
    assert t_high == pytest.approx(1, abs=1e-3)
    assert t_low == pytest.approx(0, abs=2e-3)
    assert torch.isfinite(high).all()
    assert high > 10 > 0.1 > low
    if kind == "flow":
        level, t = amg.hook.noise_level(sampling, torch.tensor([0.5, 0.5]))
        assert level.tolist() == [1.0, 1.0]
        assert t == 0.5
    if kind in ("eps", "v"):
        sigma = sampling.sigma(torch.tensor([500.0]))
        assert amg.hook.noise_level(sampling, sigma)[1] == pytest.approx(500 / 999)
