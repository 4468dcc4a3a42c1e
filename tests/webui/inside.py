"""Automatic1111 as a whole, from within: run by its own Python, in its own folder.

    python inside.py DATA

DATA: the program's data folder, as `test_program.py` makes it. All of the program is started but its
page, with this repository as an extension; requests go through its API. Prints a line of JSON a check.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

HERE, DATA = Path(__file__).parent, Path(sys.argv[1])
KEY = "fox face on violet rays"
OFF = {"despecification": 0, "deduplication": 0, "dissimilarity": 0}  # watches, changes nothing
WEAK = {"preset": "gentle", "despecification": 0, "dissimilarity": 0.01}
HIRES = {"enable_hr": True, "hr_scale": 1, "denoising_strength": 0.4, "hr_upscaler": "Lanczos"}


def start():
    """The program's API."""
    sys.argv = ["webui.py", "--data-dir", str(DATA), "--no-half", "--api", "--do-not-download-clip"]
    sys.argv += ["--use-cpu", "all", "--precision", "full", "--no-download-sd-model", "--nowebui"]
    sys.argv += ["--skip-torch-cuda-test", "--ckpt", str(DATA / "models/Stable-diffusion/demo.safetensors")]  # fmt: skip  # noqa: E501
    sys.path[:0] = [os.getcwd(), str(HERE), str(HERE.parents[1])]
    import webui
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    webui.initialize.initialize()
    app = FastAPI()
    webui.create_api(app)
    from modules import script_callbacks

    script_callbacks.before_ui_callback()
    return TestClient(app, raise_server_exceptions=False)


def draw(guard=None, path="txt2img", **more):
    """(pictures, their infotexts, their reports); `guard`: the extension's settings, None: not asked."""
    ask = {"prompt": KEY, "seed": 50, "steps": 10, "width": 128, "height": 128, "cfg_scale": 4}
    ask |= {"sampler_name": "Euler", "save_images": False, "do_not_save_grid": True} | more
    if guard is not None:
        guard = {"enabled": True, "index": "demo"} | guard if isinstance(guard, dict) else guard
        args = [guard] if isinstance(guard, dict) else guard
        ask["alwayson_scripts"] = {"anti-memorization guidance": {"args": args}}
    answer = client.post("/sdapi/v1/" + path, json=ask)
    written = answer.json()
    if answer.status_code != 200:
        raise RuntimeError(written["errors"])
    from PIL import Image

    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in written["images"]]
    reports = [json.loads(p.info.get("amg_report", "{}")).get("webui") for p in pictures]
    return [p.tobytes() for p in pictures], json.loads(written["info"])["infotexts"], reports


def coded(name: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(HERE.parents[1] / "amg_demo" / "pictures" / name).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def check_off_is_the_host_alone():
    from modules import processing, scripts

    asks = [{}, {"sampler_name": "DDIM"}, HIRES, {"batch_size": 2, "n_iter": 2}]
    before = [draw(**ask)[0] for ask in asks]
    assert before == [draw({"enabled": False}, **ask)[0] for ask in asks]
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=processing.shared.sd_model, prompt=KEY, seed=50, steps=10, width=128, height=128,
        cfg_scale=4, sampler_name="Euler", do_not_save_samples=True, do_not_save_grid=True,
    )  # fmt: skip
    assert p.scripts is None and scripts.scripts_txt2img.alwayson_scripts
    assert processing.process_images(p).images[0].tobytes() == before[0][0]


def check_a_copy_is_called_one_and_the_guard_prevents_it():
    plain, _, _ = draw()
    watched, (text,), (report,) = draw(OFF | {"report_in_picture": "full"})
    assert watched == plain and "AMG verdict: copy" in text
    assert report["verdicts"][0]["source"] == "memorised-000.webp"
    guarded, (text,), (report,) = draw({})
    assert guarded != plain and "AMG verdict: no copy" in text and "AMG index hash" in text
    assert guarded == draw([True, "main", 1.0, 1.0, 1.0, "demo"])[0]


def check_samplers():
    for sampler in ("Euler a", "DPM++ 2M", "DPM++ SDE", "Heun", "DDIM", "PLMS", "UniPC"):
        _, (text,), (report,) = draw({}, sampler_name=sampler, steps=20)
        assert any(any(step["active"]) for step in report["steps"]), sampler
        assert "AMG verdict: no copy" in text, sampler


def check_a_batch_is_its_pictures():
    """As near as the host's own kernels allow: a batch of two is not computed as one is."""
    both = draw({}, batch_size=2)[0]
    alone = draw({}, seed=51)[0]
    off = [abs(a - b) for a, b in zip(both[1], alone[0], strict=True)]
    assert sum(off) / len(off) < 2


def check_noise_or_velocity_is_one():
    """The same model as one that predicts ε, loaded in its place: the same guarded picture."""
    (v,), _, _ = draw({})
    noise = {"override_settings": {"sd_model_checkpoint": "demo-noise"}}
    (e,), (text,), _ = draw({}, **noise)
    assert "Model: demo-noise" in text
    assert sum(abs(a - b) for a, b in zip(v, e, strict=True)) / len(v) < 2


def check_img2img_and_inpainting():
    from PIL import Image

    given = {"path": "img2img", "init_images": [coded("memorised-000.webp")]}
    plain, _, _ = draw(**given, denoising_strength=0.75)
    guarded, (text,), _ = draw({}, **given, denoising_strength=0.75)
    assert plain != guarded and "AMG verdict: no copy" in text
    mask, buffer = Image.new("L", (128, 128), 255), io.BytesIO()
    mask.paste(0, (112, 0, 128, 128))
    mask.save(buffer, "PNG")
    given |= {"mask": base64.b64encode(buffer.getvalue()).decode(), "mask_blur": 0}
    for sampler in ("Euler", "DDIM"):
        more = given | {"inpainting_fill": 1, "denoising_strength": 0.9, "sampler_name": sampler}
        (plain,), _, _ = draw(**more)
        (guarded,), _, (report,) = draw({}, **more)
        a, b = (Image.frombytes("RGB", (128, 128), each) for each in (plain, guarded))
        kept, changed = (112, 0, 128, 128), (0, 0, 112, 128)
        assert a.crop(kept).tobytes() == b.crop(kept).tobytes(), sampler
        assert a.crop(changed).tobytes() != b.crop(changed).tobytes(), sampler
        assert any(any(step["active"]) for step in report["steps"])


def again():
    """What can be drawn again, and by which request."""
    switch = {"refiner_checkpoint": "demo-noise", "refiner_switch_at": 0.5}
    given = {"path": "img2img", "init_images": [coded("memorised-000.webp")]}
    return {
        "plain": {}, "ancestral": {"sampler_name": "Euler a"}, "refiner": switch, "hires": HIRES,
        "hires in latents": HIRES | {"hr_upscaler": "Latent"},
        "hires with another checkpoint": HIRES | {"hr_checkpoint_name": "demo-noise"},
        "hires with the refiner": HIRES | switch,
        "img2img": given | {"denoising_strength": 0.5},
        "img2img with the refiner": given | switch | {"denoising_strength": 0.9},
    }  # fmt: skip


def check_a_second_drawing_is_the_first():
    """With nothing escalated and no suspects, what is drawn again is the same to the last bit."""
    import torch

    from amg_core import retry
    from amg_core.run import SamplingRun
    from amg_core.similarity.verdict import Verdict
    from amg_webui.shared import Guard

    drawn, real, drawing = [], SamplingRun.__init__, Guard.draw_once

    def kept(self, draw, *more):
        samples = drawing(self, draw, *more)
        drawn.append(torch.stack(list(samples)).clone())
        return samples

    def always(self, pictures, named):
        return [Verdict(0, 0, 1, 1, 0, 0, "", "", "copy", ("first", "second")) for _ in pictures]

    with (
        replaced(retry, "escalated", lambda settings, number: settings),
        replaced(
            SamplingRun,
            "__init__",
            lambda self, matcher, settings, **_: real(self, matcher, settings),
        ),
        replaced(Guard, "draw_once", kept),
        replaced(Guard, "verdicts", always),
    ):
        for name, ask in again().items():
            drawn.clear()
            draw(WEAK | {"retries": 2}, **ask, batch_size=2)
            assert len(drawn) == 3, name
            assert all(torch.equal(each, drawn[0]) for each in drawn[1:]), name


def check_drawing_again_keeps_what_passed():
    ask = HIRES | {"sampler_name": "DPM2", "batch_size": 2}
    once, texts, _ = draw({}, **ask)
    assert ["verdict: copy" in text for text in texts] == [True, False]
    twice, texts, (first, second) = draw({"retries": 2}, **ask)
    assert once[1] == twice[1] and once[0] != twice[0]
    assert not any("verdict: copy" in text for text in texts)
    assert first["verdicts"][0]["attempt"] > 0 and len(second["attempts"]) == 1


def check_a_grid_is_no_better_than_its_worst_picture():
    ask = HIRES | {"sampler_name": "DPM2", "batch_size": 2, "save_images": True}
    _, texts, _ = draw({}, **ask)
    assert ["verdict: copy" in text for text in texts] == [True, True, False]


def check_checkpoints_in_one_module_are_told_apart():
    """The host loads a checkpoint of the same kind into the module that held another."""
    from modules import sd_models_config

    from amg_webui.shared import Guard

    encoded, text = set(), Guard.text
    config = str(DATA / "models/Stable-diffusion/demo.yaml")

    def kept(self, words):
        found = text(self, words)
        encoded.update(self._texts)
        return found

    with (
        replaced(sd_models_config, "find_checkpoint_config", lambda *_: config),
        replaced(Guard, "text", kept),
    ):
        draw({}, **HIRES | {"hr_checkpoint_name": "demo-too", "denoising_strength": 0.9})
    modules, files = {key[0] for key in encoded}, {Path(key[1]).stem for key in encoded}
    assert len(modules) == 1 and files == {"demo", "demo-too"}, encoded


def check_interrupt_and_skip():
    from modules import shared

    from amg_webui.shared import Guard

    written, count = Guard.tell, []

    def stop(flag, at):
        count.clear()

        def tell(self, run):
            written(self, run)
            count.append(1)
            if len(count) == at:
                setattr(shared.state, flag, True)

        return replaced(Guard, "tell", tell)

    with stop("interrupted", 3):
        pictures, _, _ = draw({}, n_iter=3)
    assert len(pictures) == 1 and len(count) == 3
    once, _, _ = draw({"retries": 0}, sampler_name="DPM2")
    for flag in ("interrupted", "skipped"):
        with stop(flag, 25):  # in the second drawing: the first is what leaves
            pictures, _, (report,) = draw({"retries": 3}, sampler_name="DPM2")
        assert pictures == once and len(report["attempts"]) == 1 and len(count) == 25, flag


def check_what_cannot_be_guarded_is_not_drawn():
    for guard, words in (({"index": "gone"}, "no index named 'gone'"), ({"preset": "odd"}, "odd")):
        try:
            draw(guard)
        except RuntimeError as error:
            assert words in str(error)
        else:
            raise AssertionError(words)


def check_the_infotext_restores_the_sliders():
    from modules import infotext_utils, scripts

    chosen = {
        "preset": "strong", "despecification": 0.5, "deduplication": 0.6, "dissimilarity": 1.25,
        "thresholds": "custom", "threshold_start": 0.25, "threshold_end": 0.5,
        "if_still_copied": "blank", "retries": 1,
    }  # fmt: skip
    _, (text,), _ = draw(chosen)
    written = infotext_utils.parse_generation_parameters(text)
    (script,) = [
        each
        for each in scripts.scripts_txt2img.alwayson_scripts
        if each.title().startswith("Anti-M")
    ]
    values = [
        key(written) if callable(key) else type(component.value)(written[key])
        for component, key in script.infotext_fields
    ]
    assert draw(values)[1] == [text]


def check_axes_of_the_xyz_plot():
    from modules import scripts

    (grid,) = [d.module for d in scripts.scripts_data if d.script_class.__module__ == "xyz_grid.py"]
    names = [o.label for o in grid.axis_options if type(o) is grid.AxisOption or not o.is_img2img]
    assert sum(name.startswith("[AMG]") for name in names) == 7
    x, y = names.index("[AMG] Preset"), names.index("[AMG] Threshold start")
    args = [x, "", ["main", "paper"], y, "0.1, 0.9", "", 0, "", "", True, True, False]
    args += [False, False, False, False, 0, False]
    _, texts, _ = draw({}, script_name="x/y/z plot", script_args=args)
    wanted = [(p, t) for t in ("0.1", "0.9") for p in ("main", "paper")]
    found = [text for text in texts if "AMG threshold start" in text][-4:]
    for (preset, start), text in zip(wanted, found, strict=True):
        assert f"AMG preset: {preset}" in text and f"AMG threshold start: {start}" in text


if __name__ == "__main__":
    client = start()
    for name, check in [each for each in globals().items() if each[0].startswith("check_")]:
        try:
            check()
            written = "passed"
        except Exception:
            written = traceback.format_exc()
        print("\n" + json.dumps({"check": name, "written": written}), flush=True)
