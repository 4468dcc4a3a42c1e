"""The public benchmark from end to end on the embedded model, with its own lists and pictures."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers transformers")

import torch

from amg_core.errors import AMGError
from amg_demo.model import PICTURES
from amg_demo.pipeline import pipeline
from amg_diffusers.opening import open_matcher
from benchmarks.public import __main__ as program
from benchmarks.public import detectors, methods, records, remedies
from benchmarks.public.model import Model

STEPS, FIRST = 8, 1000
OTHERS = 3


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A memorised prompt as a jsonl list, its type, two ordinary captions, and pictures named by key."""
    folder = tmp_path_factory.mktemp("public")
    rows = sorted(
        map(json.loads, (PICTURES / "metadata.jsonl").read_text("utf-8").splitlines()),
        key=lambda row: -row["duplicates"],
    )
    (folder / "pictures").mkdir()
    for i, row in enumerate([rows[0], *rows[-OTHERS:]]):
        shutil.copy(PICTURES / row["file_name"], folder / "pictures" / f"{100 + i}.webp")
    line = {"caption": rows[0]["text"], "index": 100, "url": "http://a.example/1.jpg"}
    (folder / "memorised.jsonl").write_text(json.dumps(line) + "\n")
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["", "Caption", "URL", "type", "mean_sscd", "max_sscd", "Index"])
        table.writerow([0, rows[0]["text"], line["url"], "VM", 0.8, 0.9, 100])
    captions = ["nothing of the kind", "neither is this"]
    coco = [{"image_id": i, "id": i, "caption": text} for i, text in enumerate(captions)]
    (folder / "captions.json").write_text(json.dumps({"annotations": coco}))
    return folder


def arguments(given, out, *more):
    return [
        "--model", "embedded", "--memorised", str(given / "memorised.jsonl"),
        "--labels", str(given / "labels.csv"), "--ordinary", str(given / "captions.json"),
        "--pictures", str(given / "pictures"), "--out", str(out), "--steps", str(STEPS), "--cfg", "4",
        "--seeds", "1", "--first", str(FIRST), "--device", "cpu", "--threads", "1", *more,
    ]  # fmt: skip


def test_from_the_lists_to_the_tables(given, tmp_path, capsys, monkeypatch):
    some = ("--methods", "RNA", "main")
    assert program.main(arguments(given, tmp_path, *some, "--shard", "1/2")) == 0
    first = records.read(tmp_path)
    assert {(line["list"], line["number"]) for line in first} == {("memorised", 0), ("ordinary", 1)}
    assert program.main(arguments(given, tmp_path, *some, "--shard", "2/2")) == 0
    lines = records.read(tmp_path)
    drawn = {(line["method"], line["list"]): line for line in lines}
    assert len(lines) == 3 * 4  # three methods and the detectors
    assert (
        drawn["plain", "memorised"]["outcome"] == "copy"
        and drawn["plain", "memorised"]["type"] == "VM"
    )
    assert drawn["plain", "memorised"]["nearest"] == "100.webp"
    guarded = drawn["main", "memorised"]
    assert guarded["outcome"] != "copy" and guarded["acted"] and guarded["rows"] > 2 * STEPS
    assert drawn["main", "ordinary"]["sha256"] == drawn["plain", "ordinary"]["sha256"]
    assert drawn["plain", "ordinary"]["rows"] == 2 * STEPS
    text = (tmp_path / "tables.md").read_text()
    assert "### memorised, VM\n" in text and "detectors: 1 memorised against 2 ordinary" in text
    assert "FID: --inception FILE" in text and "not measured" in text
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["tables"]["ordinary"]["main"]["bit-identical %"][0] == 100
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") == 3 * 3 and "<script" not in page

    def nothing(*_):
        raise AssertionError("something was drawn again")

    monkeypatch.setattr(program.run, "draw", nothing)
    monkeypatch.setattr(program.run, "detect", nothing)
    assert program.main(arguments(given, tmp_path, *some)) == 0
    assert program.main(arguments(given, tmp_path, "--tables")) == 0
    capsys.readouterr()
    assert program.main(arguments(given, tmp_path)) == 1, "all methods"
    assert "no CLIP tokenizer" in capsys.readouterr().out
    assert program.main([*arguments(given, tmp_path), "--steps", "9"]) == 1
    assert "steps was 8" in capsys.readouterr().out


def test_a_dry_run_draws_nothing(given, tmp_path, capsys):
    out = tmp_path / "out"
    assert program.main(arguments(given, out, "--dry-run", "--rate", "10", "--seeds", "4")) == 0
    text = capsys.readouterr().out
    assert "3 prompts (1 memorised, 2 ordinary), 4 seeds" in text and not out.exists()
    assert "--sscd-large sscd_disc_large" in text and "Not given: --hard" in text
    assert program.main(["--dry-run"]) == 1


@pytest.fixture(scope="module")
def model(given, tmp_path_factory):
    pipe = pipeline()
    index = tmp_path_factory.mktemp("index") / "index"
    program.build(given / "pictures", index, program.descriptors.create("compact"))
    return Model(pipe, open_matcher(index, pipe.vae), 2, 4.0)


def test_the_baselines_change_the_prompt_and_nothing_else(model):
    seeds, text = [1, 2], "fox face on violet rays"
    plain = methods.METHODS["plain"].draw(model, text, seeds).pictures
    assert plain.shape == (2, 3, 128, 128) and float(plain.max()) <= 1
    for name in ("GNI", "RT code", "CWR code", "RNA code"):
        drawn = methods.METHODS[name].draw(model, text, seeds).pictures
        again = methods.METHODS[name].draw(model, text, seeds[1:]).pictures
        assert not torch.equal(drawn, plain)
        assert torch.allclose(drawn[1:], again, atol=1e-4), "of its own seed alone"
    with pytest.raises(AMGError, match="padding"):
        methods.METHODS["padding"].check(model)
    for name in ("plain", "GNI", "Wen", "delayed", "main"):
        methods.METHODS[name].check(model)
    with pytest.raises(AMGError, match="above 1"):
        methods.METHODS["opposite"].check(replace(model, cfg_scale=1.0))
    word = methods.vocabulary(model.pipe.tokenizer)(torch.Generator().manual_seed(0))
    assert word in model.pipe.tokenizer.get_vocab()


def test_the_detectors_are_those_of_the_demo(model):
    """The same predictions as `benchmarks.detection.drawing` makes of the same noise."""
    from amg_demo import model as demo
    from benchmarks.detection import drawing

    text, seeds = "fox face on violet rays", [3, 4]
    found = detectors.scores(model, text, seeds)
    noise = torch.stack(
        [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    (expected,) = drawing.measure(demo.load(), [text], noise, detectors.statistics.LOW)
    for name, value in found.items():
        assert value == pytest.approx(expected[-1][name], rel=1e-3, abs=1e-4), name


def test_figures_of_detectors_by_hand():
    found = [{"norm": value, "alignment": 0.0} for value in (3.0, 4.0, 1.0, 2.0, 3.5)]
    made = detectors.figures(found, [True, True, False, False, False])
    assert made["norm"]["AUC"][0] == pytest.approx(5 / 6)
    assert made["norm"]["TPR at 1 % FPR"][0] == 0.5 and "combined" not in made


def test_without_an_index_a_prompt_that_draws_different_pictures_is_left_alone(model, monkeypatch):
    plain = methods.METHODS["plain"].draw(model, "any", [5])
    monkeypatch.setattr(methods, "likeness", lambda two: 0.5)
    assert torch.equal(methods.METHODS["guard"].draw(model, "any", [5]).pictures, plain.pictures)
    scores = iter([0.9, 0.9, 0.9, 0.1])  # memorised; led to another; then away
    monkeypatch.setattr(methods, "likeness", lambda two: next(scores))
    stored = []
    under = methods._under
    monkeypatch.setattr(
        methods,
        "_under",
        lambda *given: stored.append(given[1].index.count) or under(*given),
    )
    drawn = methods.METHODS["guard"].draw(model, "any", [5])
    assert drawn.pictures.shape == plain.pictures.shape and len(drawn.acted) == 1
    assert stored == sorted(stored) and stored[0] < stored[-1] and len(stored) == 5


def test_late_guidance_is_none_at_first_and_leaves_nothing_behind(model):
    text, seeds = "fox face on violet rays", [1, 2]
    plain, none = (model.draw(seeds, prompt=[prompt] * 2) for prompt in (text, ""))

    def drawn(scale, until):
        with remedies.delayed(model, scale, False, until):
            return model.draw(seeds, prompt=[text] * 2)

    assert torch.equal(drawn(model.cfg_scale, 1.0), plain) and torch.equal(drawn(0.0, 0.0), plain)
    assert torch.allclose(drawn(0.0, 1.1), none, atol=1e-3)
    half = drawn(0.0, 0.35)
    assert not torch.equal(half, none) and float((half - plain).abs().max()) > 0.05
    assert "step" not in vars(model.pipe.scheduler) and not model.denoiser._forward_hooks
    assert torch.equal(methods.METHODS["delayed"].draw(model, text, seeds).pictures, half)


def test_wens_remedy_lowers_the_norm_that_the_detector_measures(model):
    text, seeds = "fox face on violet rays", [3]
    before = detectors.scores(model, text, seeds)["norm"]
    given, empty = model.encode([text])
    same, _ = remedies.adapted(model, text, seeds, 2 * before)
    assert torch.equal(same, given)
    moved, _ = remedies.adapted(model, text, seeds, 0.9 * before)
    with torch.no_grad():
        noise = model.noise(seeds)
        high = detectors.predictions(model, noise, detectors.last(model), moved, empty)
    assert float(detectors.statistics.norm(high)) <= 0.9 * before
