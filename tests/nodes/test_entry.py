"""Importing the pack: no cost, no side effects, no host needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_only_the_entry_point_is_exported(entry):
    public = {name for name in vars(entry) if not name.startswith("_")}
    assert public == {"WEB_DIRECTORY", "comfy_entrypoint"}
    assert (ROOT / entry.WEB_DIRECTORY).is_dir()


def test_import_alone_loads_nothing():
    """Also where comfy_api is absent: Automatic1111 and test collectors import the folder too."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('a-b', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "before = set(sys.modules)\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_model_folders_are_merged(pack):
    """What extra_model_paths.yaml set up before stays."""
    paths = pack.module("nodes.paths")
    pack.folders["amg"] = (["/elsewhere"], {".bin"})
    paths.register()
    folders, extensions = pack.folders["amg"]
    assert folders[0] == "/elsewhere"
    assert len(folders) == 2
    assert {".bin", ".safetensors", ".pt"} <= extensions


def test_no_index_is_a_sentence_not_a_failure(pack):
    (combo,) = pack.nodes["AMG_LoadIndex"].define_schema().inputs
    assert combo.options == ["(no index yet: use Build Memorization Index)"]
