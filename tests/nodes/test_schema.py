"""Saved workflows keep working: ids, order, defaults and ranges are pinned in schema.json.

Widgets are only ever appended. A deliberate change is made in schema.json by hand, so that it is
looked at.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SNAPSHOT = json.loads(Path(__file__).with_name("schema.json").read_text())
IDS = sorted(SNAPSHOT)


def test_the_nodes(pack):
    assert sorted(pack.nodes) == IDS


@pytest.mark.parametrize("node_id", IDS)
def test_schema(pack, describe_schema, node_id):
    assert describe_schema(pack.nodes[node_id].define_schema()) == SNAPSHOT[node_id]


LONGEST = 320  # characters of a tooltip
LONGER = {"descriptor": 600}  # has a sentence for each descriptor


@pytest.mark.parametrize("node_id", IDS)
def test_every_input_and_output_has_a_tooltip(pack, node_id):
    schema = pack.nodes[node_id].define_schema()
    assert schema.category == "AMG"
    assert schema.display_name
    assert schema.description.endswith(".")
    for slot in [*schema.inputs, *schema.outputs]:
        assert slot.tooltip.endswith("."), slot.id
        assert 15 < len(slot.tooltip) < LONGER.get(slot.id, LONGEST), slot.id


@pytest.mark.parametrize("node_id", IDS)
def test_help_page_names_every_widget(pack, node_id):
    page = (ROOT / "web/docs" / f"{node_id}.md").read_text()
    schema = pack.nodes[node_id].define_schema()
    assert page.startswith(f"# {schema.display_name}\n")
    for slot in schema.inputs:
        assert re.search(rf"`{slot.id}`", page), slot.id


HOSTS = {"sampler_name", "scheduler", "index_name"}  # whose choices are not this pack's


@pytest.mark.parametrize("node_id", IDS)
def test_help_page_names_every_choice(pack, node_id):
    """Of every list, unless its row refers to the page that does."""
    page = (ROOT / "web/docs" / f"{node_id}.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for slot in pack.nodes[node_id].define_schema().inputs:
        options = getattr(slot, "options", None)
        row = next(row for row in rows if f"`{slot.id}`" in row)
        if options and slot.id not in HOSTS and not re.search(r"[Aa]s in \*|[Ss]ee \*", row):
            assert [each for each in options if f"*{each}*" not in row] == [], slot.id


def test_sampler_begins_as_ksampler():
    """So that a KSampler in a graph can be swapped for it without a look at the widgets."""
    ids = [entry["id"] for entry in SNAPSHOT["AMG_Sampler"]["inputs"]]
    assert ids[:10] == [
        "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
        "latent_image", "denoise",
    ]  # fmt: skip
