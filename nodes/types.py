"""The wire types of this pack."""

from __future__ import annotations

from inspect import signature

from comfy_api.latest import io

CATEGORY = "AMG"

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
