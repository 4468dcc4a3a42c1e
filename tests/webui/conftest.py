"""The extension on recorded hosts, and on real ones: WEBUI_PATH (Automatic1111), FORGE_PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import webui

PATHS = {"a1111": "WEBUI_PATH", "forge": "FORGE_PATH"}
KINDS = {"a1111": webui.A1111, "forge": webui.Forge}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """The host's folder of models, with an index "demo" of some of the embedded model's pictures."""
    from amg_core.descriptors import create
    from amg_core.index import build
    from tests.index.helpers import demo_pictures

    folder = tmp_path_factory.mktemp("models")
    few = demo_pictures(tmp_path_factory.mktemp("pictures"), 48)
    build(few, folder / "amg_indexes" / "demo", create("pixel"))
    return folder


@pytest.fixture(scope="module", params=["a1111", "forge", "a1111 real", "forge real"])
def host(request, models):
    torch.set_num_threads(1)
    name, _, real = request.param.partition(" ")
    path = os.environ.get(PATHS[name], "")
    if real and not path:
        pytest.skip(f"needs the real host: set {PATHS[name]} to its folder")
    made = KINDS[name](models, Path(path) if real else None)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def calm(request):
    """Every test begins with a host that nobody interrupts."""
    yield
    if "host" in request.fixturenames:
        made = request.getfixturevalue("host")
        made.state.interrupted = made.state.skipped = False
        made.errors.clear()
        made.encoded.clear()
