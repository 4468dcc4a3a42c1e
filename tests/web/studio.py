"""Draws a scene with the real front end, the same on every machine."""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from tests.web.browser import PATIENCE, Page
from tests.web.front import Front
from tests.web.scenes import Scene

WINDOW = (760, 1300)  # CSS pixels
DENSITY = 1.25  # pixels of the picture to one of the page
MARGIN, GAP = 12, 28  # CSS pixels: around all; between nodes

FLAGS = (
    f"--force-device-scale-factor={DENSITY}", "--disable-lcd-text", "--force-color-profile=srgb",
)  # fmt: skip
# Glyphs are drawn the same way whatever the machine's settings are …
GLYPHS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<include ignore_missing="yes">{machine}</include>
<match target="font">
  <edit name="antialias" mode="assign"><bool>true</bool></edit>
  <edit name="hinting" mode="assign"><bool>false</bool></edit>
  <edit name="autohint" mode="assign"><bool>false</bool></edit>
  <edit name="hintstyle" mode="assign"><const>hintnone</const></edit>
  <edit name="rgba" mode="assign"><const>none</const></edit>
</match></fontconfig>"""
# … in the font that the front end brings along; nothing moves or blinks.
STILL = """
const still = document.createElement("style");
still.textContent = `
  *:not(i):not(.pi):not([class*="mdi"]), ::placeholder { font-family: Inter !important; }
  *, ::before, ::after { animation: none !important; transition: none !important;
    caret-color: transparent !important; }
  .p-toast, .p-tooltip { display: none !important; }`;
document.head.append(still);
const font = Object.getOwnPropertyDescriptor(CanvasRenderingContext2D.prototype, "font");
Object.defineProperty(CanvasRenderingContext2D.prototype, "font", {
  get() { return font.get.call(this); },
  set(value) { font.set.call(this, value.replace(/(\\d+(?:\\.\\d+)?px).*$/, "$1 Inter")); },
});
await Promise.all(["400", "600", "700"].map((weight) => document.fonts.load(`${weight} 14px Inter`)));
"""

BUILD = """
const { kind, before, after, widgets, width } = scene;
const add = (type, x, y, w) => {
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  node.pos = [x, y];
  node.setSize([w, node.computeSize()[1]]);
  return node;
};
const join = (from, output, to, input) => {
  const slots = [from.findOutputSlot(output), to.findInputSlot(input)];
  if (slots.includes(-1) || !from.connect(slots[0], to, slots[1]))
    throw Error(`no wire ${output} > ${input}`);
};
const node = add(kind, 0, 0, width);
for (const [name, value] of Object.entries(widgets)) {
  const widget = node.widgets.find((each) => each.name === name);
  if (!widget) throw Error(`${kind} has no widget ${name}`);
  widget.value = value;
}
const pen = document.createElement("canvas").getContext("2d");
pen.font = `${LiteGraph.NODE_TEXT_SIZE}px Inter`;
const folded = (each, i, place) => {
  const wide = pen.measureText(each.title).width + 2 * LiteGraph.NODE_TITLE_HEIGHT;
  const made = add(each.kind, place(wide), 44 * i, wide);
  made.title = each.title;
  made.collapse();
  return made;
};
before.forEach((each, i) => {
  const made = folded(each, i, (wide) => -wide - GAP);
  each.slots.forEach(([output, input]) => join(made, output, node, input));
});
after.forEach((each, i) => {
  const made = folded(each, i, () => width + GAP);
  each.slots.forEach(([output, input]) => join(node, output, made, input));
});
node.setSize([width, node.computeSize()[1]]);
return String(node.id);
"""

# Everything on the canvas, moved into its corner; where that is on the page.
FRAME = """
const { ds, graph } = app.canvas;
const boxes = [...graph._nodes, graph.inputNode, graph.outputNode].filter(Boolean).map((n) => {
  n.updateArea?.(app.canvas.ctx);
  return [...n.boundingRect];
});
const x0 = Math.min(...boxes.map((b) => b[0]));
const y0 = Math.min(...boxes.map((b) => b[1]));
const x1 = Math.max(...boxes.map((b) => b[0] + b[2]));
const y1 = Math.max(...boxes.map((b) => b[1] + b[3]));
ds.scale = 1;
ds.offset = [20 - x0, 20 - y0];
app.canvas.setDirty(true, true);
const box = app.canvas.canvas.getBoundingClientRect();
return [box.x + 20, box.y + 20, x1 - x0, y1 - y0];
"""


def left(kind: str, text: str) -> dict:
    """The host's event of a node of this type whose result is this text."""
    lines = [
        {"messages": [{"code": "as_written", "words": line}], "words": line}
        for line in text.splitlines()
    ]
    return {"output": {"amg_said": [{"class": kind, "lines": lines}]}}


class Studio:
    """A front end, on the small server, where pictures are taken: `take(scene)`."""

    def __init__(self, host, find=lambda sha256: None) -> None:
        """find : the id that a picture has in the index of `host`, by its hash."""
        self.host, self.find, self.settings = host, find, dict(host.settings)
        self.number = 0  # of the latest scene
        self.folder = tempfile.TemporaryDirectory()
        glyphs = Path(self.folder.name) / "fonts.conf"
        machine = os.environ.get("FONTCONFIG_FILE", "/etc/fonts/fonts.conf")
        glyphs.write_text(GLYPHS.format(machine=machine))
        self.page = Page(WINDOW, *FLAGS, FONTCONFIG_FILE=str(glyphs))
        try:
            self.front = Front(self.page, SimpleNamespace(url=host.url, real=False, host=host))
            self.front.open()
            self.front.js(STILL)
            for name, value in (
                ("Comfy.Graph.CanvasMenu", False),
                ("Comfy.Minimap.Visible", False),
                ("Comfy.NodeBadge.NodeSourceBadgeMode", "None"),
                ("Comfy.NodeBadge.NodeIdBadgeMode", "None"),
                ("Comfy.NodeBadge.NodeLifeCycleBadgeMode", "None"),
            ):
                self.front.setting(name, value)
            self.front.js("await app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.host.settings = self.settings
        self.page.close()
        self.folder.cleanup()

    def take(self, scene: Scene) -> Image.Image:
        """The scene's picture, RGB."""
        self.show(scene)
        return self.shot()

    def shot(self) -> Image.Image:
        """What is shown now, and a margin, once it rests."""
        self.front.until("[...document.images].every((i) => i.complete || i.loading == 'lazy')")
        x, y, width, height = (round(each) for each in self._rest(self.frame))
        clip = {"x": x - MARGIN, "y": y - MARGIN, "scale": 1}
        clip |= {"width": width + 2 * MARGIN, "height": height + 2 * MARGIN}

        def picture() -> bytes:
            return self.page.command(
                "Page.captureScreenshot", format="png", clip=clip, optimizeForSpeed=True
            )["data"]

        return Image.open(io.BytesIO(base64.b64decode(self._rest(picture)))).convert("RGB")

    def show(self, scene: Scene) -> None:
        """Put the scene on the page; `frame` then tells where it is."""
        self.front.js(
            "document.querySelector('.amg-browser')?.close();"
            "app.canvas.setGraph(app.rootGraph ?? app.graph)"
        )
        self.front.setting("Comfy.ColorPalette", scene.palette)
        self.front.render(scene.mode)
        self.front.js("await app.loadGraphData({ nodes: [], links: [], version: 0.4 })")
        if scene.search:
            self._browse(scene.search)
            self.frame = lambda: self.front.box(".amg-browser")
            return
        node = self._build(scene)
        self.frame = lambda: tuple(self.front.js(FRAME))
        if scene.mode == "vue":
            selector = f"[data-node-id='{node}']"
            self.front.until(f'document.querySelector("{selector}")')
            self.front.js(FRAME)
            self.frame = lambda: self.front.box(selector)

    def _build(self, scene: Scene) -> str:
        """The node, its neighbours and its run; the execution id of the node."""
        given = json.dumps(
            {
                "kind": scene.kind, "widgets": scene.widgets, "width": scene.width,
                "before": [vars(each) for each in scene.before],
                "after": [vars(each) for each in scene.after],
            }
        )  # fmt: skip
        node = self.front.js(f"const GAP = {GAP}, scene = {given};" + BUILD)
        outer = None
        if scene.inside:
            self.front.js(f"app.graph.convertToSubgraph(new Set([amgNode({node})]))")
            outer = self.front.js("return String(app.graph._nodes.find((n) => n.subgraph).id)")
            inner = self.front.js(f"return String(amgNode({outer}).subgraph._nodes[0].id)")
            node = f"{outer}:{inner}"
        messages = [(kind, self._of(node, data)) for kind, data in scene.report]
        if scene.text:
            messages.append(("executed", self._of(node, left(scene.kind, scene.text))))
        self.number += 1
        self.front.send(messages)
        if scene.room:
            self.front.js(
                f"const n = amgNode('{node}'); n.setSize([n.size[0], n.size[1] + {scene.room}])"
            )
        if outer:
            self.front.js(f"app.canvas.setGraph(amgNode({outer}).subgraph)")
        return node

    def _of(self, node: str, data: dict) -> dict:
        """A message that was recorded, for that node and the index of this server."""
        report = json.loads(json.dumps(data)) | {"node": node, "display_node": node}
        report["prompt"] = (
            f"picture-{self.number}"  # the page keeps a prompt where it first showed it
        )
        for near in report.get("neighbors", {}).values():
            found = self.find(near["sha256"])
            near["id"] = near["id"] if found is None else found
        return report

    def _browse(self, text: str) -> None:
        self.front.js("await app.extensionManager.command.execute('AMG.BrowseIndex')")
        cards = "[...document.querySelectorAll('.amg-card img')]"
        self.front.until(f"{cards}.length > 20")
        self.front.js(
            f"document.querySelector('.amg-find input').value = {json.dumps(text)};"
            "document.querySelector('.amg-find').requestSubmit()"
        )
        self.front.until(f"{cards}.length < 20 && {cards}.every((i) => i.naturalWidth > 30)")
        self.front.js(  # the day on which the index was made
            "const about = document.querySelector('.amg-about');"
            "about.textContent = about.textContent.replace(/[0-9]{4}-[0-9]{2}-[0-9]{2}/, 'today');"
            "document.activeElement.blur()"
        )

    def _rest(self, look):
        """What `look` returns once it returns the same again a moment later."""
        last, end = None, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.front.rest()
            found = look()
            if found == last:
                return found
            last = found
            time.sleep(0.15)
        raise AssertionError("the page does not come to rest")
