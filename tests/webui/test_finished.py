"""Finished pictures: verdicts, drawing again, blanks, what is written and read back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from webui import Processing

from amg_core import report as reports
from amg_core.retry import escalated
from amg_core.similarity import verdict, verifier
from amg_demo.model import PICTURES
from amg_webui import entry
from amg_webui.options import HASH, LABELS, LARGEST, VERDICT, Options
from amg_webui.shared import as_tensor

KEYS = ["fox face on violet rays", "frog face on yellow checks"]
ON = {"enabled": True, "index": "demo"}
OFF = {"despecification": 0, "deduplication": 0, "dissimilarity": 0}  # watches, changes nothing


def run(host, options, prompts=KEYS, **more):
    """Draw, decode, judge, as the host does; stops before the host's `postprocess`."""
    p = Processing(host, prompts, list(range(50, 50 + len(prompts))), **more)
    entry.begin(p, (options,))
    latents = p.sample()
    pictures = []
    for i, decoded in enumerate(host._decode(None, latents)):
        p.batch_index = i
        values = (((decoded + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
        pp = SimpleNamespace(image=Image.fromarray(values.permute(1, 2, 0).numpy()))
        entry.finished(p, pp)
        pictures.append(pp.image)
    return p, pictures, latents


def test_a_copy_is_called_one_and_the_guard_prevents_it(host):
    watched, _, _ = run(host, ON | OFF, steps=10)
    assert [r["verdicts"][0]["outcome"] for r in watched.amg_guard.reports] == ["copy", "copy"]
    assert all("STILL A COPY" in text for text in watched.comments)
    guarded, pictures, _ = run(host, ON, steps=10)
    for i, report in enumerate(guarded.amg_guard.reports):
        own = PICTURES / f"memorised-00{i}.webp"
        with Image.open(own) as picture:  # by the judge that the guard never follows
            assert verifier.zncc(as_tensor(pictures[i]), as_tensor(picture)) < 0.6
        assert own.name in {each["source"] for each in report["neighbors"].values()}
        (verdict,) = report["verdicts"]
        assert (verdict["outcome"], verdict["source"]) != ("copy", own.name)


def test_a_grid_is_no_better_than_its_worst_picture(host):
    p, _, _ = run(host, ON | OFF, [KEYS[0], "green something"], steps=10)
    assert p.amg_guard.reports[0]["verdicts"][0]["outcome"] == "copy"
    output = p.extra_generation_params
    of_picture, of_grid = (
        [value(use_main_prompt=grid, index=1) for value in (output[VERDICT], output[LARGEST])]
        for grid in (False, True)
    )
    assert of_picture == [output[VERDICT], output[LARGEST]] and of_picture[0] != "copy"
    assert of_grid[0] == "copy" and float(of_grid[1]) > float(of_picture[1])
    assert json.loads(json.dumps(output))[VERDICT] == of_picture[0]


def test_what_is_written_below_a_picture_restores_the_sliders(host):
    chosen = ON | {
        "preset": "strong",
        "despecification": 0.5,
        "thresholds": "custom",
        "threshold_end": 0.7,
    }
    p, _, _ = run(host, chosen, KEYS[:1])
    output = {key: str(value) for key, value in p.extra_generation_params.items()}
    index = p.amg_guard.matcher.searcher.index
    assert index.hash.startswith(output[HASH]) and output[VERDICT] in ("no copy", "copy")
    report = p.amg_guard.reports[0]
    closest = max(step["score"][0] for step in report["steps"])
    assert float(output[LARGEST]) == round(max(closest, report["verdicts"][0]["score"]), 4) > 0.2
    components = [SimpleNamespace(value=value) for value in vars(Options(index="other")).values()]
    pasted = []
    for component, key in entry.paste_fields(components):  # as the host's `paste_func`
        value = key(output) if callable(key) else output.get(key)
        pasted.append(component.value if value is None else type(component.value)(value))
    again = Options(*pasted)
    assert again == Options(**chosen)
    assert set(LABELS.values()) <= {key for _, key in entry.paste_fields(components)}


def test_the_report_travels_in_the_picture_and_in_no_grid(host, tmp_path):
    p, pictures, _ = run(host, ON)
    params = SimpleNamespace(p=p, image=pictures[-1], pnginfo={})
    entry.before_saved(params)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("amg_report", params.pnginfo["amg_report"])
    pictures[-1].save(tmp_path / "x.png", pnginfo=info)
    (output,) = reports.of_picture(tmp_path / "x.png").values()
    assert output["seed"] == 51 and len(output["largest_similarity"]) == 1
    assert json.dumps(output) and output["host"]["name"] == type(p.amg_guard.host).__name__
    sent = json.loads(pictures[-1].info["amg_report"])["webui"]
    assert sent == output  # what the gallery's file and an API's answer carry
    grid = SimpleNamespace(p=p, image=pictures[0], pnginfo={})
    entry.before_saved(grid)
    assert not grid.pnginfo


@pytest.mark.parametrize("choice", ["anonymous", "full", "off"])
def test_a_picture_carries_what_was_chosen(host, choice):
    p, pictures, _ = run(host, ON | {"report_in_picture": choice}, KEYS[:1])
    params = SimpleNamespace(p=p, image=pictures[-1], pnginfo={})
    entry.before_saved(params)
    named = p.amg_guard.reports[0]["verdicts"][0]["source"]
    assert named
    for written in (params.pnginfo, pictures[-1].info):
        assert ("amg_report" in written) == (choice != "off")
        assert (named in written.get("amg_report", "")) == (choice == "full")


def test_blank_in_place_of_a_copy(host):
    _, pictures, _ = run(host, ON | OFF | {"if_still_copied": "blank"}, steps=10)
    assert all(not as_tensor(picture).any() for picture in pictures)


def test_what_is_only_close_comes_out_with_a_warning(host, monkeypatch, caplog):
    monkeypatch.setattr(verdict, "_close", lambda *_: 0)
    chosen = ON | OFF | {"if_still_copied": "blank"}
    p, pictures, _ = run(host, chosen, ["green something"], steps=3)
    assert p.amg_guard.reports[0]["verdicts"][0]["outcome"] == "cannot_tell"
    assert as_tensor(pictures[0]).any() and "Cannot tell: it is close to" in caplog.text


def test_copies_are_drawn_again_and_the_others_stay(host):
    weak = ON | {"preset": "gentle", "despecification": 0.0, "dissimilarity": 0.05, "retries": 1}
    prompts = [KEYS[0], "green something"]
    once, _, first = run(host, weak | {"retries": 0}, prompts)
    copies = [r["verdicts"][0]["outcome"] == "copy" for r in once.amg_guard.reports]
    assert copies == [True, False]
    p, _, latents = run(host, weak, prompts)
    outcome = p.amg_guard.outcome
    assert [attempt.samples for attempt in outcome.attempts] == [[0, 1], [0]]
    assert torch.equal(latents[1], first[1])
    again = p.amg_guard.drawings[1][0]
    assert again.settings == escalated(p.amg_guard.settings, 1)
    assert len(p.amg_guard.reports[0]["attempts"]) == 2
    assert len(p.amg_guard.reports[1]["attempts"]) == 1


WEAK = ON | {"despecification": 0.0, "deduplication": 0.0, "dissimilarity": 0.01}


def same_again(monkeypatch):
    """Nothing is escalated and nobody is a suspect: a drawing again is the first to the last bit."""
    from amg_core import retry
    from amg_core.run import SamplingRun

    real = SamplingRun.__init__
    monkeypatch.setattr(retry, "escalated", lambda settings, number: settings)
    monkeypatch.setattr(
        SamplingRun, "__init__", lambda self, matcher, settings, **_: real(self, matcher, settings)
    )


def test_a_second_drawing_starts_from_the_same_noise(host, monkeypatch):
    same_again(monkeypatch)
    seen = []
    p = Processing(host, KEYS, [50, 51])
    entry.begin(p, (WEAK | {"retries": 1},))
    guard, draw = p.amg_guard, type(p).sample
    guard.sample(lambda: seen.append(draw(p)) or seen[-1])
    assert len(seen) == 2 and torch.equal(*seen)
    entry.end(p)


def test_no_picture_leaves_unjudged_in_silence(host, monkeypatch):
    from amg_webui.shared import Guard

    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Guard, "verdicts", broken)
    p, _, _ = run(host, ON, KEYS[:1])
    assert p.comments == ["AMG: not checked · no memory"]
    assert p.extra_generation_params[VERDICT] == "not judged"


@pytest.mark.parametrize("host", ["a1111", "forge"], indirect=True)
def test_the_api_takes_a_list_or_an_object(host):
    p = Processing(host, KEYS[:1], [50])
    assert Options.read(p, (True, "strong", 0.5)) == Options(True, "strong", 0.5)
    assert Options.read(p, ({"enabled": True, "retries": 2},)) == Options(True, retries=2)
    p.amg_preset, p.amg_threshold_end = "gentle", 0.6  # what axes of the X/Y/Z plot set
    chosen = Options.read(p, (True, "strong"))
    assert (chosen.preset, chosen.thresholds, chosen.threshold_end) == ("gentle", "custom", 0.6)


@pytest.mark.parametrize("host", ["a1111"], indirect=True)
def test_hires_is_drawn_again_from_the_first_noise(host, monkeypatch):
    """Hires. fix has its own noise, counts its passes, and hands over decoded pictures."""
    import sys

    from webui import ImageRNG

    class Decoded(list):
        already_decoded = True

    same_again(monkeypatch)
    p = Processing(host, KEYS, [50, 51])
    p.enable_hr, host.state.job_no, seen = True, 0, []
    entry.begin(p, (WEAK | {"retries": 1},))

    def both_passes():
        latents = host.draw(p, p.rng.next())
        sys.modules["modules.shared"].state.job_no += 1
        p.rng = ImageRNG((4, 24, 24), p.seeds)
        p.rng.next()
        seen.append(latents)
        return Decoded(host._decode(None, latents))

    with torch.no_grad():
        drawn = p.amg_guard.sample(both_passes)
    assert len(seen) == 2 and torch.equal(*seen) and host.state.job_no == 1
    assert type(drawn) is Decoded and torch.equal(drawn[1], host._decode(None, seen[0])[1])
    entry.end(p)


@pytest.mark.parametrize("flag", ["interrupted", "skipped"])
def test_a_drawing_again_that_is_cut_short_is_thrown_away(host, flag):
    _, _, first = run(host, WEAK)
    p = Processing(host, KEYS, [50, 51])
    entry.begin(p, (WEAK | {"retries": 3},))
    tell, count = p.amg_guard.tell, []

    def after(sampling):
        tell(sampling)
        count.append(1)
        if len(count) == p.steps + 2:
            setattr(host.state, flag, True)

    p.amg_guard.tell = after
    assert torch.equal(p.sample(), first) and len(count) == p.steps + 2
    assert len(p.amg_guard.outcome.attempts) == 1
    entry.end(p)


def test_a_verdict_is_not_written_below_the_next_picture(host):
    p, _, _ = run(host, ON, KEYS[:1])
    assert VERDICT in p.extra_generation_params
    entry.decoded(p)
    assert not {VERDICT, LARGEST} & set(p.extra_generation_params)


def test_the_line_below_the_gallery(host):
    p, _, _ = run(host, ON | OFF, steps=10)
    for number, line in enumerate(p.comments, 1):
        assert line.startswith(f"AMG: picture {number} · STILL A COPY · A copy of memorised-00")
        assert "picture 1" not in line or number == 1
        assert ("raise Retries" in line) == (number == 1)
    q, _, _ = run(host, ON, KEYS[:1])
    if "no copy" in q.extra_generation_params[VERDICT]:
        assert q.comments[0].endswith("copy above 0.4")


@pytest.mark.parametrize("host", ["a1111", "forge"], indirect=True)
def test_texts_are_of_the_checkpoint_that_draws(host):
    """A host may load another checkpoint into the module that held the first."""
    p = Processing(host, KEYS, [50, 51])
    entry.begin(p, (ON,))
    guard = p.amg_guard
    for name in ("a", "b", "b", "a"):
        host.model.sd_checkpoint_info = SimpleNamespace(filename=name)
        guard.text("a fox")
    assert host.encoded.count("a fox") == 2
    entry.end(p)
    del host.model.sd_checkpoint_info


@pytest.mark.parametrize("pasted", [False, True])
def test_what_inpainting_keeps_is_checked_by_itself(host, monkeypatch, pasted):
    """A drawn border must not hide a copy in the part that was given; not where the host has pasted."""
    from amg_core.similarity import verdict as verdicts

    p = Processing(host, KEYS[:1], [50])
    entry.begin(p, (ON,))
    p.nmask = torch.zeros(1, 16, 16)
    p.nmask[..., :3] = 1  # drawn
    none = verdicts.Verdict(0.1, 0.4, 0.1, 0.1, 0.6, 0, "a.png", "", verdicts.NO_COPY)
    copy = verdicts.Verdict(0.9, 0.4, 0.9, 0.9, 0.6, 1, "b.png", "", verdicts.COPY, ("first",))
    asked = []

    def verdict(matcher, picture, named):
        asked.append(tuple(picture.shape[-2:]))
        return [none if picture.shape[-1] == 128 else copy]

    monkeypatch.setattr(verdicts, "verdict", verdict)
    (found,) = p.amg_guard.verdicts(torch.rand(1, 3, 128, 128), [{1}], pasted)
    assert asked == ([(128, 128)] if pasted else [(128, 128), (128, 104)])
    assert (found.copy, found.kept) == ((False, False) if pasted else (True, True))
