"""Save Guarded Image and Check a Folder, in the real host."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

PROMPT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "sketch.png"}},
    "2": {"class_type": "LoraLoader", "inputs": {"lora_name": "a.safetensors", "strength_model": 0.8}},
    "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
    "4": {"class_type": "LoraLoader", "inputs": {"lora_name": "unused.safetensors"}},
    "7": {"class_type": "AMG_SaveImage", "inputs": {"images": ["3", 0]}},
}  # fmt: skip


@pytest.fixture
def output(tmp_path, monkeypatch, amg):
    """The host's folders, empty but for two LoRAs."""
    import folder_paths

    for name in ("output", "input", "loras"):
        (tmp_path / name).mkdir()
    for name in ("a", "unused"):
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(name.encode())
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    loras = ([str(tmp_path / "loras")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", loras)
    return tmp_path / "output"


@pytest.fixture
def save(amg, output):
    """`save(images, **inputs)` -> (files, records, what the page is given)."""
    from comfy_api.latest import io

    def run(images, prompt=PROMPT, **inputs):
        before = set(output.iterdir())
        pnginfo = {"workflow": {"nodes": []}, "amg_report": {"5": {"x": "y" * 100}}}
        hidden = {
            io.Hidden.unique_id: "7",
            io.Hidden.prompt: prompt,
            io.Hidden.extra_pnginfo: pnginfo,
        }
        node = amg.nodes["AMG_SaveImage"].PREPARE_CLASS_CLONE(
            {getattr(key, "value", key): value for key, value in hidden.items()}
        )  # fmt: skip
        with torch.inference_mode():
            made = node.EXECUTE_NORMALIZED(images=images, **inputs)
        files = sorted(set(output.iterdir()) - before)
        return files, json.loads(made.args[0]), made.ui

    return run


@pytest.fixture(scope="module")
def pair(pictures):
    """A copy of a picture of the index, and noise: IMAGE (2, 128, 128, 3)."""
    from amg_core.images import to_tensor

    first = sorted(pictures.glob("*.webp"))[0]
    copy = to_tensor(Image.open(first).convert("RGB").resize((128, 128)))
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return torch.cat([copy, noise]).movedim(1, -1)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_saved_checked_and_verified(save, index, pair, form):
    from amg_core.record import stored, verified

    files, records, shown = save(pair, index=index, format=form)
    assert [file.suffix for file in files] == [
        {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[form]
    ] * 2
    assert [image["filename"] for image in shown["images"]] == [file.name for file in files]
    assert [record["answer"]["recreates"] for record in records] == ["yes", "no"]
    assert "copy" in shown["text"][0].lower()
    for file, record in zip(files, records, strict=True):
        data = file.read_bytes()
        texts = dict(stored.texts(data))
        assert json.loads(texts["prompt"]) == PROMPT
        assert json.loads(texts["workflow"]) == {"nodes": []} and "amg_report" in texts
        assert json.loads(texts["amg_record"]) == record
        assert b"trainedAlgorithmicMedia" in data
        assert [finding.what for finding in verified.verify(file) if finding.good is False] == []
    (lora,) = records[0]["models"]
    assert lora["kind"] == "loras" and lora["strengths"] == {"strength_model": 0.8}
    assert len(lora["sha256"]) == 64 and "name" not in lora
    assert records[0]["versions"].keys() >= {"torch", "python"}


def test_names_only_if_wanted(save, index, pair):
    _, (record, _), _ = save(pair, index=index, privacy="full", model_hashes=False)
    assert record["nearest"][0]["source"].endswith(".webp") and record["index"]["name"] == "few"
    assert record["models"][0]["name"] == "a.safetensors" and record["models"][0]["sha256"] == ""


def test_without_an_index(save, pair):
    files, records, shown = save(pair[:1], prompt=None)
    assert len(files) == 1 and records == [] and "NOT checked" in shown["text"][0]


def test_pixels_are_those_of_save_image(save, pair, output):
    import nodes

    (file,), _, _ = save(pair[1:])
    nodes.SaveImage().save_images(pair[1:], "other")
    (theirs,) = output.glob("other*")
    with Image.open(file) as ours, Image.open(theirs) as other:
        assert ours.tobytes() == other.tobytes()


def test_a_long_workflow_lies_beside(save, pair):
    long = PROMPT | {"8": {"class_type": "Note", "inputs": {"text": "x" * 70_000}}}
    files, _, shown = save(pair[1:], prompt=long, format="jpeg")
    assert [file.name for file in files] == [
        "ComfyUI_00001_.jpg",
        "ComfyUI_00001_.jpg.workflow.json",
    ]
    assert json.loads(files[1].read_text()) == {"nodes": []}
    assert "beside the picture" in shown["text"][0]


def test_a_wrong_report_is_refused(save, index, pair, amg):
    with pytest.raises(amg.AMGError, match="no report"):
        save(pair, index=index, report="nothing")
    with pytest.raises(amg.AMGError, match="credentials"):
        save(pair, index=index, credentials="mine")


def test_the_attempts_of_a_run(save, index, drawing, run_node, demo):
    strengths = dict.fromkeys(("despecification", "deduplication", "dissimilarity"), 1.0)
    more = {"index": index, "vae": demo["vae"], "retries": 1} | strengths
    latent, report, _ = run_node("AMG_Sampler", **drawing(**more))
    images = demo["vae"].decode(latent["samples"])
    _, records, _ = save(images, index=index, report=report)
    run = json.loads(report)
    for number, record in enumerate(records):
        mine = [a for a in run["attempts"] if number in a["samples"]]
        assert len(record["attempts"]) == len(mine) and record["seed"] == 7
        assert record["settings"]["preset"] == run["settings"]["preset"] == "main"
        assert record["drawn_with"]["hash"] == run["index"]["hash"]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_signed_with_ingredients(save, index, pair, output, form):
    pytest.importorskip("c2pa", reason="needs c2pa-python")
    from amg_core.record import credentials, verified

    (sketch, _), _, _ = save(pair, credentials="test certificate")
    sketch.rename(output.parent / "input" / "sketch.png")
    files, records, shown = save(pair, index=index, credentials="test certificate", format=form)
    assert "proves no identity" in shown["text"][0]
    for file, record in zip(files, records, strict=True):
        findings = verified.verify(file)
        assert [finding.what for finding in findings if finding.good is False] == []
        found = credentials.read(file.read_bytes(), {"jpeg": "JPEG"}.get(form, form.upper()))
        assert found.credited == ("sketch.png",) and found.record == record
        assert found.source_type == credentials.SOURCE_TYPE
    _, _, shown = save(pair[:1])
    assert "sketch.png" in shown["text"][0] and "set credentials" in shown["text"][0]


def test_without_a_certificate(save, pair, amg, output):
    pytest.importorskip("c2pa", reason="needs c2pa-python")
    with pytest.raises(amg.AMGError, match=r"certificate\.pem"):
        save(pair, credentials="own certificate")
    assert list(output.iterdir()) == []


def test_without_the_package(save, pair, amg, output, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr(amg.module("amg_core.optional"), "_broken", {})
    with pytest.raises(amg.AMGError, match="pip install c2pa-python"):
        save(pair, credentials="test certificate")
    assert list(output.iterdir()) == []


def test_a_folder_is_checked(run_node, index, pair, output, amg):
    Image.fromarray((pair[0] * 255).byte().numpy()).save(output / "copy.png")
    Image.fromarray((pair[1] * 255).byte().numpy()).save(output / "new.jpg")
    (output / "broken.png").write_bytes(b"no")
    summary, names = run_node("AMG_CheckFolder", folder=str(output), index=index)
    assert (
        names == "copy.png" and "broken.png" in summary and "Pictures with a record: 2" in summary
    )
    assert sorted(path.name for path in output.glob("*.json")) == [
        "copy.png.amg.json",
        "new.jpg.amg.json",
    ]
    before = (output / "copy.png.amg.json").stat().st_mtime_ns
    assert run_node("AMG_CheckFolder", folder=".", index=index) == (summary, names)
    assert (output / "copy.png.amg.json").stat().st_mtime_ns == before
    with pytest.raises(amg.AMGError, match="empty"):
        run_node("AMG_CheckFolder", folder=" ", index=index)
