"""Indexes of the model's own latents: made with the host's VAE, guarding without a decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def latent_index(build, demo):
    """(index, summary) of all of the demo model's training pictures."""
    return build(
        demo["folder"], "demo-latents", descriptor="latent", vae=demo["vae"], model=demo["model"]
    )


@pytest.fixture(scope="module")
def draw(run_node, drawing):
    """`draw(index, **changes)` -> (latent, report, curve) of AMG Sampler on a memorised prompt."""

    def run(index, **changes):
        inputs = drawing(
            steps=12, index=index, despecification=1.0, deduplication=1.0, dissimilarity=1.0
        )
        return run_node("AMG_Sampler", **inputs | changes)

    return run


def test_what_is_in_the_index(latent_index, demo):
    """Rows are the VAE's latents, as the sampler sees them."""
    matcher, text = latent_index
    assert text.startswith("632 pictures")
    spec = matcher.searcher.index.spec
    assert spec.id == "latent_demo"
    assert spec.preprocessing == "vae-128px-c4-square-area/1"
    assert spec.scales == (8, 16)
    assert len(spec.weights_sha256) == 64
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latent = demo["vae"].encode(picture)
    row = matcher.descriptor.embed(picture.movedim(-1, 1), 16)
    assert torch.allclose(row, latent.flatten(1), atol=1e-5)
    assert not row.requires_grad


def test_guarded_end_to_end(amg, run_node, latent_index, index, demo, draw, monkeypatch):
    """The loaded index knows no VAE; the guard decodes nothing; the picture is no copy."""
    (loaded,) = run_node("AMG_LoadIndex", index_name="demo-latents")

    def never(*_):
        raise AssertionError("a decoder was asked for")

    monkeypatch.setattr(amg.decoding, "choose", never)
    guarded, report, curve = draw(loaded, vae=demo["vae"])
    written = json.loads(report)
    assert written["host"]["decoder"] == "none"
    assert written["descriptor"]["id"] == "latent_demo"
    assert min(written["guarded_evaluations"]) > 0
    assert curve.shape[-1] == 3
    assert written["judged_by"] == "vae"
    assert all(verdict["outcome"] == "no_copy" for verdict in written["verdicts"])
    monkeypatch.undo()
    off = dict.fromkeys(("despecification", "deduplication", "dissimilarity"), 0.0)
    plain, report, _ = draw(loaded, **off)
    written = json.loads(report)
    assert written["judged_by"] == "demo"  # no vae connected
    assert all(verdict["outcome"] == "copy" for verdict in written["verdicts"])
    with torch.inference_mode():
        pictures = [demo["vae"].decode(latent["samples"]) for latent in (plain, guarded)]
    for judge in (index, latent_index[0]):  # one that never steered, and the one that did
        words = [run_node("AMG_SimilarityProbe", image=x, index=judge)[1] for x in pictures]
        assert words[0].count("A copy of memorised-000.webp") == 2
        assert "A copy of" not in words[1]
        assert "Too close" not in words[1]
    own = amg.module("amg_core.similarity.verdict").thumbnail(index.searcher.index, 0)[None]
    alike = [
        amg.module("amg_core.similarity.verifier").zncc(x.movedim(-1, 1), own) for x in pictures
    ]
    assert alike[0].min() > 0.9
    assert alike[1].max() < 0.5


def test_dormant_is_identical(run_node, latent_index, demo, draw):
    """Nothing near: the very picture of KSampler."""
    import nodes

    far = torch.rand(12, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    matcher, _ = run_node(
        "AMG_IndexFromImages", images=[far], captions=[""], name=["far"], descriptor=["latent"],
        mode=["replace"], vae=[demo["vae"]], model=[demo["model"]],
    )  # fmt: skip
    latent, report, _ = draw(matcher)
    assert json.loads(report)["guarded_evaluations"] == [0, 0]
    zero = dict.fromkeys(("despecification", "deduplication", "dissimilarity"), 0.0)
    plain, _, _ = draw(latent_index[0], **zero)
    assert torch.equal(latent["samples"], plain["samples"])
    assert nodes is not None


def test_another_family_is_refused_by_name(amg, latent_index, tiny, settings):
    with pytest.raises(amg.AMGError, match=r"demo-latents.*family demo.*is of sd15"):
        amg.hook.attach(tiny(), latent_index[0], settings("active"))


@pytest.mark.parametrize("shape", [(1, 4, 2, 16, 16), (1, 16, 16, 16)])
def test_latents_of_another_shape(amg, latent_index, draw, shape, monkeypatch):
    import comfy.sample

    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", lambda _model, latent: latent)
    with pytest.raises(amg.AMGError, match=r"latent_image has shape.*demo-latents.*4 channels"):
        draw(latent_index[0], latent_image={"samples": torch.zeros(*shape)})


def test_finished_pictures_need_the_encoder(amg, run_node, latent_index, demo, pictures):
    (loaded,) = run_node("AMG_LoadIndex", index_name="demo-latents")
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    both = {"vae": demo["vae"], "model": demo["model"]}
    with pytest.raises(amg.AMGError, match="connect vae and model"):
        run_node("AMG_SimilarityProbe", image=image, index=loaded)
    with pytest.raises(amg.AMGError, match="Connect vae and model"):
        run_node("AMG_SimilarityProbe", image=image, index=loaded, vae=demo["vae"])
    known = run_node("AMG_SimilarityProbe", image=image, index=latent_index[0])
    assert run_node("AMG_SimilarityProbe", image=image, index=loaded, **both)[:2] == known[:2]


def test_another_encoder_is_refused(amg, run_node, latent_index, demo, tiny):
    import copy

    other = copy.copy(demo["vae"])
    other.first_stage_model = copy.deepcopy(demo["vae"].first_stage_model)
    (loaded,) = run_node("AMG_LoadIndex", index_name="demo-latents")
    image = torch.zeros(1, 64, 64, 3)

    def judge(**inputs):
        return run_node("AMG_SimilarityProbe", image=image, index=loaded, **inputs)

    with torch.no_grad():  # a VAE that only decodes otherwise makes the same latents
        next(other.first_stage_model.decoder.parameters()).add_(1)
    judge(vae=other, model=demo["model"])
    with torch.no_grad():
        next(other.first_stage_model.encoder.parameters()).add_(1)
    with pytest.raises(amg.AMGError, match="another encoder"):
        judge(vae=other, model=demo["model"])
    with pytest.raises(amg.AMGError, match=r"family demo.*is of sd15"):
        judge(vae=demo["vae"], model=tiny())


def test_the_hash_does_not_depend_on_the_precision(amg, demo):
    """Hosts load one file as bfloat16 on a GPU and as float32 elsewhere."""
    import copy

    latents = amg.module("nodes.latents")
    half = copy.copy(demo["vae"])
    half.first_stage_model = copy.deepcopy(demo["vae"].first_stage_model).to(torch.bfloat16)
    assert latents._encoder_sha256(half) == latents._encoder_sha256(demo["vae"])


@pytest.mark.parametrize("missing", [("vae",), ("model",), ("vae", "model")])
def test_what_building_needs(amg, build, demo, pictures, missing):
    given = {name: demo[name] for name in ("vae", "model") if name not in missing}
    with pytest.raises(amg.AMGError, match="Connect vae and model"):
        build(pictures, "x", descriptor="latent", **given)
    assert not (amg.paths.index_folder() / "x").exists()


def test_a_vae_of_another_model(amg, build, demo, pictures):
    import copy

    other = copy.copy(demo["vae"])
    other.latent_channels = 16
    with pytest.raises(amg.AMGError, match=r"vae: .*16 channels.*draws 4"):
        build(pictures, "x", descriptor="latent", vae=other, model=demo["model"])


def test_families(amg):
    import comfy.latent_formats as formats

    known = {formats.SD15: "sd15", formats.SDXL: "sdxl", formats.SD3: "sd3", formats.Flux: "flux",
             formats.SDXL_Playground_2_5: "sdxlplayground25"}  # fmt: skip
    for kind, word in known.items():
        assert amg.module("nodes.latents").family(kind()) == word


def test_adding_to_a_latent_index(amg, run_node, demo, latent_index):
    images = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(3))
    inputs = {"captions": [""], "name": ["more-latents"], "descriptor": ["latent"]}
    both = {"vae": [demo["vae"]], "model": [demo["model"]]}
    for image in images:
        matcher, text = run_node(
            "AMG_IndexFromImages", images=[image[None]], mode=["add"], **inputs, **both
        )
    assert text.startswith("2 pictures")
    with pytest.raises(amg.AMGError, match="Connect vae and model"):
        run_node("AMG_IndexFromImages", images=[images], mode=["add"], **inputs)
    (whole,) = run_node("AMG_CombineIndexes", index_1=latent_index[0], index_2=matcher)
    assert whole.searcher.index.count == 634


@pytest.fixture
def taesd(amg):
    """A small encoder with random weights, where ComfyUI keeps them; gone after the test."""
    import folder_paths
    import safetensors.torch

    encoder = amg.module("amg_core.descriptors.latent").TAESDEncoder()
    (folder,) = folder_paths.get_folder_paths("vae_approx")
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder) / "taesd_encoder.safetensors"
    safetensors.torch.save_file(encoder.state_dict(), path)
    folder_paths.filename_list_cache.pop("vae_approx", None)
    yield path
    path.unlink()
    folder_paths.filename_list_cache.pop("vae_approx", None)


def test_taesd_encodes_for_its_own_indexes(amg, taesd):
    """Indexes of the command line: the encoder is found by itself, and not needed to guard."""
    import folder_paths

    opening, descriptors = amg.module("nodes.opening"), amg.module("amg_core.descriptors.registry")
    spec = descriptors.create("latent", taesd, side=64).spec
    assert opening.descriptor_of(spec).encode(torch.zeros(1, 3, 80, 64)).shape == (1, 4, 8, 8)
    decoder = taesd.with_name("taesd_decoder.safetensors")
    taesd.rename(decoder)  # no encoder by that name
    folder_paths.filename_list_cache.pop("vae_approx", None)
    try:
        assert amg.paths.weights(descriptors.named("latent")) == []
        without = opening.descriptor_of(spec)
        assert without.spec == spec
        with pytest.raises(amg.AMGError, match="encoder"):
            without.encode(torch.zeros(1, 3, 64, 64))
    finally:
        decoder.rename(taesd)
