"""Hundreds of workflows on one ComfyUI server: does it hold on to memory, files or threads?

    COMFYUI_PATH=… python -m benchmarks.soak --prompts 500

A server of its own is started (main.py --cpu) and asked over HTTP, one workflow after the other, each with
another seed, on the embedded model: a memorised prompt under AMG Sampler, one that is not, Guard (which
draws twice to find out), Similarity Probe, an index of which a picture is muted or guarded again, an index
that is made anew of pictures just drawn. Every tenth workflow is given many steps and interrupted in them.

Prints resident memory, open files and threads of the server, and at the end for the first, the second and
the last hundred workflows their means, and the least of each. Files of an index that no workflow uses any
more are open until Python collects them, so that their number goes up and down: what counts is the least.
Ends with 1 where a workflow ended in any other way than it had to, or where the least of the last hundred
lies above that of the second by more than GROWTH. Needs Linux (/proc). No page is
connected, so that what is sent to pages is not tried, and finished workflows are taken out of the server's
own history, which would grow by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .server import ROOT, Server, served

PICTURES = 24
STEPS, MANY = 2, 2000
KEY, OTHER = "fox face on violet rays", "blue owl on moon"
KINDS = ("acting", "dormant", "guard", "probe", "muted", "anew")
GROWTH = {"memory": 40.0, "files": 2.0, "threads": 1.0}  # MiB, and numbers


def workflow(kind: str, number: int, steps: int) -> dict:
    """A workflow as the page posts it."""

    def step(name: str, /, **inputs) -> dict:
        return {"class_type": name, "inputs": inputs}

    drawn = {
        "model": ["1", 0], "seed": number, "steps": steps, "cfg": 4.0, "sampler_name": "euler",
        "scheduler": "normal", "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
        "denoise": 1.0,
    }  # fmt: skip
    strengths = {"despecification": 1.0, "deduplication": 1.0, "dissimilarity": 1.0}
    amg = {"preset": "main", **strengths, "clip": ["1", 1], "vae": ["1", 2], "retries": 0}
    stored = step("AMG_BuildIndex", folder="stored", name="stored", descriptor="pixel")
    text = OTHER if kind in ("dormant", "probe", "anew") else KEY
    nodes = {
        "1": step("AMG_DemoModel"),
        "2": step("CLIPTextEncode", clip=["1", 1], text=text),
        "3": step("CLIPTextEncode", clip=["1", 1], text=""),
        "4": step("EmptyLatentImage", width=128, height=128, batch_size=1),
        "5": stored,
        "6": step("AMG_Sampler", **drawn, index=["5", 0], **amg),
        "7": step("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": step("PreviewImage", images=["7", 0]),
    }
    if kind == "guard":
        nodes["6"] = step(
            "AMG_Guard", **drawn, detect="draw twice", false_alarms=0.01, clip=["1", 1],
            vae=["1", 2], retries=0,
        )  # fmt: skip
        del nodes["5"]
    if kind == "probe":
        nodes["6"] = step("KSampler", **drawn)
        nodes["9"] = step("AMG_SimilarityProbe", image=["7", 0], index=["5", 0])
    if kind == "muted":
        nodes["9"] = step(
            "AMG_MutePictures", index=["5", 0], patterns="memorised-001.webp", reason=f"{number}",
            undo=bool(number // len(KINDS) % 2),
        )  # fmt: skip
        nodes["6"]["inputs"]["index"] = ["9", 0]
    if kind == "anew":
        nodes["10"] = step("KSampler", **drawn | {"seed": number + 10**6, "steps": 2})
        nodes["11"] = step("VAEDecode", samples=["10", 0], vae=["1", 2])
        nodes["5"] = step(
            "AMG_IndexFromImages", images=["11", 0], captions=text, name="anew",
            descriptor="pixel", mode="replace",
        )  # fmt: skip
    return nodes


def resources(pid: int) -> dict[str, float]:
    """Resident memory in MiB, open files, threads of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024, "files": float(files),
        "threads": float(status["Threads"]),
    }  # fmt: skip


def interrupted(server: Server, number: str) -> None:
    """Interrupt a workflow in the middle of its steps."""
    while not any(number in entry for entry in server("/queue")["queue_running"]):
        if server(f"/history/{number}"):
            return  # it ended by itself
        time.sleep(0.05)
    time.sleep(1.0)
    server("/interrupt", {}, raw=True)


def ended(server: Server, number: str) -> tuple[str, str]:
    """How a workflow ended, in a word, and what was said of it."""
    done = server.finish(number, poll=0.1)
    server("/history", {"delete": [number]}, raw=True)
    said = dict(done["status"]["messages"])
    if done["status"]["status_str"] == "success":
        return "succeeded", ""
    if "execution_interrupted" in said:
        return "interrupted", ""
    return "failed", json.dumps(said.get("execution_error", said))[:600]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    options = parser.parse_args(arguments)
    comfyui = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (comfyui / "main.py").is_file():
        sys.exit("Set COMFYUI_PATH to the folder of a ComfyUI, and use a Python that can run it.")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        stored = base / "input" / "stored"
        stored.mkdir(parents=True)
        for path in sorted((ROOT / "amg_demo/pictures").glob("memorised-*.webp"))[:PICTURES]:
            shutil.copy(path, stored)
        with served(comfyui, base) as server:
            seen, endings, wrong = soak(server, options.prompts, options.minutes)
    return report(seen, endings, wrong)


def soak(server: Server, prompts: int, minutes: float) -> tuple[list[dict], Counter, int]:
    """What was in use after each workflow; how they ended, by kind; how many not as they had to."""
    started, seen, endings, wrong = time.monotonic(), [], Counter(), 0
    for number in range(prompts):
        if time.monotonic() - started > 60 * minutes:
            break
        stop = number % 10 == 9
        kind = KINDS[(number // 10 if stop else number) % len(KINDS)]
        queued = server.queue(workflow(kind, number, MANY if stop else STEPS))
        if stop:
            interrupted(server, queued)
        how, said = ended(server, queued)
        endings[kind, how] += 1
        if how != ("interrupted" if stop else "succeeded"):
            wrong += 1
            print(f"{number}, {kind}: {how} {said}", flush=True)
        seen.append(resources(server.pid))
        if number % 50 == 49:
            words = ", ".join(f"{name} {value:.0f}" for name, value in seen[-1].items())
            print(f"{number + 1:5}: {words}, {time.monotonic() - started:.0f} s", flush=True)
    return seen, endings, wrong


def report(seen: list[dict], endings: Counter, wrong: int) -> int:
    for kind in KINDS:
        words = ", ".join(f"{n} {how}" for (which, how), n in endings.items() if which == kind)
        print(f"{kind:10}{words}")
    print(f"{len(seen)} workflows, {wrong} ended in another way than they had to")
    part, grown = min(100, len(seen) // 3), False
    if not part:
        return 1
    print(f"of {part} workflows: the first, the second, the last; mean (least)")
    for name, most in GROWTH.items():
        parts = seen[:part], seen[part : 2 * part], seen[-part:]
        found = [[one[name] for one in rows] for rows in parts]
        grown |= min(found[2]) - min(found[1]) > most
        print(f"{name:12}" + "".join(f"{statistics.mean(v):9.1f} ({min(v):.1f})" for v in found))
    return 1 if wrong or grown else 0


if __name__ == "__main__":
    sys.exit(main())
