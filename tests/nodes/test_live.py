"""The events that the page draws: what is in them, and that they are JSON of bounded size."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.index.helpers import Identity


def node_of(unique_id):
    """A node class as the host executes it."""
    schema = SimpleNamespace(node_id="AMG_Any")
    return SimpleNamespace(
        hidden=SimpleNamespace(unique_id=unique_id), define_schema=lambda: schema
    )


@pytest.fixture(scope="module")
def core(pack):
    def module(name):
        return pack.module(f"amg_core.{name}")

    return SimpleNamespace(
        index=module("index"), search=module("index.search"), pixel=module("descriptors.pixel"),
        matcher=module("similarity.matcher"), run=module("run"), presets=module("presets"),
        report=module("report"), retry=module("retry"), verdict=module("similarity.verdict"),
        live=pack.module("nodes.live"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def matcher(core, tmp_path_factory):
    """On two indexes read as one; captions longer than is sent."""
    generator = torch.Generator().manual_seed(0)
    folder, parts = tmp_path_factory.mktemp("indexes"), []
    for name, count in (("first", 12), ("second", 20)):
        (folder / name).mkdir()
        for i in range(count):
            coarse = torch.rand(1, 3, 4, 4, generator=generator)
            picture = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")[0]
            array = (picture.permute(1, 2, 0) * 255).byte().numpy()
            Image.fromarray(array).save(folder / name / f"{i:02d}.png")
            (folder / name / f"{i:02d}.txt").write_text(f"caption {i} " + "x" * 1000)
        core.index.build(folder / name, folder / f"{name}-index", core.pixel.PixelDescriptor())
        parts.append(core.index.Index.open(folder / f"{name}-index"))
    whole = core.index.Index.combine(parts)
    searcher = core.search.Searcher(whole)
    return core.matcher.Matcher(searcher, core.pixel.PixelDescriptor(), Identity())


@pytest.fixture
def run(core, matcher):
    """One step of two samples: a copy of a picture of each index."""
    made = core.run.SamplingRun(matcher, core.presets.settings("main", "nl2"), expected_steps=9)
    scale = matcher.scales[-1]
    copies = matcher.searcher.rows(torch.tensor([3, 12 + 5]), scale).reshape(2, 3, scale, scale)
    arguments = {"cond": copies, "uncond": copies.flip(0), "cfg_scale": 3.0, "t": 0.5}
    made.step(copies, sigma=torch.full((2,), 0.5), **arguments)
    return made


def test_a_step_is_its_record(core, run, matcher):
    event, record = core.live.step(run, attempt=1, retries=2), run.records[-1]
    assert (event["attempt"], event["retries"], event["step"], event["total"]) == (1, 2, 1, 9)
    assert event["similarity"] == record.similarity
    assert event["threshold"] == record.threshold
    assert event["score"] == record.score
    assert event["score_threshold"] == record.score_threshold
    assert event["active"] == record.active == [True, True]
    assert event["neighbor"] == record.neighbor == [3, 17]
    text = json.dumps(event, allow_nan=False)
    assert json.loads(text) == event
    assert len(text) < 2500


def test_a_neighbour_is_found_in_its_own_index(core, run, matcher):
    """Index, id and hash lead to the very picture: the route for thumbnails asks for all three."""
    whole = matcher.searcher.index
    members = {member.name: member for member in whole.members}
    for i, near in core.live.step(run)["neighbors"].items():
        record = members[near["index"]].record(near["id"])
        assert record == whole.record(int(i))
        assert near["sha256"] == record.sha256
        assert near["source"] == record.source
        assert near["caption"] == record.caption[: core.live.LONGEST]
    every = [core.live.entry(whole, i) for i in range(whole.count)]
    assert [each["index"] for each in every] == ["first-index"] * 12 + ["second-index"] * 20
    assert [each["id"] for each in every] == [*range(12), *range(20)]


def test_before_the_first_step_there_is_nothing(core, matcher):
    settings = core.presets.settings("main", "nl2")
    assert core.live.step(core.run.SamplingRun(matcher, settings)) == {}


def test_what_is_no_number_is_null(core, run):
    run.records[-1].similarity[0] = float("nan")
    event = core.live.step(run)
    assert event["similarity"][0] is None
    json.dumps(event, allow_nan=False)


def test_the_end_is_the_report(core, run, matcher):
    verdicts = core.verdict.verdict(matcher, torch.rand(2, 3, 32, 32))
    attempt = core.retry.Attempt([0, 1], run.report(), verdicts)
    outcome = core.retry.Outcome(torch.zeros(2), verdicts, [0, 0], [attempt])
    written = core.report.compose(run.report(), outcome, judged_by="vae")
    event = core.live.end(written)
    assert event["words"] == core.report.words(written)
    assert event["messages"] == [each.to_json() for each in core.report.story(written)]
    for shown, whole in zip(event["verdicts"], written["verdicts"], strict=True):
        assert shown["outcome"] == whole["outcome"]
        assert shown["score"] == whole["score"]
        assert len(shown["caption"]) <= core.live.LONGEST
        assert shown["composition"] == whole["composition"] and shown["near"] == whole["near"]
    near = core.live.entries(matcher.index, core.live.rows_of(written))
    best = written["verdicts"][0]["nearest"]
    assert [each["source"] for each in best] == [near[str(e["row"])]["source"] for e in best]
    assert core.live.end(written, near)["misses"]["messages"] == [{"code": "misses_pixel"}]
    unjudged = core.report.compose(run.report(), not_judged=core.report.NOT_FINISHED)
    codes = [{"code": "not_judged"}, {"code": "not_finished"}]
    words = core.report.words(unjudged)
    nothing = {"messages": [], "words": ""}
    expected = {"kind": "end", "messages": codes, "words": words, "verdicts": [], "neighbors": {}}
    expected["misses"] = nothing
    assert core.live.end(unjudged) == expected
    (found,) = core.live.verdict(verdicts[0])["messages"]
    assert found == verdicts[0].message().to_json()


def test_sent_to_the_browser_that_queued_it(core, monkeypatch):
    sent = []
    server = SimpleNamespace(client_id="me", send_sync=lambda *written: sent.append(written))
    module = ModuleType("server")
    module.PromptServer = SimpleNamespace(instance=server)
    monkeypatch.setitem(sys.modules, "server", module)
    executing = SimpleNamespace(prompt_id="first")
    utils = ModuleType("comfy_execution.utils")
    utils.get_executing_context = lambda: executing
    monkeypatch.setitem(sys.modules, "comfy_execution.utils", utils)
    send = core.live.events_of(node_of("12:3"))
    send({"kind": "step"})
    whose = {"node": "12:3", "class": "AMG_Any"}
    assert sent == [("amg.step", whose | {"prompt": "first", "kind": "step"}, "me")]
    executing.prompt_id = "second"  # a guarded model outlives the prompt that it was made in
    send({"kind": "end"})
    assert sent[1] == ("amg.step", whose | {"prompt": "second", "kind": "end"}, "me")
    executing = None
    send({"kind": "end"})
    assert sent[2][1]["prompt"] is None
    send({})
    core.live.events_of(node_of(None))({"kind": "step"})
    assert len(sent) == 3
    monkeypatch.delitem(sys.modules, "server")
    send({"kind": "step"})  # no server: nothing happens


def test_a_picture_that_no_index_keeps_is_where_the_host_saved_it(core, run, monkeypatch):
    sent = []
    server = SimpleNamespace(client_id="me", send_sync=lambda *written: sent.append(written))
    module = ModuleType("server")
    module.PromptServer = SimpleNamespace(instance=server)
    monkeypatch.setitem(sys.modules, "server", module)
    event = core.live.step(run)
    first, _ = event["neighbors"].values()
    saved = {"filename": "a.png", "subfolder": "", "type": "temp"}
    core.live.events_of(node_of("7"), {first["sha256"]: saved})(event)
    near, other = sent[0][1]["neighbors"].values()
    assert near["picture"] == saved
    assert "picture" not in other


def test_what_a_run_leaves_in_the_output_of_its_node(core, run, matcher):
    """All that the panel shows: the host keeps it in its cache and in its history."""
    verdicts = core.verdict.verdict(matcher, torch.rand(2, 3, 32, 32))
    attempt = core.retry.Attempt([0, 1], run.report(), verdicts)
    again = core.retry.Attempt([1], run.report(), verdicts[1:])
    outcome = core.retry.Outcome(torch.zeros(2), verdicts, [0, 1], [attempt, again])
    written = core.report.compose(run.report(), outcome, judged_by="vae", retries=3)
    near = core.live.entries(matcher.index, map(int, written["neighbors"]))
    saved = {"filename": "a.png", "subfolder": "", "type": "temp"}
    pictures = {near["3"]["sha256"]: saved}
    made = core.live.result(node_of("7"), written, near, pictures=pictures)
    (shown,) = made["amg_report"]
    assert json.loads(json.dumps(made, allow_nan=False))["amg_report"] == [shown]
    event = core.live.step(run)
    assert shown["steps"] == [{key: event[key] for key in core.live.CURVE}]
    assert [each.get("steps") for each in shown["attempts"]] == [None, shown["steps"]]
    assert (shown["class"], shown["retries"]) == ("AMG_Any", 3)
    assert shown["neighbors"]["17"] == event["neighbors"]["17"]
    assert shown["neighbors"]["3"] == event["neighbors"]["3"] | {"picture": saved}
    assert "picture" not in near["3"]
    assert shown["story"] == [each.to_json() for each in core.report.story(written)]
    assert made["text"] == (shown["words"],) == (core.report.words(written),)
    assert [each["outcome"] for each in shown["verdicts"]] == [v.outcome for v in verdicts]
    (elsewhere,) = core.live.result(node_of("7"), written, drawn_by="5")["amg_report"]
    assert (elsewhere["class"], elsewhere["node"]) == ("AMG_Apply", "5")


def test_what_other_nodes_leave(core, pack):
    message = pack.module("amg_core.messages").message
    long = "x" * 2 * core.live.LONGEST
    made = core.live.lines(node_of("7"), [long, [message("no_copy"), message("replaced")]])
    (shown,) = made["amg_said"]
    assert shown["class"] == "AMG_Any"
    assert [each["words"] for each in shown["lines"]] == [
        long,
        "no copy · replaced by a blank picture",
    ]
    assert shown["lines"][0]["messages"] == [{"code": "as_written", "words": long}]
    assert made["text"] == (f"{long}\nno copy · replaced by a blank picture",)
    (words,) = core.live.words_only(node_of("7"), [message("drawn_as_is")])["amg_report"]
    assert words["words"] == "drawn without the guard" and words["steps"] == []
