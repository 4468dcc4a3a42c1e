"""The nodes themselves, executed as the host executes them."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

STRENGTHS = {"despecification": 1.0, "deduplication": 1.0, "dissimilarity": 1.0}


@pytest.fixture
def inputs(demo, drawing, index):
    return drawing(index=index, vae=demo["vae"], **STRENGTHS)


def test_demo_model_is_stock(amg, demo, encode):
    """The host's classes throughout, so that stock nodes take them."""
    import comfy.model_patcher
    import comfy.sd

    assert isinstance(demo["model"], comfy.model_patcher.ModelPatcher)
    assert isinstance(demo["clip"], comfy.sd.CLIP)
    assert isinstance(demo["vae"], comfy.sd.VAE)
    assert encode("a b")[0][0].shape == (1, 8, 128)
    with torch.inference_mode():
        picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
        latent = demo["vae"].encode(picture)
        assert latent.shape == (1, 4, 16, 16)
        again = demo["vae"].decode(latent)
    assert again.shape == picture.shape
    assert again.min() >= 0
    assert again.max() <= 1


def test_demo_model_agrees_with_its_own_sampler(amg, demo, encode):
    """The host's v-prediction of our UNet is `DemoModel.denoise`."""
    network = amg.module("amg_demo.model").load()
    model = demo["model"].model
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 5
    context = encode("fox face on violet rays")[0][0].repeat(2, 1, 1)
    for level in (14.0, 1.0, 0.1):
        sigma = torch.full((2,), level)
        with torch.inference_mode():
            wanted = network.denoise(x, sigma, context)
            drawn = model.apply_model(x, sigma, c_crossattn=context)
        assert torch.allclose(drawn, wanted, atol=1e-4)


def test_sampler_node(run_node, inputs):
    latent, report, curve = run_node("AMG_Sampler", **inputs)
    assert latent["samples"].shape == (2, 4, 16, 16)
    assert len(json.loads(report)["steps"]) == 3
    assert json.loads(report)["host"]["decoder"] == "demo"
    assert curve.ndim == 4
    assert curve.shape[-1] == 3
    assert 0 <= curve.min() <= curve.max() <= 1


def test_sampler_node_at_strength_0_is_ksampler(run_node, inputs):
    import nodes

    off = dict.fromkeys(STRENGTHS, 0.0)
    guarded = run_node("AMG_Sampler", **inputs | off)[0]["samples"]
    by_one_slider = run_node("AMG_Sampler", **inputs, strength=0.0)[0]["samples"]
    assert torch.equal(by_one_slider, guarded)
    with torch.inference_mode():
        plain = nodes.KSampler().sample(
            *(inputs[name] for name in list(nodes.KSampler.INPUT_TYPES()["required"]))
        )[0]["samples"]
    assert torch.equal(guarded, plain)


def test_strength_1_changes_nothing(run_node, inputs):
    """Prompts from before the slider do not name it."""
    before = run_node("AMG_Sampler", **inputs)[0]["samples"]
    assert torch.equal(run_node("AMG_Sampler", **inputs, strength=1.0)[0]["samples"], before)
    assert not torch.equal(run_node("AMG_Sampler", **inputs, strength=0.4)[0]["samples"], before)


def test_denoise_0_samples_nothing(run_node, inputs):
    latent, report, _ = run_node("AMG_Sampler", **inputs | {"denoise": 0.0})
    assert torch.equal(latent["samples"], inputs["latent_image"]["samples"])
    assert json.loads(report)["steps"] == []


def test_without_clip_the_report_says_so(run_node, inputs):
    report = json.loads(run_node("AMG_Sampler", **inputs | {"clip": None, "vae": None})[1])
    assert report["host"]["captions"] == "no clip"


def test_apply_and_report(run_node, demo, index, inputs):
    import nodes

    widgets = {
        "thresholds": "custom", "schedule": "constant", "threshold_start": 0.0,
        "threshold_end": 0.05, "form": "projection", "exit": 0.0, "start_percent": 0.0,
        "end_percent": 1.0, "margin": 0.2, "iterations": 1, "decoder": "auto",
    }  # fmt: skip
    model, handle = run_node(
        "AMG_Apply", model=demo["model"], index=index, preset="main", clip=demo["clip"],
        **STRENGTHS, **widgets,
    )  # fmt: skip
    with torch.inference_mode():
        (latent,) = nodes.common_ksampler(
            model, 7, 3, 4.0, "euler", "normal", inputs["positive"], inputs["negative"],
            inputs["latent_image"],
        )  # fmt: skip
    report, curve, through = run_node("AMG_Report", run=handle, after=latent)
    assert through is latent
    written = json.loads(report)
    assert len(written["steps"]) == 3
    assert written["settings"]["schedule"] == {"kind": "constant", "start": 0.0, "end": 0.05}
    ways = {way["kind"]: way for way in written["settings"]["guidance"]}
    assert "prompt reduction" not in ways and ways["projection"]["margin"] == 0.2
    assert curve.shape[-1] == 3


def test_under_sampler_custom_advanced(run_node, demo, index, inputs):
    """The node itself, with CFGGuider: the guarded picture of KSampler, and no copy."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import (
        CFGGuider,
        Noise_RandomNoise,
        SamplerCustomAdvanced,
    )

    import nodes

    widgets = {
        "thresholds": "preset", "schedule": "parabolic", "threshold_start": 0.3,
        "threshold_end": 0.5, "form": "preset", "exit": 1.0, "start_percent": 0.0,
        "end_percent": 1.0, "margin": 0.1, "iterations": 0, "decoder": "auto",
    }  # fmt: skip
    model, handle = run_node(
        "AMG_Apply", model=demo["model"], index=index, preset="main", clip=demo["clip"],
        **STRENGTHS, **widgets,
    )  # fmt: skip
    conds = inputs["positive"], inputs["negative"]
    latent, steps = inputs["latent_image"], 12

    def custom(model):
        guide = getattr(CFGGuider(), "get_guider", None) or CFGGuider.execute
        run = getattr(SamplerCustomAdvanced(), "sample", None) or SamplerCustomAdvanced.execute
        (guider,) = guide(model, *conds, 4.0)
        sampling = demo["model"].get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
        sampler = comfy.samplers.sampler_object("euler")
        return run(Noise_RandomNoise(7), guider, sampler, sigmas, latent)[0]["samples"]

    with torch.inference_mode():
        plain, guarded = custom(demo["model"]), custom(model)
        (usual,) = nodes.common_ksampler(model, 7, steps, 4.0, "euler", "normal", *conds, latent)
        pictures = [demo["vae"].decode(x) for x in (plain, guarded)]
    assert torch.equal(guarded, usual["samples"])
    report = json.loads(run_node("AMG_Report", run=handle, after=usual)[0])
    assert min(report["guarded_evaluations"]) > 0
    words = [run_node("AMG_SimilarityProbe", image=x, index=index)[1] for x in pictures]
    assert words[0].count("A copy of memorised-000.webp") == 2
    assert words[1].count("Not a copy") == 2


def test_probe_knows_a_copy(amg, run_node, index, pictures):
    import numpy as np
    from PIL import Image

    path = pictures / "memorised-002.webp"
    picture = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 255
    other = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0))
    batch = torch.stack([picture, picture.flip(1), other])
    similarity, words, nearest, captions = run_node("AMG_SimilarityProbe", image=batch, index=index)
    assert similarity == pytest.approx(0, abs=0.05)
    lines = words.splitlines()
    assert len(lines) == 3
    assert "memorised-002.webp" in lines[0]
    assert "memorised-002.webp" in lines[1]
    assert "ot a copy" in lines[2]
    assert captions.splitlines()[0] == "panda face on teal checks"
    assert nearest.shape[0] == 3


def test_probe_tells_the_page_of_the_closest(amg, index, pictures, monkeypatch):
    """Both pictures saved, both measures with their limits; of a large batch the closest first."""
    import folder_paths
    import numpy as np
    from PIL import Image

    monkeypatch.setattr(amg.module("nodes.probe"), "SIDE", 48)
    copy = Image.open(pictures / "memorised-002.webp").convert("RGB").resize((96, 72))
    noise = torch.rand(18, 72, 96, 3, generator=torch.Generator().manual_seed(0))
    noise[11] = torch.from_numpy(np.array(copy)).float() / 255
    node = amg.nodes["AMG_SimilarityProbe"].PREPARE_CLASS_CLONE({"UNIQUE_ID": "7"})
    with torch.inference_mode():
        shown = node.EXECUTE_NORMALIZED(image=noise, index=index).ui
    (written,) = shown["amg_probe"]
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert (len(written["verdicts"]), written["left"]) == (16, 2)
    first = written["verdicts"][0]
    assert first["copy"]
    assert first["source"] == "memorised-002.webp"
    assert first["nearest"] == shown["images"][11]
    score = [found["score"] for found in written["verdicts"]]
    assert score == sorted(score, reverse=True)
    assert all(found["copy_above"] == 0.4 for found in written["verdicts"])
    folder = folder_paths.get_directory_by_type(first["picture"]["type"])
    with Image.open(os.path.join(folder, first["picture"]["filename"])) as saved:
        assert saved.size == (48, 36)


def test_load_index_follows_the_folder(amg, run_node, build, index, pictures, tmp_path):
    """A changed index is opened anew; an unchanged one comes from the host's cache."""
    load = amg.nodes["AMG_LoadIndex"]
    assert "few" in amg.paths.index_names()
    first = load.fingerprint_inputs(index_name="few")
    assert load.fingerprint_inputs(index_name="few") == first
    assert load.fingerprint_inputs(index_name="gone") == "none"
    (matcher,) = run_node("AMG_LoadIndex", index_name="few")
    assert matcher.searcher.index.count == 24
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(pictures.glob("*.webp"))[:3]:
        shutil.copy(path, fewer)
    build(fewer, "changing")
    before = load.fingerprint_inputs(index_name="changing")
    shutil.copy(sorted(pictures.glob("*.webp"))[5], fewer)
    _, text = build(fewer, "changing")
    assert text.startswith("4 pictures")
    assert load.fingerprint_inputs(index_name="changing") != before


def test_build_names_what_it_skipped(amg, build, pictures, tmp_path):
    shutil.copy(pictures / "memorised-000.webp", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    _, text = build(tmp_path, "odd")
    assert "NOT guarded" in text
    assert "broken.png" in text


def test_build_watches_its_folder(amg, tmp_path, pictures):
    build = amg.nodes["AMG_BuildIndex"]
    inputs = {"folder": str(tmp_path), "name": "w", "descriptor": "pixel"}
    before = build.fingerprint_inputs(**inputs)
    shutil.copy(pictures / "memorised-000.webp", tmp_path)
    assert build.fingerprint_inputs(**inputs) != before
    assert build.fingerprint_inputs(folder=None, name="w", descriptor="pixel") == "linked"


def test_relative_folders_lie_below_the_input_folder(amg):
    import folder_paths

    assert str(amg.paths.picture_folder("cats")).startswith(folder_paths.get_input_directory())


def test_the_words_that_were_left_out_are_said(amg, run_node, drawing, demo, build):
    """The text is that of the nearest picture's caption here, for there is no graph to read it in."""
    index, _ = build(demo["folder"], "words", "compact")
    _, report, _ = run_node(
        "AMG_Sampler", **STRENGTHS, **drawing(index=index, vae=demo["vae"], steps=12, retries=0)
    )
    written = json.loads(report)
    first, second = written["left_out_words"]
    assert len(first) == 2 and first[0] != first[1] and second
    assert set(" ".join(first).split()) < set("fox face on violet rays".split())
    assert " / ".join(first) in amg.module("amg_core.report").words(written)
