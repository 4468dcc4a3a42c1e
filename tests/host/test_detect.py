"""Prompt Probe and its calibration, in the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LATENT = {"samples": torch.zeros(1, 4, 16, 16)}
ROWS = [
    json.loads(line)
    for line in (ROOT / "amg_demo/pictures/metadata.jsonl").read_text("utf-8").splitlines()
]
ORDINARY = "\n".join([row["text"] for row in ROWS if row["duplicates"] == 1][::9])  # 67 captions
KEYS = [row["text"] for row in ROWS if row["duplicates"] > 1]
KEY, USUAL = KEYS[0], "penguin on violet stripes"


@pytest.fixture
def probe_of(amg):
    return amg.module("nodes.probing")


@pytest.fixture
def calls(monkeypatch):
    """Rows of each evaluation of any model, and what it was fed."""
    import comfy.model_base

    seen, real = [], comfy.model_base.BaseModel.apply_model

    def spy(self, x, t, *args, **kwargs):
        seen.append((len(x), float(t[0])))
        return real(self, x, t, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", spy)
    return seen


@pytest.fixture(scope="module")
def calibrated(amg, run_node, demo):
    """The demo model after Calibrate Prompt Probe; the summary."""
    return run_node(
        "AMG_CalibratePromptProbe", model=demo["model"], clip=demo["clip"], latent_image=LATENT,
        prompts=ORDINARY, seeds=2,
    )  # fmt: skip


@pytest.fixture
def probe(run_node, demo, encode):
    def run(prompt, **inputs):
        given = {"model": demo["model"], "positive": encode(prompt), "negative": encode(""),
                 "score": "combined", "seeds": 2, "false_alarms": 0.01, "words": "never"}  # fmt: skip
        names = ("model", "positive", "negative", "suspicious", "probability", "score", "verdict",
                 "words", "prompt_verdict")  # fmt: skip
        return dict(zip(names, run_node("AMG_PromptProbe", **given | inputs), strict=True))

    return run


@pytest.mark.parametrize("score", ["combined", "agreement"])
def test_a_key_is_told_from_an_ordinary_prompt(calibrated, probe, score):
    key, usual = probe(KEY, score=score), probe(USUAL, score=score)
    assert (key["suspicious"], usual["suspicious"]) == (True, False)
    assert key["probability"] > 0.99 > usual["probability"]
    assert key["score"] > usual["score"] + 2
    assert key["verdict"].startswith("suspicious")
    assert usual["verdict"].startswith("nothing suspicious")
    assert key["prompt_verdict"].verdict.score == key["score"]


def test_costs_two_batched_evaluations(calibrated, probe, calls):
    probe(KEY)
    assert [rows for rows, _ in calls] == [4, 4]  # 2 noises, with and without the prompt
    high, low = (level for _, level in calls)
    assert high > 14 > 0.25 > low


def test_equals_the_core_by_hand(amg, calibrated, demo, encode, probe_of):
    """Against the network itself: v networks see the noise unscaled at both levels."""
    stats = amg.module("amg_core.detection.statistics")
    of = amg.module("amg_core.detection.predictions")
    shape = (4, 16, 16)
    got = probe_of.measure(demo["model"], encode(KEY), encode(""), shape, 2, stats.LOW)
    z = probe_of.noises(shape, 2)
    network = demo["model"].model.diffusion_model
    sigmas = demo["model"].model.model_sampling.sigmas
    seen = []
    with torch.inference_mode():
        for t in (999, 41):
            out = []
            for text in (KEY, ""):
                context = encode(text)[0][0].expand(2, -1, -1)
                out.append(network(z, torch.full((2,), t), context))
            sigma = float(sigmas[t])
            x = z * (1 + sigma**2) ** 0.5
            d = [x / (1 + sigma**2) - v * sigma / (1 + sigma**2) ** 0.5 for v in out]
            seen.append(of.Predictions(x, sigma, *d, of.V))
        wanted = stats.measure(*seen)
    for one, two in zip(got, wanted, strict=True):
        assert one == pytest.approx(two, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("kind", ["eps", "v", "edm", "flow"])
def test_every_kind_of_model(amg, tiny, prompts, probe_of, kind, monkeypatch, calls):
    """The network sees the noise itself at both levels, and what it says comes back from D."""
    model, fed, said, looks = tiny(kind), [], [], []
    of, network = amg.module("amg_core.detection.predictions"), type(model.model.diffusion_model)
    real, measure = network.forward, probe_of.statistics.measure

    def spy(self, x, *args, **kwargs):
        fed.append(x.clone())
        said.append(real(self, x, *args, **kwargs))
        return said[-1]

    def keep(*predictions):
        looks.extend(predictions)
        return measure(*predictions)

    monkeypatch.setattr(network, "forward", spy)
    monkeypatch.setattr(probe_of.statistics, "measure", keep)
    report = probe_of.measure(model, *prompts, (4, 16, 16), 3, 0.041)
    assert len(calls) == len(fed) == 2
    z = probe_of.noises((4, 16, 16), 3)
    for x, out, p in zip(fed, said, looks, strict=True):
        assert torch.allclose(x, z.repeat(2, 1, 1, 1), atol=1e-4)
        back = [of.output(p, d) for d in (p.cond, p.uncond)]
        halves = out.chunk(2)  # the host has the last condition first
        pairs = [(back[0], halves[1]), (back[1], halves[0])]
        if kind != "edm":  # its network's output is no ε
            assert all(torch.allclose(a, b, atol=2e-3, rtol=1e-3) for a, b in pairs)
    for each in report:
        assert all(abs(value) < 1e6 for value in each.values())
        assert -1 <= each["alignment"] <= 1
        assert each["norm"] > 0


def test_kinds(amg, tiny, demo, probe_of):
    def kind(model):
        return probe_of.kind(model.get_model_object("model_sampling"))

    assert [kind(tiny(k)) for k in ("eps", "v", "edm", "flow")] == [
        "epsilon",
        "v",
        "epsilon",
        "flow",
    ]
    assert kind(demo["model"]) == "v"


def test_one_noise_does_not_change_another(probe_of, tiny, prompts):
    few = probe_of.measure(tiny(), *prompts, (4, 16, 16), 2, 0.041)
    more = probe_of.measure(tiny(), *prompts, (4, 16, 16), 4, 0.041)
    for one, two in zip(few, more, strict=False):
        assert one == pytest.approx(two, rel=1e-4)


def test_generator_and_model_stay_as_they_were(
    calibrated, probe, demo, sample, tiny, probe_of, prompts
):
    before = torch.get_rng_state()
    probe(KEY)
    assert torch.equal(torch.get_rng_state(), before)
    model = tiny()
    plain = sample(model)
    probe_of.measure(model, *prompts, (4, 16, 16), 2, 0.041)
    assert torch.equal(sample(model), plain)


def test_gates_the_guard(amg, calibrated, probe, demo, index, settings, calls):
    """The guarded model leaves only for a key; the guard on a model is no part of a probe."""
    guarded = amg.hook.attach(demo["model"], index, settings("active"))
    assert probe(KEY, guarded_model=guarded)["model"] is guarded
    assert probe(USUAL, guarded_model=guarded)["model"] is demo["model"]
    calls.clear()
    under = probe(KEY, model=guarded)
    assert len(calls) == 2
    assert under["score"] == probe(KEY)["score"]


def test_words(calibrated, probe, demo, calls):
    found = probe(KEY, words="if suspicious", clip=demo["clip"], text=KEY)
    words = KEY.split()
    assert any(f"“{word}”" in found["words"] for word in ("fox", "violet", "rays"))
    assert len(calls) == 2 + 2 * (1 + len(words))
    calls.clear()
    quiet = probe(USUAL, words="if suspicious", clip=demo["clip"], text=USUAL)
    assert quiet["words"] == ""
    assert len(calls) == 2


def test_parts_that_act_later_are_probed_too(calibrated, probe, encode):
    later = [
        [text, more | {"start_percent": 0.5, "end_percent": 0.9}] for text, more in encode(KEY)
    ]
    assert probe(KEY, positive=later)["score"] == pytest.approx(probe(KEY)["score"], abs=1e-4)


def test_what_is_missing_is_said(amg, calibrated, probe, tiny, prompts, demo, run_node):
    with pytest.raises(amg.AMGError, match=r"prompt_probe.*Calibrate Prompt Probe"):
        probe(KEY, model=tiny(), positive=prompts[0], negative=prompts[1])
    with pytest.raises(amg.AMGError, match="calibrated with 2"):
        probe(KEY, seeds=3)
    with pytest.raises(amg.AMGError, match="words"):
        probe(KEY, words="always")
    few = {"model": demo["model"], "clip": demo["clip"], "latent_image": LATENT, "seeds": 2}
    with pytest.raises(amg.AMGError, match="there are 2"):
        run_node("AMG_CalibratePromptProbe", prompts="one\n\ntwo\none", **few)
    video = {"samples": torch.zeros(1, 4, 2, 16, 16)}
    with pytest.raises(amg.AMGError, match="still pictures"):
        run_node("AMG_CalibratePromptProbe", prompts=ORDINARY, **few | {"latent_image": video})


def test_the_calibration_is_a_file_of_the_model(amg, calibrated, demo, probe_of):
    file = amg.paths.calibration_file(probe_of.model_key(demo["model"]))
    body = json.loads(file.read_text())
    assert body["format"] == "amg-prompt-calibration/1"
    assert body["shape"] == [4, 16, 16]
    assert str(file) in calibrated[1]
    assert calibrated[0] is demo["model"]
    assert file.parent.parent.name == "amg"


def test_a_lora_is_another_model(amg, demo, probe_of, encode, run_node):
    model = demo["model"]
    key = probe_of.model_key(model)
    name = next(n for n in model.model.state_dict() if n.endswith("out.weight"))
    weight = model.model.state_dict()[name]

    def patched(strength):
        other = model.clone()
        with torch.inference_mode():
            delta = torch.full_like(weight, 0.01)
        assert other.add_patches({name: ("diff", (delta,))}, strength)
        return other

    keys = {probe_of.model_key(m) for m in (patched(0.5), patched(1.0), model.clone())}
    assert len(keys) == 3
    assert key in keys
    assert probe_of.model_key(patched(1.0)) == probe_of.model_key(patched(1.0))
    # While a LoRA is worked into the shared weights, keys stay what they were.
    one = patched(1.0)
    before = probe_of.model_key(one)
    probe_of.measure(one, encode(KEY), encode(""), (4, 16, 16), 1, 0.041)
    assert (probe_of.model_key(one), probe_of.model_key(model)) == (before, key)
    other = type(run_node("AMG_DemoModel")[0])  # the same file, loaded once more
    assert isinstance(run_node("AMG_DemoModel")[0], other)
    assert probe_of.model_key(run_node("AMG_DemoModel")[0]) == key


def test_interrupt(amg, calibrated, probe):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        probe(KEY)


def test_known_prompts(run_node, amg, demo, probe, calibrated):
    """Calibrated with known keys, the probability speaks of them; then as before."""
    with_known = {
        "model": demo["model"], "clip": demo["clip"], "latent_image": LATENT, "seeds": 2,
        "prompts": ORDINARY,
    }  # fmt: skip
    known = "\n".join(KEYS[1:9])
    _, summary = run_node("AMG_CalibratePromptProbe", memorised=known, **with_known)
    assert "combined" in summary
    assert "finds 8 of the 8" in summary
    assert probe(KEY)["probability"] > 0.9
    assert probe(USUAL)["probability"] < 0.1
    run_node("AMG_CalibratePromptProbe", **with_known)


def test_the_list_of_the_pack(amg):
    detect = amg.module("nodes.detect")
    lines = detect._lines(detect.ORDINARY.read_text("utf-8"))
    assert len(lines) >= 60
