"""Automatic1111 as a whole, without its page: WEBUI_PATH, and WEBUI_PYTHON, the Python it runs by."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import checkpoint
import pytest

from amg_core.descriptors import create
from amg_core.index import build
from amg_demo.model import PICTURES

INSIDE = Path(__file__).with_name("inside.py")
CHECKS = re.findall(r"^def (check_\w+)", INSIDE.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, str]:
    """What became of each check."""
    path, python = os.environ.get("WEBUI_PATH", ""), os.environ.get("WEBUI_PYTHON", "")
    if not (path and python):
        pytest.skip("needs the real host: set WEBUI_PATH to its folder, WEBUI_PYTHON to its Python")
    data = tmp_path_factory.mktemp("data")
    for name in ("Stable-diffusion", "amg_indexes"):
        (data / "models" / name).mkdir(parents=True)
    for name in ("demo", "demo-too", "demo-noise"):
        checkpoint.write(data / "models" / "Stable-diffusion", name, noise=name == "demo-noise")
    build(PICTURES, data / "models" / "amg_indexes" / "demo", create("pixel"))
    (data / "extensions").mkdir()
    (data / "extensions" / "anti-memorization").symlink_to(INSIDE.parents[2])
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, str(INSIDE), str(data)], cwd=path, capture_output=True, text=True, timeout=540,
        env=os.environ | quiet | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if keep := os.environ.get("WEBUI_LOG"):
        Path(keep).write_text(done.stdout + done.stderr)
    found = {each["check"]: each["written"] for each in map(json.loads, lines)}
    assert found, done.stdout[-2000:] + done.stderr[-6000:]
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_program(report, check):
    assert report.get(check, "the program ended before it") == "passed"
