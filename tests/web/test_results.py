"""Results stay on the nodes: after the run, from the cache, after a reload, and from a dropped picture."""

from __future__ import annotations

import base64
import copy
import io
import json
from itertools import count

import pytest
from PIL import Image, PngImagePlugin

from amg_core import messages as words_of
from amg_core.descriptors.pixel import PixelDescriptor
from amg_core.messages import message
from tests.web.conftest import ROOT
from tests.web.front import EMPTY, HELPERS, READY, shortened
from tests.web.test_front import FIRST_LOOK, PROBE, SAMPLER, ended, lengths, run

WORKFLOWS = ROOT / "example_workflows"
NUMBERS = count(1)
LIVE = f"amgPanel({SAMPLER}, 'amg_live')"
IDENTITY = "6f0b4e2a-1f57-4b0e-9d0c-3a5f2f6f9d11"  # of a workflow
SENTENCES = [message("measured", count=4), message("no_copy")]


@pytest.fixture
def report(messages, pack, schemas) -> dict:
    """A report of the recorded run, as far as it is shown."""
    events = [data for kind, data in messages if kind == "amg.step"]
    steps = [each for each in events if each["kind"] == "step"]
    near = {row: each for step in steps for row, each in step["neighbors"].items()}
    return {
        "steps": steps,
        "attempts": [{}],
        "verdicts": events[-1]["verdicts"],
        "neighbors": near,
        "story": words_of.to_json(SENTENCES),
        "descriptor": PixelDescriptor.spec.to_json(),
    }


@pytest.fixture
def live(pack):
    return pack.module("nodes.live")


def of_pack(pack, sentences: list) -> list:
    """The same messages, of the pack's own class."""
    make = pack.module("amg_core.messages").message
    return [make(each.code, **each.values) for each in sentences]


@pytest.fixture
def output(pack, live, report) -> dict:
    """What AMG Sampler leaves."""
    node = pack.nodes["AMG_Sampler"]
    return live.result(node, report, report["neighbors"], sentences=of_pack(pack, SENTENCES))


def prompt() -> str:
    return f"result-{next(NUMBERS)}"


def executed(node: int, output: dict, number: str) -> tuple[str, dict]:
    place = {"node": str(node), "display_node": str(node), "prompt_id": number}
    return "executed", place | {"output": output}


def told(front) -> str:
    front.until(f"{LIVE}?.querySelector('.amg-line')")
    return front.js(f"return {LIVE}.querySelector('.amg-words').textContent")


def test_from_the_output_of_the_node(front, mode, output):
    front.load(FIRST_LOOK)
    front.send([executed(SAMPLER, output, prompt())])
    assert told(front) == words_of.words(SENTENCES)
    assert lengths(front) == [20] * 4
    assert front.js(f"return {LIVE}.dataset.outcome") == "no_copy"
    if not front.server.real:
        front.until(f"{LIVE}.querySelector('img').naturalWidth > 30")
    assert "threshold" in front.js(f"return {LIVE}.querySelector('.amg-numbers').textContent")


def test_close_is_amber_and_what_may_be_overlooked_is_said(front, mode, output):
    """A picture that is no copy but near a limit: in colour and in words, with its nearest pictures."""
    found = copy.deepcopy(output)
    (run_of,) = found["amg_report"]
    rows = list(run_of["neighbors"])[:3]
    best = [
        {"row": int(row), "likeness": 0.36 - 0.1 * i, "composition": 0.1}
        for i, row in enumerate(rows)
    ]
    run_of["verdicts"][0] |= {"near": True, "nearest": best}
    for each in run_of["verdicts"][1:]:
        each["nearest"] = best
    front.load(FIRST_LOOK)
    front.send([executed(SAMPLER, output, prompt())])
    told(front)
    edge = f"getComputedStyle({LIVE}.querySelector('.amg-words')).borderLeftColor"
    clear = front.js(f"return {edge}")
    front.send([executed(SAMPLER, found, prompt())])
    front.until(f"{LIVE}.dataset.outcome == 'close'")
    assert front.js(f"return {edge}") != clear
    shown = front.js(
        f"return [...{LIVE}.querySelectorAll('.amg-best li')].map((e) => e.innerText.trim())"
    )
    large = front.js(f"return {LIVE}.querySelector('.amg-name').textContent")
    places = [i for i, row in enumerate(rows) if run_of["neighbors"][row]["source"] != large]
    assert places and shown == [f"{i + 1} · {0.36 - 0.1 * i:.2f}" for i in places]
    title = front.js(f"return {LIVE}.querySelector('.amg-best img').title")
    i = places[0]
    assert title.startswith(f"{i + 1}. ")
    assert f"likeness {0.36 - 0.1 * i:.2f}, composition 0.10" in title
    assert "15°" in front.js(f"return {LIVE}.querySelector('.amg-misses').textContent")
    limit = front.js(f"return {LIVE}.querySelector('.amg-at').textContent")
    assert limit == "0.40"
    line = front.js(f"return {LIVE}.querySelector('.amg-limit').getAttribute('d')")
    assert line.startswith("M0.00 59.20")


def test_one_scale_in_the_probe(front, mode, pack):
    """Both bars have their limit at the same place; what was measured is in the tooltip."""
    of = {"similarity": -1.2, "threshold": -0.94, "zncc": 0.6, "zncc_threshold": 0.62}
    saved = {"filename": "drawn.webp", "subfolder": "", "type": "temp"}
    shown = {"likeness": 0.2, "composition": 0.387, "copy_above": 0.4, "near_above": 0.3}
    found = of | shown | {"copy": False, "near": True, "outcome": "no_copy", "source": "a.png"}
    found |= {"caption": "", "picture": saved, "nearest": saved, "messages": [], "words": ""}
    entry = {"index": "amg-demo", "id": 0, "sha256": "0" * 64, "caption": "", "composition": 0.1}
    found["best"] = [
        entry | {"source": f"{name}.png", "likeness": likeness}
        for name, likeness in (("a", 0.2), ("b", 0.15), ("c", 0.05))
    ]
    front.load(FIRST_LOOK)
    silent = {"messages": [], "words": ""}
    output = {"amg_probe": [{"verdicts": [found], "left": 0, "misses": silent}]}
    front.send([executed(PROBE, output, prompt())])
    panel = f"amgPanel({PROBE}, 'amg_probe')"
    front.until(f"{panel}?.querySelectorAll('[role=meter]').length == 2")
    bars = front.js(
        f"return [...{panel}.querySelectorAll('.amg-bar')].map((b) => [b.dataset.outcome,"
        "b.querySelector('.amg-bar-value').textContent, b.querySelector('.amg-mark').style.left,"
        "b.querySelector('.amg-fill').style.width])"
    )
    assert bars == [
        ["no_copy", "0.20 / 0.40", "40%", "20%"],
        ["close", "0.39 / 0.40", "40%", "38.7%"],
    ]
    titles = front.js(f"return [...{panel}.querySelectorAll('.amg-bar')].map((b) => b.title)")
    assert "similarity −1.20, threshold −0.94" in titles[0]
    assert "agreement 0.60, limit 0.62" in titles[1]
    assert front.js(f"return {panel}.querySelector('article').dataset.outcome") == "close"
    others = front.js(
        f"return [...{panel}.querySelectorAll('.amg-best li')].map((e) => e.textContent)"
    )
    assert others == ["2 · 0.15", "3 · 0.10"]  # the nearest is shown large


def test_what_was_seen_of_a_run_is_kept(front, mode, messages, output):
    """The picture that was chosen stays chosen when the output comes."""
    number = prompt()
    events = [(kind, data | {"prompt": number}) for kind, data in messages if kind == "amg.step"]
    front.load(FIRST_LOOK)
    front.send(events)
    front.until(f"{LIVE}?.querySelector('.amg-chip')")
    front.js(f"{LIVE}.querySelectorAll('.amg-chip')[2].click()")
    front.send([executed(SAMPLER, output, number)])
    front.rest()
    assert front.js(f"return {LIVE}.querySelectorAll('.amg-chip')[2].ariaPressed") == "true"
    front.send([executed(SAMPLER, output, prompt())])  # another run
    front.until(f"{LIVE}.querySelectorAll('.amg-chip')[2].ariaPressed == 'false'")


def test_where_nothing_was_executed(front, mode, output):
    """The host tells of the nodes that it has reused only in its history."""
    number = prompt()
    front.load(FIRST_LOOK)
    past = {number: {"prompt": [1, number, {}, {}, []], "outputs": {str(SAMPLER): output}}}
    with history(front, past):
        front.send(
            [
                ("execution_cached", {"nodes": [str(SAMPLER)], "prompt_id": number}),
                ("execution_success", {"prompt_id": number}),
            ]
        )
        assert told(front) == words_of.words(SENTENCES)
    assert lengths(front) == [20] * 4


class history:
    """The host's history for a while; a real one is asked through the page."""

    def __init__(self, front, past: dict) -> None:
        self.front, self.past = front, past

    def __enter__(self):
        if not self.front.server.real:
            self.front.server.host.past = self.past
            return
        self.front.js(
            "window.amgFetch = app.api.fetchApi; app.api.fetchApi = async (path, ...more) =>"
            f"path.startsWith('/history') ? new Response({json.dumps(json.dumps(self.past))})"
            ": amgFetch.call(app.api, path, ...more)"
        )

    def __exit__(self, *_):
        if not self.front.server.real:
            self.front.server.host.past = {}
        else:
            self.front.js("app.api.fetchApi = window.amgFetch")


def test_after_a_reload(front, output, live, pack):
    """What the history has of this workflow, the latest of each node; nothing of another workflow."""
    if front.server.real:
        pytest.skip("the history of the small server")
    graph = FIRST_LOOK | {"id": IDENTITY}
    built = live.lines(pack.nodes["AMG_BuildIndex"], ["512 pictures", "2 skipped"])
    builder = next(n["id"] for n in FIRST_LOOK["nodes"] if n["type"] == "AMG_BuildIndex")
    older = live.words_only(pack.nodes["AMG_Sampler"], of_pack(pack, [message("not_judged")]))

    def past_run(number: str, identity: str, outputs: dict) -> dict:
        extra = {"extra_pnginfo": {"workflow": {"id": identity}}}
        return {number: {"prompt": [1, number, {}, extra, []], "outputs": outputs, "status": {}}}

    past = past_run(prompt(), IDENTITY, {str(SAMPLER): older, str(builder): built})
    past |= past_run(prompt(), IDENTITY, {str(SAMPLER): output})
    past |= past_run(prompt(), "another", {str(SAMPLER): older})
    with history(front, past):
        front.open()
        front.render("classic")
        front.load(graph)
        assert told(front) == words_of.words(SENTENCES)
        panel = f"amgPanel({builder}, 'amg_said')"
        front.until(f"{panel}?.innerText.includes('2 skipped')")
        assert front.js(f"return {panel}.querySelectorAll('p').length") == 2
        front.load(FIRST_LOOK | {"id": "8b8d1c52-0d0e-4ad5-9a41-52c6bb6b3f30"})
        front.rest()
        assert lengths(front) == []


def test_the_front_end_brings_the_workflow_back(front, output):
    """As a browser does that is closed and opened: nothing is loaded by hand."""
    if front.server.real:
        pytest.skip("the history of the small server")
    extra = {"extra_pnginfo": {"workflow": {"id": IDENTITY}}}
    number = prompt()
    queued = [1, number, {}, extra, []]
    front.render("classic")
    front.setting("Comfy.Workflow.Persist", True)
    try:
        front.load(FIRST_LOOK | {"id": IDENTITY})
        front.js(
            f"amgNode({SAMPLER}).pos[0] += 10;"
            "await app.extensionManager.workflow.activeWorkflow.changeTracker.checkState?.();"
            "app.api.dispatchCustomEvent('graphChanged', app.graph.serialize());"
            "await new Promise((then) => setTimeout(then, 1500))"
        )
        with history(front, {number: {"prompt": queued, "outputs": {str(SAMPLER): output}}}):
            front.page.open(front.server.url)
            front.until(READY, 120)
            front.js(HELPERS)
            front.until(f"(app.rootGraph ?? app.graph).id == {json.dumps(IDENTITY)}", 20)
            assert told(front) == words_of.words(SENTENCES)
    finally:
        front.setting("Comfy.Workflow.Persist", False)
        front.open()


def test_a_real_run_comes_back(front):
    """After a reload, and where the same workflow is opened anew and nothing is executed."""
    if not front.server.real:
        pytest.skip("needs ComfyUI: set COMFYUI_PATH to its folder")
    front.render("classic")
    graph = shortened(FIRST_LOOK) | {"id": IDENTITY}
    front.load(graph)
    run(front)
    ended(front)
    words, drawn = told(front), lengths(front)
    probe = f"amgPanel({PROBE}, 'amg_probe')"
    front.until(f"{probe}?.querySelectorAll('img').length >= 4")
    front.until(
        "Object.values(await (await app.api.fetchApi('/history')).json()).at(-1)?.status?.completed"
    )
    front.open()
    front.load(graph)
    assert (told(front), lengths(front)) == (words, drawn)
    front.until(f"{probe}?.querySelectorAll('img').length >= 4")
    front.load(graph | {"id": "8b8d1c52-0d0e-4ad5-9a41-52c6bb6b3f31"})
    front.rest()
    assert lengths(front) == []
    run(front)
    assert (told(front), lengths(front)) == (words, drawn)


def test_text_stays_when_the_run_has_ended(front, mode, live, pack):
    """The host removes its own text then."""
    node = front.alone("AMG_BuildIndex")
    front.look_at(node)
    panel = f"amgPanel({node}, 'amg_said')"
    number = prompt()
    lines = ["12 pictures in <b>my-index</b> (1.0 s).", "3 of 12 with a caption."]
    values = front.values()
    front.send(
        [
            ("execution_start", {"prompt_id": number}),
            executed(node, live.lines(pack.nodes["AMG_BuildIndex"], lines), number),
            ("execution_success", {"prompt_id": number}),
        ]
    )
    front.until(f"{panel}?.offsetHeight > 20", 30)
    found = front.js(f"return [...{panel}.querySelectorAll('p')].map((p) => p.textContent)")
    assert found == lines
    assert front.js(
        f"return {panel}.scrollHeight <= {panel}.clientHeight + 1"
    )  # nothing is cut off
    assert front.values() == values  # and nothing is saved
    front.send([("progress_text", [str(node), "5 pictures so far…"])] * (not front.server.real))
    if not front.server.real:
        front.until(f"{panel}.innerText.includes('so far')")
    front.send([executed(node, live.lines(pack.nodes["AMG_BuildIndex"], lines[:1]), prompt())])
    front.until(f"{panel}.querySelectorAll('p').length == 1")


def test_a_result_without_a_run_is_words_alone(front, mode, live, pack):
    """Guard with nothing to guard against."""
    node = front.alone("AMG_Guard")
    panel = f"amgPanel({node}, 'amg_live')"
    story = [message("not_suspicious"), message("drawn_as_is")]
    front.send(
        [executed(node, live.words_only(pack.nodes["AMG_Guard"], of_pack(pack, story)), prompt())]
    )
    front.until(f"{panel}?.innerText.trim() == {json.dumps(words_of.words(story))}")
    assert front.js(f"return {panel}.querySelectorAll('path').length") == 0


def test_messages_are_in_the_language_of_the_host(front, live, pack):
    front.setting("Comfy.Locale", "fr")
    try:
        node = front.alone("AMG_PromptProbe")
        shown = live.lines(
            pack.nodes["AMG_PromptProbe"], [of_pack(pack, [message("not_suspicious")])]
        )
        front.send([executed(node, shown, prompt())])
        wanted = words_of.words([message("not_suspicious")], "fr")
        front.until(f"amgPanel({node}, 'amg_said')?.innerText.trim() == {json.dumps(wanted)}")
    finally:
        front.setting("Comfy.Locale", "en")


# ---------------------------------------------------------------- a picture is dropped


def picture(graph: dict, reports: object) -> str:
    """A PNG as Save Image writes it, as a data URL."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", json.dumps(graph))
    info.add_text("amg_report", reports if isinstance(reports, str) else json.dumps(reports))
    made = io.BytesIO()
    Image.new("RGB", (8, 8)).save(made, "PNG", pnginfo=info)
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()


def drop(front, data: str, name: str = "fox.png") -> None:
    front.js(
        f"const blob = await (await fetch({json.dumps(data)})).blob();"
        "const given = new DataTransfer();"
        f"given.items.add(new File([blob], {json.dumps(name)}, {{ type: 'image/png' }}));"
        "document.dispatchEvent(new DragEvent('drop', { dataTransfer: given, bubbles: true }))"
    )
    front.until(f"amgNode({SAMPLER}) != null", 30)
    front.rest()


def test_from_the_report_in_a_picture(front, mode, report):
    front.load(EMPTY)
    drop(front, picture(FIRST_LOOK, {str(SAMPLER): report}))
    assert told(front) == words_of.words(SENTENCES)
    assert lengths(front) == [20] * 4
    text = front.js(f"return {LIVE}.innerText")
    assert "From the report in the picture fox.png." in text
    assert report["neighbors"][str(report["steps"][-1]["neighbor"][0])]["source"] in text
    # It asks for no thumbnail: the index may be another one here.
    assert front.js(f"return {LIVE}.querySelector('img').hidden")
    # A run in this workflow takes its place.
    front.send([executed(SAMPLER, {"amg_report": [report | {"class": "AMG_Sampler"}]}, prompt())])
    front.until(f"!{LIVE}.innerText.includes('fox.png')")


def test_an_anonymous_and_an_older_report(front, report):
    front.render("classic")
    front.load(EMPTY)
    older = {key: report[key] for key in ("steps", "attempts")} | {"neighbors": {}}
    older["verdicts"] = [{"outcome": "copy", "words": "A copy of picture 3 of the index"}]
    drop(front, picture(FIRST_LOOK, {str(SAMPLER): older}))
    assert told(front) == "A copy of picture 3 of the index"
    assert front.js(f"return {LIVE}.dataset.outcome") == "copy"
    assert front.js(f"return {LIVE}.querySelector('.amg-name').textContent") == ""


@pytest.mark.parametrize(
    "reports",
    [
        "{", "[]", "null", '{"14": null}', '{"14": [1]}', '{"14": {"steps": 5, "story": 7}}',
        '{"14": {"steps": [null, {"score": ["<b>", {}], "active": 3}], "story": [{"code": "seen"}]}}',
        '{"14": {"steps": [], "verdicts": [null], "words": "<img src=x onerror=\'window.evil = 1\'>"}}',
        '{"3": {"steps": []}, "__proto__": {"steps": []}}',
    ],
)  # fmt: skip
def test_a_damaged_report_does_no_harm(front, reports):
    """Pictures come from anybody. The workflow opens all the same."""
    front.render("classic")
    front.load(EMPTY)
    before = len(front.page.errors)
    drop(front, picture(FIRST_LOOK, reports))
    assert front.js("return app.graph._nodes.length") == len(FIRST_LOOK["nodes"])
    assert front.js("return window.evil ?? null") is None
    assert front.js("return document.querySelectorAll('.amg-panel b, .amg-words img').length") == 0
    assert front.page.errors[before:] == []


def test_the_report_of_apply_amg_comes_by_amg_report(front, report):
    """AMG Report wrote it; the curve belongs to the Apply AMG before it."""
    front.render("classic")
    front.load(EMPTY)
    front.js(
        "const add = (type, y) => { const n = LiteGraph.createNode(type); n.pos = [100, y];"
        " app.graph.add(n); return n }; const apply = add('AMG_Apply', 100);"
        "apply.connect(1, add('AMG_Report', 900), 0)"
    )
    apply, node = front.id_of("AMG_Apply"), front.id_of("AMG_Report")
    graph = front.saved()
    front.load(EMPTY)
    front.js(
        f"const blob = await (await fetch({json.dumps(picture(graph, {str(node): report}))})).blob();"
        "await app.handleFile(new File([blob], 'a.png', { type: 'image/png' }))"
    )
    front.until(f"amgPanel({apply}, 'amg_live')?.querySelector('.amg-line')")
    assert words_of.words(SENTENCES) in front.js(f"return amgPanel({node}, 'amg_said').innerText")


# ---------------------------------------------------------------- errors


def failed(node: int, kind: str, number: str, words: str, name: str = "amg.AMGError") -> tuple:
    given = {"prompt_id": number, "node_id": str(node), "node_type": kind, "executed": []}
    given |= {"exception_message": words, "exception_type": name, "traceback": []}
    return "execution_error", given | {"current_inputs": {}, "current_outputs": []}


def test_an_error_is_said_on_the_node_until_the_next_run(front, mode):
    node = front.alone("AMG_BuildIndex")
    front.look_at(node)
    panel = f"amgPanel({node}, 'amg_said')"
    words = "folder: <b>it</b> is empty. Give the folder of the pictures to stay away from."
    front.send([failed(node, "AMG_BuildIndex", prompt(), words + "\n")])
    front.until(f"{panel}?.offsetHeight > 20", 30)
    assert front.js(f"return {panel}.innerText.trim()") == f"Error: {words}"
    assert front.js(f"return [{panel}.dataset.outcome, {panel}.ariaLabel]") == ["error", "Result"]
    front.send([("execution_start", {"prompt_id": prompt()})])
    front.until(f"{panel}.hidden && {panel}.innerText == ''")
    other = "not enough memory"
    front.send([failed(node, "AMG_BuildIndex", prompt(), other, "torch.OutOfMemoryError")])
    front.until(f"{panel}.innerText.includes('torch.OutOfMemoryError: {other}')")


def test_an_error_beside_a_curve(front, mode, output):
    """What was seen of the run stays; nodes of others are left alone."""
    front.load(FIRST_LOOK)
    plain = next(n["id"] for n in FIRST_LOOK["nodes"] if n["type"] == "KSampler")
    front.send(
        [
            executed(SAMPLER, output, prompt()),
            failed(SAMPLER, "AMG_Sampler", prompt(), "Stopped: picture 1 is still too close."),
            failed(plain, "KSampler", prompt(), "no"),
        ]
    )
    front.until(f"amgPanel({SAMPLER}, 'amg_said')?.innerText.includes('Stopped: picture 1')")
    assert lengths(front) == [20] * 4
    assert not front.js(f"return amgNode({plain}).widgets.some((w) => w.name == 'amg_said')")


def test_the_panel_is_as_high_as_its_text(front, live, pack):
    """Neither cut off nor half empty, in letters of any width."""
    front.render("classic")
    kind = "AMG_PromptProbe"
    for text in ("short", "a sentence of many words " * 12, "很长的一句话，" * 24):
        node = front.alone(kind)
        front.look_at(node)
        front.send([executed(node, live.lines(pack.nodes[kind], [text]), prompt())])
        panel = f"amgPanel({node}, 'amg_said')"
        front.until(f"{panel}?.offsetHeight > 20", 30)
        front.rest()
        whole, shown = front.js(
            f"return [{panel}.firstElementChild.offsetHeight, {panel}.clientHeight]"
        )
        assert whole - 2 <= shown <= 1.6 * whole + 50, text


def test_a_new_node_shows_its_whole_name(front):
    """On the classic canvas a longer title is cut off."""
    front.render("classic")
    for kind in ("AMG_SimilarityProbe", "AMG_PromptProbe", "AMG_Sampler"):
        node = front.alone(kind)
        wide = front.js(
            "const pen = document.createElement('canvas').getContext('2d');"
            f"const node = amgNode({node}); pen.font = `${{LiteGraph.NODE_TEXT_SIZE}}px Inter`;"
            "return [pen.measureText(node.title).width + LiteGraph.NODE_TITLE_HEIGHT, node.size[0]]"
        )
        assert wide[0] < wide[1], kind


def cell(strength: float, **more) -> dict:
    widgets = {"seed": 11, "preset": "strong", "strength": strength, "dissimilarity": 0.5}
    made = {
        "picture": 1, "strength": strength, "threshold_scale": 1, "same_as": None, "judged": True,
        "outcome": "no_copy", "near": False, "likeness": 0.2, "composition": 0.1, "source": "a.png",
        "use": {"AMG_Sampler": widgets},
    }  # fmt: skip
    return made | more


GRID = json.loads((WORKFLOWS / "amg_strength_grid.json").read_text())


def test_the_grid_is_read_and_fills_a_sampler(front, mode):
    """A button on each line: into the sampler that is there, or a new one wired as the grid is."""
    front.load(GRID)
    node = front.id_of("AMG_StrengthGrid")
    cells = [cell(0, outcome="copy", likeness=0.9), cell(1.5, near=True), cell(2, same_as=1.5)]
    cells.append(cell(1, threshold_scale=1.6, use={}))
    told = {"class": "AMG_StrengthGrid", "cells": cells}
    front.send([executed(node, {"amg_grid": [told]}, prompt())])
    panel = f"amgPanel({node}, 'amg_grid')"
    front.until(f"{panel}?.querySelectorAll('tbody tr').length == 4")
    rows = front.js(
        f"return [...{panel}.querySelectorAll('tbody tr')].map((r) => [...r.children]"
        ".map((c) => c.textContent))"
    )
    assert rows[0] == ["× 1", "0", "0.90", "0.10", "COPY", "use"]
    assert rows[1][4] == "no copy, but close"
    assert rows[2][4] == "no copysame picture as strength 1.5"
    press = f"{panel}.querySelectorAll('button')"
    assert front.js(f"return [...{press}].map((b) => b.disabled)") == [False, False, False, True]
    front.js(f"{press}[1].click()")
    front.until(f"{panel}.querySelector('.amg-status').textContent.includes('these settings')")
    sampler = front.id_of("AMG_Sampler")
    names = ("seed", "control_after_generate", "preset", "strength", "dissimilarity")
    assert [front.value(sampler, name) for name in names] == [11, "fixed", "strong", 1.5, 0.5]
    wired = front.export()
    mine, grids = wired[str(sampler)]["inputs"], wired[str(node)]["inputs"]
    shared = ("model", "index", "positive", "negative", "latent_image", "clip", "vae")
    assert [mine[name] for name in shared] == [grids[name] for name in shared]
    front.js(f"{press}[2].click()")  # into the same sampler
    assert front.js("return amgOn('AMG_Sampler').length") == 1
    assert front.value(sampler, "strength") == 2
    front.js("app.graph.add(LiteGraph.createNode('AMG_Sampler'))")
    front.js(f"app.canvas.deselectAll?.(); {press}[0].click()")
    assert "several" in front.js(f"return {panel}.querySelector('.amg-status').textContent")
    assert front.value(sampler, "strength") == 2
    if mode == "vue":
        front.until(f"document.querySelector('[data-node-id=\"{node}\"] .amg-table table')")


def test_a_new_index_is_listed(front, live, pack):
    """Once for each name, whichever node made it; other results do not ask the host again."""
    front.js(
        "window.amgAsked = 0; window.amgRefresh = app.refreshComboInNodes;"
        "app.refreshComboInNodes = async () => { window.amgAsked += 1; }"
    )

    def built(kind: str, name: str) -> None:
        lines = live.lines(
            pack.nodes[kind], [of_pack(pack, [message("index_holds_one", name=name, seconds=1.0)])]
        )
        front.send([executed(front.alone(kind), lines, prompt())])

    asked = []
    try:
        for kind, name in (
            ("AMG_BuildIndex", "foxes"),
            ("AMG_BuildIndex", "foxes"),
            ("AMG_IndexFromImages", "owls"),
        ):
            built(kind, name)
            asked.append(front.js("return window.amgAsked"))
        built("AMG_CombineIndexes", "both")
        asked.append(front.js("return window.amgAsked"))
    finally:
        front.js("app.refreshComboInNodes = window.amgRefresh")
    assert asked == [1, 1, 2, 2]
