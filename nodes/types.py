"""The wire types of this pack."""

from __future__ import annotations

import json
from functools import cache
from inspect import signature
from pathlib import Path

from comfy_api.latest import io

CATEGORY = "AMG"
# The parts of the category, in the order in which an artist comes to need them.
START, INDEX, CHECK, PROMPT, EXPERT = ("start here", "index", "check", "prompt", "advanced")
# What people may search for to find a node of each part. The page adds the words of other languages, and
# these where the host's schema has no place for them.
WORDS = Path(__file__).parents[1] / "locales/en/main.json"

# Carries a `Matcher` without a decoder: an open index and its descriptor.
MemorizationIndex = io.Custom("MEMORIZATION_INDEX")
# Carries a `hook.Report`, which a sampling run fills.
ReportHandle = io.Custom("AMG_REPORT")
# The output of a sampler or a decoder, passed through. The host accepts it for either type.
Drawn = io.Custom("LATENT,IMAGE")
# Carries a `Verdict` of amg_core.detection.calibration on a prompt.
PromptVerdict = io.Custom("PROMPT_VERDICT")

# For inputs among the advanced ones, if the host's schema supports that.
ADVANCED = {"advanced": True} if "advanced" in signature(io.Float.Input).parameters else {}


def place(part: str) -> dict:
    """Arguments of a schema: the category of a node of that part, and words by which it is found."""
    found: dict = {"category": f"{CATEGORY}/{part}"}
    if "search_aliases" in signature(io.Schema).parameters:
        found["search_aliases"] = _words()[part].split(", ")
    return found


@cache
def _words() -> dict[str, str]:
    """The words of each part, in English."""
    return json.loads(WORDS.read_text(encoding="utf-8"))["amg_search"]
