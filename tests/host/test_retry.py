"""The closed loop in the host: finished pictures are measured, and copies drawn again.

The guard of these tests never acts by itself. So a prompt of the demo model's memorised pictures gives a
copy, and the retry, which knows the prompt for a key from the start, gives something else.
"""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

COPIED, NEW = "fox face on violet rays", "blue owl on moon"
STEPS = 12


@pytest.fixture(scope="module")
def conditioning(encode):
    """`conditioning(*prompts)`: one prompt a sample of the batch, and the empty one."""
    return lambda *prompts: (encode(*prompts), encode(""))


@pytest.fixture(scope="module")
def lax(amg):
    """Looks, never acts in a first drawing, and leaves softly what is known to be a key."""
    reduction = amg.module("amg_core.guidance").PromptReduction
    return amg.Settings(amg.Schedule("constant", 2.0, 2.0), (reduction(),))


@pytest.fixture
def draw(amg, demo, index, lax, conditioning):
    """`draw(prompts, settings=, **attach options)` -> samples, report, lines; `.plain` without guard."""
    import nodes

    def sample(model, prompts, seed=7, **kwargs):
        positive, negative = conditioning(*prompts)
        latent = {"samples": torch.zeros(len(prompts), 4, 16, 16)}
        with torch.inference_mode():
            return nodes.common_ksampler(
                model, seed, STEPS, 4.0, kwargs.pop("sampler", "euler"), "normal", positive,
                negative, latent, **kwargs,
            )[0]["samples"]  # fmt: skip

    def guarded(prompts, settings=lax, vae=demo["vae"], sampling=None, **options):
        report, lines = amg.hook.Report(), []
        loop = amg.hook.Loop(**options)
        model = amg.hook.attach(
            demo["model"], index, settings, vae=vae, loop=loop, report=report,
            on_step=lines.append,
        )  # fmt: skip
        samples = sample(model, prompts, **(sampling or {}))
        return SimpleNamespace(samples=samples, report=report.latest, lines=lines)

    guarded.plain = lambda prompts, **kwargs: sample(demo["model"], prompts, **kwargs)
    return guarded


def outcomes(drawn):
    return [verdict["outcome"] for verdict in drawn.report["verdicts"]]


def test_a_copy_is_drawn_again_and_the_other_kept_bit_for_bit(amg, draw):
    plain = draw.plain([COPIED, NEW])
    once = draw([COPIED, NEW])
    assert torch.equal(once.samples, plain)
    assert outcomes(once) == ["copy", "no_copy"] and len(once.report["attempts"]) == 1
    drawn = draw([COPIED, NEW], retries=3)
    assert outcomes(drawn) == ["no_copy", "no_copy"]
    assert torch.equal(drawn.samples[1], plain[1])
    assert not torch.equal(drawn.samples[0], plain[0])
    written = drawn.report
    amg.module("amg_core.report").check(written)
    assert written["judged_by"] == "vae" and written["not_judged"] == "" and written["seed"] == 7
    assert [attempt["samples"] for attempt in written["attempts"]][:2] == [[0, 1], [0]]
    assert len(written["steps"]) == STEPS == len(written["attempts"][1]["steps"])
    assert written["attempts"][0]["verdicts"][0]["source"] == "memorised-000.webp"
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert sum(line.startswith("retry 1/3 · step") for line in drawn.lines) == STEPS
    assert "picture 1 drawn again: likeness" in drawn.lines[-1]
    assert torch.equal(draw([COPIED, NEW], retries=3).samples, drawn.samples)


def test_the_verdict_is_that_of_similarity_probe(draw, demo, index, run_node):
    drawn = draw([COPIED, NEW])
    with torch.inference_mode():
        pictures = demo["vae"].decode(drawn.samples)
    _, words, _, _ = run_node("AMG_SimilarityProbe", image=pictures, index=index)
    written = [f"{max(0.0, v['score']):.2f}  {v['words']}" for v in drawn.report["verdicts"]]
    assert words.splitlines() == written


def test_without_vae_the_decoder_of_the_guard_judges_and_says_so(draw):
    drawn = draw([COPIED, NEW], vae=None)
    assert drawn.report["judged_by"] == "demo"
    assert outcomes(drawn) == ["copy", "no_copy"]


def test_a_copy_that_stays(amg, draw, caplog):
    with stubborn(amg), caplog.at_level(logging.WARNING):
        said = draw([NEW, COPIED], retries=1)
        assert outcomes(said) == ["no_copy", "copy"]
        assert said.lines[-1].startswith("STILL A COPY: picture 2 · ")
        assert "STILL A COPY: picture 2" in caplog.text
        blank = draw([NEW, COPIED], retries=1, if_still_copied="blank")
        assert outcomes(blank) == ["no_copy", "blanked"]
        assert torch.equal(blank.samples[0], said.samples[0])
        assert torch.count_nonzero(blank.samples[1]) == 0
        assert "blank" in blank.lines[-1]
        with pytest.raises(amg.AMGError, match=r"picture 2 of 2 .*memorised-000\.webp"):
            draw([NEW, COPIED], retries=1, if_still_copied="stop")


@contextmanager
def stubborn(amg):
    """As if retries knew of no suspects: the same copy is drawn again and again."""
    real = amg.drawing.SamplingRun
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            amg.drawing,
            "SamplingRun",
            lambda watch, settings, steps, _: real(watch, replace(settings, guidance=()), steps),
        )
        yield patch


def test_the_second_check_votes_where_the_guard_never_acted(amg, draw, lax):
    """A copy that the first check does not see is drawn again, and stopped if it stays."""
    with pytest.MonkeyPatch.context() as patch:
        judge = amg.module("amg_core.similarity.verifier")
        alike = lambda _, others: SimpleNamespace(score=torch.full((len(others),), 0.99))  # noqa: E731
        patch.setattr(judge, "registered", alike)
        drawn = draw([NEW], retries=1)
        assert outcomes(drawn) == ["copy"] and len(drawn.report["attempts"]) == 2
        with pytest.raises(amg.AMGError, match="Stopped: picture 1"):
            draw([NEW], retries=1, if_still_copied="stop")


@pytest.mark.parametrize("policy", ["stop", "blank"])
def test_what_is_only_close_comes_out_with_a_warning(amg, draw, monkeypatch, caplog, policy):
    """And is not drawn again: too many pictures that are no copies are close."""
    monkeypatch.setattr(amg.module("amg_core.similarity.verdict"), "_close", lambda *_: 0)
    with caplog.at_level(logging.WARNING):
        drawn = draw([NEW], retries=2, if_still_copied=policy)
    assert outcomes(drawn) == ["cannot_tell"] and len(drawn.report["attempts"]) == 1
    assert torch.equal(drawn.samples, draw.plain([NEW]))
    warning = "cannot tell for picture 1: it is close to "
    assert drawn.lines[-1].startswith(warning) and warning in caplog.text


def test_what_is_not_finished_is_not_judged(draw):
    part = {"start_step": 0, "last_step": 5, "force_full_denoise": False}
    drawn = draw([COPIED], retries=2, if_still_copied="stop", sampling=part)
    assert drawn.report["verdicts"] == [] and drawn.report["judged_by"] == ""
    assert "not finished" in drawn.report["not_judged"]
    assert drawn.lines[-1].startswith("not checked · sampling was not finished")
    assert len(drawn.report["steps"]) == 5
    assert torch.equal(drawn.samples, draw.plain([COPIED], **part))


def test_new_noise_is_that_of_another_seed(amg, draw):
    """In the last retry, and only for the copies."""
    real, started = amg.drawing.Drawing._start, []

    def start(self, number, suspects, anew):
        started.append(real(self, number, suspects, anew))
        return started[-1]

    with stubborn(amg) as patch:
        patch.setattr(amg.drawing.Drawing, "_start", start)
        drawn = draw([COPIED, NEW], retries=2, new_noise=True)
    assert [seed for _, seed, _ in started] == [7, 7, 9]
    assert [attempt.get("seed", 7) for attempt in drawn.report["attempts"]] == [7, 7, 9]
    own, same, other = (noise for noise, *_ in started)
    assert drawn.report["attempts"][2]["seeds"] == [9]
    assert torch.equal(own, same) and torch.equal(own[1], other[1])
    wanted = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    assert torch.equal(other[0], wanted[0])


def test_each_picture_can_be_drawn_again_from_the_report(amg, demo, draw, index, lax, conditioning):
    """Also where a retry drew a copy again from its noise, and a picture that was pushed from other noise.

    The sampler adds noise at every step, of the seed of the drawing.
    """
    import comfy.sample

    retry, prompts, kind = amg.module("amg_core.retry"), [COPIED, NEW], "euler_ancestral"
    real = amg.drawing.SamplingRun

    def run_of(suspects):
        def make(watch, settings, steps, known):
            run = real(watch, settings, steps, known if suspects is None else suspects)
            run.repelled = lambda i: i == 1 and known is None  # as if pushed in the first drawing
            return run

        return make

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amg.drawing, "SamplingRun", run_of(None))
        drawn = draw(prompts, retries=3, new_noise=True, sampling={"sampler": kind})
    assert [found["attempt"] for found in drawn.report["verdicts"]] == [1, 1]
    assert [found["seed"] for found in drawn.report["verdicts"]] == [7, 8]
    attempt = drawn.report["attempts"][1]
    assert attempt["seeds"] == [7, 8] and attempt["suspects"] == [0]
    settings = retry.escalated(lax, 1)
    assert json.loads(json.dumps(settings.to_json())) == attempt["settings"]
    suspects = torch.tensor([i in attempt["suspects"] for i in range(2)])
    latent = torch.zeros(2, 4, 16, 16)
    for i, found in enumerate(drawn.report["verdicts"]):
        model = amg.hook.attach(demo["model"], index, settings, vae=demo["vae"])
        noise = comfy.sample.prepare_noise(latent, found["seed"])
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(amg.drawing, "SamplingRun", run_of(suspects))
            again = comfy.sample.sample(
                model, noise, STEPS, 4.0, kind, "normal", *conditioning(*prompts), latent,
                seed=attempt["seed"],
            )  # fmt: skip
        assert torch.equal(again[i], drawn.samples[i])


@pytest.fixture
def careless(amg, monkeypatch):
    """Samplers draw from the global generator, as some packs' do."""
    import comfy.k_diffusion.sampling

    monkeypatch.setattr(
        comfy.k_diffusion.sampling,
        "default_noise_sampler",
        lambda x, seed=None: lambda sigma, sigma_next: torch.randn(x.shape),
    )


def test_global_generators_are_as_after_one_drawing(draw, careless):
    """And each drawing gets the same numbers of samplers that draw from them."""
    states = []
    for retries in (0, 2):
        drawn = draw([COPIED], retries=retries, sampling={"sampler": "dpmpp_2s_ancestral"})
        states.append((torch.get_rng_state(), len(drawn.report["attempts"])))
    assert states[0][1] == 1 < states[1][1]
    assert torch.equal(states[0][0], states[1][0])


@pytest.mark.parametrize("kind", ["ancestral", "regional", "inpainting"])
def test_a_retry_starts_from_the_very_same_state(
    amg, demo, index, lax, conditioning, careless, kind
):
    """Unsteered it gives the same copy: prompts, masks and random numbers are as they were."""
    import nodes

    positive, negative = conditioning(COPIED)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    if kind == "regional":
        area = {"area": (16, 12, 0, 0), "set_area_to_bounds": False, "strength": 0.8}
        positive = [*positive, [positive[0][0], positive[0][1] | area]]
    if kind == "inpainting":
        latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
        latent["noise_mask"] = torch.ones(1, 1, 128, 128)
        latent["noise_mask"][..., :24] = 0
    drawn, kind = [], amg.drawing.Drawing
    draw, judge = kind.draw, kind.judge

    def keep(self, settings, suspects, anew):
        drawn.append(draw(self, settings, suspects, anew))
        return drawn[-1]

    def copies(self, *given):
        return [replace(v, outcome="copy") for v in judge(self, *given)]

    model = amg.hook.attach(demo["model"], index, lax, vae=demo["vae"], loop=amg.hook.Loop(2))
    with stubborn(amg) as patch, torch.inference_mode():
        patch.setattr(kind, "draw", keep)
        patch.setattr(kind, "judge", copies)
        sampler = "dpmpp_2s_ancestral" if kind == "ancestral" else "euler"
        (out,) = nodes.common_ksampler(
            model, 7, 6, 4.0, sampler, "normal", positive, negative, latent
        )
    first, second, third = (each.latents for each in drawn)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal(out["samples"], first)


def test_interrupted_in_a_retry(amg, demo, index, lax, conditioning):
    import comfy.model_management as management

    import nodes

    lines = []

    def stop(line):
        lines.append(line)
        if line.startswith("retry 1/2 · step 3"):
            management.interrupt_current_processing()

    report = amg.hook.Report()
    model = amg.hook.attach(
        demo["model"], index, lax, vae=demo["vae"], loop=amg.hook.Loop(2), report=report,
        on_step=stop,
    )  # fmt: skip
    positive, negative = conditioning(COPIED)
    with torch.inference_mode(), pytest.raises(management.InterruptProcessingException):
        nodes.common_ksampler(
            model, 7, STEPS, 4.0, "euler", "normal", positive, negative,
            {"samples": torch.zeros(1, 4, 16, 16)},
        )  # fmt: skip
    assert len(lines) == STEPS + 3
    assert report.latest["not_judged"] == "the run did not end"
    assert amg.hook.KEY not in model.model_options


def test_the_host_is_shown_what_leaves(amg, demo, index, lax, conditioning):
    """SamplerCustomAdvanced takes its second output from what the callback saw last."""
    import comfy.samplers

    shown = []
    model = amg.hook.attach(
        demo["model"], index, lax, vae=demo["vae"], loop=amg.hook.Loop(3), report=None
    )
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conditioning(COPIED, NEW))
    guider.set_cfg(4.0)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        samples = guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas,
            callback=lambda step, x0, x, total: shown.append((step, x0, total)), seed=7,
        )  # fmt: skip
    assert len(shown) > 2 * STEPS
    assert shown[-1][0] == STEPS - 1 and shown[-1][2] == STEPS
    assert torch.allclose(shown[-1][1], samples, atol=1e-5)  # at σ = 0 they are one


def test_a_vae_of_another_model_is_refused_by_name(amg, tiny, index, settings, demo):
    vae = SimpleNamespace(
        first_stage_model=object(), latent_dim=2, output_channels=3, latent_channels=16
    )
    with pytest.raises(amg.AMGError, match="vae: it decodes latents of 16 channels"):
        amg.hook.attach(demo["model"], index, settings("dormant"), vae=vae)


def test_the_index_is_made_ready_once(amg, index):
    matcher = amg.hook.Matcher(index.searcher, index.descriptor)
    device = torch.device("meta")
    decoder = SimpleNamespace(to=lambda device: None)
    first, again = matcher.through(None).to(device), matcher.through(decoder).to(device)
    assert first.searcher is again.searcher
    assert first.searcher.device == device
    assert again.decoder is decoder and first.decoder is None
    assert first._background is again._background
    assert matcher.through(None).to(matcher.searcher.device).searcher is matcher.searcher


def test_gentle_is_made_good_by_retries(amg, run_node, demo, index, conditioning):
    """The softest preset, through the node: what leaves has been measured."""
    inputs = {
        "model": demo["model"], "seed": 107, "steps": 20, "cfg": 4.0, "sampler_name": "euler",
        "scheduler": "normal", "latent_image": {"samples": torch.zeros(2, 4, 16, 16)},
        "denoise": 1.0, "index": index, "preset": "gentle", "clip": demo["clip"],
        "vae": demo["vae"], "despecification": 1.0, "deduplication": 1.0, "dissimilarity": 1.0,
    }  # fmt: skip
    positive, negative = conditioning(COPIED)
    _, report, curves = run_node("AMG_Sampler", positive=positive, negative=negative, **inputs)
    written = json.loads(report)
    assert written["settings"]["preset"] == "gentle"
    assert [verdict["outcome"] for verdict in written["verdicts"]] == ["no_copy", "no_copy"]
    assert len(curves) == len(written["attempts"])


def test_live_text_in_a_widget_is_the_default(amg, demo, index, run_node):
    sampling = amg.module("nodes.sampling")
    new = "looks" + amg.module("nodes.show").MARK
    for text in ("step 20/20 · similarity 0.31 · guarding 0 of 1", "looking…", new):
        assert sampling.loop_of(text, 2, False).if_still_copied == "say so"
        assert sampling.choices_are_valid(text, text) is True
    assert sampling.choices_are_valid(None, None) is True
    assert "not one of the choices" in sampling.choices_are_valid("Stop", None)
    with pytest.raises(amg.AMGError, match="if_still_copied"):
        sampling.loop_of("Stop", 2, False)


def test_the_contract_of_hosts_is_fulfilled(amg):
    assert issubclass(amg.drawing.Drawing, amg.module("amg_core.hosts").Generation)
