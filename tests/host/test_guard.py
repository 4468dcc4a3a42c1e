"""Guard: detects, finds out what the prompt is a key to, steers, verifies, and says so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

KEY, KEYS_PICTURE, USUAL = "fox face on violet rays", "memorised-000.webp", "crab on teal rays"
STEPS = 12


@pytest.fixture
def guard(run_node, demo, encode):
    def run(prompt, seed=7, **changes):
        given = {
            "model": demo["model"], "seed": seed, "steps": STEPS, "cfg": 4.0,
            "sampler_name": "euler", "scheduler": "normal", "positive": encode(prompt),
            "negative": encode(""), "latent_image": {"samples": torch.zeros(1, 4, 16, 16)},
            "denoise": 1.0, "detect": "draw twice", "false_alarms": 0.01, "clip": demo["clip"],
            "vae": demo["vae"],
        } | changes  # fmt: skip
        return run_node("AMG_Guard", **given)

    return run


@pytest.fixture
def plain(demo, encode):
    import nodes

    def draw(prompt, seed=7):
        with torch.inference_mode():
            return nodes.common_ksampler(
                demo["model"], seed, STEPS, 4.0, "euler", "normal", encode(prompt), encode(""),
                {"samples": torch.zeros(1, 4, 16, 16)},
            )[0]["samples"]  # fmt: skip

    return draw


def correlation(amg, demo, latent, name):
    """ZNCC of a drawn latent with a training picture."""
    import numpy as np

    with torch.inference_mode():
        drawn = demo["vae"].decode(latent).movedim(-1, 1)
    stored = np.asarray(Image.open(f"{demo['folder']}/{name}").convert("RGB"), dtype=np.float32)
    stored = torch.from_numpy(stored).permute(2, 0, 1)[None] / 255
    return float(amg.module("amg_core.similarity.verifier").zncc(drawn.clone(), stored))


def test_a_key_is_left_without_any_index(amg, demo, guard, plain):
    assert correlation(amg, demo, plain(KEY), KEYS_PICTURE) > 0.9
    latent, said, report = guard(KEY)
    assert correlation(amg, demo, latent["samples"], KEYS_PICTURE) < 0.7
    assert "are the same picture" in said and "the guard steered" in said and "no copy" in said
    written = json.loads(report)
    assert written["index"]["count"] == 2 and written["verdicts"][0]["outcome"] == "no_copy"
    assert written["verdicts"][0]["source"].startswith("drawn from another seed")
    assert [each["code"] for each in written["before"]] == ["drawings_agree", "steered"]


def test_an_ordinary_prompt_is_drawn_bit_for_bit_as_ever(guard, plain):
    latent, said, report = guard(USUAL)
    assert torch.equal(latent["samples"], plain(USUAL))
    assert "differ" in said and said.endswith("drawn without the guard") and report == "{}"


def test_with_an_index_both_are_stayed_away_from(amg, demo, guard, index, plain):
    latent, said, report = guard(KEY, index=index)
    assert json.loads(report)["index"]["count"] == 24 + 2
    assert correlation(amg, demo, latent["samples"], KEYS_PICTURE) < 0.7
    latent, said, report = guard(KEY, index=index, detect="off")
    assert json.loads(report)["index"]["count"] == 24 and "the guard steered" in said
    latent, said, _ = guard(USUAL, index=index, detect="off")
    assert torch.equal(latent["samples"], plain(USUAL)) and "the guard was not needed" in said


def test_the_page_is_told_of_a_picture_that_was_not_guarded(amg, guard, monkeypatch):
    sent = []
    monkeypatch.setattr(amg.module("nodes.live"), "events_of", lambda node, saved=None: sent.append)
    _, said, _ = guard(USUAL)
    assert [event["kind"] for event in sent] == ["begin", "end"]
    assert (
        sent[-1]["words"] == said and "drawn without the guard" in said and not sent[-1]["verdicts"]
    )


def test_the_page_is_told_all_of_a_guarded_picture(amg, guard, monkeypatch):
    sent = []
    monkeypatch.setattr(amg.module("nodes.live"), "events_of", lambda node, saved=None: sent.append)
    _, said, _ = guard(KEY)
    assert {event["kind"] for event in sent[1:-1]} == {"step"} and sent[-1]["kind"] == "end"
    assert sent[-1]["words"] == said and len(sent[-1]["verdicts"]) == 1
    assert sent[-1]["messages"][0]["code"] == "drawings_agree"


def test_what_fixes_the_composition_is_left_out_of_the_two_drawings(amg):
    kept = amg.module("nodes.guard")._text_only([["words", {"control": 1, "pooled_output": 2}]])
    assert kept == [["words", {"pooled_output": 2}]]


def test_a_batch_of_prompts_is_refused(amg, guard, encode):
    batch = [[torch.cat([encode(KEY)[0][0], encode(USUAL)[0][0]]), {}]]
    with pytest.raises(amg.AMGError, match=r"positive: .* one prompt at a time"):
        guard(KEY, positive=batch)


@pytest.mark.parametrize("suspicious", [False, True])
def test_the_verdict_of_prompt_probe_is_taken(amg, guard, plain, suspicious):
    written = amg.module("amg_core.messages").message("as_written", words="as the probe says")
    verdict = SimpleNamespace(suspicious=suspicious, messages=lambda: [written])
    given = SimpleNamespace(verdict=verdict, key_words="")
    latent, said, _ = guard(KEY, detect="auto", prompt_verdict=given)
    assert said.startswith("as the probe says · ")
    assert torch.equal(latent["samples"], plain(KEY)) != suspicious


def test_nothing_to_go_by_is_an_error(amg, guard, index, tmp_path, monkeypatch):
    monkeypatch.setattr(amg.paths, "calibration_file", lambda key: tmp_path / f"{key}.json")
    with pytest.raises(amg.AMGError, match=r"Calibrate Prompt Probe.*draw twice.*index"):
        guard(KEY, detect="auto")
    with pytest.raises(amg.AMGError, match="connect an index"):
        guard(KEY, detect="off")
    _, said, _ = guard(USUAL, detect="auto", index=index)
    assert "not calibrated" in said


def test_the_global_generator_and_the_folder_are_left_as_they_are(guard, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = torch.get_rng_state()
    guard(KEY)
    assert not list(tmp_path.iterdir())
    # the host itself seeds the generator for its noise; Guard adds nothing that a KSampler would not
    assert before.shape == torch.get_rng_state().shape


def test_a_way_out_that_is_a_stored_picture_is_left_too(amg, demo, guard, monkeypatch):
    """What is drawn under guard counts as one picture once: then both of it are avoided as well."""
    real, asked = amg.module("nodes.guard")._likeness, []

    def likeness(two):
        asked.append(real(two))
        return 0.95 if len(asked) == 2 else asked[-1]

    monkeypatch.setattr(amg.module("nodes.guard"), "_likeness", likeness)
    latent, said, report = guard(KEY)
    shown = amg.module("amg_core.similarity.metrics").likeness(
        0.95, amg.module("amg_core.limits").ONE_PICTURE
    )
    assert len(asked) == 3 and f"from another seed (likeness {shown:.2f})" in said
    assert json.loads(report)["index"]["count"] == 4
    assert json.loads(report)["verdicts"][0]["outcome"] in ("no_copy", "cannot_tell")
    assert correlation(amg, demo, latent["samples"], KEYS_PICTURE) < 0.7
