"""Mitigations without an index, in the host's own loop and on its own text encoder."""

from __future__ import annotations

import math

import pytest
import torch

SAMPLERS = ["euler", "heun", "dpmpp_2s_ancestral", "uni_pc"]
LATENT = (2, 4, 16, 16)


@pytest.fixture
def delay(run_node):
    def attach(model, **changes):
        widgets = {"mode": "delayed", "transition": "static", "until": 0.35, "keep": 0.0,
                   "away": 2.0}  # fmt: skip
        return run_node("AMG_DelayedGuidance", model=model, **widgets | changes)[0]

    return attach


def watched(model, seen: list):
    """A clone that notes what leaves guidance, after all hooks that are on it now."""
    model = model.clone()

    def note(args):
        seen.append(args)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(note)
    return model


# ---------------------------------------------------------------- prompts


def test_randomise_prompt(amg, run_node, clip, demo):
    text = {"text": "a red (fox:1.2) in snow", "repeats": 4, "settings": "code", "seed": 5}
    for method in ("CWR", "RNA"):
        (one,) = run_node("AMG_RandomisePrompt", method=method, **text)
        assert one == run_node("AMG_RandomisePrompt", method=method, **text)[0]
        assert len(one.split()) == 9 and "(fox:1.2)" in one
        assert run_node("AMG_RandomisePrompt", method=method, **text | {"seed": 6})[0] != one
        assert (
            run_node("AMG_RandomisePrompt", method=method, **text | {"repeats": 0})[0]
            == text["text"]
        )
    with pytest.raises(amg.AMGError, match=r"RT.*CLIP"):
        run_node("AMG_RandomisePrompt", method="RT", **text)
    with pytest.raises(amg.AMGError, match="settings"):
        run_node("AMG_RandomisePrompt", method="RNA", **text | {"settings": "odd"})


@pytest.mark.parametrize(("method", "probability"), [("RT", 0.1), ("CWR", 0.4), ("RNA", 0.4)])
def test_the_paper_leaves_some_prompts_alone(run_node, clip, method, probability):
    """Four rounds of the paper's probability: (1 − p)⁴ of 400 prompts stay, within four deviations."""
    text, stays = "a red fox in snow", (1 - probability) ** 4
    same = sum(
        run_node(
            "AMG_RandomisePrompt", text=text, method=method, settings="paper", repeats=4, seed=seed,
            clip=clip,
        )[0] == text
        for seed in range(400)
    )  # fmt: skip
    assert abs(same - 400 * stays) < 4 * (400 * stays * (1 - stays)) ** 0.5


def test_random_words_come_from_the_vocabulary(amg, run_node, clip, demo):
    """CLIP's own tokenizer, and that of the demo; a word that is drawn can be read again."""
    widgets = {"text": "", "method": "RT", "settings": "code", "repeats": 50, "seed": 1}
    (drawn,) = run_node("AMG_RandomisePrompt", clip=clip, **widgets)
    words = drawn.split()
    assert len(words) == 50 and len(set(words)) > 40
    assert not any(mark in drawn for mark in "()[]<>")
    (drawn,) = run_node("AMG_RandomisePrompt", clip=demo["clip"], **widgets)
    assert set(drawn.split()) <= set(demo["clip"].tokenizer.text.words)


def test_prompt_noise(run_node, prompts):
    (embedding, more), *_ = prompts[0]
    widgets = {"conditioning": prompts[0], "strength": 0.1, "seed": 9}
    (noisy,) = run_node("AMG_PromptNoise", relative=False, **widgets)
    noise = torch.randn(embedding.shape[1:], generator=torch.Generator().manual_seed(9))
    assert torch.allclose(noisy[0][0], embedding + 0.1 * noise, atol=1e-6)
    assert noisy[0][1].keys() == more.keys()
    (relative,) = run_node("AMG_PromptNoise", relative=True, **widgets)
    assert torch.allclose(relative[0][0], embedding + 0.1 * embedding.std() * noise, atol=1e-5)
    assert (
        run_node("AMG_PromptNoise", relative=True, **widgets | {"strength": 0.0})[0] is prompts[0]
    )


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("text", ["a red fox", "a (red:1.3) fox", "fox " * 90])
def test_padding_replaced(amg, run_node, clip, text):
    """Against the host's encoder, asked by hand: '!' for padding, zero for the true end."""
    (fixed,) = run_node("AMG_PaddingFix", clip=clip, text=text, method="replace", share=0.7, seed=0)
    tokens = clip.tokenize(text)
    start, zeroed = 0, []
    for number, chunk in enumerate(tokens["l"]):
        end = [token[0] for token in chunk].index(49407)
        tokens["l"][number] = [
            (0, *token[1:]) if place > end else token for place, token in enumerate(chunk)
        ]
        zeroed.append(start + end)
        start += len(chunk)
    with torch.inference_mode():
        wanted = clip.encode_from_tokens_scheduled(tokens)[0][0].clone()
        wanted[:, zeroed] = 0
    assert torch.equal(fixed[0][0], wanted)
    assert len(zeroed) == (2 if len(text) > 100 else 1)


def test_padding_zeroed(run_node, clip, prompts):
    widgets = {"clip": clip, "text": "a red fox", "method": "zero", "seed": 3}
    (fixed,) = run_node("AMG_PaddingFix", share=0.7, **widgets)
    plain = prompts[0][0][0]
    zero = (fixed[0][0] == 0).all(dim=2)[0]
    assert int(zero.sum()) == round(0.7 * (77 - 5))
    assert not zero[:5].any()  # start, three words, the true end
    assert torch.equal(fixed[0][0][:, ~zero], plain[:, ~zero])
    (off,) = run_node("AMG_PaddingFix", share=0.0, **widgets)
    assert torch.equal(off[0][0], plain)


def test_other_encoders_are_refused_by_name(amg, run_node, demo):
    import comfy.sdxl_clip

    widgets = {"text": "a", "method": "replace", "share": 0.7, "seed": 0}
    with pytest.raises(amg.AMGError, match=r"_TextModel \(words\)"):
        run_node("AMG_PaddingFix", clip=demo["clip"], **widgets)

    class Other:
        cond_stage_model = object.__new__(comfy.sdxl_clip.SDXLClipModel)
        tokenizer = comfy.sdxl_clip.SDXLTokenizer()

        def tokenize(self, text):
            return self.tokenizer.tokenize_with_weights(text)

    with pytest.raises(amg.AMGError, match=r"SDXLClipModel \(g, l\)"):
        run_node("AMG_PaddingFix", clip=Other(), **widgets)


# ---------------------------------------------------------------- delayed guidance


@pytest.mark.parametrize(("kind", "sampler"), [("flow", "euler"), *(("eps", s) for s in SAMPLERS)])
def test_delayed_until_the_point(amg, tiny, delay, sample, kind, sampler):
    """cfg is what the node says above the point, and untouched below it, evaluation by evaluation."""
    for widgets, scale in (
        ({"keep": 0.0}, 0.0), ({"keep": 1.0}, 1.0), ({"mode": "opposite", "away": 2.0}, -2.0),
    ):  # fmt: skip
        model, seen = tiny(kind), []
        sample(watched(delay(model, until=0.5, **widgets), seen), sampler, steps=5, batch=1)
        point = model.get_model_object("model_sampling").percent_to_sigma(0.5)
        early = [float(args["sigma"][0]) > point for args in seen]
        assert any(early) and not all(early)
        for args, before in zip(seen, early, strict=True):
            cond, uncond = args["cond_denoised"], args["uncond_denoised"]
            plain = uncond + (cond - uncond) * args["cond_scale"]
            if before:
                wanted = uncond + scale * (cond - uncond)
                assert torch.allclose(args["denoised"], wanted, atol=1e-4)
            else:
                assert torch.equal(args["denoised"], plain)


def test_dynamic_transition_and_two_runs(amg, tiny, delay, sample):
    """Each sample by its own history; a second run of the same model starts anew."""
    first_minimum = amg.module("amg_core.mitigation.transition").first_minimum
    seen: list = []
    model = watched(delay(tiny(), transition="dynamic", until=0.9), seen)
    once = sample(model, steps=8, batch=3)
    assert torch.equal(sample(model, steps=8, batch=3), once)
    assert torch.equal(
        sample(model, steps=8, batch=3, seed=4), sample(model, steps=8, batch=3, seed=4)
    )
    point = model.get_model_object("model_sampling").percent_to_sigma(0.9)
    norms = []
    for args in seen[:8]:
        cond, uncond = args["cond_denoised"], args["uncond_denoised"]
        norms.append((cond - uncond).flatten(1).norm(dim=1) / args["sigma"])
        waits = ~first_minimum(torch.stack(norms)) & (args["sigma"] > point)
        plain = uncond + (cond - uncond) * args["cond_scale"]
        for row, wait in enumerate(waits.tolist()):
            assert torch.equal(args["denoised"][row], plain[row]) != wait


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_off_is_the_model_as_it_is(tiny, delay, sample, sampler):
    model = tiny()
    plain = sample(model, sampler)
    assert torch.equal(sample(delay(model, mode="off"), sampler), plain)
    assert torch.equal(sample(delay(model, until=0.0), sampler), plain)
    assert torch.equal(sample(delay(delay(model), mode="off"), sampler), plain)
    assert torch.equal(sample(model, sampler), plain)
    assert not torch.equal(sample(delay(model), sampler), plain)


def test_a_sample_does_not_depend_on_its_mates(tiny, delay, sample):
    """Turning the batch round turns the result round."""
    seen: list = []
    model = delay(tiny(), transition="dynamic", until=0.9)
    sample(watched(model, seen), steps=6, batch=3)
    (hook, *_) = model.model_options["sampler_post_cfg_function"]
    runs = [{}, {}]
    for args in seen:
        plain = args["uncond_denoised"] + 5.0 * (args["cond_denoised"] - args["uncond_denoised"])
        given = args | {"denoised": plain}
        turned = given | {
            k: given[k].flip(0) for k in ("denoised", "cond_denoised", "uncond_denoised", "sigma")
        }
        ahead = hook(given | {"model_options": runs[0]})
        back = hook(turned | {"model_options": runs[1]})
        assert torch.equal(ahead.flip(0), back)


@pytest.mark.parametrize("first", ["delay", "guard"])
def test_composes_with_the_guard(amg, tiny, delay, sample, index, clip, settings, first):
    """In either order: a guard that sleeps changes nothing, one that acts adds its changes."""
    model, delayed = tiny(), sample(delay(tiny()))

    def both(kind):
        def guard(m):
            return amg.hook.attach(m, index, settings(kind), clip=clip, decoder="linear")

        return guard(delay(model)) if first == "delay" else delay(guard(model))

    assert torch.equal(sample(both("dormant")), delayed)
    acting = sample(both("active"))
    assert torch.isfinite(acting).all()
    assert not torch.equal(acting, delayed)
    off = amg.hook.attach(model, index, settings("active"), clip=clip, decoder="linear")
    assert torch.equal(sample(delay(off, mode="off")), sample(off))


def test_without_guidance_it_says_so(amg, tiny, delay, sample):
    with pytest.raises(amg.AMGError, match="cfg above 1"):
        sample(delay(tiny()), cfg=1.0)
    with pytest.raises(amg.AMGError, match="mode"):
        delay(tiny(), mode="odd")


# ---------------------------------------------------------------- adapting


@pytest.fixture
def adapt(run_node, prompts):
    def run(model, **changes):
        inputs = {
            "model": model, "positive": prompts[0], "negative": prompts[1],
            "latent_image": {"samples": torch.zeros(LATENT)}, "seed": 3, "target": 0.1,
            "iterations": 3, "learning_rate": 0.05,
        }  # fmt: skip
        return run_node("AMG_AdaptPrompt", **inputs | changes)

    return run


def loaded(model):
    """As a loader leaves it: the weights were made in inference mode."""
    with torch.inference_mode():
        for part in model.model.diffusion_model.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                setattr(part, name, torch.nn.Parameter(weight.data.clone(), requires_grad=False))
    return model


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_adapted_as_by_hand(amg, tiny, prompts, adapt, kind):
    """Against AdamW on an ordinary network: the same noise as KSampler's, sample by sample."""
    import comfy.sample

    (adapted, report) = adapt(loaded(tiny(kind)), target=0.0)
    assert adapted[0][0].shape == (2, 77, 64)
    assert report.count("NOT reached in 3 steps") == 2 and "memory" in report
    inner = tiny(kind).model.requires_grad_(False)
    with torch.random.fork_rng():
        noise = comfy.sample.prepare_noise(torch.zeros(LATENT), 3)
    sigma = inner.model_sampling.sigma_max.reshape(1).float()
    for row in range(2):
        x = inner.model_sampling.noise_scaling(sigma, noise[row : row + 1], torch.zeros(()), True)
        with torch.no_grad():
            empty = inner.apply_model(x, sigma, c_crossattn=prompts[1][0][0].clone())
        value = prompts[0][0][0].clone().requires_grad_()
        optimiser, scores = torch.optim.AdamW([value], lr=0.05), []
        for _ in range(3):
            score = (inner.apply_model(x, sigma, c_crossattn=value) - empty).norm() / sigma
            scores.append(float(score.detach()))
            (value.grad,) = torch.autograd.grad(score, value)
            optimiser.step()
        # Steps are of one size whatever the gradient: where it is near 0, its sign is rounding.
        close = (adapted[0][0][row] - value.detach()[0]).abs() < 1e-3
        assert close.float().mean() > 0.95
        assert f"score {scores[0]:.2f} →" in report


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_adapted_by_the_anisotropy_as_by_hand(amg, tiny, prompts, adapt, kind):
    """M from the network's raw outputs on one noise at two levels, and AdamW, picture by picture."""
    import comfy.sample

    widgets = {"metric": "anisotropy", "alignment_weight": 2.0, "target": -100.0, "iterations": 2}
    (adapted, report) = adapt(loaded(tiny(kind)), **widgets)
    inner = tiny(kind).model.requires_grad_(False)
    sampling = inner.model_sampling
    with torch.random.fork_rng():
        noise = comfy.sample.prepare_noise(torch.zeros(LATENT), 3)
    levels = [float(sampling.sigma_max), float(sampling.percent_to_sigma(1 - 0.041))]

    def output(z, sigma, prompt):
        """The network's own output for the input z."""
        t = sampling.timestep(torch.tensor([sigma]))
        return inner.diffusion_model(z, t.float(), context=prompt)

    def as_noise(z, sigma, out):
        if kind == "flow":  # out = ε − x0, z = (1 − σ)·x0 + σ·ε
            return z + (1 - sigma) * out
        alpha = 1 / (1 + sigma**2)
        return out if kind == "eps" else alpha**0.5 * out + (1 - alpha) ** 0.5 * z

    for row in range(2):
        z = noise[row : row + 1]

        def metric(prompt, z=z):
            high, low = (
                [output(z, sigma, p) for p in (prompt, prompts[1][0][0].clone())]
                for sigma in levels
            )
            if kind == "flow":  # at σ = 1 scores do not differ: the norm of the velocities
                norm = (high[0] - high[1]).norm()
            else:
                cond, uncond = (as_noise(z, levels[0], each) for each in high)
                norm = (cond - uncond).norm() * (1 + levels[0] ** -2) ** 0.5
            cond, uncond = (as_noise(z, levels[1], each) for each in low)
            d = cond - uncond
            return norm + 2.0 * (uncond * d).sum() / (uncond.norm() * d.norm())

        value = prompts[0][0][0].clone().requires_grad_()
        optimiser, scores = torch.optim.AdamW([value], lr=0.05), []
        for _ in range(2):
            score = metric(value)
            scores.append(float(score.detach()))
            (value.grad,) = torch.autograd.grad(score, value)
            optimiser.step()
        first = float(report.splitlines()[row].split("score ")[1].split(" ")[0])
        assert first == pytest.approx(scores[0], abs=0.02)
        close = (adapted[0][0][row] - value.detach()[0]).abs() < 1e-3
        assert close.float().mean() > 0.9


def test_the_metric_and_its_weight(amg, tiny, prompts, adapt):
    model = loaded(tiny())
    plain = adapt(model)
    by_name = adapt(model, metric="norm", alignment_weight=9.0)
    assert torch.equal(plain[0][0][0], by_name[0][0][0])
    assert plain[1].splitlines()[:2] == by_name[1].splitlines()[:2]
    both = [
        adapt(model, metric="anisotropy", alignment_weight=w, iterations=0)[1] for w in (0.0, 2.0)
    ]
    assert both[0] != both[1]
    with pytest.raises(amg.AMGError, match=r"metric.*norm, anisotropy"):
        adapt(model, metric="odd")


def test_an_adapted_prompt_scores_less_in_the_sampler(amg, tiny, prompts, adapt):
    """The first step of KSampler itself, with the same seed and batch."""
    import nodes

    model, norms = loaded(tiny()), []
    (adapted, _) = adapt(model)
    for positive in (prompts[0], adapted):
        seen: list = []
        with torch.inference_mode():
            nodes.common_ksampler(
                watched(model, seen), 3, 4, 5.0, "euler", "normal", positive, prompts[1],
                {"samples": torch.zeros(LATENT)},
            )  # fmt: skip
        difference = seen[0]["cond_denoised"] - seen[0]["uncond_denoised"]
        norms.append(difference.flatten(1).norm(dim=1) / seen[0]["sigma"])
    assert (norms[1] < 0.6 * norms[0]).all()


def test_under_the_target_nothing_changes(tiny, prompts, adapt):
    model = loaded(tiny())
    (same, report) = adapt(model, target=100.0)
    assert same is prompts[0]
    assert report.count("unchanged") == 2
    (same, report) = adapt(model, iterations=0)
    assert same is prompts[0]
    assert report.count("NOT reached in 0 steps") == 2


def test_pictures_are_adapted_one_by_one(tiny, adapt):
    """The second of a batch as if it were alone, and the model's weights as they were."""
    model = loaded(tiny())
    weights = list(model.model.diffusion_model.parameters())
    before = [w.clone() for w in weights]
    state = torch.get_rng_state()
    (both, _) = adapt(model)
    (alone, _) = adapt(
        model, latent_image={"samples": torch.zeros(1, 4, 16, 16), "batch_index": [1]}
    )
    assert torch.equal(both[0][0][1:], alone[0][0])
    assert torch.equal(torch.get_rng_state(), state)
    after = list(model.model.diffusion_model.parameters())
    assert all(a is b for a, b in zip(weights, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_memory(amg, tiny, adapt):
    """Where a step does not fit, the network runs twice; the prompt is the same. Less is an error."""
    model = loaded(tiny())
    (whole, report) = adapt(model)
    assert "run twice" not in report
    (twice, report) = adapt(model, memory_gb=4 / 1024)
    assert "run twice" in report
    assert torch.allclose(whole[0][0], twice[0][0], atol=1e-4)
    with pytest.raises(amg.AMGError, match=r"memory_gb.*smaller latent"):
        adapt(model, memory_gb=0.1 / 1024)


def test_what_it_would_not_see_is_refused(amg, tiny, prompts, adapt):
    model = tiny()
    with pytest.raises(amg.AMGError, match=r"positive.*2 parts"):
        adapt(model, positive=[*prompts[0], *prompts[0]])
    for key, word in (
        ("control", "ControlNet"),
        ("area", "area"),
        ("mask", "mask"),
        ("hooks", "LoRA"),
    ):
        odd = [[prompts[1][0][0], {key: (8, 8, 0, 0)}]]
        with pytest.raises(amg.AMGError, match=rf"negative.*{word}"):
            adapt(model, negative=odd)
    with pytest.raises(amg.AMGError, match="finite"):
        adapt(model, positive=[[prompts[0][0][0] * math.nan, {}]])


def test_a_patch_without_gradient_is_named(amg, tiny, adapt):
    """Another node's patch that keeps tensors of its own, made in inference mode."""
    model = tiny()
    with torch.inference_mode():
        own = torch.ones(1)
    model.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * own
    )
    with pytest.raises(amg.AMGError, match=r"model.*another node"):
        adapt(model)


def test_a_lora_is_seen(tiny, adapt):
    """Patches of weights act while the prompt is adapted, and are still there afterwards."""
    model = tiny()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    weight = dict(model.model.named_parameters())[key]
    patched = model.clone()
    patched.add_patches({key: ("diff", (torch.ones_like(weight),))}, 0.5)
    (plain, _), (lora, _) = adapt(model), adapt(patched)
    assert not torch.allclose(plain[0][0], lora[0][0], atol=1e-3)
    assert torch.equal(adapt(model)[0][0][0], plain[0][0])


def test_a_guarded_model_is_not_judged(amg, tiny, adapt, index, settings):
    """Nothing is drawn, so the guard has nothing to report, and the prompt is the same."""
    model, report = tiny(), amg.hook.Report()
    guarded = amg.hook.attach(model, index, settings("active"), decoder="linear", report=report)
    assert torch.equal(adapt(guarded)[0][0][0], adapt(model)[0][0][0])
    assert report.latest is None


def test_the_demo_model(demo, encode, run_node):
    (adapted, report) = run_node(
        "AMG_AdaptPrompt", model=demo["model"], positive=encode("fox face on violet rays"),
        negative=encode(""), latent_image={"samples": torch.zeros(LATENT)}, seed=7, target=1.5,
        iterations=10, learning_rate=0.05,
    )  # fmt: skip
    assert adapted[0][0].shape == (2, 8, 128)
    assert "→" in report and "NOT" not in report
