"""The page in a browser: what an artist does, in both renderings, and what is seen."""

from __future__ import annotations

import copy
import json
import re
from itertools import count

import pytest

from amg_core import messages
from amg_core.index import Index
from amg_core.messages import message
from tests.web.conftest import COMFYUI, INDEX, PICTURES, ROOT, WORKFLOWS
from tests.web.front import EMPTY, shortened

SAMPLER = 14  # AMG Sampler in amg_first_look, and in the recorded run
PLAIN, PROBE = 11, 17  # Similarity Probe of the plain and of the guarded pictures
FIRST_LOOK = json.loads((ROOT / "example_workflows/amg_first_look.json").read_text())
API = ROOT / "example_workflows/api"
LOADERS = {"CheckpointLoaderSimple", "LoraLoader", "LoadImage"}
SHOWN = f"document.querySelector('[data-node-id=\"{SAMPLER}\"]')"  # AMG Sampler in Nodes 2.0
SEEDS = count(7)  # a real host does not draw the same thing again


@pytest.fixture
def recorded(messages):
    """The recorded events of AMG Sampler, of a prompt that this page did not queue."""
    found = [(kind, data) for kind, data in messages if kind == "amg.step"]
    prompt = f"recorded-{next(SEEDS)}"  # the page keeps a prompt where it first showed it
    return [(kind, data | {"prompt": prompt}) for kind, data in found]


def moved(events: list, node: str, **more) -> list:
    """The same events, of another node."""
    return [(kind, data | {"node": node} | more) for kind, data in events]


def run(front) -> None:
    front.js("await app.queuePrompt(0, 1)")


def ended(front, node: int = SAMPLER) -> str:
    """Wait for the verdict on the sampler's panel; the outcome."""
    panel = f"amgPanel({node}, 'amg_live')"
    front.until(f"({panel}?.dataset.outcome ?? 'running') != 'running'")
    return front.js(f"return {panel}.dataset.outcome")


def lengths(front, node: int = SAMPLER) -> list[int]:
    """Number of points of each line of the curve."""
    return front.js(
        f"return [...amgPanel({node}, 'amg_live')?.querySelectorAll('.amg-line') ?? []]"
        ".map((line) => line.getAttribute('d').split(/[ML]/).length - 1)"
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_workflow_loads_and_exports_as_it_should(front, mode, path, schemas):
    """As its API form says; widgets that were appended since have their defaults."""
    graph = json.loads(path.read_text())
    front.load(graph)
    bad = front.js("return app.graph._nodes.filter((n) => n.has_errors).map((n) => n.type)")
    assert set(bad) <= LOADERS  # newer front ends mark what lacks its file
    wanted, found = json.loads((API / f"{path.stem}.api.json").read_text()), front.export()
    assert {i: each["class_type"] for i, each in found.items()} == {
        i: each["class_type"] for i, each in wanted.items()
    }
    for i, node in wanted.items():
        given = found[i]["inputs"]
        slots = schemas[node["class_type"]].inputs if node["class_type"] in schemas else []
        newer = [slot for slot in slots if slot.optional and slot.id not in node["inputs"]]
        defaults = {slot.id: slot.default for slot in newer if slot.id in given}
        assert given == node["inputs"] | defaults, i


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_widgets_survive_save_and_load(front, mode, path):
    """What is appended by a newer schema comes at the end; nothing of ours comes behind it."""
    graph = json.loads(path.read_text())
    front.load(graph)
    first, exported = front.values(), front.export()
    for node in graph["nodes"]:
        if node["type"].startswith("AMG_"):
            given = node["widgets_values"]
            assert (first[node["id"]] or [])[: len(given)] == given
    front.load(front.saved())
    assert front.values() == first
    assert front.export() == exported


def said(words: str) -> dict:
    """A message as the server sends it."""
    return {"messages": [{"code": "as_written", "words": words}], "words": words}


def test_a_run_is_seen_and_leaves_the_widgets_alone(front, mode):
    graph = shortened(FIRST_LOOK) if front.server.real else FIRST_LOOK
    front.load(graph)
    front.look_at(SAMPLER, scale=0.9)
    if front.server.real:
        front.js(f"amgNode({SAMPLER}).widgets.find((w) => w.name == 'seed').value = {next(SEEDS)}")
    values, exported = front.values(), front.export()
    line = f"amgPanel({SAMPLER}, 'amg_live')?.querySelector('.amg-line')"
    front.js(
        "window.amgGrown = new Set(); window.amgWatch = () => "
        f"amgGrown.add({line}?.getAttribute('d').length); app.api.addEventListener('amg.step', amgWatch)"
    )
    run(front)
    assert ended(front) == "no_copy"
    front.js("app.api.removeEventListener('amg.step', amgWatch)")
    front.rest()
    # The curve grew, a line a picture, and it stays.
    assert front.js("return amgGrown.size") > 3
    steps = 8 if front.server.real else 20
    batch = 2 if front.server.real else 4
    assert lengths(front) == [steps] * batch
    text = front.js(f"return amgPanel({SAMPLER}, 'amg_live').innerText")
    assert "no copy" in text
    assert "likeness" in text and "threshold 0.40" in text and "similarity" not in text
    raw = front.js(f"return amgPanel({SAMPLER}, 'amg_live').querySelector('.amg-numbers').title")
    assert re.search(r"similarity −?\d\.\d\d, threshold −?\d\.\d\d", raw)
    label = front.js(
        f"return amgPanel({SAMPLER}, 'amg_live').querySelector('svg').getAttribute('aria-label')"
    )
    assert f"after {steps} of {steps}" in label
    # The nearest picture is really shown.
    front.until(f"amgPanel({SAMPLER}, 'amg_live').querySelector('img').naturalWidth > 30")
    # Nothing was written into the widgets, and saving and loading again changes nothing.
    assert front.values() == values
    assert front.export() == exported
    front.load(front.saved())
    assert front.values() == values
    assert front.export() == exported
    # The panel is back with the same workflow: undo and changing tabs make new node objects.
    assert lengths(front) == []
    turn(front, "Previous")
    assert lengths(front) == [steps] * batch
    assert front.values() == values
    front.js("app.graph.getNodeById(3).widgets[0].value = 'another prompt'; app.graph.change()")
    front.js(
        "await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())), true, true,"
        "app.extensionManager.workflow.activeWorkflow)"  # as undo does
    )
    assert lengths(front) == [steps] * batch


def test_the_probe_shows_both_pictures(front, mode):
    """What the run before left; the recorded one where nothing is run."""
    front.load(shortened(FIRST_LOOK) if front.server.real else FIRST_LOOK)
    front.look_at(PROBE, scale=0.9)
    if front.server.real:
        front.js(f"amgNode({SAMPLER}).widgets.find((w) => w.name == 'seed').value = {next(SEEDS)}")
    run(front)
    ended(front)
    panel = f"amgPanel({PROBE}, 'amg_probe')"
    front.until(f"{panel}?.querySelectorAll('img').length >= 4")
    front.until(f"[...{panel}.querySelectorAll('img')].every((i) => i.naturalWidth > 30)")
    pairs = front.js(
        f"return [...{panel}.querySelectorAll('article')].map((a) => ({{"
        "images: a.querySelectorAll('.amg-both img').length, alt: a.querySelectorAll('img')[1].alt,"
        "meters: [...a.querySelectorAll('[role=meter]')].map((m) => m.getAttribute('aria-valuetext')),"
        "words: a.querySelector('.amg-words').textContent}))"
    )
    for pair in pairs:
        assert pair["images"] == 2
        assert pair["alt"].startswith("Nearest picture: ")
        assert len(pair["meters"]) == 2
        assert all("a copy above" in meter for meter in pair["meters"])
        assert pair["words"]
    # What is a copy is told from what is none, in words and in colour.
    front.until(f"amgPanel({PLAIN}, 'amg_probe')")
    report = front.js(
        f"return [{PLAIN}, {PROBE}].map((id) => {{"
        "const words = amgPanel(id, 'amg_probe').querySelector('.amg-words');"
        "return [words.textContent, getComputedStyle(words).borderLeftColor]})"
    )
    assert report[0][0].startswith("A copy of")
    assert report[1][0].startswith("Not a copy")
    assert report[0][1] != report[1][1]
    # The host does not show the nearest pictures a second time.
    if mode == "vue":
        own = f"[data-node-id='{PROBE}'] img:not(.amg-best img)"
        assert front.js(f'return document.querySelectorAll("{own}").length') == 2 * len(pairs)
    else:
        assert front.js(f"return amgNode({PROBE}).imgs?.length ?? 0") == 0


def test_a_slider_is_dragged(front, mode):
    front.load(FIRST_LOOK)
    front.look_at(SAMPLER)
    assert front.value(SAMPLER, "strength") == 1
    if mode == "classic":
        y = front.widget(SAMPLER, "strength")[1]
        front.page.drag(
            (front.widget(SAMPLER, "strength", 0.5)[0], y),
            (front.widget(SAMPLER, "strength", 0.75)[0], y),
        )
    else:
        x, y = front.centre(f"{SHOWN}.querySelector('[role=slider]')")
        front.page.drag((x, y), (x + 25, y))
    front.rest()
    dragged = front.value(SAMPLER, "strength")
    assert 1.2 < dragged <= 2
    assert round(dragged, 2) == pytest.approx(dragged)
    assert front.value(SAMPLER, "deduplication") == 1
    assert front.export()[str(SAMPLER)]["inputs"]["strength"] == dragged


def choose_preset(front, mode: str, preset: str) -> None:
    if mode == "classic":
        front.page.click(*front.widget(SAMPLER, "preset"))
        options = "[...document.querySelectorAll('.litecontextmenu .litemenu-entry')]"
    else:
        combo = (
            f"[...{SHOWN}.querySelectorAll('[role=combobox]')]"
            ".find((e) => /main|strong|gentle/.test(e.textContent + e.value))"
        )
        front.page.click(*front.centre(combo))
        options = "[...document.querySelectorAll('[role=option]')]"
    entry = f"{options}.find((e) => e.textContent.trim().startsWith('{preset}:'))"
    front.until(entry)
    front.rest()
    front.page.click(*front.centre(entry))
    front.rest()


TERMS = ("despecification", "deduplication", "dissimilarity")
STRENGTHS = (*TERMS, "strength")


def test_a_preset_fills_the_sliders_and_loading_does_not(front, mode):
    graph = copy.deepcopy(FIRST_LOOK)
    values = next(node for node in graph["nodes"] if node["id"] == SAMPLER)["widgets_values"]
    at = values.index("main")
    values[at:] = ["strong", 0.5, 1.5, 2.0, "say so", 2, True, "anonymous", 0.75]
    front.load(graph)
    front.look_at(SAMPLER)
    front.export()
    assert [front.value(SAMPLER, name) for name in ("preset", *STRENGTHS)] == [
        "strong",
        0.5,
        1.5,
        2.0,
        0.75,
    ]
    front.js(  # as a host does that applies what a Primitive node holds
        f"const w = amgNode({SAMPLER}).widgets.find((w) => w.name == 'preset'); w.callback(w.value)"
    )
    assert front.value(SAMPLER, "dissimilarity") == 2
    choose_preset(front, mode, "gentle")
    assert [front.value(SAMPLER, name) for name in ("preset", *STRENGTHS)] == ["gentle", 1, 1, 1, 1]
    # Seeing them move is what it is for.
    if mode == "vue":
        shown = front.js(
            f"return [...{SHOWN}.querySelectorAll('[role=slider]')]"
            ".map((e) => e.getAttribute('aria-valuenow'))"
        )
        assert shown == ["1"]  # strength; the other three are among the advanced inputs


@pytest.mark.parametrize("left", [[], ["step 20/20 · likeness 0.12"]])
def test_a_workflow_of_before_means_the_same(front, mode, left):
    """It has no value for the slider, or the live text that some front ends save behind the widgets."""
    graph = copy.deepcopy(FIRST_LOOK)
    node = next(node for node in graph["nodes"] if node["id"] == SAMPLER)
    at = node["widgets_values"].index("main")
    node["widgets_values"][at + 1 :] = [1.0, 1.0, 1.0, "say so", 2, True, "anonymous", *left]
    front.load(graph)
    sent = front.export()[str(SAMPLER)]["inputs"]
    assert sent["strength"] == 1
    assert [sent[name] for name in TERMS] == [1, 1, 1]


def test_choices_are_shown_in_words(front, mode):
    node = front.alone("AMG_Sampler")
    front.look_at(node)
    said = front.js(
        f"return Object.fromEntries(amgNode({node}).widgets.filter((w) => w.options.getOptionLabel)"
        ".map((w) => [w.name, w.options.getOptionLabel(w.value)]))"
    )
    assert said == {
        "preset": "main: recommended",
        "if_still_copied": "say so: keep it, warn me",
        "report_in_picture": "anonymous: no names",
    }
    toggle = f"amgNode({node}).widgets.find((w) => w.name == 'new_noise').options"
    assert front.js(f"return [{toggle}.on, {toggle}.off]") == ["last retry", "never"]
    sent = front.export()[str(node)]["inputs"]
    assert (sent["preset"], sent["if_still_copied"]) == ("main", "say so")
    if mode == "vue":
        text = f"document.querySelector('[data-node-id=\"{node}\"]')?.innerText"
        front.until(f"{text}?.includes('main: recommended')")
        front.until(f"{text}.includes('if still a copy')")
        assert not front.js(f"return {text}.includes('despecification')")


def test_experts_settings_are_hidden_until_asked_for(front, mode):
    """Where the host's schema has a word for that, as the small server's does."""
    if front.server.real and not front.js(
        "return app.graph.constructor && Object.values((await app.api.getNodeDefs()).AMG_Apply"
        ".input.required).some((each) => each[1]?.advanced)"
    ):
        pytest.skip("this host has no advanced inputs")
    if mode == "classic":
        hidden = front.js(
            "return Object.entries((await app.api.getNodeDefs()).AMG_Apply.input.required)"
            ".filter(([, each]) => each[1]?.advanced).map(([name]) => name)"
        )
        assert "threshold_start" in hidden
        assert set(TERMS) < set(hidden) and not {"preset", "strength"} & set(hidden)
        return
    node = front.alone("AMG_Apply")
    front.look_at(node)
    front.until(f"document.querySelector('[data-node-id=\"{node}\"]')")
    shown = f"document.querySelector('[data-node-id=\"{node}\"]')"
    text = front.js(f"return {shown}.innerText")
    assert "strength" in text
    assert not [name for name in (*TERMS, "threshold_start") if name in text]
    front.js(f"amgNode({node}).showAdvanced = true")
    front.until(f"{shown}.innerText.includes('threshold_start')")
    assert "by words (despecification)" in front.js(f"return {shown}.innerText")


def test_inside_a_subgraph(front, mode, recorded):
    """Execution ids are paths there; the panel appears on the node within."""
    front.load(FIRST_LOOK)
    front.js(f"app.graph.convertToSubgraph(new Set([amgNode({SAMPLER})]))")
    outer = front.js("return String(app.graph._nodes.find((n) => n.subgraph).id)")
    inner = front.js(f"return String(amgNode({outer}).subgraph._nodes[0].id)")
    values = front.js(f"return amgNode('{outer}:{inner}').serialize().widgets_values")
    front.send(moved(recorded, f"{outer}:{inner}"))
    front.js(f"app.canvas.setGraph(amgNode({outer}).subgraph)")
    front.until(f"amgPanel('{outer}:{inner}', 'amg_live')?.dataset.outcome == 'no_copy'")
    assert front.js(f"return amgNode('{outer}:{inner}').serialize().widgets_values") == values
    front.until("[...document.querySelectorAll('.amg-panel')].some((e) => e.offsetHeight > 100)")
    front.js("app.canvas.setGraph(app.rootGraph ?? app.graph)")


def test_two_workflows_with_the_same_ids(front, mode, recorded):
    """What is told of a prompt is seen where it was queued, whatever is open when it comes."""
    front.load(FIRST_LOOK)
    front.js(
        "window.amgFetch = app.api.fetchApi; app.api.fetchApi = async () =>"
        'new Response(\'{"prompt_id": "mine", "number": 1, "node_errors": {}}\')'
    )
    try:
        front.js("await app.queuePrompt(0, 1)")
    finally:
        front.js("app.api.fetchApi = window.amgFetch")
    front.load(FIRST_LOOK)
    front.send(moved(recorded, str(SAMPLER), prompt="mine"))
    assert lengths(front) == []
    turn(front, "Previous")
    assert lengths(front) == [20] * 4
    turn(front, "Next")
    assert lengths(front) == []
    # Told of a prompt that another page queued: on a node of that class, or nowhere.
    front.send(moved(recorded[:3], str(PLAIN)))
    front.send(recorded[:3])
    assert lengths(front, PLAIN) == []
    assert lengths(front) == [3] * 4


def turn(front, to: str) -> None:
    """To the next or the previous tab."""
    front.js(f"await app.extensionManager.command.execute('Workspace.{to}OpenedWorkflow')")
    front.rest()


@pytest.mark.parametrize("kind", ["AMG_Apply", "AMG_Guard"])
def test_the_other_nodes_that_guard(front, mode, kind, recorded):
    """Every node that sends these events shows them."""
    node = front.alone(kind)
    front.send(moved(recorded[:4], str(node), **{"class": kind}))
    front.until(f"amgPanel({node}, 'amg_live')?.querySelector('.amg-line')")
    assert lengths(front, node) == [4] * 4


def test_a_picture_that_the_host_saved(front, mode, recorded):
    """Guard's own index ends with the run: its picture comes from the host's temp folder."""
    node = front.alone("AMG_Guard")
    _, data = copy.deepcopy(recorded[0])
    for near in data["neighbors"].values():
        near |= {
            "index": "known",
            "picture": {"filename": "a b.png", "subfolder": "", "type": "temp"},
        }
    front.send([("amg.step", data | {"node": str(node), "class": "AMG_Guard"})])
    picture = f"amgPanel({node}, 'amg_live')?.querySelector('img')"
    front.until(picture)
    address = front.js(f"return {picture}.src")
    assert address.endswith("/view?filename=a+b.png&subfolder=&type=temp")
    name = front.js(f"return amgPanel({node}, 'amg_live').querySelector('.amg-name').textContent")
    assert name == "the stored picture, drawn from another seed"
    if not front.server.real:
        front.until(f"{picture}.naturalWidth > 30 && !{picture}.hidden")


def test_drawing_again_and_the_pinned_picture(front, mode, recorded):
    """A second attempt: the first stays, pale; a click on a number tells of that picture."""
    steps = [data for _, data in recorded if data["kind"] == "step"][:6]
    again = [data | {"attempt": 1} for data in steps[:3]]
    front.load(FIRST_LOOK)
    front.look_at(SAMPLER, y=-350)
    front.send([("amg.step", data) for data in [*steps, *again]])
    panel = f"amgPanel({SAMPLER}, 'amg_live')"
    front.until(f"{panel}?.querySelectorAll('.amg-line').length == 8")
    assert lengths(front) == [6] * 4 + [3] * 4
    assert front.js(f"return {panel}.querySelectorAll('.amg-line.amg-earlier').length") == 4
    assert "retry 1/2" in front.js(f"return {panel}.innerText")
    acted = sum(data["active"][2] for data in again)
    front.rest()
    front.page.click(*front.centre(f"{panel}.querySelectorAll('.amg-chip')[2]"))
    front.until(f"{panel}.innerText.includes('picture 3')")
    assert f"guarded steps: {acted}" in front.js(f"return {panel}.innerText")
    chips = front.js(
        f"return [...{panel}.querySelectorAll('button')].map((b) => [b.ariaLabel, b.ariaPressed])"
    )
    assert chips[2] == ["Picture 3 of 4", "true"]
    assert front.js("return document.activeElement.ariaLabel") == "Picture 3 of 4"
    front.page.key("Enter", 13, "\r")  # by the keyboard: let it go again
    front.until(f"{panel}.querySelectorAll('.amg-chip')[2].ariaPressed == 'false'")


def test_the_rendering_is_switched_with_a_curve_on_the_node(front, recorded):
    front.render("classic")
    front.load(FIRST_LOOK)
    front.look_at(SAMPLER, y=-350)
    front.send(recorded)
    values = front.values()
    for mode in [*front.modes, "classic"]:
        front.render(mode)
        front.until(f"amgPanel({SAMPLER}, 'amg_live')?.isConnected")
        front.until(f"amgPanel({SAMPLER}, 'amg_live').getBoundingClientRect().height > 150")
        assert lengths(front) == [20] * 4
        assert front.values() == values


def test_a_run_that_is_stopped_says_so(front, mode, recorded):
    front.load(FIRST_LOOK)
    prompt = recorded[0][1]["prompt"]
    stop = ("execution_interrupted", {"prompt_id": "another", "node_id": "14"})
    front.send([*recorded[:5], stop])
    assert front.js(f"return amgPanel({SAMPLER}, 'amg_live').dataset.outcome") == "running"
    front.send([("execution_interrupted", {"prompt_id": prompt, "node_id": "14"})])
    front.until(f"amgPanel({SAMPLER}, 'amg_live')?.innerText.includes('did not end')")
    assert lengths(front) == [5] * 4


def test_a_run_in_which_nothing_was_looked_at_clears_the_curve(front, mode, recorded):
    """Guard tells first that it is finding out, and may then have nothing to guard against."""

    def message(kind: str, words: str) -> tuple:
        return ("amg.step", recorded[0][1] | {"kind": kind, **said(words), "verdicts": []})

    front.load(FIRST_LOOK)
    panel = f"amgPanel({SAMPLER}, 'amg_live')"
    front.send([message("begin", "finding out")])
    front.until(f"{panel}?.innerText.trim() == 'finding out'")
    assert (
        front.js(f"return {panel}.querySelector('.amg-plot').offsetHeight") == 0
    )  # nothing to draw
    front.send(recorded)
    ended(front)
    drawn = f"return {panel}.querySelectorAll('path, button').length"
    assert front.js(drawn) > 0
    for kind, outcome in (("begin", "running"), ("end", "unknown")):
        front.send([message(kind, f"only {kind}")])
        front.until(f"{panel}.innerText.trim() == 'only {kind}'")
        assert front.js(drawn) == 0
        assert front.js(f"return {panel}.dataset.outcome") == outcome
    front.send(recorded[:5])
    front.until(f"{panel}.querySelectorAll('.amg-line').length == 4")
    assert "only" not in front.js(f"return {panel}.innerText")


def test_text_is_never_markup(front, mode, recorded):
    """Captions come from files that anybody made."""
    _, data = copy.deepcopy(recorded[0])
    whose = {key: data[key] for key in ("node", "class", "prompt")}
    evil = "<img src=x onerror='window.evil = 1'><b>bold</b>"
    for near in data["neighbors"].values():
        near["caption"] = near["source"] = evil
    front.load(FIRST_LOOK)
    front.send(
        [
            ("amg.step", data),
            ("amg.step", {**whose, "kind": "end", **said(evil), "verdicts": []}),
        ]
    )
    front.until(f"amgPanel({SAMPLER}, 'amg_live')?.dataset.outcome == 'unknown'")
    assert front.js(f"return amgPanel({SAMPLER}, 'amg_live').querySelectorAll('b').length") == 0
    assert evil in front.js(f"return amgPanel({SAMPLER}, 'amg_live').innerText")
    assert front.js("return window.evil") is None


def test_a_long_verdict_is_seen_whole(front, mode, recorded):
    """The curve gives way to it."""
    node = front.alone("AMG_Guard")
    front.look_at(node, y=-200)
    whose = {"node": str(node), "class": "AMG_Guard"}
    words = (
        "STILL A COPY: pictures 1, 2, 3, 4 · A copy of memorised-000.webp: both checks agree · "
        "picture 2 drawn again: likeness 0.55 → 0.12 · look at picture 3: composed like other.webp"
    )
    end = recorded[0][1] | {"kind": "end", **said(words), "verdicts": []}
    front.send([(kind, data | whose) for kind, data in [*recorded[:3], ("amg.step", end)]])
    panel = f"amgPanel({node}, 'amg_live')"
    front.until(f"{panel}?.offsetHeight > 200 && {panel}.innerText.includes('STILL')")
    front.rest()
    inside = front.js(
        f"const panel = {panel}.getBoundingClientRect();"
        f"const words = {panel}.querySelector('.amg-words').getBoundingClientRect();"
        f"const plot = {panel}.querySelector('.amg-plot').getBoundingClientRect();"
        "return [panel.bottom - words.bottom, plot.height]"
    )
    assert inside[0] >= 0
    assert inside[1] >= 45


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_it_is_readable(front, mode, palette, recorded):
    """Text against what is behind it: at least 4.5 to 1. The curve's colours: at least 3 to 1."""
    front.setting("Comfy.ColorPalette", palette)
    try:
        front.load(FIRST_LOOK)
        front.look_at(SAMPLER, y=-350)
        front.send(recorded)
        front.until(f"amgPanel({SAMPLER}, 'amg_live')?.offsetHeight > 100")
        found = front.js(
            f"const panel = amgPanel({SAMPLER}, 'amg_live');"
            "const of = (e, what) => getComputedStyle(e)[what];"
            "return {back: of(panel, 'backgroundColor'),"
            "ink: ['.amg-name', '.amg-caption', '.amg-numbers', '.amg-words']"
            ".map((s) => of(panel.querySelector(s), 'color')),"
            "lines: [...panel.querySelectorAll('path')].map((p) => of(p, 'stroke'))}"
        )
    finally:
        front.setting("Comfy.ColorPalette", "dark")
    back = luminance(found["back"])
    assert (back > 0.5) == (palette == "light")
    assert min(contrast(luminance(ink), back) for ink in found["ink"]) >= 4.5, found
    assert min(contrast(luminance(line), back) for line in found["lines"]) >= 3, found


@pytest.mark.parametrize("code", ["fr", "ja", "en"])
def test_it_speaks_the_language_of_the_host(front, code, recorded):
    report = json.loads((ROOT / f"locales/{code}/main.json").read_text())["amg"]
    front.render("classic")
    front.setting("Comfy.Locale", code)
    try:
        front.load(FIRST_LOOK)
        front.send(recorded)
        panel = f"amgPanel({SAMPLER}, 'amg_live')"
        front.until(f"{panel}?.querySelector('.amg-line')")
        assert front.js(f"return {panel}.ariaLabel") == report["What the guard sees"]
        text = front.js(f"return {panel}.querySelector('.amg-numbers').textContent")
        assert report["likeness <value>"].replace("<value>", "") in text
        # The words are those that the core makes of the same messages.
        (*_, end) = (data for kind, data in recorded if kind == "amg.step")
        every = [[message(**each) for each in end["messages"]]]
        whose = {key: recorded[0][1][key] for key in ("node", "class", "prompt")}
        parts = [
            message("key_word", words="<b> 2", drop=1.3),
            message("key_word", words="-", drop=-3),
        ]
        every += (
            [message("still_a_copy_more", pictures=[1, 12])],
            [message("cannot_tell_of", picture=2, reason=message("flat"))],
            [message("key_words", parts=parts), message("copy_by_both", source="a (1).png")],
            [message("closest", score=-0.004, limit=0.4)],
        )
        for each in every:
            words = messages.words(each, code)
            event = {"messages": messages.to_json(each), "words": "not these", "verdicts": []}
            front.send([("amg.step", {**whose, "kind": "end", **event})])
            front.until(f"{panel}.querySelector('.amg-words').textContent == {json.dumps(words)}")
        later = {
            "messages": [{"code": "of a later version"}],
            "words": "in English",
            "verdicts": [],
        }
        front.send([("amg.step", {**whose, "kind": "end", **later})])
        front.until(f"{panel}.querySelector('.amg-words').textContent == 'in English'")
        front.js("await app.extensionManager.command.execute('AMG.BrowseIndex')")
        front.until("document.querySelector('.amg-browser')")
        search = front.js("return document.querySelector('.amg-find input').placeholder")
        assert search == report["Search captions and names"]
        front.js("document.querySelector('.amg-browser').close()")
    finally:
        front.setting("Comfy.Locale", "en")


def luminance(colour: str) -> float:
    """Relative luminance (WCAG) of "rgb(r, g, b)" or "color(srgb r g b)"."""
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", colour)[:3]]
    parts = numbers if colour.startswith("color(srgb") else [number / 255 for number in numbers]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.fixture
def index_folder(front, request):
    """Where the index of the server lies; a real one has been given it by the workflow."""
    if not COMFYUI:
        return request.getfixturevalue("indexes") / INDEX
    return front.server.host.base / "models/amg_indexes" / INDEX


def test_the_index_is_browsed(front, mode, index_folder):
    """The button of Load Memorization Index: pages, search, mute, guard again; keys alone suffice."""
    node = front.alone("AMG_LoadIndex")
    front.look_at(node)
    if mode == "classic":
        front.page.click(*front.widget(node, "browse pictures"))
    else:
        button = (
            f"[...document.querySelectorAll(\"[data-node-id='{node}'] button\")]"
            ".find((b) => /browse/.test(b.innerText))"
        )
        front.until(button)
        front.page.click(*front.centre(button))
    count = PICTURES if not COMFYUI else 632
    status = "document.querySelector('.amg-browser .amg-status')?.textContent"
    cards = "[...document.querySelectorAll('.amg-card')]"
    front.until(f"{status} == '1 to 24 of {count}'")
    assert front.js("return document.querySelector('.amg-about').textContent").startswith(
        f"{count} pictures"
    )
    front.until(f"{cards}.slice(0, 4).every((c) => c.querySelector('img').naturalWidth > 30)")
    assert front.js(f"return {cards}.length") == 24
    front.js("document.querySelector('.amg-browser footer button:last-child').click()")
    front.until(f"{status} == '25 to 48 of {count}'")
    front.js("document.querySelector('.amg-browser footer button').click()")
    front.until(f"{status} == '1 to 24 of {count}'")
    # Search with the keyboard: typed, and sent with Enter.
    front.js("document.querySelector('.amg-find input').focus()")
    front.page.command("Input.insertText", text="Fox VIOLET")
    front.js("document.querySelector('.amg-find').requestSubmit()")
    front.until(f"{status}.includes('on this page')")
    captions = front.js(f"return {cards}.map((c) => c.querySelector('.amg-caption').textContent)")
    assert captions
    assert all("fox" in each and "violet" in each for each in captions)
    # Mute one, and guard it again.
    front.js("document.querySelector('.amg-tools label input[type=text]').value = 'my own work'")
    front.js(f"{cards}[0].querySelector('button').click()")
    front.until(
        f"{cards}[0].querySelector('.amg-why')?.textContent == 'excluded (muted): my own work'"
    )
    with Index.open(index_folder) as index:
        assert list(index.muted.values()) == ["my own work"]
    assert front.js("return document.activeElement.ariaLabel").startswith("Guard again: ")
    front.js("document.activeElement.click()")
    front.until(f"!{cards}[0].querySelector('.amg-why')")
    with Index.open(index_folder) as index:
        assert not index.muted
    # Every control has a name, and Escape closes.
    unnamed = front.js(
        "return [...document.querySelectorAll('.amg-browser :is(button, input, select)')]"
        ".filter((e) => !(e.ariaLabel || e.textContent || e.closest('label')?.textContent)).length"
    )
    assert unnamed == 0
    front.page.key("Escape", 27)
    front.until("!document.querySelector('.amg-browser')")
    assert len(front.values()[node]) == 1  # the name alone: the button is not saved


def test_a_refusal_is_a_sentence_in_the_window(front):
    front.load(EMPTY)
    front.js(
        "window.amgFetch = app.api.fetchApi;"
        'app.api.fetchApi = async () => new Response(\'{"error": "No, because."}\', {status: 409})'
    )
    try:
        front.js("await app.extensionManager.command.execute('AMG.BrowseIndex')")
        front.until(
            "document.querySelector('.amg-browser .amg-status')?.textContent == 'No, because.'"
        )
    finally:
        front.js(
            "app.api.fetchApi = window.amgFetch; document.querySelector('.amg-browser')?.close()"
        )


def test_without_an_index_the_node_says_how_to_get_one(front, mode):
    """And a button puts the node that makes one in its place, with its wires."""

    def buttons(node: int) -> list[str]:
        return front.js(
            f"return amgNode({node}).widgets.filter((w) => w.type == 'button').map((w) => w.name)"
        )

    assert buttons(front.alone("AMG_LoadIndex")) == ["browse pictures"]
    known = "(await app.api.getNodeDefs()).AMG_LoadIndex"
    front.js(  # as a host lists it that has none
        f"const given = structuredClone({known}), slot = given.input.required.index_name;"
        "const none = ['(no index yet: use Build Memorization Index)'];"
        "if (slot[0] === 'COMBO') slot[1].options = none; else slot[0] = none;"
        "await app.registerNodeDef('AMG_LoadIndex', given)"
    )
    try:
        front.load(EMPTY)
        front.js(
            "const load = LiteGraph.createNode('AMG_LoadIndex'); load.pos = [200, 200];"
            "const probe = LiteGraph.createNode('AMG_SimilarityProbe'); probe.pos = [700, 200];"
            "app.graph.add(load); app.graph.add(probe);"
            "load.connect(0, probe, probe.findInputSlot('index'))"
        )
        node = front.id_of("AMG_LoadIndex")
        panel = f"amgPanel({node}, 'amg_said')"
        front.until(f"{panel}?.innerText.includes('There is no index yet')")
        assert buttons(node) == ["browse pictures", "make an index"]
        assert len(front.values()[node]) == 1  # neither button nor panel is saved
        front.js(f"amgNode({node}).widgets.find((w) => w.name == 'make an index').callback()")
        front.rest()
        assert front.js("return amgOn('AMG_LoadIndex').length") == 0
        wired = front.js(
            "const probe = amgOn('AMG_SimilarityProbe')[0];"
            "return probe.getInputNode(probe.findInputSlot('index'))?.type"
        )
        assert wired == "AMG_BuildIndex"
    finally:
        front.js(f"await app.registerNodeDef('AMG_LoadIndex', structuredClone({known}))")


def test_the_window_about_weights(front):
    """Says where the file is published and where to put it; Escape closes it."""
    front.js("await app.extensionManager.command.execute('AMG.CheckWeights')")
    words = "document.querySelector('.amg-weights [role=status]').textContent"
    front.until(f"{words}.includes('facebookresearch/sscd-copy-detection')")
    assert "models/amg" in front.js(f"return {words}")
    *_, width, height = front.box(".amg-weights")
    assert 200 < width < 700 and 60 < height < 400
    front.page.key("Escape", 27)
    front.until("!document.querySelector('.amg-weights')")
