"""What can go wrong says what it is, where, and what to do."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture
def inputs(tiny, prompts, index):
    return {
        "model": tiny(), "seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler",
        "scheduler": "normal", "positive": prompts[0], "negative": prompts[1],
        "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "denoise": 1.0, "index": index,
        "preset": "main", "despecification": 1.0, "deduplication": 1.0, "dissimilarity": 1.0,
    }  # fmt: skip


@pytest.fixture
def custom(tiny, index):
    return {
        "model": tiny(), "index": index, "preset": "main", "despecification": 1.0,
        "deduplication": 1.0, "dissimilarity": 1.0, "thresholds": "custom",
        "schedule": "parabolic", "threshold_start": 0.2, "threshold_end": 0.4, "form": "preset",
        "exit": 1.0, "start_percent": 0.0, "end_percent": 1.0, "margin": 0.1, "iterations": 0,
        "decoder": "auto",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["despecification", "deduplication", "dissimilarity"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_bad_strengths(amg, run_node, inputs, name, value):
    with pytest.raises(amg.AMGError, match=name):
        run_node("AMG_Sampler", **inputs | {name: value})


@pytest.mark.parametrize("name", ["threshold_start", "threshold_end"])
@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_thresholds_that_never_guard(amg, run_node, custom, name, value):
    with pytest.raises(amg.AMGError, match=rf"{name}.*never guard"):
        run_node("AMG_Apply", **custom | {name: value})


@pytest.mark.parametrize("name", ["start_percent", "margin", "exit"])
def test_other_numbers_that_are_none(amg, run_node, custom, name):
    with pytest.raises(amg.AMGError, match=name.split("_")[0]):
        run_node("AMG_Apply", **custom | {name: math.nan})


@pytest.mark.parametrize("name", ["thresholds", "schedule", "decoder", "form", "preset"])
def test_choices_that_are_none(amg, run_node, custom, name):
    with pytest.raises(amg.AMGError, match=rf"{name}.*hoose one of"):
        run_node("AMG_Apply", **custom | {name: "odd"})


@pytest.mark.parametrize("name", ["descriptor", "mode"])
def test_choices_of_index_from_images(amg, run_node, name):
    inputs = {"images": [torch.zeros(1, 8, 8, 3)], "captions": [""], "name": ["x"],
              "descriptor": ["pixel"], "mode": ["replace"]}  # fmt: skip
    with pytest.raises(amg.AMGError, match=rf"{name}: 'odd'.*hoose one of"):
        run_node("AMG_IndexFromImages", **inputs | {name: ["odd"]})
    assert not (amg.paths.index_folder() / "x").exists()


@pytest.mark.parametrize("name", ["sampler_name", "scheduler", "preset"])
def test_samplers_that_are_none(amg, run_node, inputs, name):
    """The host would quietly take the first in its list."""
    with pytest.raises(amg.AMGError, match=rf"{name}: 'odd'"):
        run_node("AMG_Sampler", **inputs | {name: "odd"})


def test_video_latent(amg, run_node, inputs):
    latent = {"samples": torch.zeros(1, 4, 2, 16, 16)}
    with pytest.raises(amg.AMGError, match=r"latent_image.*Video"):
        run_node("AMG_Sampler", **inputs | {"latent_image": latent})


def test_wrong_number_of_channels(amg, tiny, index):
    decoder = amg.decoding.choose(tiny().model.latent_format)
    with pytest.raises(amg.AMGError, match="latent_image has 16 channels and decoder linear"):
        amg.decoding.check(decoder, torch.zeros(1, 16, 8, 8))


def test_no_index(amg, run_node, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "amg_indexes", ([str(tmp_path)], {".json"})
    )
    assert amg.paths.index_names() == [amg.paths.NO_INDEX]
    with pytest.raises(amg.AMGError) as caught:
        run_node("AMG_LoadIndex", index_name=amg.paths.NO_INDEX)
    assert str(tmp_path) in str(caught.value)
    assert "Build Memorization Index" in str(caught.value)
    with pytest.raises(amg.AMGError, match="'gone'"):
        run_node("AMG_LoadIndex", index_name="gone")
    with pytest.raises(amg.AMGError, match="no index named"):
        run_node("AMG_LoadIndex", index_name="../gone")


def test_damaged_index(amg, run_node, index):
    import shutil

    folder = amg.paths.index_folder()
    shutil.copytree(folder / "few", folder / "damaged")
    try:
        manifest = folder / "damaged" / "manifest.json"
        manifest.write_text("{}")
        with pytest.raises(amg.AMGError, match=r"manifest\.json"):
            run_node("AMG_LoadIndex", index_name="damaged")
    finally:
        shutil.rmtree(folder / "damaged")


def test_missing_sscd_weights(amg, build, pictures):
    with pytest.raises(amg.AMGError, match=r"sscd_disc_mixup.*models/amg"):
        build(pictures, "x", "sscd")
    assert not (amg.paths.index_folder() / "x").exists()


def test_wrong_sscd_weights(amg, build, pictures):
    import folder_paths

    (folder,) = folder_paths.get_folder_paths("amg")
    path = Path(folder) / "sscd_disc_mixup.torchvision.pt"
    path.write_bytes(b"not weights")
    folder_paths.filename_list_cache.pop("amg", None)
    try:
        with pytest.raises(amg.AMGError, match=r"sscd_disc_mixup.torchvision.pt"):
            build(pictures, "x", "sscd")
    finally:
        path.unlink()
        folder_paths.filename_list_cache.pop("amg", None)


def test_index_of_another_descriptor(amg, index):
    """An index whose descriptor differs from ours, if only in its preprocessing, is refused."""
    import dataclasses

    opening = amg.module("nodes.opening")
    real = opening.make_descriptor("pixel")
    other = dataclasses.replace(real.spec, preprocessing="other/9")
    with pytest.raises(amg.AMGError, match="other/9"):
        opening.descriptor_of(other)
    real.spec = other
    with pytest.raises(amg.AMGError, match="other/9"):
        opening.open_matcher(amg.paths.find_index("few"), real)


def test_every_file_that_may_be_the_weights_is_tried(amg, tmp_path, monkeypatch):
    """CLIP has no file name of its own: the one that made the index is found among others."""
    import folder_paths

    opening = amg.module("nodes.opening")
    spec = opening.make_descriptor("pixel").spec
    for name in ("clip_b.safetensors", "a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    files = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", files)
    folder_paths.filename_list_cache.pop("clip_vision", None)
    seen = []

    def for_spec(spec, file):
        seen.append(file.name)
        if file.name != "b.safetensors":
            raise amg.AMGError(f"{file.name} is another")
        return "found"

    monkeypatch.setattr(amg.module("amg_core.descriptors.registry"), "for_spec", for_spec)
    clip = spec.__class__("clip_vit_b_32", "cosine", "x", (224,))
    assert opening.descriptor_of(clip) == "found"
    assert seen == ["a.safetensors", "b.safetensors"]
    (tmp_path / "b.safetensors").unlink()
    folder_paths.filename_list_cache.pop("clip_vision", None)
    with pytest.raises(amg.AMGError, match="is another"):
        opening.descriptor_of(clip)
    folder_paths.filename_list_cache.pop("clip_vision", None)


def test_missing_clip_weights(amg):
    opening = amg.module("nodes.opening")
    spec = opening.make_descriptor("pixel").spec
    clip = spec.__class__("clip_vit_b_32", "cosine", "crop224-bicubic-clip-gelu-heads12/1", (224,))
    with pytest.raises(amg.AMGError, match="clip_vision"):
        opening.descriptor_of(clip)


@pytest.mark.parametrize("name", ["", "  ", "a/b", "..", ".hidden", "a\\b", "c:d", "x\ny"])
def test_names_of_indexes(amg, build, pictures, name):
    with pytest.raises(amg.AMGError, match="name:"):
        build(pictures, name and name + " ")


def test_picture_folders(amg, build, tmp_path):
    for folder, words in (("", "folder: it is empty"), (str(tmp_path / "no"), "does not exist")):
        with pytest.raises(amg.AMGError, match=words):
            build(folder, "x")
    with pytest.raises(amg.AMGError, match="No picture files"):
        build(tmp_path, "x")


@pytest.mark.skipif(os.sep != "/", reason="these are paths here")
@pytest.mark.parametrize(
    "folder", ["C:\\Users\\me\\cats", "d:/cats", "\\\\nas\\cats", "cats\\dogs", '"C:\\cats"']
)
def test_paths_of_windows(build, amg, folder):
    with pytest.raises(amg.AMGError, match=r"is a path of Windows.*/mnt/c/"):
        build(folder, "x")


def test_addresses_of_files(amg, tmp_path):
    folder = tmp_path / "my cats"
    for text in (folder.as_uri(), f"file://localhost{folder}", f" '{folder}' ", str(folder)):
        assert amg.paths.picture_folder(text) == folder
    odd = tmp_path / "a\\b"  # a name that is allowed here
    odd.mkdir()
    assert amg.paths.picture_folder(str(odd)) == odd


def test_report_before_any_run(amg, run_node, custom):
    _, report = run_node("AMG_Apply", **custom)
    with pytest.raises(amg.AMGError, match="after"):
        run_node("AMG_Report", run=report, after=None)


def test_probe_without_pictures(amg, run_node, index):
    with pytest.raises(amg.AMGError, match="image"):
        run_node("AMG_SimilarityProbe", image=torch.zeros(0, 8, 8, 3), index=index)
