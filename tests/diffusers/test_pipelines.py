"""The guard around the classic pipelines: dormant, acting, and gone afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers transformers")

import diffusers
import numpy as np
import torch
from PIL import Image

from amg_core import report as reports
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.run import SamplingRun
from amg_core.schedule import Schedule
from amg_core.similarity.matcher import Matcher
from amg_diffusers import guard

from .tiny import autoencoder, extra_large, flow, plain, unet

ALWAYS = {"schedule": Schedule("constant", -100.0, -100.0)}  # every picture is too close
NEVER = {"schedule": Schedule("constant", 100.0, 100.0)}
PIPELINES = {"plain": plain, "extra large": extra_large, "flow": flow}
SIZE = {"height": 16, "width": 16}
PROMPTS = ("ab cd", "ef gh ij")


def draw(pipe, prompts=PROMPTS, steps=3, cfg=3.0, **more):
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    more = {"num_inference_steps": steps, "guidance_scale": cfg, "output_type": "pt"} | more
    return pipe(list(prompts), generator=seeds, **more)[0]


def left_alone(pipe) -> bool:
    """Whether nothing of the guard is on the pipeline."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    owners = pipe, pipe.scheduler, pipe.vae
    marked = [value for owner in owners for value in vars(owner).values() if hasattr(value, "amg")]
    return not denoiser._forward_hooks and not marked


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_inactive_is_the_pipeline_without_a_guard(make, cfg, tokenizer, index):
    pipe = make(tokenizer)
    before = draw(pipe, cfg=cfg, **SIZE)
    with guard(pipe, index, **NEVER) as guarded:
        assert torch.equal(draw(pipe, cfg=cfg, **SIZE), before)
    report = guarded.report
    assert report["evaluations"] == 3 and report["guarded_evaluations"] == [0, 0]
    assert len(report["verdicts"]) == 2 and report["judged_by"] == "vae"
    assert left_alone(pipe)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_active_changes_the_picture_and_leaves_out_words(make, tokenizer, index):
    pipe = make(tokenizer)
    before = draw(pipe, **SIZE)
    with guard(pipe, index, **ALWAYS) as guarded:
        after = draw(pipe, **SIZE)
    assert guarded.report["guarded_evaluations"] == [3, 3]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    first, second = guarded.report["left_out_words"]
    assert first and set(" ".join(first).split()) <= {"ab", "cd"}
    assert second and set(" ".join(second).split()) <= {"ef", "gh", "ij"}


def test_samples_do_not_change_each_other(tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, **ALWAYS):
        both, one = draw(pipe, **SIZE), draw(pipe, PROMPTS[:1], **SIZE)
    assert torch.allclose(both[:1], one, atol=1e-4)


def test_several_pictures_of_one_prompt_know_their_text(tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, **ALWAYS) as guarded:
        pipe("ab cd", num_images_per_prompt=3, num_inference_steps=2, output_type="pt", **SIZE)
    assert len(guarded.report["verdicts"]) == 3 and all(guarded.report["left_out_words"])


def test_encoded_prompts_keep_their_first_tokens(tokenizer, index):
    pipe = plain(tokenizer)
    tokens = pipe.encode_prompt(["kl mn"], "cpu", 1, False)[0]
    with guard(pipe, index, **ALWAYS) as guarded:
        pipe(prompt_embeds=tokens, negative_prompt_embeds=0 * tokens, num_inference_steps=2, **SIZE)
    report = guarded.report
    assert report["left_out_words"] == [[]] and report["guarded_evaluations"] == [2]
    assert report["steps"][0]["moved"]["despecification"][0] > 0


@pytest.mark.parametrize(
    "options, evaluations", [({"guidance_rescale": 0.7}, 3), ({"eta": 1.0}, 3)]
)
def test_what_pipelines_can_do_besides(options, evaluations, tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, **ALWAYS) as guarded:
        pictures = draw(pipe, **SIZE, **options)
    assert guarded.report["evaluations"] == evaluations and bool(pictures.isfinite().all())


def test_a_scheduler_that_asks_twice_is_guarded_each_time(tokenizer, index):
    pipe = plain(tokenizer, diffusers.HeunDiscreteScheduler())
    with guard(pipe, index, **ALWAYS) as guarded:
        draw(pipe, **SIZE)
    assert guarded.report["guarded_evaluations"] == [5, 5]


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind, channels", [("Img2Img", 4), ("Inpaint", 4), ("Inpaint", 9)])
def test_given_pictures(kind, channels, tokenizer, index):
    pipe = plain(
        tokenizer, kind=getattr(diffusers, f"StableDiffusion{kind}Pipeline"), unet=unet(channels)
    )
    mask = {"mask_image": Image.fromarray(np.eye(16, dtype=np.uint8) * 255), **SIZE}
    given = {"image": picture(), "strength": 0.8} | (mask if kind == "Inpaint" else {})
    before = draw(pipe, PROMPTS[:1], steps=5, **given)
    with guard(pipe, index, **NEVER) as guarded:
        assert torch.equal(draw(pipe, PROMPTS[:1], steps=5, **given), before)
    assert guarded.report["evaluations"] == 4 and guarded.report["verdicts"]
    with guard(pipe, index, **ALWAYS):
        assert not torch.equal(draw(pipe, PROMPTS[:1], steps=5, **given), before)
    assert left_alone(pipe)


def test_the_kept_part_of_an_inpainting_is_checked(tokenizer, index, pictures, monkeypatch):
    """The guard compares with the given part put in, and a kept part that is stored makes a copy."""
    stored = Image.open(pictures / "3.png")
    kept = np.zeros((48, 48), np.uint8)
    kept[:, 36:] = 255  # the right quarter is drawn
    pipe = plain(tokenizer, kind=diffusers.StableDiffusionInpaintPipeline)
    compared = []
    match = Matcher.match
    monkeypatch.setattr(
        Matcher, "match", lambda self, x, sigma: compared.append(x) or match(self, x, sigma)
    )
    given = {"image": stored, "mask_image": Image.fromarray(kept), "height": 48, "width": 48}
    with guard(pipe, index, **NEVER) as guarded:
        draw(pipe, PROMPTS[:1], strength=1.0, **given)
        latents = guarded._given
        assert all(torch.allclose(x[..., :16], latents[..., :16]) for x in compared) and compared
        assert guarded._masks(1).shape == (1, 1, 24, 24)
        torch.manual_seed(1)
        half = torch.cat([to_tensor(stored)[..., :36], torch.rand(1, 3, 48, 12)], dim=-1)
        rest = torch.cat([torch.rand(1, 3, 48, 36), to_tensor(stored)[..., 36:]], dim=-1)
        (part,), (drawn,) = (guarded.runs.judge(each, guarded._masks(1)) for each in (half, rest))
    assert part.copy and not drawn.copy


def test_a_control_net_is_guarded(tokenizer, index):
    network = unet()
    torch.manual_seed(6)
    control = diffusers.ControlNetModel.from_unet(
        network, conditioning_embedding_out_channels=(4, 8)
    )
    for part in control.controlnet_down_blocks:
        torch.nn.init.normal_(part.weight)
    pipe = plain(
        tokenizer,
        kind=diffusers.StableDiffusionControlNetPipeline,
        unet=network,
        controlnet=control,
    )
    before = draw(pipe, image=[picture()] * 2, **SIZE)
    with guard(pipe, index, **NEVER):
        assert torch.equal(draw(pipe, image=[picture()] * 2, **SIZE), before)
    with guard(pipe, index, **ALWAYS) as guarded:
        draw(pipe, image=[picture()] * 2, **SIZE)
    assert all(guarded.report["left_out_words"])


def test_the_neighbours_caption_is_drawn(tokenizer, index):
    """Preset paper, whose deduplication asks for D_n: the captions of the index are "ab cd"."""
    pipe = plain(tokenizer)
    with guard(pipe, index, "paper", despecification=0, dissimilarity=0, **ALWAYS) as guarded:
        draw(pipe, ("kl", "mn"), cfg=7.5, **SIZE)
    assert ("ab cd",) in guarded.encoder._made
    moved = [step["moved"]["deduplication"] for step in guarded.report["steps"]]
    assert np.max(moved) > 0


def test_a_guard_of_no_step_still_checks_the_picture(tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, start_percent=1.0, **ALWAYS) as guarded:
        draw(pipe, **SIZE)
    assert guarded.report["evaluations"] == 0 and len(guarded.report["verdicts"]) == 2


def test_latents_are_checked_as_well(tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, **NEVER) as guarded:
        draw(pipe, output_type="latent", **SIZE)
        draw(pipe, PROMPTS[:1], output_type="latent", **SIZE)
    assert [len(report["verdicts"]) for report in guarded.reports] == [2, 1]


def test_each_drawing_has_its_report_with_seeds(tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, **NEVER) as guarded:
        draw(pipe, **SIZE)
        draw(pipe, PROMPTS[:1], steps=2, **SIZE)
    assert [report["evaluations"] for report in guarded.reports] == [3, 2]
    assert [v["seed"] for v in guarded.reports[0]["verdicts"]] == [7, 8]
    reports.check(guarded.report)
    assert guarded.report["versions"]["diffusers"] == diffusers.__version__ and str(guarded)


@pytest.fixture
def copying(tokenizer, index, pictures, monkeypatch):
    """A pipeline whose VAE decodes everything to a picture of the index."""
    pipe = plain(tokenizer)
    stored = np.array(Image.open(pictures / "3.png"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    monkeypatch.setattr(
        pipe.vae,
        "_decode",
        lambda z, **_: SimpleNamespace(
            sample=torch.from_numpy(stored)[None].repeat(len(z), 1, 1, 1)
        ),
    )
    return pipe


def test_a_copy_that_is_decoded_is_named(copying, index):
    with guard(copying, index, **NEVER, decoder=autoencoder()) as guarded:
        pictures = draw(copying, **SIZE)
    assert [v["source"] for v in guarded.report["verdicts"]] == ["3.png"] * 2
    assert all(v["copy"] for v in guarded.report["verdicts"]) and pictures.max() > 0.5


def test_blank_and_stop(copying, index):
    with guard(copying, index, **NEVER, decoder=autoencoder(), if_still_copied="blank") as guarded:
        assert not draw(copying, **SIZE).any()
    assert guarded.report["verdicts"][0]["outcome"] == "blanked"
    with (
        pytest.raises(AMGError, match=r"3\.png"),
        guard(copying, index, **NEVER, decoder=autoencoder(), if_still_copied="stop"),
    ):
        draw(copying, **SIZE)
    with (
        pytest.raises(AMGError, match=r"3\.png"),
        guard(copying, index, **NEVER, decoder=autoencoder(), if_still_copied="stop"),
    ):
        draw(copying, output_type="latent", **SIZE)
    assert left_alone(copying)


@pytest.fixture
def once_copied(tokenizer, index, pictures, monkeypatch):
    """A pipeline whose first decoded batch has a picture of the index as its first one."""
    pipe = plain(tokenizer)
    stored = np.array(Image.open(pictures / "3.png"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    decode, batches = pipe.vae._decode, []

    def decoded(z, **more):
        picture = decode(torch.nn.functional.interpolate(z, scale_factor=3.0), **more).sample
        if not batches:
            picture[0] = torch.from_numpy(stored)
        batches.append(picture)
        return SimpleNamespace(sample=picture)

    monkeypatch.setattr(pipe.vae, "_decode", decoded)
    return pipe, batches


@pytest.mark.parametrize("output_type", ["pt", "pil", "np"])
def test_only_a_copy_is_drawn_again(once_copied, index, output_type):
    pipe, batches = once_copied
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": output_type, **SIZE}
    with guard(pipe, index, **NEVER, decoder=autoencoder()) as guarded:
        drawn = guarded.draw(list(PROMPTS), generator=seeds, retries=1, **given).images
    assert len(batches) == 2 and len(guarded.reports) == 1
    report = guarded.report
    assert [attempt["samples"] for attempt in report["attempts"]] == [[0, 1], [0]]
    assert report["attempts"][1]["suspects"] == [0] and report["retries"] == 1
    assert [v["attempt"] for v in report["verdicts"]] == [1, 0]
    assert not any(v["copy"] for v in report["verdicts"])
    expected = [batches[1][0] / 2 + 0.5, batches[0][1] / 2 + 0.5]
    for picture, wanted in zip(drawn, expected, strict=True):
        wanted = wanted.clamp(0, 1)
        if output_type == "pt":
            assert torch.equal(picture, wanted)
        else:
            pixels = np.asarray(picture, np.float32) / (255 if output_type == "pil" else 1)
            assert np.abs(pixels.transpose(2, 0, 1) - wanted.numpy()).max() < 0.003
    assert left_alone(pipe)


def test_without_a_copy_draw_is_the_pipeline(tokenizer, index):
    pipe = plain(tokenizer)
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    before = draw(pipe, **SIZE)
    torch.manual_seed(3)
    untouched = pipe("ab", num_inference_steps=2, output_type="pt", **SIZE).images
    state = torch.get_rng_state()
    with guard(pipe, index, **NEVER) as guarded:
        given = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", **SIZE}
        assert torch.equal(guarded.draw(list(PROMPTS), generator=seeds, **given).images, before)
        assert len(guarded.report["attempts"]) == 1
        torch.manual_seed(3)
        short = guarded.draw("ab", num_inference_steps=2, output_type="pt", **SIZE).images
        latents = guarded.draw("ab", num_inference_steps=2, output_type="latent", **SIZE).images
    assert torch.equal(short, untouched) and latents.shape == (1, 4, 8, 8)
    torch.manual_seed(3)
    pipe("ab", num_inference_steps=2, output_type="pt", **SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    with guard(pipe, index, **NEVER) as guarded, pytest.raises(AMGError, match="retries"):
        guarded.draw("ab", retries=-1)


def test_a_copy_to_the_end_is_blanked_or_stopped(copying, index):
    given = {"num_inference_steps": 2, "output_type": "pil", "retries": 1, **SIZE}
    seed = torch.Generator().manual_seed(4)
    with guard(copying, index, **NEVER, decoder=autoencoder(), if_still_copied="blank") as guarded:
        (picture,) = guarded.draw("ab", generator=seed, **given).images
    assert not np.asarray(picture).any() and len(guarded.report["attempts"]) == 2
    state = seed.get_state()
    copying("ab", generator=seed.manual_seed(4), num_inference_steps=2, **SIZE)
    assert torch.equal(seed.get_state(), state)
    with (
        pytest.raises(AMGError, match=r"3\.png"),
        guard(copying, index, **NEVER, decoder=autoencoder(), if_still_copied="stop") as guarded,
    ):
        guarded.draw("ab", **given)
    assert left_alone(copying) and guarded.report["verdicts"][0]["copy"]


@pytest.mark.parametrize("seeded", [True, False])
def test_a_picture_that_was_pushed_off_starts_from_other_noise(
    tokenizer, index, seeded, monkeypatch
):
    pipe = plain(tokenizer)
    monkeypatch.setattr(SamplingRun, "repelled", lambda run, i: i == 1 and not run.records[0].t < 0)
    given = {"num_inference_steps": 2, "output_type": "pt", **SIZE}
    starts = []
    prepare = pipe.prepare_latents
    monkeypatch.setattr(pipe.scheduler, "scale_model_input", lambda x, t: starts.append(x) or x)
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(2)] if seeded else None
    assert prepare == pipe.prepare_latents
    with guard(pipe, index, **NEVER) as guarded:
        guarded.draw(list(PROMPTS), generator=seeds, retries=2, guidance_scale=1.0, **given)
    first, second, third = starts[::2]
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], third[0])
    assert len({tensor[1].sum().item() for tensor in (first, second, third)}) == 3
    if seeded:
        assert [attempt.get("seeds") for attempt in guarded.report["attempts"]] == [
            None,
            [500_008],
            [1_000_008],
        ]


def test_nothing_is_left_after_an_error(tokenizer, index, monkeypatch):
    pipe = plain(tokenizer)
    with pytest.raises(ZeroDivisionError), guard(pipe, index, **NEVER) as guarded:
        draw(pipe, callback_on_step_end=lambda *_: 1 / 0, **SIZE)
    assert left_alone(pipe) and guarded.report["not_judged_code"] == reports.NOT_ENDED
    draw(pipe, **SIZE)


def test_what_cannot_be_guarded_is_refused(tokenizer, index):
    pipe = plain(tokenizer)
    with guard(pipe, index, **NEVER), pytest.raises(AMGError, match="already"), guard(pipe, index):
        pass
    with pytest.raises(AMGError, match="another scheduler"), guard(pipe, index, **NEVER):
        pipe.scheduler = diffusers.EulerDiscreteScheduler()
        draw(pipe, **SIZE)
    other = plain(tokenizer)
    with pytest.raises(AMGError, match="without the guarded model"), guard(other, index, **NEVER):
        other.unet = unet()
        draw(other, **SIZE)
    with pytest.raises(AMGError, match="channels"), guard(other, index, decoder=autoencoder(8)):
        pass
    with pytest.raises(AMGError, match="vae"), guard(object(), index):
        pass


def test_guidance_of_another_kind_is_refused(tokenizer, index):
    class Doubled(diffusers.StableDiffusionPipeline):
        @property
        def guidance_scale(self):
            asked = getattr(self, "asked", 0)
            self.asked = asked + 1
            return self._guidance_scale + asked

    pipe = plain(tokenizer, kind=Doubled)
    with pytest.raises(AMGError, match="Doubled"), guard(pipe, index, **NEVER):
        draw(pipe, **SIZE)
