"""The papers' figures of generated pictures, and the report."""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.index import Index, build, mute
from amg_core.index.search import Searcher
from amg_core.index.sources import open_source
from amg_core.similarity.matcher import Matcher
from index_tools import evaluate, intervals, page, selftest
from tests.index.helpers import demo_pictures, fill, options_of, paint

command = partial(options_of, evaluate)


def judged(similarity=0.0, nl2=None, score=0.0, copy=False) -> evaluate.Checked:
    return evaluate.Checked("p", "", similarity, nl2, score, 0.0, copy, "", 0, "s", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An index of 60 pictures; four of them; a folder of 3 copies, 5 new pictures and a broken one."""
    root = tmp_path_factory.mktemp("evaluate")
    build(fill(root / "train", 60), root / "index", create("pixel"))
    fill(root / "others", 4)
    made = root / "made"
    fill(made, 5, first=500, prefix="new")
    for i in (3, 7, 11):
        paint(i).save(made / f"copy{i:02}.png")
    (made / "copy03.txt").write_text('<script>alert("x")</script> & co')
    (made / "broken.png").write_text("no")
    return root


@pytest.fixture(scope="module")
def matcher(place):
    with Index.open(place / "index") as index:
        yield Matcher(Searcher(index), create("pixel"))


@pytest.fixture(scope="module")
def judged_once(matcher, place):
    """What comes of the folder, and what was told of the progress."""
    steps = []
    return evaluate.evaluate(
        matcher, open_source(place / "made"), progress=lambda *state: steps.append(state[:2])
    ), steps


# --------------------------------------------------------------------------- statistics


def by_hand(values, percent):
    """A percentile by sorting: at the place (n − 1)·percent/100, between the two values beside it."""
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    below = ranked[math.floor(place)]
    return below + (place - math.floor(place)) * (ranked[math.ceil(place)] - below)


@pytest.mark.parametrize("percent", [5, 95])
def test_percentiles(percent):
    values = np.random.default_rng(1).normal(0, 1, 77)
    value, low, high = intervals.percentile(values, percent)
    assert value == pytest.approx(by_hand(values, percent))
    assert low <= value <= high
    share = (values <= value).mean()
    assert abs(100 * share - percent) < 100 / 77
    assert value != pytest.approx(np.sort(values)[-4:].mean(), abs=0.05)  # not the mean of the tail


def test_shares_have_wilson_intervals():
    assert intervals.share(0, 100) == pytest.approx((0, 0, 3.70), abs=0.01)
    assert intervals.share(10, 100) == pytest.approx((10, 5.52, 17.44), abs=0.01)
    assert intervals.share(5, 5) == pytest.approx((100, 56.55, 100), abs=0.01)


def test_bootstrap_is_the_same_each_time_and_draws_from_nobody_else():
    values = np.random.default_rng(0).normal(3, 1, 400)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    low, high = intervals.bootstrap(values, lambda part: float(part.mean()))
    assert (low, high) == intervals.bootstrap(values, lambda part: float(part.mean()))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert states == after
    error = values.std() / 20  # of the mean of 400
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.02)


def test_figures_of_cosines():
    values = [0.45, 0.55, 0.9, 0.2] + [0.1] * 16
    found = evaluate.figures([judged(v, score=v) for v in values], "cosine", 0.4)
    assert found["count"].value == 20
    assert found["above_0.5"].value == 10 and found["above_0.4"].value == 15
    assert found["similarity_top1"].value == 0.9
    assert found["similarity_95"].value == found["score_95"].value
    assert found["similarity_95"].value == pytest.approx(0.55 + 0.05 * (0.9 - 0.55))
    assert found["similarity_95"].label == "similarity, 95th percentile"
    assert found["similarity_mean"].value == pytest.approx(np.mean(values))
    assert found["too_close"].value == 15 and found["copies"].value == 0
    assert found["similarity_95"].low <= found["similarity_95"].value <= found["similarity_95"].high


def test_figures_of_nl2_count_the_small_ones():
    values = [1.2, 1.45, 1.5, 1.8] + [1.9] * 36
    found = evaluate.figures([judged(nl2=v) for v in values], "nl2", 0.4)
    assert found["nl2_below_1.4"].value == 2.5 and found["nl2_below_1.6"].value == 7.5
    assert found["nl2_5"].value == pytest.approx(by_hand(values, 5))
    assert found["nl2_5"].label == "nL2, 5th percentile"
    assert found["nl2_top1"].value == 1.2
    assert found["nl2_5"].low <= found["nl2_5"].value <= found["nl2_5"].high


def test_what_was_not_measured_is_not_zero():
    found = evaluate.figures([judged()], "nl2", 0.4)["nl2_below_1.4"]
    assert found.value is None and found.text().startswith("not measured (Eq. 8 needs")
    assert evaluate._clip_figure([], 3, False).text().startswith("not measured (needs --clip")
    assert "no picture has a prompt" in evaluate._clip_figure([], 3, True).text()
    assert evaluate._fid_figure([], None).text().startswith("not measured (needs --inception")


def test_frechet_distance():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    assert evaluate.fid(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.fid(a, a + 2) == pytest.approx(6 * 4)
    scaled = 3 * (a - a.mean(0)) + a.mean(0)  # (3 − 1)² tr Σ
    assert evaluate.fid(a, scaled) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
    b = rng.normal(size=(300, 6))
    assert evaluate.fid(a, b) == pytest.approx(evaluate.fid(b, a))


# ------------------------------------------------------------------------------- looking


def test_copies_are_found_and_new_pictures_are_not(judged_once):
    found, steps = judged_once
    assert steps == [(i, 9) for i in range(1, 10)]
    by_name = {one.picture: one for one in found.judged}
    assert len(by_name) == 8
    assert {name for name, one in by_name.items() if one.copy} == {
        "copy03.png", "copy07.png", "copy11.png"
    }  # fmt: skip
    assert by_name["copy07.png"].source == "p007.png" and by_name["copy07.png"].nl2 < 0.05
    assert min(one.nl2 for name, one in by_name.items() if name.startswith("new")) > 1
    assert found.figures["copies"].value == pytest.approx(37.5)
    assert found.figures["nl2_top1"].value == min(one.nl2 for one in found.judged)
    assert found.skipped == [("broken.png", "not a picture of a known format")]
    score = [one.score for one, _ in found.worst]
    assert score == sorted(score, reverse=True) and len(score) == 8
    assert by_name["copy03.png"].prompt.startswith("<script>")


def test_nl2_is_eq_8(place, matcher, pixel):
    picture = to_tensor(paint(900))
    rows = torch.from_numpy(matcher.searcher.index.rows(32)[0:60].astype(np.float32))
    distances = (pixel.embed(picture, 32) - rows).norm(dim=1).sort().values
    expected = distances[0] / (0.5 * distances[:50].mean())
    assert evaluate.plain_nl2(matcher, picture) == pytest.approx(float(expected), rel=1e-5)


def test_an_index_too_small_for_eq_8(made, pixel, pictures):
    with Index.open(made) as index:
        found = evaluate.evaluate(Matcher(Searcher(index), pixel), open_source(pictures))
    assert found.figures["nl2_below_1.4"].value is None
    assert all(one.copy for one in found.judged)
    assert "<svg" in page.render([found], index, lambda i: None)


def test_muted_pictures_are_not_compared_with(tmp_path, pixel):
    build(fill(tmp_path / "train", 12), tmp_path / "index", pixel)
    paint(4).save(fill(tmp_path / "made", 1, first=900) / "copy.png")
    for expected in (True, False):
        with Index.open(tmp_path / "index") as index:
            found = evaluate.evaluate(
                Matcher(Searcher(index), pixel), open_source(tmp_path / "made")
            )
        (copy,) = (one for one in found.judged if one.picture == "copy.png")
        assert (copy.source == "p004.png") is expected
        mute(tmp_path / "index", lambda entry: entry.source == "p004.png", "mine")


def test_the_worst_are_kept_in_order(place, matcher, monkeypatch):
    monkeypatch.setattr(evaluate, "WORST", 2)
    found = evaluate.evaluate(matcher, open_source(place / "made"))
    top = sorted(found.judged, key=lambda one: -one.score)[:2]
    assert [one.picture for one, _ in found.worst] == [one.picture for one in top]
    assert all(jpeg.startswith(b"\xff\xd8") for _, jpeg in found.worst)


def test_optional_measures_are_taken(place, matcher):
    found = evaluate.evaluate(
        matcher,
        open_source(place / "made"),
        clip=lambda picture, prompt: float(len(prompt)),
        inception=lambda pixels: pixels.reshape(-1, 3).mean(0).astype(float),
        reference=np.random.default_rng(0).random((9, 3)),
    )
    clip = found.figures["clip"]
    assert clip.value == 32 and clip.note == "1 of 8 pictures have a prompt"
    assert found.figures["fid"].value > 0 and "biased" in found.figures["fid"].note


def test_inception_weights_are_never_unpickled_freely(tmp_path, monkeypatch):
    from types import ModuleType

    class Network:
        def __init__(self, _name, _features, feature_extractor_weights_path):
            assert Path(feature_extractor_weights_path) != given, "runs what it finds in that file"
            passed.append(torch.load(feature_extractor_weights_path, weights_only=True))

        def to(self, _device):
            return self

    network = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    network.FeatureExtractorInceptionV3 = Network
    given, passed = tmp_path / "hostile.pth", []
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, network.__name__, network)
    torch.save({"conv.weight": torch.ones(2)}, given)
    evaluate.inception_features(given)
    assert [list(state) for state in passed] == [["conv.weight"]]
    torch.save({"weights": random.Random(0)}, given)
    with pytest.raises(AMGError, match=r"not only tensors \(its pickle names random\.Random"):
        evaluate.inception_features(given)
    assert len(passed) == 1
    with pytest.raises(AMGError, match="is missing"):
        evaluate.inception_features(tmp_path / "none.pth")


def test_absent_packages_are_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(AMGError, match="pip install transformers"):
        evaluate.clip_scorer(tmp_path)
    with pytest.raises(AMGError, match="pip install torch-fidelity"):
        evaluate.inception_features(tmp_path / "x.pth")
    with pytest.raises(AMGError, match=r"An interval needs scipy: pip install scipy\."):
        intervals.share(1, 2)
    with pytest.raises(AMGError, match="pip install jinja2, or omit --out"):
        page.template()


# ------------------------------------------------------------------------------- telling


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(judged_once, matcher):
    found, _ = judged_once
    text = page.render([found], matcher.searcher.index, lambda i: None if i == 3 else b"jpeg")
    parsed = Parsed(text)
    assert "script" not in parsed.tags and parsed.tags.count("figure") == 8
    assert parsed.links and all(link.startswith("data:image/jpeg;base64,") for link in parsed.links)
    assert (
        "url(" not in text
        and "@import" not in text
        and "http" not in text.replace("http-equiv", "")
    )
    assert '<script>alert("x")</script> & co' in parsed.text  # escaped, so it is text
    assert "3 of 8 pictures are too close" in parsed.text and "no picture" in parsed.text
    assert "1.4" in parsed.text and "not measured" in parsed.text and "broken.png" in parsed.text


def test_the_command(place, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = (place / "made", "--index", place / "index")
    evaluate.run(command(*arguments, "--against", place / "others", "--out", out))
    told = capsys.readouterr().out
    assert "37.5 %" in told and "100.0 %" in told and "NOT checked: broken.png" in told
    data = json.loads((out / "metrics.json").read_text())
    assert [one["figures"]["count"]["value"] for one in data["sets"]] == [8, 4]
    with (out / "pairs.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert "closest pairs" in (out / "index.html").read_text(encoding="utf-8")
    with pytest.raises(AMGError, match="nothing is overwritten"):
        evaluate.run(command(*arguments, "--out", out))
    evaluate.run(command(*arguments, "--json"))
    (one,) = json.loads(capsys.readouterr().out)["sets"]
    assert one["figures"]["copies"]["value"] == 37.5 and one["figures"]["fid"]["value"] is None


def test_mistakes_are_explained(place, tmp_path):
    with pytest.raises(AMGError, match="--fid-reference"):
        evaluate.run(command(place / "made", "--index", place / "index", "--inception", "x"))
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(AMGError, match="No picture of"):
        evaluate.run(command(tmp_path, "--index", place / "index"))


def test_pictures_of_any_size_are_shown_small():
    from io import BytesIO

    jpeg = evaluate.small_jpeg(Image.new("RGB", (900, 300)))
    assert Image.open(BytesIO(jpeg)).size == (224, 75)


def test_a_bordered_copy_is_a_copy(tmp_path, capsys):
    """A border moves everything. The parts and the second check find the picture in it."""
    pictures, made = tmp_path / "pictures", tmp_path / "made"
    pictures.mkdir(), made.mkdir()
    demo_pictures(pictures, 6)
    build(pictures, tmp_path / "index", create("compact"))
    for path in sorted(pictures.glob("*.webp"))[:3]:
        with Image.open(path) as image:
            selftest.EDITS["border of 8 %"](image.convert("RGB")).save(made / f"{path.stem}.png")
    evaluate.run(command(made, "--index", tmp_path / "index", "--json"))
    (one,) = json.loads(capsys.readouterr().out)["sets"]
    assert one["figures"]["count"]["value"] == 3 and one["figures"]["copies"]["value"] == 100


def test_a_self_test_names_what_is_missed(place, capsys):
    evaluate.run(command("--index", place / "index", "--self-test", 1))
    lines = capsys.readouterr().out.splitlines()
    assert "1 pictures of index" in lines[0] and len(lines) == 1 + len(selftest.EDITS)
    assert lines[1].startswith("100.0 %") and lines[1].endswith("unedited")
    evaluate.run(command("--index", place / "index", "--self-test", 1, "--json"))
    edits = {one["edit"]: one for one in json.loads(capsys.readouterr().out)["edits"]}
    assert edits["unedited"] == {"edit": "unedited", "count": 1, "missed": []}
    with pytest.raises(AMGError, match="or --self-test without"):
        evaluate.run(command("--index", place / "index"))
    tried = selftest.Tried("grey", 5, ["a", "b", "c", "d"])
    assert tried.text().endswith("grey: missed a, b, c and 1 more")
