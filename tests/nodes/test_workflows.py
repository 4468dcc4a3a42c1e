"""The example workflows fit the nodes. That they run: tests/host/test_server.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "example_workflows"
SNAPSHOT = json.loads(Path(__file__).with_name("schema.json").read_text())
GRAPHS = sorted(FOLDER.glob("*.json"))
PROMPTS = sorted((FOLDER / "api").glob("*.api.json"))
BESIDE = 160  # units between two nodes; less than a node
RESULTS = {
    "PreviewImage", "SaveImage", "AMG_Sampler", "AMG_Apply", "AMG_SimilarityProbe", "AMG_PromptProbe",
    "AMG_CalibratePromptProbe", "AMG_StrengthGrid",
}  # fmt: skip
WIDGETS = {"INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"}


def test_each_workflow_is_there_in_both_forms():
    names = [path.stem for path in GRAPHS]
    assert names == [
        "amg_app.app", "amg_custom_sampler", "amg_first_look", "amg_lora", "amg_off_on",
        "amg_probe_picture", "amg_prompt_probe", "amg_sd15", "amg_strength_grid",
    ]  # fmt: skip
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


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_graph_and_prompt_say_the_same(path):
    """The prompt is what the front end makes of the graph: nodes, widget values, wires."""
    graph = json.loads(path.read_text())
    prompt = json.loads((FOLDER / "api" / f"{path.stem}.api.json").read_text())
    sources = {link: [str(source), out] for link, source, out, *_ in graph["links"]}
    drawn = {str(node["id"]): node for node in graph["nodes"] if "Note" not in node["type"]}
    assert {i: node["type"] for i, node in drawn.items()} == {
        i: node["class_type"] for i, node in prompt.items()
    }
    for i, node in drawn.items():
        given = prompt[i]["inputs"]
        wired = {slot["name"]: slot["link"] for slot in node["inputs"] if slot.get("link")}
        assert {name: sources[link] for name, link in wired.items()} == {
            name: value for name, value in given.items() if isinstance(value, list)
        }
        if node["type"] in SNAPSHOT:
            known = [e["id"] for e in SNAPSHOT[node["type"]]["inputs"] if e["type"] in WIDGETS]
            values = list(node["widgets_values"])
            for name in known:
                value = values.pop(0) if values else None
                if name == "seed":
                    assert values.pop(0) in ("fixed", "randomize")
                if name in given and name not in wired:
                    assert value == given[name], (i, name)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_thumbnail(path):
    """The template browser shows the .jpg of the same name."""
    file = path.with_suffix(".jpg")
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and picture.width == 400
    assert file.stat().st_size < 64_000


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_nothing_is_shown_twice(path):
    """Our nodes say their result on a panel. Only pictures and a whole report are shown by others."""
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, source, out, target, *_ in graph["links"]:
        if nodes[source]["type"] in SNAPSHOT and nodes[target]["type"].startswith("Preview"):
            assert (nodes[source]["type"], out) == ("AMG_Report", 0)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_one_begins_beside_the_first_result(path):
    """The note "Start here", and a node that shows a result, are neighbours."""
    graph = json.loads(path.read_text())
    (note,) = (node for node in graph["nodes"] if node.get("title") == "Start here")
    (x, y), (w, h) = note["pos"], note["size"]
    near = []
    for node in graph["nodes"]:
        (x0, y0), (w0, h0) = node["pos"], node["size"]
        across, down = max(x0 - x - w, x - x0 - w0), max(y0 - y - h, y - y0 - h0)
        if 0 < max(across, down) <= BESIDE and not node["flags"].get("collapsed"):
            near.append(node["type"])
    assert set(near) & RESULTS


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_groups_have_titles_in_words(path):
    for group in json.loads(path.read_text())["groups"]:
        assert re.fullmatch(r"[A-Z][A-Za-z ,:?]{7,}", group["title"])


@pytest.mark.parametrize("folder", ["docs", "web/docs"])
def test_pictures_of_the_pages_are_there(folder):
    """And none is there that no page shows; small enough to be carried about."""
    pages = sorted((FOLDER.parent / folder).glob("*.md"))
    text = (FOLDER.parent / "README.md").read_text() + "".join(p.read_text() for p in pages)
    shown = {
        name for page in pages for name in re.findall(r"!\[.*?\]\(([^)]+)\)", page.read_text())
    }
    files = {file.name for file in (FOLDER.parent / folder).iterdir() if file.suffix != ".md"}
    assert all((FOLDER.parent / folder / name).is_file() for name in shown)
    assert all(name in text for name in files)
    new = [FOLDER.parent / folder / name for name in files if name.endswith(".webp")]
    assert all(file.stat().st_size < 150_000 for file in new)
