"""The cost benchmark runs as a whole, and what it counts adds up. Nothing here is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(comfyui, tmp_path_factory) -> tuple[dict, str]:
    """What the program writes and prints for narrow networks at a noise level of scale 16."""
    out = tmp_path_factory.mktemp("cost") / "cost.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard_cost", "--small", "--device", "cpu", "--steps", "1",
         "--sizes", "128", "--batches", "1", "2", "--descriptors", "pixel", "latent",
         "--pictures", "100", "--threads", "1", "--no-memory", "--json", str(out)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture
def macs(told):
    """(row, batch) -> MACs a step."""
    tables = told[0]["tables"]
    return {(r["row"], t["batch"]): r["macs"] for t in tables for r in t["rows"]}


@pytest.fixture
def parts(told):
    return {part["part"]: part["macs"] for part in told[0]["parts"]}


def test_every_row_is_there(told):
    found, printed = told
    guards = ("watch", "terms", "terms+neighbour", "exit", "exit+neighbour")
    wanted = ["plain", *(f"{g} {d}" for d in ("pixel", "latent") for g in guards), "authors"]
    for table in found["tables"]:
        assert [row["row"] for row in table["rows"]] == wanted
        assert all(row["seconds"] > 0 and row["macs_ratio"] >= 1 for row in table["rows"])
    assert all(f"\n{row} " in printed for row in wanted)


def test_what_is_counted_adds_up(macs, parts):
    branch = parts["model, one branch, 128²"]
    look, gradient = parts["pixel, scale 16: look"], parts["pixel, scale 16: gradient"]
    assert macs["plain", 1] == pytest.approx(2 * branch, rel=0.01)
    assert macs["watch pixel", 1] - macs["plain", 1] == pytest.approx(look, rel=0.05)
    terms = 2 * look + 3 * gradient  # D_c, D, and three steps of the projection
    assert macs["terms pixel", 1] - macs["plain", 1] == pytest.approx(terms, rel=0.05)
    assert macs["exit latent", 1] - macs["plain", 1] == pytest.approx(branch, rel=0.05)
    assert macs["watch latent", 1] < 1.01 * macs["plain", 1]


def test_a_batch_costs_its_members(macs):
    for row in ("plain", "watch pixel", "terms pixel"):
        assert macs[row, 2] == pytest.approx(2 * macs[row, 1], rel=0.02)
