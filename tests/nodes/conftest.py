"""Just enough of ComfyUI to import the nodes and read their schemas. What they do: tests/host."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).parents[2]
ALIASES = (f"amg-pack-{number}" for number in count())  # dashes, as a host's users have them
MOCKED = (
    "comfy", "comfy.model_management", "comfy.model_sampling", "comfy.utils", "comfy.samplers",
    "comfy.patcher_extension", "comfy.latent_formats", "comfy.model_base", "comfy.model_patcher",
    "comfy.sd", "comfy.supported_models_base",
)  # fmt: skip


class Slot(SimpleNamespace):
    """An input or output as the schema was given it."""

    def __init__(self, io_type, id, **options):
        options.setdefault("optional", False)
        super().__init__(io_type=io_type, id=id, **options)


class Kind:
    """`io.Int` and the like: `.Input` and `.Output` record what they are given."""

    def __init__(self, io_type: str):
        self.io_type = io_type

    def Input(self, id, *, advanced=None, **options):
        return Slot(self.io_type, id, advanced=advanced, **options)

    def Output(self, id, **options):
        return Slot(self.io_type, id, **options)


class FakeIO(ModuleType):
    ComfyNode = type("ComfyNode", (), {"hidden": SimpleNamespace(unique_id="1", prompt=None)})
    Hidden = SimpleNamespace(unique_id="UNIQUE_ID", extra_pnginfo="EXTRA_PNGINFO", prompt="PROMPT")
    NumberDisplay = SimpleNamespace(slider="slider")
    AnyType = Kind("*")

    @staticmethod
    def Custom(io_type):
        return Kind(io_type)

    @staticmethod
    def Schema(**fields):
        return SimpleNamespace(**({"is_output_node": False, "hidden": None} | fields))

    @staticmethod
    def NodeOutput(*args, ui=None):
        return SimpleNamespace(args=args, ui=ui)

    def __getattr__(self, name):
        return Kind(name.upper())


def fakes(models_dir: str) -> dict[str, ModuleType]:
    """Stand-ins for the host's modules, by name."""
    made: dict = {name: MagicMock() for name in MOCKED}
    made["comfy"].samplers = made["comfy.samplers"]
    made["comfy.samplers"].KSampler.SAMPLERS = ["euler"]
    made["comfy.samplers"].KSampler.SCHEDULERS = ["normal"]
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ui = FakeIO("io"), MagicMock()
    latest.ComfyExtension = type("ComfyExtension", (), {})
    paths = ModuleType("folder_paths")
    paths.models_dir, paths.folder_names_and_paths = models_dir, {}

    def add(name: str, path: str) -> None:
        paths.folder_names_and_paths.setdefault(name, ([], set()))[0].append(path)

    paths.add_model_folder_path = add
    paths.get_input_directory = lambda: os.path.join(models_dir, "input")
    paths.get_filename_list = lambda name: []
    paths.get_folder_paths = lambda name: paths.folder_names_and_paths[name][0]
    return made | {
        "comfy_api": ModuleType("comfy_api"),
        "comfy_api.latest": latest,
        "folder_paths": paths,
    }


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The nodes on a stand-in for the host, whose folder of models no other file of tests sees."""
    with loaded_pack(tmp_path_factory.mktemp("models")) as made:
        yield made


@contextmanager
def loaded_pack(models: Path) -> Iterator[SimpleNamespace]:
    """`nodes`: id -> node class; `module(path)`: the pack's modules, imported anew each time."""
    alias, made = next(ALIASES), fakes(str(models))
    absent = object()
    saved = {name: sys.modules.get(name, absent) for name in made}
    sys.modules.update(made)
    try:
        extension = asyncio.run(load_entry(alias).comfy_entrypoint())
        nodes = asyncio.run(extension.get_node_list())
    finally:  # a real host may be loaded, for the tests beside these
        for name, module in saved.items():
            if module is absent:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    yield SimpleNamespace(
        nodes={node.define_schema().node_id: node for node in nodes},
        module=lambda path: importlib.import_module(f"{alias}.{path}"),
        folders=made["folder_paths"].folder_names_and_paths,
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == alias]:
        del sys.modules[name]


def load_entry(alias: str) -> ModuleType:
    """The pack's __init__.py as a host loads it: by path, under a name of the host's choice."""
    spec = importlib.util.spec_from_file_location(
        alias, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def entry():
    return load_entry("amg-entry-alone")
