"""What leaves the host's guiders is what the guard looks at and steers, whatever guider, cache or hook."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks.guiders import dual, perpneg, plain

PICTURES = Path(__file__).parents[2] / "amg_demo/pictures"
NEW = "blue owl on moon"
STEPS = 12


@pytest.fixture(scope="session")
def keys() -> list[str]:
    """Eight prompts of the demo model's that are keys to memorised pictures."""
    lines = (PICTURES / "metadata.jsonl").read_text().splitlines()
    known = [json.loads(line) for line in lines if '"memorised-' in line]
    return [line["text"] for line in known[:8]]


@pytest.fixture(scope="session")
def sharp(amg):
    """The preset that artists start with."""
    return amg.module("amg_core.presets").settings


@pytest.fixture
def guarded(amg, demo, index, sharp):
    """`guarded(model=, **attach options)` -> the guarded model and its report."""

    def make(model=None, settings=None, **options):
        report = amg.hook.Report()
        model = amg.hook.attach(
            demo["model"] if model is None else model, index,
            sharp("main", index.metric) if settings is None else settings,
            clip=demo["clip"], vae=demo["vae"], report=report, **options,
        )  # fmt: skip
        return model, report

    return make


@pytest.fixture(scope="session")
def judged(amg, demo, index):
    """Latents -> whether each is a copy, by the very checks of Similarity Probe, no guard asked."""

    def copies(latents) -> list[bool]:
        with torch.inference_mode():
            pictures = demo["vae"].decode(latents).movedim(-1, 1)
        verdict = amg.module("amg_core.similarity.verdict").verdict
        return [found.copy for found in verdict(index, pictures.clone())]

    return copies


def draw(guider, batch, sampler="euler", steps=STEPS, seed=7, shape=(4, 16, 16)):
    import comfy.samplers

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas,
            seed=seed,
        )  # fmt: skip


GUIDERS = {
    "cfg": lambda model, encode, texts: plain(model, encode(*texts), encode("")),
    "dual": lambda model, encode, texts: dual(model, encode(*texts), encode("a"), encode("")),
    "dual, one scale 1": lambda model, encode, texts: dual(
        model, encode(*texts), encode("a"), encode(""), 4.0, 1.0
    ),
    "dual, nested": lambda model, encode, texts: dual(
        model, encode(*texts), encode("a"), encode(""), 2.0, 2.0, nested=True
    ),
    "perp-neg": lambda model, encode, texts: perpneg(
        model, encode(*texts), encode("crab"), encode("")
    ),
    "perp-neg, scale 0": lambda model, encode, texts: perpneg(
        model, encode(*texts), encode("crab"), encode(""), scale=0.0
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_of_the_host_is_steered(demo, encode, keys, guarded, judged, name):
    texts = keys[:3]
    assert judged(draw(GUIDERS[name](demo["model"], encode, texts), 3)) == [True] * 3
    model, report = guarded()
    assert judged(draw(GUIDERS[name](model, encode, texts), 3)) == [False] * 3
    written = report.latest
    assert [verdict["outcome"] for verdict in written["verdicts"]] == ["no_copy"] * 3
    assert all(written["guarded_evaluations"]) and len(written["steps"]) == STEPS
    assert written["unseen_steps"] == 0


@pytest.mark.parametrize("name", GUIDERS)
def test_a_dormant_guard_changes_no_guider(demo, encode, guarded, settings, name):
    expected = draw(GUIDERS[name](demo["model"], encode, [NEW]), 1, steps=4)
    model, _ = guarded(settings=settings("dormant"))
    assert torch.equal(draw(GUIDERS[name](model, encode, [NEW]), 1, steps=4), expected)


def brighter_hook(model):
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 0.1)
    return model


def brighter_wrapper(model):
    from comfy.patcher_extension import WrappersMP

    model.add_wrapper_with_key(
        WrappersMP.PREDICT_NOISE, "another node", lambda executor, *args: executor(*args) + 0.1
    )
    return model


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("other", [None, brighter_hook, brighter_wrapper])
def test_what_leaves_is_what_was_looked_at(
    amg, encode, guarded, settings, monkeypatch, name, other
):
    """Also where another node changes the prediction, though it was put on after the guard."""
    seen, left = [], []
    real = amg.drawing.SamplingRun.step

    def step(self, denoised, **rest):
        seen.append(denoised)
        return real(self, denoised, **rest)

    monkeypatch.setattr(amg.drawing.SamplingRun, "step", step)
    model, _ = guarded(settings=settings("dormant"))
    guider = GUIDERS[name](model if other is None else other(model.clone()), encode, [NEW])
    called = type(guider).__call__
    monkeypatch.setattr(
        type(guider),
        "__call__",
        lambda self, *a, **k: left.append(called(self, *a, **k)) or left[-1],
    )
    draw(guider, 1, steps=3)
    assert len(seen) == 3 and all(a is b for a, b in zip(seen, left, strict=True))


def test_a_guider_that_is_not_understood_is_refused_by_name(amg, encode, guarded):
    import comfy.samplers

    class Brighter(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs) + 0.1

    class Silent(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
            return 0 * x

    class Around(comfy.samplers.CFGGuider):
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    class Careful(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs)

    model, _ = guarded()
    for kind in (Brighter, Silent, Around):
        with pytest.raises(amg.AMGError, match=rf"guider {kind.__name__}\b.*DualCFGGuider"):
            draw(plain(model, encode(NEW), encode(""), kind=kind), 1, steps=3)
        assert amg.hook.KEY not in model.model_options
    assert torch.isfinite(
        draw(plain(model, encode(NEW), encode(""), kind=Careful), 1, steps=3)
    ).all()


ORDERS = ["before the guard", "after the guard"]


def cached(model, order, cache, guarded, **options):
    """A guarded model with a cache of the host's on it, and its report."""
    import comfy_extras.nodes_easycache as nodes

    node = getattr(nodes, f"{cache}Node")
    put_on = lambda model: node.execute(model, 0.3, 0.15, 0.95, False)[0]  # noqa: E731
    if order == "before the guard":
        return guarded(put_on(model), **options)
    model, report = guarded(model, **options)
    return put_on(model), report


@pytest.fixture
def calls(monkeypatch):
    """`calls(model, draw)` -> what `draw()` gives, and how often it ran the model's network."""

    def count(model, draw):
        asked, network = [], type(model.model.diffusion_model)
        real = network._forward if hasattr(network, "_forward") else network.forward
        with monkeypatch.context() as patch:
            patch.setattr(network, real.__name__, lambda *a, **k: asked.append(1) or real(*a, **k))
            return draw(), len(asked)

    return count


@pytest.mark.parametrize("order", ORDERS)
def test_steps_that_lazycache_makes_up_are_guarded(
    demo, encode, keys, guarded, judged, settings, calls, order
):
    """Its place is around the guider: made-up steps never came by the host's hooks."""
    texts = [*keys[:2], NEW]

    def drawn(model):
        return draw(plain(model, encode(*texts), encode("")), 3)

    unguarded, _ = cached(demo["model"], order, "LazyCache", lambda model: (model, None))
    expected, count = calls(unguarded, lambda: drawn(unguarded))
    assert count < STEPS and judged(expected) == [True, True, False]
    model, report = cached(demo["model"], order, "LazyCache", guarded, settings=settings("dormant"))
    again, same = calls(model, lambda: drawn(model))
    assert torch.equal(again, expected) and same == count
    assert len(report.latest["steps"]) == STEPS and report.latest["unseen_steps"] == 0
    model, report = cached(demo["model"], order, "LazyCache", guarded)
    assert judged(drawn(model)) == [False] * 3
    assert len(report.latest["steps"]) == STEPS


@pytest.mark.parametrize("order", ORDERS)
def test_easycache_serves_two_masters(tiny, sample, amg, index, clip, settings, calls, order):
    """Its place is around the network: the guard's own questions go through it."""

    def guard(model, kind):
        report = amg.hook.Report()
        return amg.hook.attach(model, index, settings(kind), clip=clip, report=report), report

    model = tiny()
    unguarded, _ = cached(model, order, "EasyCache", lambda model: (model, None))
    expected, count = calls(model, lambda: sample(unguarded, steps=STEPS, batch=1))
    assert count < STEPS
    quiet, report = cached(model, order, "EasyCache", guard, kind="dormant")
    assert torch.equal(sample(quiet, steps=STEPS, batch=1), expected)
    for kind in ("active", "leaving"):
        acting, report = cached(model, order, "EasyCache", guard, kind=kind)
        guided = sample(acting, steps=STEPS, batch=1)
        assert torch.isfinite(guided).all() and not torch.equal(guided, expected)
        assert len(report.latest["steps"]) == STEPS and report.latest["unseen_steps"] == 0


def test_a_cache_of_one_state_is_named(amg, demo, encode, keys, guarded):
    state = {}

    def one_state(apply, options):
        out = apply(options["input"], options["timestep"], **options["c"])
        change = out - options["input"]
        before = state.setdefault("before", change)
        state["before"] = change
        return out + 0 * (change - before)

    model = demo["model"].clone()
    model.set_model_unet_function_wrapper(one_state)
    draw(plain(model, encode(*keys[:1]), encode("")), 1)
    state.clear()
    model, _ = guarded(model)
    with pytest.raises(amg.AMGError, match=r"one_state.*TeaCache.*EasyCache"):
        draw(plain(model, encode(*keys[:1]), encode("")), 1)


def test_steps_that_the_sampler_does_not_ask_about_are_told(amg, demo, encode, guarded):
    import comfy.samplers

    def lazy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            if i % 3 != 2:
                denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised, "sigma": sigmas[i]})
            x = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]
        return x

    model, report = guarded()
    guider = plain(model, encode(NEW), encode(""))
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "normal", STEPS
    )
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        guider.sample(noise, 0 * noise, comfy.samplers.KSAMPLER(lazy), sigmas, seed=7)
    assert report.latest["unseen_steps"] == 4
    words = amg.module("amg_core.report").words(report.latest)
    assert "steps not seen by the guard: 4" in words


@pytest.fixture
def inputs(demo, encode, index):
    return {
        "seed": 7, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": encode(NEW), "negative": encode(""), "denoise": 1.0, "index": index,
        "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "clip": demo["clip"],
        "vae": demo["vae"],
    }  # fmt: skip


STRENGTHS = {"preset": "main", "despecification": 1.0, "deduplication": 1.0, "dissimilarity": 1.0}


def test_a_second_guard_is_refused(amg, run_node, index, guarded, inputs):
    """Never is one taken off without a word."""
    model, _ = guarded()
    for node, more in (
        ("AMG_Sampler", STRENGTHS),
        ("AMG_Guard", {"detect": "off"}),
        ("AMG_Guard", {"detect": "draw twice", "index": None}),
    ):
        with pytest.raises(
            amg.AMGError, match=rf"model: .*index {index.searcher.index.name}.*Combine"
        ):
            run_node(node, model=model, **inputs | more)
    with pytest.raises(amg.AMGError, match="guarded already"):
        amg.hook.attach(model, index, amg.Settings(amg.Schedule("constant", 2.0, 2.0)))


def finished(demo, encode, keys, name):
    """Positive, negative and latent of one of the ways to a copy, and what KSampler needs besides."""
    positive, negative, latent, more = encode(keys[0]), encode(""), torch.zeros(1, 4, 16, 16), {}
    if name == "img2img":
        with torch.inference_mode():
            latent = demo["vae"].encode(_picture("memorised-000.webp"))
        more = {"denoise": 0.2}
    if name == "combined":
        positive = [*encode(keys[0]), *encode(keys[0])]
    if name == "area":
        area = {"area": (16, 16, 0, 0), "set_area_to_bounds": False, "strength": 1.0}
        positive = [[positive[0][0], positive[0][1] | area]]
    if name == "timed":
        positive = [
            [part[0][0], part[0][1] | {"start_percent": start, "end_percent": end}]
            for part, start, end in ((positive, 0.0, 0.5), (encode(f"{keys[0]} a"), 0.5, 1.0))
        ]
    latent = {"samples": latent}
    if name == "inpaint":
        with torch.inference_mode():
            latent["samples"] = demo["vae"].encode(_picture("memorised-000.webp"))
        latent["noise_mask"] = torch.zeros(1, 1, 128, 128)
        latent["noise_mask"][..., :24] = 1
    return positive, negative, latent, more


def _picture(name):
    import numpy as np
    from PIL import Image

    picture = np.asarray(Image.open(PICTURES / name).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(picture / 255)[None]


WAYS = ["plain", "img2img", "inpaint", "combined", "area", "timed"]


@pytest.mark.parametrize("name", WAYS)
def test_no_copy_comes_out_where_none_may(amg, demo, encode, keys, guarded, judged, settings, name):
    """Watched only, so that the copy is there to the end."""
    import nodes

    positive, negative, latent, more = finished(demo, encode, keys, name)
    outcomes = {}
    for policy in ("say so", "blank", "stop"):
        loop = amg.hook.Loop(if_still_copied=policy)
        model, _ = guarded(settings=settings("zero"), loop=loop)
        args = (7, STEPS, 4.0, "euler", "normal", positive, negative, latent)
        with torch.inference_mode():
            if policy == "stop":
                with pytest.raises(amg.AMGError, match=r"Stopped: picture 1 .*memorised-000"):
                    nodes.common_ksampler(model, *args, **more)
            else:
                outcomes[policy] = nodes.common_ksampler(model, *args, **more)[0]["samples"]
    assert judged(outcomes["say so"]) == [True]
    assert torch.count_nonzero(outcomes["blank"]) == 0


def test_spoiling_the_rest_does_not_make_a_kept_copy_pass(
    amg, demo, encode, keys, sharp, run_node, pictures
):
    """Of a stored picture a border is drawn anew: no guard can change the rest, and both checks of the
    whole are fooled by what it makes of the border."""
    import nodes

    index, _ = run_node(
        "AMG_BuildIndex", folder=str(pictures), name="compact", descriptor="compact"
    )
    given = torch.cat([_picture(f"memorised-{i:03}.webp") for i in range(8)])
    with torch.inference_mode():
        latent = {"samples": demo["vae"].encode(given)}
    latent["noise_mask"] = torch.zeros(1, 1, 128, 128)
    latent["noise_mask"][..., :24] = 1
    report = amg.hook.Report()
    model = amg.hook.attach(
        demo["model"], index, sharp("main", index.metric), clip=demo["clip"], vae=demo["vae"],
        report=report,
    )  # fmt: skip
    with torch.inference_mode():
        nodes.common_ksampler(
            model, 7, 8, 4.0, "euler", "normal", encode(*keys), encode(""), latent
        )  # fmt: skip
    verdicts = report.latest["verdicts"]
    assert [verdict["outcome"] for verdict in verdicts] == ["copy"] * 8
    assert any(verdict["words"].endswith("that was kept") for verdict in verdicts)


@pytest.mark.parametrize("policy", ["say so", "blank", "stop"])
@pytest.mark.parametrize("finished", [True, False])
def test_the_second_output_follows_the_policy(
    amg, demo, encode, keys, guarded, settings, policy, finished
):
    """SamplerCustomAdvanced hands on what the model guessed last, even of a run that is not finished."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    model, report = guarded(settings=settings("zero"), loop=amg.hook.Loop(if_still_copied=policy))
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    guider = plain(model, encode(keys[0], NEW), encode(""))
    args = (
        Noise_RandomNoise(7), guider, comfy.samplers.sampler_object("euler"),
        sigmas if finished else sigmas[:-2], {"samples": torch.zeros(2, 4, 16, 16)},
    )  # fmt: skip
    if policy == "stop" and finished:
        with torch.inference_mode(), pytest.raises(amg.AMGError, match="Stopped"):
            SamplerCustomAdvanced().sample(*args)
        return
    with torch.inference_mode():
        out, second = (each["samples"] for each in SamplerCustomAdvanced().sample(*args))
    hidden = policy != "say so"
    assert (torch.count_nonzero(second[0]) == 0) == hidden
    assert torch.count_nonzero(second[1]) and torch.count_nonzero(out[1])
    assert report.latest["blanked_previews"] == ([0] if hidden and not finished else [])
    words = amg.module("amg_core.report").words(report.latest)
    assert ("denoised_output was a copy and is blank now: picture 1" in words) == (
        hidden and not finished
    )


def test_a_policy_that_cannot_be_kept_is_refused(amg, tiny, monkeypatch, index, settings):
    """Where nothing shows the finished pictures, nothing can be stopped."""
    monkeypatch.setattr(amg.decoding, "choose_if_any", lambda space: None)
    latent = copy.copy(index)
    latent.latent = True
    monkeypatch.setattr(amg.module("nodes.latents"), "check_model", lambda matcher, space: None)
    for policy in ("stop", "blank"):
        with pytest.raises(amg.AMGError, match=r"if_still_copied.*connect the vae"):
            amg.hook.attach(
                tiny(), latent, settings("active"), loop=amg.hook.Loop(if_still_copied=policy)
            )
    amg.hook.attach(tiny(), latent, settings("active"))


def test_at_cfg_1_the_prompt_is_reduced(amg, demo, encode, keys, sharp, index):
    """The host computes no unconditional prediction there; distilled models are drawn so."""
    import nodes

    report, latent = amg.hook.Report(), {"samples": torch.zeros(2, 4, 16, 16)}
    model = amg.hook.attach(
        demo["model"], index, sharp("main", index.metric), clip=demo["clip"], vae=demo["vae"],
        report=report, loop=amg.hook.Loop(2),
    )  # fmt: skip
    with torch.inference_mode():
        nodes.common_ksampler(
            model, 7, 10, 1.0, "euler", "normal", encode(*keys[:2]), encode(""), latent
        )
    moved = {name for step in report.latest["steps"] for name in step["moved"]}
    assert {"despecification", "away"} <= moved
    assert [verdict["outcome"] for verdict in report.latest["verdicts"]] == ["no_copy"] * 2
