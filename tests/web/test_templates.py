"""Each template as a user opens it: first in the list, large enough to read, nothing cut off."""

from __future__ import annotations

import copy
import json
from itertools import count

import pytest

from amg_core import messages as words_of
from amg_core.messages import message
from tests.web.browser import Page, chromium
from tests.web.conftest import WORKFLOWS, missing
from tests.web.front import MODES, Front
from tests.web.host import FOLDER

SIZE = (1680, 857)  # CSS pixels of the page
BROWSER = (
    1,
    34,
)  # front ends whose template browser these tests know; in older ones the file is dropped
SMALLEST_ZOOM = 0.7
OLDER_ZOOM = 0.65  # there the bars lie beside the canvas and leave it less room
SMALLEST_TEXT = {
    "host": 7,
    "ours": 8,
}  # pixels on the screen; a text field of the host has 10 at zoom 1
ALL = [path.stem for path in WORKFLOWS]
APPS = [name for name in ALL if name.endswith(".app")]
NAMES = [name for name in ALL if name not in APPS]
CARDS = "[...document.querySelectorAll('[data-testid^=template-workflow-]')]"

# {what: [left, top, right, bottom]} on the screen, of every node and of every group's title.
PLACES = """
const { scale, offset } = app.canvas.ds, ids = app.graph._nodes.map((node) => node.id), found = {};
const [dx, dy] = offset;
const shown = (x, y, w, h) => [x + dx, y + dy, x + w + dx, y + h + dy].map((v) => v * scale);
for (const node of app.graph._nodes) {
  node.updateArea?.(app.canvas.ctx);
  const own = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
  found[`${node.id} ${node.title}`] = own
    ? [own.left, own.top, own.right, own.bottom] : shown(...node.boundingRect);
}
const pen = app.canvas.ctx;
for (const group of app.graph._groups) {
  pen.save();
  pen.font = `${group.font_size}px ${group.font ?? "Arial"}`;
  const [x, y] = group._bounding, wide = pen.measureText(group.title).width;
  pen.restore();
  found[`group ${group.title}`] = shown(x + 4, y + 4, wide, group.font_size);
}
return found;
"""
# What covers a point of the canvas, other than nodes: a bar of the page.
COVERED = """
const over = (x, y) => {
  const top = document.elementFromPoint(x, y);
  const ours = top && (top === app.canvas.canvas || top.closest("[data-node-id], .dom-widget, canvas"));
  const around = "#graph-canvas-container, .graph-canvas-panel, [data-testid=transform-pane]";
  const pane = top?.closest(around);
  const through = top && top.contains(app.canvas.canvas);
  return ours || pane || through ? "" : top ? top.outerHTML.slice(0, 200) : "outside";
};
"""
# {whose, tag and text: pixels on the screen} of text in elements on the canvas.
TEXTS = """
const found = {};
const drawn = (element) => { // its pixels on the screen to one of the page's; what is small is rounded
  while (!(element.offsetWidth > 100)) element = element.parentElement;
  return element.getBoundingClientRect().width / element.offsetWidth;
};
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; (text = walk.nextNode()); ) {
  const element = text.parentElement, words = text.textContent.trim();
  if (!words || !element.closest("[data-node-id], .dom-widget") || !element.checkVisibility?.({
    visibilityProperty: true, opacityProperty: true })) continue;
  if (!element.getBoundingClientRect().width) continue;
  const size = parseFloat(getComputedStyle(element).fontSize) * drawn(element);
  const whose = element.closest(".amg-panel, [class*=markdown]") ? "ours" : "host";
  found[`${whose} ${element.tagName} ${words.slice(0, 40)}`] = size;
}
for (const area of document.querySelectorAll("[data-node-id] textarea, .dom-widget textarea")) {
  if (!area.getBoundingClientRect().width) continue;
  const size = parseFloat(getComputedStyle(area).fontSize) * drawn(area);
  found[`host TEXTAREA ${area.value.slice(0, 40)}`] = size;
}
return found;
"""


@pytest.fixture(scope="module")
def wide(server):
    """The front end on a page of SIZE."""
    if chromium() is None:
        pytest.skip("needs a Chromium: install one, or set CHROMIUM to its path")
    if reason := missing("websocket"):
        pytest.skip(reason)
    page = Page(SIZE)
    try:
        width, height = SIZE
        page.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        made = Front(page, server)
        made.open()
        made.setting("Comfy.Minimap.Visible", True)  # as it is for a new user
        yield made
        made.setting("Comfy.Minimap.Visible", False)
        assert [error for error in page.errors if "amg" in error.lower()] == []
    finally:
        page.close()


@pytest.fixture(params=MODES)
def mode(request, wide):
    if request.param not in wide.modes:
        pytest.skip("this front end has no Nodes 2.0 yet")
    wide.render(request.param)
    return request.param


def browse(front) -> None:
    """The template browser, at this pack."""
    front.js("await app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    ours = (
        "[...document.querySelectorAll('[role=dialog] :is(button, li, [role=button])')]"
        f".find((e) => e.innerText?.trim().toLowerCase().replaceAll(' ', '-') == {json.dumps(FOLDER)})"
    )
    front.until(ours)
    front.js(f"{ours}.click()")
    front.until(f"{CARDS}.length == {len(ALL)}")
    front.rest()


def choose(front, name: str) -> None:
    """Click on the card of a template; returns once it is open and at rest."""
    card = f"document.querySelector('[data-testid=template-workflow-{name}]')"
    front.js(f"{card}.scrollIntoView({{ block: 'center' }})")
    front.rest()
    front.page.click(*front.centre(card))
    front.until(
        f"app.extensionManager.workflow.activeWorkflow?.filename?.startsWith('{name.removesuffix('.app')}')"
    )
    front.until("!document.querySelector('[role=dialog]') && app.graph._nodes.length")
    front.rest()
    zoom = "app.canvas.ds.scale"
    front.until(f"window.amgZoom === {zoom} || void (window.amgZoom = {zoom})")


def drop(front, name: str) -> None:
    """The file of a template, dropped onto the page."""
    text = json.dumps((WORKFLOWS[0].parent / f"{name}.json").read_text())
    front.js(
        f"await app.handleFile(new File([{text}], '{name}.json', {{ type: 'application/json' }}),"
        "'file_drop'); await amgRest()"
    )
    front.until(
        f"app.extensionManager.workflow.activeWorkflow?.filename?.startsWith('{name.removesuffix('.app')}')"
    )
    front.rest()


def behind(places: dict) -> list[tuple[str, str]]:
    """(title of a group, node that lies over it)"""
    titles = {what: at for what, at in places.items() if what.startswith("group ")}
    return [
        (title, what)
        for title, (left, top, right, bottom) in titles.items()
        for what, (x0, y0, x1, y1) in places.items()
        if what not in titles and x0 < right and left < x1 and y0 < bottom and top < y1
    ]


def check(front, mode: str) -> None:
    """All that is on the canvas can be read, and nothing is cut off or covered."""
    zoom = front.js("return app.canvas.ds.scale")
    assert zoom >= (SMALLEST_ZOOM if front.version >= BROWSER else OLDER_ZOOM)
    places = front.js(PLACES)
    assert behind(places) == []
    for what, (left, top, right, bottom) in places.items():
        assert left >= 0 and top >= 0 and right <= SIZE[0] and bottom <= SIZE[1], what
        corners = [(left + 2, top + 2), (right - 2, top + 2), (left + 2, bottom - 2)]
        for x, y in [*corners, (right - 2, bottom - 2)]:
            assert not front.js(COVERED + f"return over({x}, {y})"), (what, x, y)
    if front.version < BROWSER:
        return
    texts = front.js(TEXTS)
    assert any(text.startswith("ours") for text in texts)
    small = {text: size for text, size in texts.items() if size < SMALLEST_TEXT[text[:4]]}
    assert not small
    if mode == "classic":
        drawn = front.js("return [LiteGraph.NODE_TEXT_SIZE, LiteGraph.NODE_SUBTEXT_SIZE]")
        assert min(drawn) * zoom >= SMALLEST_TEXT["host"]


def test_the_one_to_begin_with_comes_first(wide):
    if wide.version < BROWSER:
        pytest.skip("this front end has an older template browser")
    browse(wide)
    found = wide.js(
        f"return {CARDS}.map((e) => e.dataset.testid.slice('template-workflow-'.length))"
    )
    assert found[0] == "amg_first_look"
    assert sorted(found) == ALL
    pictures = f"{CARDS}.map((e) => e.querySelector('img')).filter(Boolean)"
    wide.until(f"{pictures}.length && {pictures}.every((i) => i.naturalWidth >= 400)")
    wide.page.key("Escape", 27)
    wide.until("!document.querySelector('[role=dialog]')")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_as_it_opens(wide, mode, name):
    if wide.version < BROWSER:
        drop(wide, name)
    else:
        browse(wide)
        choose(wide, name)
    check(wide, mode)


def test_it_is_read_when_it_is_dropped(wide, mode):
    drop(wide, "amg_first_look")
    check(wide, mode)


def one_picture(messages: list) -> list:
    """The recorded run, as it is told of one picture, with its three nearest: no template draws more."""
    messages = copy.deepcopy(messages)
    entries: dict[str, dict] = {}
    for kind, data in messages:
        if kind == "amg.step":
            entries |= data.get("neighbors", {})
    rows = sorted(entries)[:3]
    nearest = [{"row": int(row), "likeness": 0.12, "composition": 0.1} for row in rows]
    overlooked = [message("misses_pixel")]
    misses = {"messages": words_of.to_json(overlooked), "words": words_of.words(overlooked)}
    for kind, data in messages:
        if kind == "executed":
            for told in data["output"].get("amg_probe", []):
                told |= {"misses": misses, "verdicts": told["verdicts"][:1]}
                told["verdicts"][0]["best"] = [entries[str(n["row"])] | n for n in nearest]
        elif kind == "amg.step" and data["kind"] == "end":
            (first, *_) = data["verdicts"]
            verdicts = [first | {"nearest": nearest}]
            data |= {"misses": misses, "verdicts": verdicts}
            data["neighbors"] = data.get("neighbors", {}) | {row: entries[row] for row in rows}
    return messages


PANELS = {"AMG_SimilarityProbe": "amg_probe", "AMG_Sampler": "amg_live", "AMG_Apply": "amg_live"}
NUMBERS = count(1)
NEEDS_NOTHING = ("amg_first_look", "amg_lora")  # and takes no longer than it must


def as_told_of(node: int, kind: str, messages: list) -> list:
    """What the recorded run tells of a node of that type, for another one."""
    found = []
    of = {"node": str(node), "display_node": str(node)}
    place = f"room-{next(NUMBERS)}"
    for what, data in messages:
        if what == "amg.step" and PANELS[kind] == "amg_live":
            found.append((what, data | of | {"class": kind, "prompt": place}))
        elif what == "executed" and PANELS[kind] in data["output"]:
            output = {PANELS[kind]: data["output"][PANELS[kind]]}
            found = [(what, of | {"output": output, "prompt_id": place})]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_results_find_room(request, wide, mode, name):
    """A run makes no node grow out of the view or over another."""
    if wide.server.real and name not in NEEDS_NOTHING:
        pytest.skip("needs a model or a picture, or much time")
    drop(wide, name)
    graph = json.loads((WORKFLOWS[0].parent / f"{name}.json").read_text())
    ours = {node["id"]: node["type"] for node in graph["nodes"] if node["type"] in PANELS}
    if not ours:
        pytest.skip("has no node that shows pictures in a panel")
    if wide.server.real:
        wide.js("await app.queuePrompt(0, 1)")
    else:
        messages = one_picture(request.getfixturevalue("messages"))
        for node, kind in ours.items():
            wide.send(as_told_of(node, kind, messages))
    for node, kind in ours.items():
        panel = f"amgPanel({node}, '{PANELS[kind]}')"
        wide.until(f"{panel} && ({panel}.dataset.outcome ?? '') != 'running'")
    wide.rest()
    check(wide, mode)
    boxes = wide.js(PLACES)
    nodes = {what: box for what, box in boxes.items() if not what.startswith("group")}
    for what, (left, top, right, bottom) in nodes.items():
        for other, (x0, y0, x1, y1) in nodes.items():
            apart = right <= x0 + 1 or x1 <= left + 1 or bottom <= y0 + 1 or y1 <= top + 1
            assert what == other or apart, (what, other)


# ---------------------------------------------------------------- App mode

RUN = "[...document.querySelectorAll('[data-testid=linear-run-button] button')].at(-1)"
VERDICT = "A copy of memorised-000.webp: both checks agree"


@pytest.fixture(scope="module")
def app(wide):
    """The workflow of an app, opened in App mode; closed in the end."""
    if not wide.js("return !!app.extensionManager.workflow.activeWorkflow"):
        pytest.skip("this front end names no open workflow")
    graph = json.loads((WORKFLOWS[0].parent / f"{APPS[0]}.json").read_text())
    wide.js("app.graph.clear()")
    drop(wide, APPS[0])
    if wide.js("return app.extensionManager.workflow.activeWorkflow.initialMode ?? ''") != "app":
        pytest.skip("this front end has no App mode")
    wide.until(RUN)
    wide.page.key("Escape", 27)  # the tour of those who come here first
    wide.rest()
    yield graph
    wide.js("app.extensionManager.workflow.activeWorkflow.activeMode = 'graph'; await amgRest()")


def test_an_app_opens_in_app_mode(wide, app, schemas):
    """Prompt, index and strength are asked for; nothing of the graph is seen."""
    assert not wide.js("return app.canvas.canvas.checkVisibility()")
    items = "[...document.querySelectorAll('[data-testid=app-mode-widget-item]')]"
    shown = wide.js(f"return {items}.map((e) => e.innerText.split('\\n')[0].trim())")
    kinds = {node["id"]: node["type"] for node in app["nodes"]}
    asked = [(kinds[node], widget) for node, widget, *_ in app["extra"]["linearData"]["inputs"]]
    known = {kind: [slot.id for slot in schema.inputs] for kind, schema in schemas.items()}
    there = [widget for kind, widget in asked if widget in known.get(kind, [widget])]
    assert {"text", "index_name", "strength"} <= set(there)
    assert len(shown) == len(there)
    assert shown[:2] == ["Prompt", "Pictures to avoid"]


def test_an_app_shows_picture_nearest_picture_and_verdict(wide, app):
    if wide.server.real:
        pytest.skip("the recorded run of the small server")
    host = wide.server.host
    host.texts["verdict.txt"] = VERDICT
    recorded = host.messages
    host.messages = one_picture(recorded)
    for kind, data in host.messages:
        if kind == "executed" and "amg_probe" in (data.get("output") or {}):
            file = {"filename": "verdict.txt", "subfolder": "", "type": "temp"}
            data["output"]["amg_verdict"] = [file]
    said = "document.body.innerText.includes"
    items = "[...document.querySelectorAll('[data-testid=linear-in-progress-item]')]"
    try:
        wide.js(f"{RUN}.click()")
        wide.until(f"{items}.length > 1", 60)
        wide.until(
            "[...document.images].some((i) => i.src.includes('/view?') && i.naturalWidth > 30)"
        )
        wide.until(f"{said}('Not a copy of anything')", 60)  # a message, whatever is looked at
        text = f"{items}.find((e) => !e.querySelector('img'))"
        wide.until(text, 60)
        wide.page.click(*wide.centre(text))
        wide.until(f"{said}({json.dumps(VERDICT)})", 60)
    finally:
        host.messages = recorded
