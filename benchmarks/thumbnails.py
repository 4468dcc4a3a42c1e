"""Draws the thumbnails of the template browser: what each template draws without and with the guard.

    COMFYUI_PATH=… python -m benchmarks.thumbnails

Runs the templates in a real ComfyUI, with the Python that runs it, and writes the pictures,
400 pixels wide, into example_workflows. amg_sd15 needs a model that is not there: its thumbnail
shows another prompt of the demo model.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import urllib.parse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.server import ROOT, Server, served

FOLDER = ROOT / "example_workflows"
WIDTH, GAP, LABEL = 400, 4, 26  # pixels
GROUND, INK = "#202124", "#e8e8e8"
OFF, ON = "without the guard", "with the guard"
FROG = "frog face on yellow checks"
# name: [(label, id of the node that shows the picture)], drawn side by side
SHOWN = {
    "amg_first_look": [(OFF, "10"), (ON, "16")],
    "amg_lora": [(OFF, "12"), (ON, "18")],
    "amg_off_on": [
        ("memorised, off", "10"),
        ("memorised, on", "13"),
        ("ordinary, off", "16"),
        ("ordinary, on", "19"),
    ],
    "amg_strength_grid": [("several strengths", "7")],
}
APP = "amg_app.app"


def prompt(name: str, text: str = "") -> dict:
    """The template as it is queued; `text` in place of the prompts that it has."""
    found = json.loads((FOLDER / f"api/{name}.api.json").read_text())
    for node in found.values():
        if text and node["inputs"].get("text"):
            node["inputs"]["text"] = text
    return found


def pictures(server: Server, queued: dict) -> dict[str, Image.Image]:
    """The first picture that each node shows after a run, by the node's id."""
    entry = server.finish(server.queue(queued))
    assert entry["status"]["status_str"] == "success", entry["status"]
    first = {i: out["images"][0] for i, out in entry["outputs"].items() if out.get("images")}
    return {
        i: Image.open(io.BytesIO(server(f"/view?{urllib.parse.urlencode(each)}", raw=True))).convert("RGB")
        for i, each in first.items()
    }  # fmt: skip


def stacked(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """At most two pictures in a row, WIDTH pixels wide."""
    rows = [side_by_side(parts[k : k + 2]) for k in range(0, len(parts), 2)]
    made = Image.new("RGB", (WIDTH, sum(row.height for row in rows)), GROUND)
    for k, row in enumerate(rows):
        made.paste(row, (0, sum(each.height for each in rows[:k])))
    return made


def side_by_side(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of the same height with their labels below, WIDTH pixels wide."""
    each = (WIDTH - GAP * (len(parts) - 1)) // len(parts)
    drawn = [
        part.resize((each, round(part.height * each / part.width)), Image.LANCZOS)
        for _, part in parts
    ]
    made = Image.new("RGB", (WIDTH, max(one.height for one in drawn) + LABEL), GROUND)
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(15)
    for k, ((label, _), one) in enumerate(zip(parts, drawn, strict=True)):
        left = k * (each + GAP)
        made.paste(one, (left, 0))
        pen.text((left + each / 2, one.height + LABEL / 2), label, INK, font, anchor="mm")
    return made


def write(name: str, parts: list[tuple[str, Image.Image]]) -> None:
    stacked(parts).save(FOLDER / f"{name}.jpg", quality=88)
    print(name, flush=True)


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as base,
        served(Path(os.environ["COMFYUI_PATH"]), Path(base)) as server,
    ):
        shown = {}
        for name, parts in SHOWN.items():
            shown[name] = pictures(server, prompt(name))
            write(name, [(label, shown[name][i]) for label, i in parts])
        plain, guarded = (shown["amg_first_look"][i] for i in ("10", "16"))
        frog = pictures(server, prompt("amg_first_look", FROG))
        write("amg_sd15", [(OFF, frog["10"]), (ON, frog["16"])])
        for name, node in (("amg_custom_sampler", "15"), ("amg_prompt_probe", "13")):
            write(name, [(OFF, plain), (ON, pictures(server, prompt(name))[node])])
        if (FOLDER / f"api/{APP}.api.json").is_file():
            write(APP, [(OFF, plain), (ON, guarded)])
        asked = prompt("amg_probe_picture")
        (loader,) = (n for n in asked.values() if n["class_type"] == "LoadImage")
        (server.base / "input").mkdir(exist_ok=True)
        plain.save(server.base / "input" / loader["inputs"]["image"])
        stored = Image.open(ROOT / "amg_demo/pictures/memorised-000.webp").convert("RGB")
        write("amg_probe_picture", [("your picture", plain), ("the nearest one", stored)])


if __name__ == "__main__":
    main()
