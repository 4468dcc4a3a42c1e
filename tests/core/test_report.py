"""The report: complete, JSON, and read back from a picture."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from amg_core import presets, report
from amg_core.errors import AMGError
from amg_core.retry import until_no_copy
from amg_core.run import Drawn
from amg_core.similarity.verdict import Verdict

SESSION = {
    "amg": "0", "index": {"name": "cats", "hash": "abc", "count": 3}, "descriptor": {"id": "pixel"},
    "settings": {"preset": "main"}, "evaluations": 1, "guarded_evaluations": [1, 1],
    "largest_similarity": [0.1, 0.2], "neighbors": {}, "steps": [{"number": 0}],
}  # fmt: skip


def says(copy):
    return ("copy", ("first",)) if copy else ("no_copy", ())


def outcome(*means, retries=2):
    """Sample i has the likeness `means[i][attempt]`; a copy above 0.4."""
    calls = []

    def draw(settings, suspects, anew):
        number = len(calls)
        calls.append(settings)
        drawn = torch.tensor([row[min(number, len(row) - 1)] for row in means])
        report = SESSION | {"steps": [{"number": number}]}
        return Drawn(drawn[:, None], report, [()] * len(means))

    def judge(latents, named, samples):
        return [
            Verdict(v, 0.4, v, 0.0, 0.75, 0, "a.png", "a cat", *says(v > 0.4))
            for v in latents[:, 0].tolist()
        ]

    generation = SimpleNamespace(
        draw=draw, judge=judge, stopped=lambda: False, restarts=lambda: False
    )
    return until_no_copy(generation, presets.settings("main", "nl2"), len(means), retries)


def compose(*means, **options):
    return report.compose(SESSION, outcome(*means), judged_by="vae", **options)


def test_complete_and_json():
    written = compose(
        [0.1], [0.9, 0.2], seed=7, versions={"comfyui": "1"}, host={"decoder": "demo"}
    )
    report.check(written)
    again = json.loads(json.dumps(written, allow_nan=False))
    assert again == written
    assert written["schema"] == "amg-report/2" and written["index"]["hash"] == "abc"
    assert set(written["versions"]) == {"torch", "python", "comfyui"}
    assert [v["attempt"] for v in written["verdicts"]] == [0, 1]
    assert [v["outcome"] for v in written["verdicts"]] == ["no_copy", "no_copy"]
    assert (
        written["verdicts"][1]["source"] == "a.png" and written["verdicts"][1]["caption"] == "a cat"
    )
    assert [a["samples"] for a in written["attempts"]] == [[0, 1], [1]]
    assert written["attempts"][0]["verdicts"][1]["copy"] is True
    assert (
        written["attempts"][1]["steps"] == [{"number": 1}] and written["attempts"][1]["seed"] == 7
    )


def test_every_key_of_the_schema_is_documented_and_checked():
    written = compose([0.1], [0.2])
    for key in report._SHAPE:
        assert f"\n{key} " in report.__doc__
        with pytest.raises(AMGError, match=key if key != "schema" else report.SCHEMA):
            report.check({k: v for k, v in written.items() if k != key})
    with pytest.raises(AMGError, match="another version"):
        report.check(written | {"schema": "amg-report/1"})


def test_what_travels_is_short_and_says_what_it_leaves_out():
    written = compose([0.123456], [0.9, 0.2])
    short = report.travelling(written, report.FULL)
    assert short["verdicts"][0]["score"] == 0.1235 and "left_out" not in short
    step = {"similarity": [1 / 3] * 64, "moved": {"away": [1 / 3] * 64}}
    sizes = []
    for count in (20, 40, 80, 200):
        written["steps"] = [step] * count
        written["attempts"][1]["steps"] = [step] * 10
        short = report.travelling(written, report.FULL)
        report.check(short)
        assert len(json.dumps(short)) < report.LIMIT + 100
        assert short["verdicts"] == report._rounded(written["verdicts"])
        sizes.append(short.get("left_out", []))
    assert sizes[0] == ["steps.moved"] and sizes[-1][-1] == "steps"
    assert "moved" in written["steps"][0]  # the report itself is whole


def test_without_names_it_is_the_same_report():
    written = compose([0.1], [0.9, 0.2], [0.9], seed=7, host={"decoder": "demo"})
    written["neighbors"] = {"0": {"source": "a.png", "caption": "a cat"}}
    short = report.travelling(written)
    report.check(short)
    assert short == json.loads(json.dumps(short, allow_nan=False))
    text = json.dumps(short)
    assert not [word for word in ("a.png", "a cat", "cats") if word in text]
    assert short["index"] == {"name": "", "hash": "abc", "count": 3} and short["left_out"] == [
        "names"
    ]
    for found, whole in zip(short["verdicts"], written["verdicts"], strict=True):
        for key in ("sample", "attempt", "outcome", "similarity", "score", "neighbor", "copy"):
            assert found[key] == pytest.approx(whole[key]) if key != "outcome" else whole[key]
    assert short["verdicts"][2]["words"] == "A copy of picture 0 of the index"
    assert short["verdicts"][0]["words"] == "Not a copy of anything in this index"
    assert short["verdicts"][2]["checks"] == ["first"]
    assert [a["samples"] for a in short["attempts"]] == [a["samples"] for a in written["attempts"]]
    assert short["attempts"][1]["steps"] == [{"number": 1}] and short["seed"] == 7
    assert "still a copy" in report.words(short).lower()


def test_words_tell_what_became_of_it():
    assert "no copy" in report.words(compose([0.1], [0.2]))
    again = report.words(compose([0.1], [0.9, 0.2]))
    assert "picture 2 drawn again: likeness 0.90 → 0.20" in again
    bad = report.words(compose([0.1], [0.9]))
    assert bad.startswith("STILL A COPY: picture 2") and "a.png" in bad and "blank" not in bad
    assert "replaced by a blank" in report.words(compose([0.9], if_still_copied="blank"))
    unjudged = report.words(report.compose(SESSION, not_judged=report.NOTHING_DRAWN))
    assert unjudged == "not checked · nothing was drawn"


def test_each_picture_has_the_seed_that_it_is_from():
    """A retry may draw some pictures from the noise of another seed, and some from the same."""
    made = outcome([0.9, 0.2], [0.1], [0.9, 0.8, 0.3])
    starts = [[7, 7, 7], [8, 7, 7], [7, 7, 9]]
    written = report.compose(SESSION, made, seed=7, seeds=[7, 8, 9], starts=starts)
    assert [v["seed"] for v in written["verdicts"]] == [8, 7, 9]
    first, second, third = written["attempts"]
    assert "seed" not in first
    assert (second["seed"], second["seeds"], second["suspects"]) == (8, [8, 7], [0, 2])
    assert (third["seed"], third["seeds"], third["suspects"]) == (9, [9], [2])
    short = report.travelling(written)
    assert [v["seed"] for v in short["verdicts"]] == [8, 7, 9]
    assert short["attempts"][1]["seeds"] == [8, 7] and short["attempts"][2]["suspects"] == [2]


def test_refusal_names_picture_neighbour_and_what_to_change():
    text = report.refusal(compose([0.1], [0.9], if_still_copied="stop"))
    for part in ("picture 2 of 2", "a.png", "cats", "3 drawing", "retries", "say so"):
        assert part in text


def test_what_cannot_be_told_is_no_clean_verdict():
    written = outcome([0.1])
    verdict = Verdict(0.1, 0.4, 0.1, 0.0, 0.75, 0, "b.png", "", "cannot_tell", (), "flat")
    written.verdicts[0] = verdict
    written = report.compose(SESSION, written, judged_by="vae")
    assert written["verdicts"][0]["outcome"] == "cannot_tell"
    words = report.words(written)
    assert (
        "cannot tell for picture 1: it is nearly one flat tone" in words and "no copy" not in words
    )


def test_what_is_close_is_said_before_what_is_no_copy():
    written = outcome([0.1], [0.3])
    close = Verdict(0.3, 0.4, 0.3, 0.5, 0.62, 0, "b.png", "", "cannot_tell", (), "close")
    written.verdicts[1] = close
    words = report.words(report.compose(SESSION, written, judged_by="vae"))
    assert words.startswith("cannot tell for picture 2: it is close to b.png.")
    assert "no copy" in words
    written.verdicts[0] = outcome([0.9]).verdicts[0]
    words = report.words(report.compose(SESSION, written, judged_by="vae"))
    assert words.startswith("STILL A COPY: picture 1")
    assert "cannot tell for picture 2" in words


def test_blanked_is_told():
    written = compose([0.1], [0.9], if_still_copied="blank")
    assert [v["outcome"] for v in written["verdicts"]] == ["no_copy", "blanked"]


def test_what_the_guard_did_not_see_is_told():
    said = report.words(compose([0.1], unseen_steps=3, blanked_previews=[0, 2]))
    assert said.endswith(
        " · steps not seen by the guard: 3 · denoised_output was a copy and is blank now: picture 1, 3"
    )
    unjudged = report.compose(SESSION, not_judged=report.NOT_ENDED, unseen_steps=1)
    assert report.words(unjudged) == (
        "not checked · the run did not end · steps not seen by the guard: 1"
    )
    whole = compose([0.1], unseen_steps=0, blanked_previews=[])
    assert "not seen" not in report.words(whole) and "blank" not in report.words(whole)


def test_one_curve_a_drawing():
    (first, title), (second, again) = report.drawings(compose([0.1], [0.9, 0.2]))
    assert first == "likeness to cats" and title["steps"] == [{"number": 0}]
    assert second.startswith("picture 2 drawn again, 1") and again["steps"] == [{"number": 1}]


def test_read_from_a_picture(tmp_path):
    written, path = compose([0.1]), tmp_path / "a.png"
    info = PngInfo()
    info.add_text(report.KEY, json.dumps({"7": written}))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    assert report.of_picture(path) == {"7": written}
    for text, words in (
        (None, "no report"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"7": 1}', "no"),
    ):
        info = PngInfo()
        if text is not None:
            info.add_text(report.KEY, text)
        Image.new("RGB", (4, 4)).save(path, pnginfo=info)
        with pytest.raises(AMGError, match=words):
            report.of_picture(path)


def test_a_run_is_told_in_every_language():
    written = compose([0.1], [0.9, 0.2], unseen_steps=2)
    assert "Bild 2 neu erzeugt: Übereinstimmung 0.90 → 0.20" in report.words(written, "de")
    assert "なし" in report.words(written, "ja")
    assert report.words(written, "xx") == report.words(written, "../en") == report.words(written)


def test_one_picture_is_told_without_its_number():
    written = report.compose(SESSION, outcome([0.9, 0.2]), judged_by="vae")
    assert [each.code for each in report.story_of_one(written)] == ["no_copy", "drawn_again"]
    written = report.compose(SESSION, outcome([0.9]), judged_by="vae", if_still_copied="blank")
    codes = [each.code for each in report.story_of_one(written)]
    assert codes == ["still_a_copy", "copy_by_first", "replaced"]
