"""The small server says what a real one would: asked where there is a real one."""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.web.conftest import COMFYUI, missing


@pytest.mark.skipif(not COMFYUI, reason="needs ComfyUI: set COMFYUI_PATH to its folder")
@pytest.mark.skipif(bool(missing("aiohttp")), reason=missing("aiohttp"))
def test_it_gives_the_schema_of_the_real_one(real, info):
    with urllib.request.urlopen(f"{real.url}/object_info", timeout=600) as answer:
        found = json.load(answer)
    ours = [name for name in info if name.startswith("AMG_")]
    assert ours
    for name in ours:
        assert comparable(found[name]) == comparable(info[name]), name


def comparable(node: dict) -> dict:
    """Without what depends on the machine and on the version of the host."""
    keys = ("output", "output_is_list", "output_name", "output_tooltips", "name",
            "display_name", "description", "category", "output_node")  # fmt: skip
    report = {key: node[key] for key in keys}
    report["order"] = [node["input_order"].get(part, []) for part in ("required", "optional")]
    report["input"] = {}
    for part in ("required", "optional"):
        for slot, (kind, options) in node["input"].get(part, {}).items():
            kept = {k: v for k, v in options.items() if k not in ("advanced", "multiline")}
            if slot in ("index_name", "sampler_name", "scheduler"):
                kept.pop("options")
            report["input"][slot] = (kind, kept)
    return report
