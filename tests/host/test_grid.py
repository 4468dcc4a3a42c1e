"""Strength Grid in the host: the pictures are those of KSampler and AMG Sampler."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture(scope="module")
def request_of(demo, index, drawing):
    """Inputs of a small grid on the demo model; the prompt is one that it has memorised."""
    return drawing(steps=6, index=index, vae=demo["vae"])


def draw(run_node, monkeypatch, amg, inputs, **more):
    """(sheets, table, latents): what the node gives, and what it decoded on the way."""
    vae, decoded = inputs["vae"], []
    original = vae.decode

    def decode(latents):
        if len(latents) > 1:  # the judge looks at one after the other
            decoded.append(latents.clone())
        return original(latents)

    monkeypatch.setattr(vae, "decode", decode)
    sheets, read, table = run_node("AMG_StrengthGrid", **inputs | more)
    assert len(read.splitlines()) == 2 + len(json.loads(table))
    return sheets, json.loads(table), decoded


def test_a_column_is_what_the_sampler_draws(amg, run_node, request_of, monkeypatch):
    import nodes

    grid = amg.module("nodes.grid")
    sheets, table, decoded = draw(
        run_node, monkeypatch, amg, request_of,
        strengths="0, 1", strength_of=grid.ALL, threshold_scales="1, 3",
    )  # fmt: skip
    assert len(sheets) == 2 and len(table) == 8 and len(decoded) == 4
    assert [(row["picture"], row["threshold_scale"], row["strength"]) for row in table] == [
        (picture, scale, strength) for picture in (1, 2) for scale in (1, 3) for strength in (0, 1)
    ]
    shared = {k: v for k, v in request_of.items() if k not in ("index", "vae", "preset", "clip")}
    order = ("model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
             "latent_image")  # fmt: skip
    with torch.inference_mode():
        plain = nodes.common_ksampler(*(shared[name] for name in order))[0]["samples"]
    guarded = run_node(
        "AMG_Sampler", **request_of, despecification=1.0, deduplication=1.0, dissimilarity=1.0,
        retries=0,
    )[0]["samples"]  # fmt: skip
    assert torch.equal(decoded[0], plain)
    assert torch.equal(decoded[1], guarded)
    assert not torch.equal(plain, guarded)
    # Three times the threshold is more than any picture reaches: the guard sleeps.
    assert torch.equal(decoded[2], plain) and torch.equal(decoded[3], plain)
    by = {(row["picture"], row["threshold_scale"], row["strength"]): row for row in table}
    assert by[1, 1, 0]["copy"] and by[1, 1, 0]["score"] > by[1, 1, 1]["score"]
    assert by[1, 1, 0]["score"] == by[1, 3, 0]["score"]
    assert [by[1, 3, strength]["same_as"] for strength in (0, 1)] == [None, 0]
    assert by[1, 1, 1]["same_as"] is None


def test_what_cannot_differ_is_drawn_once(amg, run_node, request_of, monkeypatch):
    """A strength on which the guard did not act says that no other strength changes anything."""
    grid = amg.module("nodes.grid")
    _, table, decoded = draw(
        run_node, monkeypatch, amg, request_of,
        strengths="0.5, 1, 2", strength_of=grid.ALL, threshold_scales="3",
    )  # fmt: skip
    assert len(decoded) == 1 and len(table) == 6
    assert [row["same_as"] for row in table] == [None, 0.5, 0.5] * 2
    assert grid._same_rows(table) == [3]


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"strengths": "0, five"}, "strengths: 'five'"),
        ({"strengths": "4"}, "strengths: '4'"),
        ({"threshold_scales": ""}, "threshold_scales"),
        ({"strengths": ", ".join(str(i / 20) for i in range(60))}, "48"),
        ({"strength_of": "x"}, "strength_of"),
        ({"preset": "x"}, "preset"),
    ],
)
def test_errors_name_the_widget(amg, run_node, request_of, inputs, word):
    good = {"strengths": "0, 1", "strength_of": "all three", "threshold_scales": "1"}
    with pytest.raises(amg.AMGError, match=word):
        run_node("AMG_StrengthGrid", **request_of | good | inputs)


def test_undrawn_is_not_judged(run_node, request_of):
    """At denoise 0 the host runs no step: nothing is measured, and the sheet says so."""
    _, _, table = run_node(
        "AMG_StrengthGrid",
        **request_of | {"denoise": 0.0, "strengths": "1", "threshold_scales": "1"},
        strength_of="all three",
    )
    assert [row["judged"] for row in json.loads(table)] == [False, False]
