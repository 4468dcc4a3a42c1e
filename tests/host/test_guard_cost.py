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
def report(comfyui, tmp_path_factory) -> tuple[dict, str]:
    """What the program writes and prints for narrow networks and two steps."""
    out = tmp_path_factory.mktemp("cost") / "cost.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard_cost", "--small", "--device", "cpu", "--steps", "2",
         "--sizes", "128", "--batches", "1", "2", "--descriptors", "pixel", "latent",
         "--pictures", "100", "--threads", "1", "--no-memory", "--json", str(out)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture
def macs(report):
    """(row, batch) -> MACs of each step."""
    tables = report[0]["tables"]
    return {(r["row"], t["batch"]): r["macs_by_step"] for t in tables for r in t["rows"]}


@pytest.fixture
def parts(report):
    return {part["part"]: part["macs"] for part in report[0]["parts"]}


def test_every_row_is_there(report):
    found, printed = report
    guards = ("watch", "terms", "terms+neighbour", "exit", "exit+neighbour")
    wanted = ["plain", *(f"{g} {d}" for d in ("pixel", "latent") for g in guards), "authors"]
    for table in found["tables"]:
        assert [row["row"] for row in table["rows"]] == wanted
        assert all(row["seconds"] > 0 and row["macs_ratio"] >= 1 for row in table["rows"])
    assert all(f"\n{row} " in printed for row in wanted)


def test_what_is_counted_adds_up(macs, parts):
    branch = parts["model, one branch, 128²"]
    look, gradient = parts["pixel, scale 16: look"], parts["pixel, scale 16: gradient"]

    def more(row: str, step: int = 1) -> float:
        return macs[row, 1][step] - macs["plain", 1][step]

    assert macs["plain", 1][1] == pytest.approx(2 * branch, rel=0.01)
    assert more("watch pixel") == pytest.approx(look, rel=0.05)
    # D, and the gradient of Eq. 17
    assert more("terms pixel") == pytest.approx(look + gradient, rel=0.05)
    assert more("watch latent") < 0.01 * branch
    assert more("exit latent") == pytest.approx(branch, rel=0.05)
    # The tokens to leave out, by bisection among 77: 6 branches where one is enough, 7 where all are not.
    # The text is not known; looking for it encodes the neighbour's caption.
    caption = parts["a caption, encoded"]
    assert more("exit latent", 0) == pytest.approx((6 + 1) * branch + caption, rel=0.05)
    besides = more("exit+neighbour latent", 0) - (7 + 1 + 1) * branch
    assert min(abs(besides), abs(besides - caption)) < 0.05 * 8 * branch


def test_branches_are_those_that_were_drawn(report):
    """Averages over two steps, the first of which looks for the words to keep."""
    rows = {row["row"]: row["branches"] for row in report[0]["tables"][0]["rows"]}
    assert rows["plain"] == rows["watch pixel"] == rows["terms pixel"] == 2
    assert rows["authors"] == 3
    assert 2.5 <= rows["terms+neighbour pixel"] <= 3  # one serves two steps while the caption stays
    assert 3 < rows["exit pixel"] <= rows["exit+neighbour pixel"] <= rows["exit pixel"] + 1


def test_a_batch_costs_its_members(macs):
    for row in ("plain", "watch pixel", "terms pixel"):
        assert macs[row, 2] == pytest.approx([2 * one for one in macs[row, 1]], rel=0.02)
