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


PARTS = ("start here", "index", "check", "prompt", "advanced")  # of the category
LONGEST = 320  # characters of a tooltip
LONGER = {"descriptor": 600}  # has a sentence for each descriptor


@pytest.mark.parametrize("node_id", IDS)
def test_every_input_and_output_has_a_tooltip(pack, node_id):
    schema = pack.nodes[node_id].define_schema()
    assert schema.category.removeprefix("AMG/") in PARTS
    assert schema.display_name
    assert schema.description.endswith(".")
    for slot in [*schema.inputs, *schema.outputs]:
        assert slot.tooltip.endswith("."), slot.id
        assert 15 < len(slot.tooltip) < LONGER.get(slot.id, LONGEST), slot.id


SEARCHED = ("copyright", "copy", "duplicate", "plagiarism", "training data", "overfit", "lora")


def test_found_by_what_people_search_for(pack, monkeypatch):
    """Where the host's schema has a place for such words; older ones refuse what they do not know."""
    types = pack.module("nodes.types")
    assert "search_aliases" not in types.place(types.CHECK)

    def schema(search_aliases=None): ...

    monkeypatch.setattr(types.io, "Schema", schema)
    found = {part: types.place(part)["search_aliases"] for part in PARTS}
    assert [word for word in SEARCHED if word not in found["check"]] == []
    assert [word for word in SEARCHED if word not in found["start here"]] == []
    assert all(words and all(words) for words in found.values())


@pytest.mark.parametrize("node_id", IDS)
def test_names_say_whose_they_are(pack, node_id):
    """Beside hundreds of nodes of others; and at most as long as a title that is not cut off."""
    name = pack.nodes[node_id].define_schema().display_name
    assert "AMG" in name and len(name) <= 34


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
