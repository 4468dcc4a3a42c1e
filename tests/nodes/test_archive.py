"""What is published: the files of the archive, and what the registry reads of pyproject.toml."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = (
    r"(?:(==|>=|<=|!=|~=|>|<|<>|=)\s*)?\d+\.\d+\.\d+(?:-[a-zA-Z0-9]+)?"  # as comfy-cli reads it
)
FRONT_END = "comfyui-frontend-package"
TOP = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md",
    "__init__.py", "amg_core", "amg_demo", "amg_diffusers", "amg_webui", "docs", "example_workflows",
    "index_tools", "install.py", "locales", "nodes", "pyproject.toml", "requirements.txt", "run.py",
    "scripts", "setup.py", "subgraphs", "training", "web", ".comfyignore", ".gitignore",
}  # fmt: skip
# comfy-cli names the patterns so; newer pathspec would have another name.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
MOST = 32 * 1024 * 1024  # bytes of all files


@pytest.fixture(scope="module")
def archived() -> list[str]:
    """The files of `comfy node pack`: those that git tracks, less the patterns of .comfyignore."""
    pathspec = pytest.importorskip("pathspec")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    lines = (ROOT / ".comfyignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", patterns)
    return [name for name in listed.stdout.splitlines() if not ignored.match_file(name)]


def test_only_what_an_artist_needs(archived):
    assert {name.split("/")[0] for name in archived} == TOP
    assert sum((ROOT / name).stat().st_size for name in archived) < MOST


@pytest.mark.parametrize(
    "name",
    [
        "amg_core/descriptors/compact.safetensors",
        "amg_core/messages.json",
        "example_workflows/amg_first_look.json",
        "example_workflows/amg_first_look.jpg",
        "example_workflows/amg_app.app.json",
        "index_tools/page.html",
        "locales/de/nodeDefs.json",
        "nodes/ordinary_prompts.txt",
        "web/amg.css",
        "web/docs/AMG_Sampler.md",
        "web/docs/AMG_Sampler.webp",
    ],
)
def test_what_is_read_at_run_time_is_in_it(archived, name):
    assert name in archived


def test_no_module_that_is_left_out_is_imported(archived):
    """tests, benchmarks and the tool for translations stay at home."""
    gone = re.compile(r"^\s*(?:from|import) (tests|benchmarks|locales_tool)\b", re.M)
    shipped = ("amg_core", "amg_diffusers", "amg_webui", "index_tools", "nodes", "scripts", "web")
    for name in archived:
        if name.endswith(".py") and name.startswith(shipped):
            assert not gone.search((ROOT / name).read_text(encoding="utf-8")), name


def project() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_registry_reads_which_hosts_it_is_for():
    """comfy-cli takes the front end from [project].dependencies, and the rest as what is installed."""
    read = project()
    (front_end,) = read["project"]["dependencies"]
    assert front_end.startswith(FRONT_END)
    for part in front_end.removeprefix(FRONT_END).split(","):
        assert re.fullmatch(VERSION, part.strip())
    assert re.fullmatch(VERSION, read["tool"]["comfy"]["requires-comfyui"])


def test_pip_installs_no_front_end(tmp_path):
    """For the command line and diffusers; setup.py leaves it out."""
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "amg_core").mkdir()
    (tmp_path / "amg_core/__init__.py").touch()
    build = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.dist-info/METADATA")
    needs = re.findall(r"^Requires-Dist: (.*)$", file.read_text(), re.M)
    assert any("diffusers" in each for each in needs)
    assert not [each for each in needs if "extra ==" not in each]
    assert FRONT_END not in file.read_text().split("\n\n")[0]


# ---------------------------------------------------------------- fingerprints


ALWAYS = "AMG_CheckFolder"  # runs each time: files may have changed


def with_fingerprint(pack) -> dict:
    return {name: node for name, node in pack.nodes.items() if "fingerprint_inputs" in vars(node)}


def test_a_fingerprint_bears_what_is_not_known_yet(pack):
    """The host asks before the graph runs. What comes over a wire is None then."""
    found = with_fingerprint(pack)
    assert set(found) == {"AMG_LoadIndex", "AMG_BuildIndex", "AMG_PromptProbe", ALWAYS}
    del found[ALWAYS]
    for node in found.values():
        inputs = {slot.id: None for slot in node.define_schema().inputs}
        names = node.fingerprint_inputs.__func__.__code__.co_varnames
        taken = inputs if "_" in names else {name: inputs[name] for name in inputs if name in names}
        first = node.fingerprint_inputs(**taken)
        assert isinstance(first, str) and first == node.fingerprint_inputs(**taken)
        json.dumps(first)


def test_a_fingerprint_takes_every_input(pack):
    """The other half: all that a node has, as values or over wires, in any mixture."""
    for node in with_fingerprint(pack).values():
        given = {slot.id: "/nowhere" for slot in node.define_schema().inputs}
        for missing in [None, *given]:
            node.fingerprint_inputs(**(given | ({missing: None} if missing else {})))
