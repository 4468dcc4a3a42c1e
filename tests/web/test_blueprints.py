"""The subgraph blueprints: made of nodes that there are, found in the page, and what they export."""

from __future__ import annotations

import json
import time

import pytest

from tests.web.conftest import ROOT, WORKFLOWS
from tests.web.front import EMPTY
from tests.web.host import WIDGETS

FILES = sorted((ROOT / "subgraphs").glob("*.json"))
# What stands around a blueprint's node, and the same without it.
# name: (type, {widget: value}, {input: (name, output)})
DEMO = {
    "demo": ("AMG_DemoModel", {}, {}),
    "prompt": ("CLIPTextEncode", {"text": "fox face on violet rays"}, {"clip": ("demo", 1)}),
    "nothing": ("CLIPTextEncode", {"text": ""}, {"clip": ("demo", 1)}),
    "empty": ("EmptyLatentImage", {"width": 128, "height": 128}, {}),
}
TEXTS = {"positive": ("prompt", 0), "negative": ("nothing", 0)}
ASKED = {"model": ("demo", 0), **TEXTS, "clip": ("demo", 1), "vae": ("demo", 2)}
PLAIN = {
    "seed": 5,
    "steps": 4,
    "cfg": 4.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
}
INDEX = ("AMG_LoadIndex", {"index_name": "amg-demo"}, {})
FIXED = {"control_after_generate": "fixed"}
DECODED = ("VAEDecode", {}, {"samples": ("sampler", 0), "vae": ("demo", 2)})


def drawn(by: str) -> dict:
    """KSampler by the model and the prompts of that node, and its picture."""
    asked = {"model": (by, 0), **TEXTS}
    if by != "demo":
        asked |= {"positive": (by, 1), "negative": (by, 2)}
    sampler = ("KSampler", {**PLAIN, **FIXED}, {**asked, "latent_image": ("empty", 0)})
    return {"sampler": sampler, "drawn": DECODED}


AROUND = {
    "Guarded Sampling (AMG)": (
        {**ASKED, "latent_image": ("empty", 0)},
        {"seed": 5, "steps": 4, "cfg": 4.0, "preset": "strong", "index_name": "amg-demo"},
        {
            "shown": ("PreviewImage", {}, {"images": ("blueprint", 0)}),
            "report": ("PreviewAny", {}, {"source": ("blueprint", 2)}),
            "more": ("PreviewAny", {}, {"source": ("blueprint", 3)}),
        },
        {
            "index": INDEX,
            "sampler": (
                "AMG_Sampler",
                {**PLAIN, **FIXED, "preset": "strong"},
                {**ASKED, "latent_image": ("empty", 0), "index": ("index", 0)},
            ),
            "decode": DECODED,
            "probe": ("AMG_SimilarityProbe", {}, {"image": ("decode", 0), "index": ("index", 0)}),
            "shown": ("PreviewImage", {}, {"images": ("decode", 0)}),
            "report": ("PreviewAny", {}, {"source": ("probe", 1)}),
            "more": ("PreviewAny", {}, {"source": ("sampler", 1)}),
        },
    ),
    "Check a Picture (AMG)": (
        {"image": ("drawn", 0)},
        {"index_name": "amg-demo"},
        {
            **drawn("demo"),
            "report": ("PreviewAny", {}, {"source": ("blueprint", 0)}),
            "shown": ("PreviewImage", {}, {"images": ("blueprint", 1)}),
            "number": ("PreviewAny", {}, {"source": ("blueprint", 2)}),
        },
        {
            **drawn("demo"),
            "index": INDEX,
            "probe": ("AMG_SimilarityProbe", {}, {"image": ("drawn", 0), "index": ("index", 0)}),
            "report": ("PreviewAny", {}, {"source": ("probe", 1)}),
            "shown": ("PreviewImage", {}, {"images": ("probe", 2)}),
            "number": ("PreviewAny", {}, {"source": ("probe", 0)}),
        },
    ),
    "Guard a Prompt (AMG)": (
        ASKED,
        {"index_name": "amg-demo", "preset": "gentle", "false_alarms": 0.05},
        {
            **drawn("blueprint"),
            "shown": ("PreviewImage", {}, {"images": ("drawn", 0)}),
            "report": ("PreviewAny", {}, {"source": ("blueprint", 3)}),
        },
        {
            "index": INDEX,
            "apply": (
                "AMG_Apply",
                {"preset": "gentle"},
                {
                    "model": ("demo", 0),
                    "index": ("index", 0),
                    "clip": ("demo", 1),
                    "vae": ("demo", 2),
                },
            ),
            "probe": (
                "AMG_PromptProbe",
                {"false_alarms": 0.05},
                {
                    "model": ("demo", 0),
                    **TEXTS,
                    "clip": ("demo", 1),
                    "guarded_model": ("apply", 0),
                },
            ),
            **drawn("probe"),
            "shown": ("PreviewImage", {}, {"images": ("drawn", 0)}),
            "report": ("PreviewAny", {}, {"source": ("probe", 6)}),
        },
    ),
}
BUILD = {  # the index that they ask for
    "1": {"class_type": "AMG_DemoModel", "inputs": {}},
    "2": {
        "class_type": "AMG_BuildIndex",
        "inputs": {"folder": ["1", 3], "name": "amg-demo", "descriptor": "pixel"},
    },
    "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
}
MAKE = """
const made = {...given};
for (const [name, [type, values]] of Object.entries(defs)) {
  const node = made[name] = LiteGraph.createNode(type);
  app.graph.add(node);
  for (const [widget, value] of Object.entries(values)) {
    node.widgets.find((each) => each.name === widget).value = value;
  }
}
for (const [name, inputs] of Object.entries({...Object.fromEntries(
    Object.entries(defs).map(([name, [, , inputs]]) => [name, inputs])), ...around})) {
  for (const [input, [from, output]] of Object.entries(inputs)) {
    const slot = made[name].inputs.findIndex((each) => each.name === input);
    if (slot < 0) throw new Error(`${name} has no ${input}`);
    made[from].connect(output, made[name], slot);
  }
}
"""


def make(front, defs: dict, blueprint: dict | None = None) -> None:
    """Add nodes to the open graph; `blueprint`: inputs of the node that stands there already."""
    given = "{}" if blueprint is None else "{blueprint: app.graph._nodes.find((n) => n.subgraph)}"
    around = {} if blueprint is None else {"blueprint": blueprint}
    front.js(
        f"const given = {given}, defs = {json.dumps(defs)}, around = {json.dumps(around)};" + MAKE
    )


def tree(prompt: dict, link: list) -> tuple:
    """What a link leads to, whatever the ids are: (output, class, inputs)."""
    node, output = prompt[link[0]], link[1]
    inputs = {
        name: tree(prompt, value) if isinstance(value, list) and len(value) == 2 else value
        for name, value in node["inputs"].items()
    }
    return output, node["class_type"], inputs


def ends(prompt: dict) -> list:
    """The whole prompt as trees from its last nodes."""
    led = {
        value[0] for node in prompt.values() for value in node["inputs"].values()
        if isinstance(value, list)
    }  # fmt: skip
    return sorted((tree(prompt, [i, None]) for i in prompt if i not in led), key=repr)


def test_there_are_some():
    assert {path.stem for path in FILES} == set(AROUND)
    assert not {path.stem for path in FILES} & {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_made_of_what_there_is(path, info):
    """Types, inputs and widgets of every node are those of the schema, and their values allowed."""
    tree = json.loads(path.read_text())
    (outer,), (inner,) = tree["nodes"], tree["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"]
    assert outer["title"] == inner["name"] == path.stem
    assert inner["description"].endswith(".")
    assert tree["extra"]["BlueprintDescription"] == inner["description"]
    for node in inner["nodes"]:
        schema = info[node["type"]]["input"]
        slots = {**schema["required"], **schema.get("optional", {})}
        assert {each["name"] for each in node["inputs"]} == set(slots), node["type"]
        values = []
        for name, (kind, *options) in slots.items():
            if kind in WIDGETS or isinstance(kind, list):
                values.append((name, kind, options[0] if options else {}))
                if options and options[0].get("control_after_generate"):
                    values.append(("control_after_generate", "COMBO", {"options": ["fixed"]}))
        given = node.get("widgets_values") or []
        assert len(given) == len(values), node["type"]
        for value, (name, kind, options) in zip(given, values, strict=True):
            choices = kind if isinstance(kind, list) else options.get("options")
            assert choices is None or value in choices, (name, value)
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], (name, value)
    ids = {node["id"] for node in inner["nodes"]}
    for link in inner["links"]:
        assert {link["origin_id"], link["target_id"]} <= ids | {-10, -20}
    inside = {node["id"]: node for node in inner["nodes"]}
    for slot, outside in zip(inner["inputs"], outer["inputs"], strict=True):
        led = [link for link in inner["links"] if link["id"] in slot["linkIds"]]
        assert led, slot["name"]
        for link in led:
            met = inside[link["target_id"]]["inputs"][link["target_slot"]]
            assert (met["name"], met["type"]) == (slot["name"], slot["type"])
            assert ("widget" in met) == ("widget" in outside)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_exports_what_the_same_nodes_do_without_it(front, mode, path):
    """Dropped into a graph from the search, where the front end has blueprints; else loaded."""
    inputs, values, around, flat = AROUND[path.stem]
    if front.server.real:
        front.load(json.loads(path.read_text()))
    else:
        front.load(EMPTY)
        drop(front, path.stem)
    outer = "app.graph._nodes.find((n) => n.subgraph)"
    assert front.js(f"return {outer}.title") == path.stem
    found = front.js(f"return {outer}.widgets.map((w) => w.name)")
    assert sorted(found) == sorted(values)
    for name, value in values.items():
        front.js(f"{outer}.widgets.find((w) => w.name == '{name}').value = {json.dumps(value)}")
    make(front, {**DEMO, **around}, inputs)
    exported = front.export()
    front.load(front.saved())
    assert front.export() == exported
    front.load(EMPTY)
    make(front, {**DEMO, **flat})
    wanted = front.export()
    assert ends(exported) == ends(wanted)
    if front.server.real and "Prompt" not in path.stem:  # that one wants a calibration first
        host = front.server.host
        for prompt in (BUILD, exported):
            assert host.finish(host.queue(prompt))["status"]["status_str"] == "success"


def drop(front, name: str) -> None:
    """As a hand does: open the search, type the name, take what is found."""
    front.js("await app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    front.until("document.activeElement?.tagName == 'INPUT'")
    front.page.command("Input.insertText", text=name)
    time.sleep(1)  # it searches a moment after the last letter
    front.rest()
    front.page.key("Enter", 13, "\r")
    front.rest()
    front.page.click(800, 400)  # newer front ends let the hand choose where
    front.until("app.graph._nodes.some((n) => n.subgraph)")
