"""A real server: the pack is listed, its pages are served, and the example workflow runs."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from benchmarks.server import FOLDER, PATIENCE, ROOT, served

TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """`server(path, data=None)` -> parsed answer. One server for the whole file."""
    with served(comfyui, tmp_path_factory.mktemp("base")) as started:
        yield started


def finish(server, prompt: dict, metadata: dict | None = None) -> dict:
    """Queue a prompt, with what its pictures are to carry, and wait; the history entry."""
    return server.finish(server.queue(prompt, metadata))


def succeed(server, prompt: dict, metadata: dict | None = None) -> dict:
    """The same, for a prompt that must run; what its nodes showed."""
    done = finish(server, prompt, metadata)
    assert done["status"]["status_str"] == "success", done["status"]
    return done["outputs"]


def cached(server, prompt: dict) -> list[str]:
    """Run a prompt; the nodes whose outputs the host had kept."""
    return dict(finish(server, prompt)["status"]["messages"])["execution_cached"]["nodes"]


def posted(server, name: str) -> dict:
    """A template as the front end sends it: the same as its own file for the API."""
    graph = json.loads((ROOT / f"example_workflows/amg_{name}.json").read_text())
    prompt = as_prompt(graph, server("/object_info"))
    api = json.loads((ROOT / f"example_workflows/api/amg_{name}.api.json").read_text())
    assert prompt == {i: {k: node[k] for k in ("class_type", "inputs")} for i, node in api.items()}
    return prompt


@pytest.fixture(scope="module")
def first_look():
    text = (ROOT / "example_workflows/api/amg_first_look.api.json").read_text()
    prompt = json.loads(text)
    for node in prompt.values():
        if "batch_size" in node["inputs"]:
            node["inputs"]["batch_size"] = 1
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 6
    return prompt


def step(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def of_type(prompt: dict, kind: str) -> list[str]:
    return [number for number, node in prompt.items() if node["class_type"] == kind]


def guarded_part(prompt: dict, *more: str) -> dict:
    """A copy of a prompt with no nodes but the guarded sampler's, and those of `more` kinds."""
    kinds = {
        *("AMG_Sampler", "AMG_DemoModel", "AMG_BuildIndex", "CLIPTextEncode", "EmptyLatentImage"),
        *more,
    }
    kept = {number: node for number, node in prompt.items() if node["class_type"] in kinds}
    return copy.deepcopy(kept)


def test_listed(server):
    info = server("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("AMG_")}
    snapshot = Path(__file__).parents[1] / "nodes/schema.json"
    assert set(ours) == set(json.loads(snapshot.read_text()))
    parts = ("start here", "index", "check", "prompt", "advanced")
    assert {node["category"] for node in ours.values()} == {f"AMG/{part}" for part in parts}
    assert {node["python_module"] for node in ours.values()} == {f"custom_nodes.{FOLDER}"}
    for node in ours.values():
        assert all(node["output_tooltips"])


def test_loaded_quietly(server):
    log = (server.base / "log.txt").read_text()
    assert "IMPORT FAILED" not in log
    mine = [line for line in log.splitlines() if "amg" in line.lower()]
    assert len(mine) <= 1, mine


def test_help_pages_and_workflows_are_served(server):
    for node in ("AMG_Sampler", "AMG_BuildIndex", "AMG_IndexFromImages", "AMG_MutePictures"):
        assert server(f"/extensions/{FOLDER}/docs/{node}.md", raw=True).startswith(b"# ")
    templates = server("/api/workflow_templates")
    assert {path.stem for path in TEMPLATES} <= set(templates[FOLDER])
    for path in TEMPLATES:
        assert server(f"/api/workflow_templates/{FOLDER}/{path.name}") == json.loads(
            path.read_text()
        )
        picture = server(f"/api/workflow_templates/{FOLDER}/{path.stem}.jpg", raw=True)
        assert picture.startswith(b"\xff\xd8")


def test_languages_are_served(server):
    written = server("/api/i18n")
    for code in ("en", "zh", "ja", "ko", "de", "fr", "es"):
        path = ROOT / "locales" / code / "nodeDefs.json"
        mine = {k: v for k, v in written[code]["nodeDefs"].items() if k.startswith("AMG_")}
        assert mine == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["off_on", "probe_picture", "custom_sampler", "prompt_probe", "strength_grid"]
)
def test_templates_for_the_demo_model_run(server, name):
    """As the front end sends them, with fewer steps."""
    from PIL import Image

    prompt = posted(server, name)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 5
        if node["class_type"] == "LoadImage":
            (server.base / "input").mkdir(exist_ok=True)
            with Image.open(ROOT / "amg_demo/pictures/memorised-000.webp") as picture:
                picture.convert("RGB").save(server.base / "input" / node["inputs"]["image"])
    shown = succeed(server, prompt)
    for kind in ("PreviewImage", "AMG_SimilarityProbe", "AMG_StrengthGrid"):
        assert all(shown[i]["images"] for i in of_type(prompt, kind))
    kinds = ("PreviewAny", "AMG_SimilarityProbe")
    said = [shown[i]["text"][0] for kind in kinds for i in of_type(prompt, kind)]
    assert all(said)
    if name == "probe_picture":
        assert any("memorised-000" in text for text in said)


def test_the_lora_template_runs(server):
    """As it is posted, with fewer pictures: the LoRA copies its training set, the guard prevents it."""
    prompt = posted(server, "lora")
    (latent,) = of_type(prompt, "EmptyLatentImage")
    prompt[latent]["inputs"]["batch_size"] = 2
    shown = succeed(server, prompt)
    assert all(shown[i]["images"] for i in of_type(prompt, "PreviewImage"))
    (built,) = of_type(prompt, "AMG_BuildIndex")
    kinds = ("AMG_BuildIndex", "AMG_SimilarityProbe")
    said = [shown[i]["text"][0] for kind in kinds for i in of_type(prompt, kind)]
    assert any(text.startswith("8 pictures in") for text in said), said
    (plain,) = (text for text in said if "both checks agree" in text)
    assert plain.count("A copy of panda-face-at-midnight.webp") == 2
    (guarded,) = (text for text in said if "Not a copy" in text)
    assert guarded.count("Not a copy") == 2 and "A copy of" not in guarded
    assert (server.base / "models/amg_indexes" / prompt[built]["inputs"]["name"]).is_dir()


def test_the_first_look_runs(server, first_look):
    """On an empty ComfyUI: no checkpoint, no index, no descriptor weights."""
    shown = succeed(server, first_look)
    for kind in ("PreviewImage", "AMG_SimilarityProbe"):
        assert all(shown[i]["images"] for i in of_type(first_look, kind))
    assert all(shown[i]["text"][0] for i in of_type(first_look, "AMG_SimilarityProbe"))
    assert all(
        shown[i]["amg_verdict"][0]["filename"].endswith(".txt")
        for i in of_type(first_look, "AMG_SimilarityProbe")
    )
    assert (server.base / "models/amg_indexes/amg-demo/manifest.json").is_file()


def test_the_other_workflow_lacks_nothing_but_files(server):
    """Validated by the host: only the user's own checkpoint and index are not in its lists."""
    text = (ROOT / "example_workflows/api/amg_sd15.api.json").read_text()
    with pytest.raises(urllib.error.HTTPError) as caught:
        server("/prompt", {"prompt": json.loads(text)})
    answer = json.loads(caught.value.read())
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert {error["type"] for error in errors} == {"value_not_in_list"}
    names = {error["extra_info"]["input_name"] for error in errors}
    # Lists of V3 nodes are checked by newer hosts only.
    assert {"ckpt_name"} <= names <= {"ckpt_name", "index_name"}


def test_indexes_made_in_the_graph(server, first_look):
    """Index from Images (list inputs), Combine Indexes and Mute Pictures, in one workflow."""
    prompt = guarded_part(first_look, "KSampler")
    (plain,), (demo,) = of_type(prompt, "KSampler"), of_type(prompt, "AMG_DemoModel")
    (sampler,), (built,) = of_type(prompt, "AMG_Sampler"), of_type(prompt, "AMG_BuildIndex")
    prompt |= {
        "90": step("VAEDecode", samples=[plain, 0], vae=[demo, 2]),
        "91": step("AMG_IndexFromImages", images=["90", 0], captions="a fox", name="drawn",
                   descriptor="pixel", mode="add"),
        "92": step("AMG_CombineIndexes", index_1=[built, 0], index_2=["91", 0]),
        "93": step("AMG_MutePictures", index=["92", 0], patterns="once-032*", reason="mine",
                   undo=False),
        "94": step("PreviewAny", source=["93", 1]),
        "95": step("PreviewAny", source=[sampler, 1]),
        "96": step("PreviewAny", source=["91", 1]),
    }  # fmt: skip
    prompt[sampler]["inputs"]["index"] = ["93", 0]
    shown = succeed(server, prompt)
    shown = {number: shown[number]["text"][0] for number in ("94", "95", "96")}
    assert shown["94"].startswith("1 of 633 pictures in amg-demo + drawn are excluded (muted).")
    assert json.loads(shown["95"])["index"]["count"] == 633
    assert shown["96"].startswith("1 picture in")
    assert {sampler, built, "91", "92", "93"} <= set(cached(server, prompt))


def test_words_are_left_out_of_a_text_that_nodes_make(server, first_look):
    """As of the same text in the encoder's own widget. It is no caption of the index."""
    reports, text = [], "violet fox face on rays"
    for made in (False, True):
        prompt = guarded_part(first_look)
        (sampler,) = of_type(prompt, "AMG_Sampler")
        encoder, _ = prompt[sampler]["inputs"]["positive"]
        prompt[encoder]["inputs"]["text"] = text
        prompt["97"] = step("PreviewAny", source=[sampler, 1])
        if made:
            subject, rest = text.split(" ", 1)
            prompt[encoder]["inputs"]["text"] = ["98", 0]
            prompt["98"] = step(
                "StringConcatenate", string_a=["99", 0], string_b=rest, delimiter=" "
            )
            prompt["99"] = step("PrimitiveString", value=subject)
        reports.append(json.loads(succeed(server, prompt)["97"]["text"][0]))
    typed, made = (report["left_out_words"] for report in reports)
    assert typed == made and all(typed)


WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def as_prompt(graph: dict, info: dict) -> dict:
    """A saved graph as the front end sends it: widget values by their order, links by number."""
    links = {link: [str(source), out] for link, source, out, *_ in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] not in info:  # notes
            continue
        kinds = info[node["type"]]["input"]
        known = {**kinds.get("required", {}), **kinds.get("optional", {})}
        values, inputs = list(node.get("widgets_values", [])), {}
        for name, (kind, *options) in known.items():
            if isinstance(kind, list) or kind in WIDGETS:
                if values:
                    inputs[name] = values.pop(0)
                if options and options[0].get("control_after_generate"):
                    values.pop(0)
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_a_workflow_saved_before_the_loop_runs(server):
    """Its graph lacks the appended widgets, and has the live text of its last run in their place."""
    graph = json.loads((ROOT / "example_workflows/amg_first_look.json").read_text())
    for node in graph["nodes"]:
        if node["type"] == "AMG_Sampler":
            node["widgets_values"] = node["widgets_values"][:11]
            node["widgets_values"] += ["step 20/20 · similarity -0.91 · guarding 0 of 4"]
    prompt = as_prompt(graph, server("/object_info"))
    (sampler,) = of_type(prompt, "AMG_Sampler")
    assert prompt[sampler]["inputs"]["dissimilarity"] == 1.0
    assert prompt[sampler]["inputs"]["if_still_copied"].startswith("step 20/20")
    prompt[sampler]["inputs"] |= {"steps": 6}
    succeed(server, prompt)
    prompt[sampler]["inputs"]["if_still_copied"] = "Stop"  # no text of ours
    (error,) = server("/prompt", {"prompt": prompt})["node_errors"][sampler]["errors"]
    assert error["details"].startswith("if_still_copied - 'Stop' is not one of the choices")


def under_apply(prompt: dict, sampler: str) -> str:
    """Replace AMG Sampler by KSampler behind Apply AMG, node 80; the id of AMG Report behind it."""
    inputs = prompt[sampler]["inputs"]
    guards = ("preset", "index", "clip", "vae", "despecification", "deduplication", "dissimilarity")
    kept = {name: value for name, value in inputs.items() if name not in guards}
    prompt[sampler] = step("KSampler", **kept | {"model": ["80", 0]})
    prompt["80"] = step(
        "AMG_Apply", model=inputs["model"],
        **{name: inputs[name] for name in guards if name in inputs},
        thresholds="preset", schedule="parabolic", threshold_start=0.2, threshold_end=0.4,
        form="preset", exit=1.0, start_percent=0.0, end_percent=1.0, margin=0.05,
        iterations=0, decoder="auto",
    )  # fmt: skip
    prompt["81"] = step("AMG_Report", run=["80", 1], after=[sampler, 0])
    return "81"


def saved(server, first_look, steps: int, through_report: bool = False):
    """Run the first look with Save Image behind the guarded sampler; (metadata, prompt, reporter)."""
    from PIL import Image

    prompt = guarded_part(first_look)
    (sampler,), (demo,) = of_type(prompt, "AMG_Sampler"), of_type(prompt, "AMG_DemoModel")
    inputs = prompt[sampler]["inputs"] | {"steps": steps}
    prompt[sampler]["inputs"], source = inputs, sampler
    if through_report:
        source = under_apply(prompt, sampler)
    slot = 2 if through_report else 0
    prompt["90"] = step("VAEDecode", samples=[source, slot], vae=[demo, 2])
    prompt["91"] = step("SaveImage", images=["90", 0], filename_prefix=f"report-{steps}")
    workflow = {"nodes": [], "note": "as the front end sends it"}
    (picture,) = succeed(server, prompt, {"workflow": workflow})["91"]["images"]
    path = server.base / "output" / picture["filename"]
    with Image.open(path) as opened:
        found = dict(opened.info)
    assert json.loads(found["workflow"]) == workflow
    assert json.loads(found["prompt"])[sampler]["inputs"]["steps"] == steps
    return path, source


@pytest.mark.parametrize("through_report", [False, True])
def test_the_report_travels_in_the_picture(server, first_look, through_report):
    from amg_core import report

    for steps in (5, 7):  # the second time models and Apply AMG come from the cache
        path, source = saved(server, first_look, steps, through_report)
        found = report.of_picture(path)
        assert list(found) == [source]
        written = found[source]
        assert len(written["steps"]) == steps
        assert written["index"]["name"] == "" and len(written["index"]["hash"]) > 8
        assert written["judged_by"] == "vae" and written["verdicts"][0]["neighbor"] >= 0
        assert written["left_out"][0] == "names" and "memorised-" not in json.dumps(written)
        assert "comfyui" in written["versions"] and written["retries"] == 2
        assert "memorised-" not in json.dumps(written["story"])
        assert {each["code"] for each in written["story"]} & {"no_copy", "still_a_copy_one"}


def test_results_are_in_the_outputs_of_the_nodes(server, first_look):
    """Also of a run in which nothing was executed: from these the page shows them again."""
    first, again = (finish(server, first_look)["outputs"] for _ in range(2))
    (sampler,), (builder,) = (
        of_type(first_look, f"AMG_{kind}") for kind in ("Sampler", "BuildIndex")
    )
    assert sampler in cached(server, first_look)
    (shown,) = again[sampler]["amg_report"]
    assert shown["steps"] and shown["neighbors"] and shown["verdicts"]
    assert again[sampler] == first[sampler]
    (told,) = again[builder]["amg_said"]
    assert told["lines"][0]["words"].startswith("632 pictures in ")


def test_a_run_under_apply_amg_is_shown_on_it(server, first_look):
    """AMG Report leaves what the page shows on Apply AMG."""
    prompt = guarded_part(first_look)
    (sampler,) = of_type(prompt, "AMG_Sampler")
    prompt[sampler]["inputs"]["steps"] = 5
    under_apply(prompt, sampler)
    prompt["99"] = step("PreviewAny", source=["81", 0])
    outputs = succeed(server, prompt)
    (shown,) = outputs["81"]["amg_report"]
    assert (shown["class"], shown["node"], len(shown["steps"])) == ("AMG_Apply", "80", 5)
    assert outputs["81"]["amg_said"][0]["lines"][0]["words"] == shown["words"]


def test_unchanged_nodes_come_from_the_cache(server, first_look):
    finish(server, first_look)
    kept = set(cached(server, first_look))
    assert {*of_type(first_look, "AMG_BuildIndex"), *of_type(first_look, "AMG_Sampler")} <= kept


def test_an_error_reaches_the_artist(server):
    build = step("AMG_BuildIndex", folder="/nowhere", name="x", descriptor="pixel")
    done = finish(server, {"1": build})
    error = dict(done["status"]["messages"])["execution_error"]
    assert "/nowhere" in error["exception_message"]
    assert error["exception_type"] == "amg.AMGError"  # wherever the pack lies
    assert error["node_type"] == "AMG_BuildIndex"


def test_interrupt(server, first_look):
    prompt = guarded_part(first_look)
    (sampler,) = of_type(prompt, "AMG_Sampler")
    prompt[sampler]["inputs"] |= {"steps": 2000, "seed": 99}
    prompt["99"] = step("PreviewAny", source=[sampler, 1])
    number = server.queue(prompt)
    time.sleep(4)
    server("/interrupt", {}, raw=True)
    messages = dict(server.finish(number)["status"]["messages"])
    assert "execution_interrupted" in messages
    succeed(server, first_look)  # the server goes on working


def test_a_prompt_is_calibrated_probed_and_drawn(server):
    """As an artist wires it: calibrate, probe, sample; then a probe alone finds the calibration."""
    folder = ROOT / "amg_demo/pictures/metadata.jsonl"
    rows = [json.loads(line) for line in folder.read_text("utf-8").splitlines()]
    usual = [row["text"] for row in rows if row["duplicates"] == 1][::20]

    def graph(text: str, model: list) -> dict:
        return {
            "1": step("AMG_DemoModel"),
            "2": step("EmptyLatentImage", width=128, height=128, batch_size=1),
            "3": step("CLIPTextEncode", clip=["1", 1], text=text),
            "4": step("CLIPTextEncode", clip=["1", 1], text=""),
            "6": step(
                "AMG_PromptProbe", model=model, positive=["3", 0], negative=["4", 0],
                score="combined", seeds=2, false_alarms=0.02, words="never",
            ),
            "7": step(
                "KSampler", model=["6", 0], positive=["6", 1], negative=["6", 2],
                latent_image=["2", 0], seed=1, steps=2, cfg=4.0, sampler_name="euler",
                scheduler="normal", denoise=1.0,
            ),
            "8": step("VAEDecode", samples=["7", 0], vae=["1", 2]),
            "9": step("PreviewImage", images=["8", 0]),
        }  # fmt: skip

    for file in (server.base / "models").rglob("prompt_probe/*.json"):  # of the templates
        file.unlink()
    early = finish(server, graph("fox face on violet rays", ["1", 0]))
    assert early["status"]["status_str"] == "error"
    assert "Calibrate Prompt Probe" in json.dumps(early["status"]["messages"])
    prompt = graph("fox face on violet rays", ["5", 0])
    prompt["5"] = step(
        "AMG_CalibratePromptProbe", model=["1", 0], clip=["1", 1], latent_image=["2", 0], seeds=2,
        prompts="\n".join(usual),
    )  # fmt: skip
    shown = succeed(server, prompt)
    assert shown["5"]["text"][0].startswith("calibrated on 30 ordinary prompts")
    assert shown["6"]["text"][0].startswith("suspicious")
    assert shown["9"]["images"]
    plain = succeed(server, graph("penguin on violet stripes", ["1", 0]))
    assert plain["6"]["text"][0].startswith("nothing suspicious")


def test_live_events_name_the_node_of_their_own_prompt(server):
    """Workflows that differ in nothing but the ids of their nodes: the host keeps what one has made.

    Also ids within subgraphs.
    """
    seen = []
    for number, before in enumerate(("", "1", "2:")):
        prompt = guarded_model(before, seed=number)
        prompt_id, events = asyncio.run(watched(server, prompt))
        assert {e["prompt"] for e in events} == {prompt_id}
        assert {e["node"] for e in events} == {f"{before}5"}
        assert {e["class"] for e in events} == {"AMG_Apply"}
        assert [e["kind"] for e in events][-1] == "end"
        seen.append(len(events))
    assert len(set(seen)) == 1
    assert seen[0] > 3


def test_a_sampler_in_another_workflow_shows_what_it_sees(server, first_look):
    """Nothing differs but the ids: it is drawn again, for the curve is on the node."""
    (sampler,) = of_type(first_look, "AMG_Sampler")
    finish(server, first_look)
    moved = json.loads(json.dumps(first_look).replace(f'"{sampler}"', '"99"'))
    _, events = asyncio.run(watched(server, moved))
    assert {event["node"] for event in events} == {"99"}
    assert asyncio.run(watched(server, moved))[1] == []  # unchanged: from the cache


def guarded_model(before: str, seed: int) -> dict:
    """KSampler on the demo model behind Apply AMG; `before` stands before every id."""

    def of(number, slot=0):
        return [f"{before}{number}", slot]

    nodes = {
        1: step("AMG_DemoModel"),
        2: step("CLIPTextEncode", clip=of(1, 1), text="fox face on violet rays"),
        3: step("EmptyLatentImage", width=128, height=128, batch_size=1),
        4: step("AMG_BuildIndex", folder=of(1, 3), name="amg-demo", descriptor="pixel"),
        5: step(
            "AMG_Apply", model=of(1), index=of(4), preset="main", despecification=1.0,
            deduplication=1.0, dissimilarity=1.0, thresholds="preset", schedule="parabolic",
            threshold_start=0.2, threshold_end=0.4, form="preset", exit=1.0, start_percent=0.0,
            end_percent=1.0, margin=0.05, iterations=0, decoder="auto",
        ),
        6: step(
            "KSampler", model=of(5), seed=seed, steps=4, cfg=1.0, sampler_name="euler",
            scheduler="normal", positive=of(2), negative=of(2), latent_image=of(3), denoise=1.0,
        ),
        7: step("VAEDecode", samples=of(6), vae=of(1, 2)),
        8: step("PreviewImage", images=of(7)),
    }  # fmt: skip
    return {f"{before}{i}": node for i, node in nodes.items()}


async def watched(server, prompt: dict) -> tuple[str, list[dict]]:
    """Queue a prompt as a page does; its id, and the live events that the page is sent."""
    aiohttp = pytest.importorskip("aiohttp")
    events = []
    async with (
        aiohttp.ClientSession(server.url) as client,
        client.ws_connect("/ws?clientId=page", max_msg_size=0) as socket,
    ):
        async with client.post("/prompt", json={"prompt": prompt, "client_id": "page"}) as answer:
            number = (await answer.json())["prompt_id"]
        while True:
            message = await socket.receive(timeout=PATIENCE)
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            written = json.loads(message.data)
            if written["type"] == "amg.step":
                events.append(written["data"])
            if written["type"] == "execution_error":
                pytest.fail(str(written["data"]))
            if written["type"] == "execution_success":
                return number, events


def test_guard_shows_the_picture_that_it_found_out(server):
    """Its index ends with the run: the page is told where the host saved the picture."""
    from PIL import Image

    prompt = guarded_model("", seed=0)
    prompt.pop("4")
    prompt["5"] = step(
        "AMG_Guard", model=["1", 0], seed=0, steps=12, cfg=4.0, sampler_name="euler",
        scheduler="normal", positive=["2", 0], negative=["9", 0], latent_image=["3", 0],
        denoise=1.0, detect="draw twice", false_alarms=0.01,
    )  # fmt: skip
    prompt["9"] = step("CLIPTextEncode", clip=["1", 1], text="")
    prompt.pop("6")
    prompt["7"]["inputs"]["samples"] = ["5", 0]
    _, events = asyncio.run(watched(server, prompt))
    steps = [event for event in events if event["kind"] == "step"]
    assert steps
    found = [near for event in steps for near in event["neighbors"].values()]
    assert found
    for near in found:
        query = urllib.parse.urlencode(near["picture"])
        data = server(f"/view?{query}", raw=True)
        with Image.open(io.BytesIO(data)) as picture:
            assert max(picture.size) == 128
    assert len({near["picture"]["filename"] for near in found}) <= 2
