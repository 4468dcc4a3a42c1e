"""The wire types of this pack."""

from __future__ import annotations

from inspect import signature

from comfy_api.latest import io

CATEGORY = "AMG"

# Carries a `Matcher` without a decoder: an open index and the descriptor that made it.
MemorizationIndex = io.Custom("MEMORIZATION_INDEX")
# Carries a `hook.Report`, which a sampling run fills.
ReportHandle = io.Custom("AMG_REPORT")
# What a sampler or a decoder made, passed through. The host accepts it where either is wanted.
Drawn = io.Custom("LATENT,IMAGE")
# Carries a `Verdict` of amg_core.detection.calibration on a prompt.
PromptVerdict = io.Custom("PROMPT_VERDICT")

# For an input that is hidden until it is asked for, where the host's schema has a word for that.
ADVANCED = {"advanced": True} if "advanced" in signature(io.Float.Input).parameters else {}
