"""What a hand does to the front end, and what an eye sees there."""

from __future__ import annotations

import copy
import json
import time

from tests.web.browser import Page

READY = "app?.graph && app.extensionManager && LiteGraph.registered_node_types.AMG_Sampler"
MODES = ["classic", "vue"]
EMPTY = {"nodes": [], "links": [], "version": 0.4}  # a graph
HELPERS = """
window.amgNode = (id) => {
  let graph = app.rootGraph ?? app.graph, node = null;
  for (const part of String(id).split(":")) { node = graph.getNodeById(part); graph = node?.subgraph; }
  return node;
};
window.amgOn = (type) => app.graph._nodes.filter((node) => node.type === type);
window.amgPanel = (id, name) => amgNode(id).widgets.find((w) => w.name === name)?.element;
const frame = () => new Promise(requestAnimationFrame);
window.amgRest = async () => {
  await frame(), await frame();
  const moving = document.getAnimations().filter((each) =>
    each.playState === "running" && Number.isFinite(each.effect.getComputedTiming().endTime));
  await Promise.allSettled(moving.map((each) => each.finished));
  await new Promise(requestIdleCallback);
};
app.api.addEventListener("amg.seen", ({ detail }) => (window.amgSeen = detail.number));
"""


class Front:
    def __init__(self, page: Page, server) -> None:
        self.page, self.server = page, server
        self.js, self.until = page.js, page.until
        self.sent = 0  # calls of `send`

    def open(self) -> None:
        self.page.open(self.server.url)
        self.until(READY, 120)
        self.js(HELPERS + "await app.extensionManager.setting.set('Comfy.Workflow.Persist', false)")
        self.version = tuple(map(int, self.js("return __COMFYUI_FRONTEND_VERSION__").split(".")))
        time.sleep(1)
        self.page.key("Escape", 27)  # a dialog of welcome, where there is one

    def rest(self) -> None:
        """Wait until what was done is drawn, what moves has moved and the page has nothing to do."""
        self.js("await amgRest()")

    @property
    def modes(self) -> list[str]:
        """Renderings that this version has in earnest."""
        return MODES if self.version >= (1, 34) else MODES[:1]

    def setting(self, name: str, value) -> None:
        self.js(f"await app.extensionManager.setting.set({json.dumps(name)}, {json.dumps(value)})")

    def render(self, mode: str) -> None:
        self.setting("Comfy.VueNodes.Enabled", mode == "vue")

    def load(self, graph: dict) -> None:
        self.js(f"await app.loadGraphData({json.dumps(graph)}); await amgRest()")

    def alone(self, kind: str) -> int:
        """A graph of one node of that type; its id."""
        self.load(EMPTY)
        self.js(f"const n = LiteGraph.createNode('{kind}'); n.pos = [100, 100]; app.graph.add(n)")
        return self.id_of(kind)

    def export(self) -> dict:
        """What would be queued: {id: {"class_type", "inputs"}}.

        Without what Preview as Text shows, which some versions queue along.
        """
        found = json.loads(self.js("return JSON.stringify((await app.graphToPrompt()).output)"))
        for node in found.values():
            if node["class_type"] == "PreviewAny":
                node["inputs"] = {"source": node["inputs"]["source"]}
        return {
            i: {key: each[key] for key in ("class_type", "inputs")} for i, each in found.items()
        }

    def saved(self) -> dict:
        return json.loads(self.js("return JSON.stringify(app.graph.serialize())"))

    def values(self) -> dict[int, list]:
        """widgets_values of every node of this pack, as they would be saved."""
        nodes = self.saved()["nodes"]
        return {
            n["id"]: n.get("widgets_values") or [] for n in nodes if n["type"].startswith("AMG_")
        }

    def id_of(self, kind: str) -> int:
        """Of the first node of that type."""
        return int(self.js(f"return String(amgOn({json.dumps(kind)})[0].id)"))

    def look_at(self, node: int, x: float = 300, y: float = 120, scale: float = 1.0) -> None:
        """Put the node's upper left corner at (x, y) of the canvas."""
        self.js(
            f"const node = amgNode({node}); app.canvas.ds.scale = {scale};"
            f"app.canvas.ds.offset = [{x} / {scale} - node.pos[0], {y} / {scale} - node.pos[1]];"
            "app.canvas.setDirty(true, true); await amgRest()"
        )

    def widget(self, node: int, name: str, part: float = 0.5) -> tuple[float, float]:
        """Where on the screen a canvas widget is: at `part` of its width."""
        return tuple(
            self.js(
                f"const node = amgNode({node}); const w = node.widgets.find((w) => w.name == '{name}');"
                "const {scale, offset} = app.canvas.ds;"
                "const box = app.canvas.canvas.getBoundingClientRect();"
                f"const x = node.pos[0] + 15 + (node.size[0] - 30) * {part};"
                "const y = node.pos[1] + (w.last_y ?? w.y) + (w.computedHeight ?? 20) / 2;"
                "return [box.x + (x + offset[0]) * scale, box.y + (y + offset[1]) * scale]"
            )
        )

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """x, y, width, height on the screen of the first element that fits."""
        return tuple(
            self.js(
                f"const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                "return [r.x, r.y, r.width, r.height]"
            )
        )

    def centre(self, element: str) -> tuple[float, float]:
        """Where on the screen the middle of the element is that a JS expression gives."""
        return tuple(
            self.js(
                f"const r = ({element}).getBoundingClientRect();"
                "return [r.x + r.width / 2, r.y + r.height / 2]"
            )
        )

    def value(self, node: int, name: str):
        return self.js(f"return amgNode({node}).widgets.find((w) => w.name == '{name}').value")

    def send(self, messages: list[tuple[str, dict]]) -> None:
        """Let these arrive, over the wire where the server is the small one; returns once they have."""
        if not self.server.real:
            self.sent += 1
            self.server.host.play([*messages, ("amg.seen", {"number": self.sent})])
            self.until(f"window.amgSeen == {self.sent}")
            self.rest()
            return
        for kind, data in messages:
            self.js(
                f"app.api.dispatchEvent(new CustomEvent({json.dumps(kind)},"
                f"{{detail: {json.dumps(data)}}}))"
            )


def shortened(graph: dict, steps: int = 8, batch: int = 2) -> dict:
    """A saved workflow that a real server runs in seconds."""
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        values = node.get("widgets_values")
        if node["type"] in ("KSampler", "AMG_Sampler"):
            values[2] = steps
        if node["type"] == "EmptyLatentImage":
            values[2] = batch
    return graph
