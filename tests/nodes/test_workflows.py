"""The example workflows fit the nodes. That they run: tests/host/test_server.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "example_workflows"
SNAPSHOT = json.loads(Path(__file__).with_name("schema.json").read_text())
GRAPHS = sorted(FOLDER.glob("*.json"))
PROMPTS = sorted((FOLDER / "api").glob("*.api.json"))
WIDGETS = {"INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"}


def test_each_workflow_is_there_in_both_forms():
    names = [path.stem for path in GRAPHS]
    assert names == ["amg_first_look", "amg_sd15"]
    assert [path.name.removesuffix(".api.json") for path in PROMPTS] == names


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_prompt_gives_every_input(path):
    prompt = json.loads(path.read_text())
    for node in prompt.values():
        inputs = node["inputs"]
        for value in inputs.values():
            if isinstance(value, list):
                assert value[0] in prompt
        if node["class_type"] in SNAPSHOT:
            known = SNAPSHOT[node["class_type"]]["inputs"]
            wanted = {entry["id"] for entry in known if not entry.get("optional")}
            assert wanted <= set(inputs) <= {entry["id"] for entry in known}


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_graph_is_consistent(path):
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    assert graph["last_node_id"] == max(nodes)
    assert any(node["type"] in ("MarkdownNote", "Note") for node in nodes.values())
    for link, source, out, target, into, kind in graph["links"]:
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == link
        assert nodes[source]["outputs"][out]["type"] == kind
    for node in nodes.values():
        if node["type"] in SNAPSHOT:
            known = SNAPSHOT[node["type"]]["inputs"]
            extra = sum(entry["id"] == "seed" for entry in known)  # control_after_generate
            widgets = [entry for entry in known if entry["type"] in WIDGETS]
            needed = [entry for entry in widgets if not entry.get("optional")]
            # A workflow may be older than the widgets that were appended since.
            given = len(node.get("widgets_values", [])) - extra
            assert given in range(len(needed), len(widgets) + 1)
            assert widgets[: len(needed)] == needed
