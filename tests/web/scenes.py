"""What is on the pictures that tests/web/pictures draws: each node in a state that teaches, and views."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HELP = ROOT / "web/docs"
REFERENCES = HERE / "references"


@dataclass(frozen=True)
class Neighbour:
    """A node, drawn folded: its type, its title, and (output, input) of every wire to the one shown."""

    kind: str
    title: str
    slots: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scene:
    """One node, what it is wired to, and what the server has told about it.

    kind : the node's type. before, after : neighbours to its left and to its right.
    widgets : values that are not the defaults. text : the result of a node whose result is text.
    report : (type, data) of the server's messages; they get the node's id.
    picture : the file; or a folder, where it is called as the node is.
    """

    kind: str
    before: tuple[Neighbour, ...] = ()
    after: tuple[Neighbour, ...] = ()
    widgets: dict = field(default_factory=dict)
    text: str = ""
    report: tuple = ()
    width: int = 270
    room: int = 0  # height that is added for what the host shows on the node
    inside: bool = False  # of a subgraph, and that is shown
    search: str = ""  # not the node, but the window onto an index, searched for this
    mode: str = "classic"
    palette: str = "dark"
    picture: Path = HELP

    @property
    def path(self) -> Path:
        return self.picture if self.picture.suffix else self.picture / f"{self.kind}.webp"


def wire(kind: str, title: str, *slots: str) -> Neighbour:
    """slots : "output > input". A folded node shows 20 characters of its title."""
    return Neighbour(kind, title, tuple(tuple(each.split(" > ")) for each in slots))


def report(name: str) -> tuple:
    """A run that was recorded: of the node in pictures.json, or "events": the one in events.json."""
    if name == "events":
        every = json.loads((HERE / "events.json").read_text())
        return tuple((kind, data) for kind, data in every if kind == "amg.step")
    return tuple(map(tuple, json.loads((HERE / "pictures.json").read_text())[name]))


def fixed(**widgets) -> dict:
    return {"seed": 7, "control_after_generate": "fixed", **widgets}


DRAWING = {"steps": 20, "cfg": 4.0, "denoise": 1.0}
LOAD = "AMG_LoadIndex"

ORDINARY = json.loads((ROOT / "example_workflows/api/amg_prompt_probe.api.json").read_text())
ORDINARY = ORDINARY["8"]["inputs"]["prompts"]

# Narrow: the help panel is, at first, 220 to 290 pixels wide. So wires are drawn only where they teach.
NODES = [
    Scene("AMG_LoadIndex"),
    Scene("AMG_Sampler", widgets=fixed(**DRAWING), report=report("events")),
    Scene("AMG_Apply", report=report("AMG_Apply")),
    Scene("AMG_SimilarityProbe", report=report("AMG_SimilarityProbe"), width=330),
    Scene("AMG_SaveImage", before=(wire(LOAD, "Load Index", "index > index"),)),
    Scene(
        "AMG_CheckFolder",
        widgets={"folder": "deliveries"},
        before=(wire(LOAD, "Load Index", "index > index"),),
        text="12 pictures have a record: 1 copy (yes), 1 unsure, 10 no copies (no)",
    ),
    Scene("AMG_BuildIndex", widgets={"folder": "my-pictures"}),
    Scene(
        "AMG_IndexFromImages",
        widgets={"captions": "a red fox under northern lights", "name": "my-pictures"},
    ),
    Scene(
        "AMG_CombineIndexes",
        before=(
            wire(LOAD, "Load: archive", "index > index_1"),
            wire(LOAD, "Load: my LoRA", "index > index_2"),
            wire(LOAD, "Load: last week", "index > index_3"),
        ),
        width=190,
    ),
    Scene(
        "AMG_MutePictures", widgets={"patterns": "mine/*.png\nlogo.webp", "reason": "my own work"}
    ),
    Scene(
        "AMG_DemoModel",
        after=(
            wire("KSampler", "KSampler", "MODEL > model"),
            wire("CLIPTextEncode", "CLIP Text Encode", "CLIP > clip"),
            wire("VAEDecode", "VAE Decode", "VAE > vae"),
            wire("AMG_BuildIndex", "Build Index", "pictures > folder"),
        ),
        width=190,
    ),
    Scene(
        "AMG_Report",
        before=(
            wire("AMG_Apply", "Apply AMG", "run > run"),
            wire("KSampler", "KSampler", "LATENT > after"),
        ),
        width=160,
    ),
    Scene(
        "AMG_PromptProbe",
        width=330,
        widgets={"text": "fox face on violet rays", "false_alarms": 0.05},
        text="suspicious: this prompt probably draws a training picture · combined 6.7 · "
        "fewer than one in 240 ordinary prompts scores as high · "
        "trigger words: “violet” (−9.2), “fox” (−7.7), “rays” (−4.3)",
    ),
    Scene(
        "AMG_CalibratePromptProbe",
        widgets={"prompts": ORDINARY},
        text="calibrated on 24 ordinary prompts · 4 noises each · latents 4x16x16",
    ),
    Scene(
        "AMG_RandomisePrompt",
        widgets=fixed(text="a red fox under northern lights", settings="code"),
        text="a red fox clouds under red northern lights pig crown",
    ),
    Scene("AMG_PromptNoise", widgets=fixed()),
    Scene(
        "AMG_AdaptPrompt",
        widgets=fixed(target=1.3),
        text="picture 1: score 2.34 → 1.21 in 10 steps\nmemory: 2.0 MiB of 14.79 GiB allowed",
    ),
    Scene("AMG_PaddingFix", widgets=fixed(text="a red fox under northern lights")),
    Scene("AMG_DelayedGuidance"),
    Scene(
        "AMG_Guard",
        widgets=fixed(**DRAWING, false_alarms=0.05),
        report=report("AMG_Guard"),
        room=60,
    ),
    Scene(
        "AMG_StrengthGrid",
        widgets=fixed(**DRAWING, threshold_scales="1, 1.6"),
        text="2 of 8 pictures are copies",
    ),
]
VIEWS = [
    Scene(
        "AMG_Sampler", widgets=fixed(**DRAWING), report=report("events"),
        palette="light", picture=REFERENCES / "sampler_light.webp",
    ),
    Scene(
        "AMG_Sampler", widgets=fixed(**DRAWING), report=report("events"),
        mode="vue", picture=REFERENCES / "sampler_vue.webp",
    ),
    Scene(
        "AMG_SimilarityProbe", report=report("AMG_SimilarityProbe"), width=330,
        mode="vue", picture=REFERENCES / "probe_vue.webp",
    ),
    Scene(
        "AMG_Sampler",
        before=(
            wire("CheckpointLoaderSimple", "Load Checkpoint", "MODEL > model"),
            wire(LOAD, "Load Index", "index > index"),
        ),
        after=(wire("VAEDecode", "VAE Decode", "LATENT > samples"),),
        widgets=fixed(**DRAWING), report=report("events"),
        inside=True, picture=REFERENCES / "sampler_subgraph.webp",
    ),
    Scene("AMG_LoadIndex", search="fox violet", picture=REFERENCES / "browser.webp"),
]  # fmt: skip
