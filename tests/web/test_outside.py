"""What a node inside a subgraph has found is seen outside, on the subgraph's node."""

from __future__ import annotations

from itertools import count

import pytest

from amg_core import messages as words_of
from amg_core.messages import message
from tests.web.front import EMPTY

NUMBERS = count(1)
COPY = [message("still_a_copy")]
FINE = [message("no_copy")]
BOX = """
for (const [i, type] of types.entries()) {
  const node = LiteGraph.createNode(type);
  node.pos = [100, 100 + 300 * i];
  app.graph.add(node);
}
const box = () => app.canvas.graph._nodes.find((node) => node.subgraph);
for (let i = 0; i < depth; i++) app.graph.convertToSubgraph(new Set(app.graph._nodes));
const ids = [];
let graph = app.graph;
for (let i = 0; i < depth; i++) {
  const node = graph._nodes.find((each) => each.subgraph);
  ids.push(node.id);
  graph = node.subgraph;
}
return [ids, ...types.map((type) => graph._nodes.find((node) => node.type === type).id)].map(String);
"""


def boxed(front, *types: str, depth: int = 1) -> tuple[list[str], list[str]]:
    """(execution ids of the boxes from the outermost on, those of nodes of these types in them)."""
    front.load(EMPTY)
    found = front.js(f"const types = {list(types)}, depth = {depth};" + BOX)
    path = found[0].split(",")
    boxes = [":".join(path[: i + 1]) for i in range(depth)]
    return boxes, [f"{boxes[-1]}:{inner}" for inner in found[1:]]


def end(node: str, kind: str, said: list, outcome: str) -> tuple[str, dict]:
    """The event of a run that has ended."""
    told = {"messages": words_of.to_json(said), "words": words_of.words(said)}
    verdicts = [{"sample": 0, "attempt": 0, "outcome": outcome, "words": ""}]
    place = {"node": node, "class": kind, "prompt": f"outside-{next(NUMBERS)}"}
    return "amg.step", place | {"kind": "end", "verdicts": verdicts} | told


def outside(front, box: str) -> dict:
    """What is read on the box now."""
    panel = f"amgPanel('{box}', 'amg_said')"
    front.until(f"{panel}?.querySelector('p')")
    front.rest()
    return front.js(
        f"const panel = {panel}, r = panel.getBoundingClientRect();"
        "return { texts: [...panel.querySelectorAll('p')].map((p) => p.textContent),"
        "outcome: panel.dataset.outcome, wide: r.width, high: r.height }"
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_a_copy_is_seen_on_every_box_around_it(front, mode, depth):
    boxes, (sampler,) = boxed(front, "AMG_Sampler", depth=depth)
    assert len(boxes) == depth
    front.send([end(sampler, "AMG_Sampler", COPY, "copy")])
    for box in boxes[:1]:  # the one that is on the canvas
        found = outside(front, box)
        assert found["texts"] == [f"AMG Sampler: {words_of.words(COPY)}"]
        assert found["outcome"] == "copy"
        assert found["wide"] > 100 and found["high"] > 15
    front.js(f"app.canvas.setGraph(amgNode('{boxes[0]}').subgraph)")
    for box in boxes[1:]:
        assert outside(front, box)["outcome"] == "copy"
    front.js("app.canvas.setGraph(app.rootGraph ?? app.graph)")


def test_the_worst_comes_first(front, mode):
    (box,), (sampler, guard) = boxed(front, "AMG_Sampler", "AMG_Guard")
    front.send([end(sampler, "AMG_Sampler", FINE, "no_copy")])
    assert outside(front, box)["outcome"] == "no_copy"
    front.send([end(guard, "AMG_Guard", COPY, "copy")])
    front.until(f"amgPanel('{box}', 'amg_said').querySelectorAll('p').length == 2")
    found = outside(front, box)
    assert found["outcome"] == "copy"
    assert found["texts"][0].endswith(words_of.words(COPY))
    assert found["texts"][1] == f"AMG Sampler: {words_of.words(FINE)}"


def test_it_goes_with_the_next_run_and_is_not_saved(front, mode, messages):
    (box,), (sampler,) = boxed(front, "AMG_Sampler")
    before = [node.get("widgets_values") for node in front.saved()["nodes"]]
    front.send([end(sampler, "AMG_Sampler", COPY, "copy")])
    assert outside(front, box)["outcome"] == "copy"
    assert [node.get("widgets_values") for node in front.saved()["nodes"]] == before
    step = next(data for kind, data in messages if kind == "amg.step" and data["kind"] == "step")
    front.send([("amg.step", step | {"node": sampler, "prompt": f"outside-{next(NUMBERS)}"})])
    front.until(f"!amgPanel('{box}', 'amg_said').querySelector('p')")


def test_an_error_is_seen_outside(front, mode):
    (box,), (builder,) = boxed(front, "AMG_BuildIndex")
    event = {
        "node_id": builder, "node_type": "AMG_BuildIndex", "prompt_id": f"outside-{next(NUMBERS)}",
        "exception_type": "amg.AMGError", "exception_message": "No such folder.",
    }  # fmt: skip
    front.send(
        [("execution_error", event | {"executed": [], "traceback": [], "current_inputs": {}})]
    )
    found = outside(front, box)
    assert found["outcome"] == "error" and "No such folder." in found["texts"][0]


def test_a_box_that_is_opened_anew_says_it_again(front, mode):
    """The workflow is loaded again: its nodes are new objects."""
    (box,), (sampler,) = boxed(front, "AMG_Sampler")
    front.send([end(sampler, "AMG_Sampler", COPY, "copy")])
    front.js(
        "const same = app.extensionManager.workflow.activeWorkflow;"
        "await app.loadGraphData(app.graph.serialize(), true, true, same); await amgRest()"
    )
    assert outside(front, box)["outcome"] == "copy"
