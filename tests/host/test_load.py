"""ComfyUI's own loader takes the pack, from a folder with dashes, quickly and quietly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SNAPSHOT = json.loads((Path(__file__).parents[1] / "nodes/schema.json").read_text())


def test_loads_and_brings_nothing_heavy(amg):
    assert amg.loaded
    heavy = {"faiss", "transformers", "torchvision"}
    assert not heavy & {name.split(".")[0] for name in amg.imported}
    assert not [name for name in amg.imported if name.endswith("amg_demo.model")]


@pytest.mark.parametrize("node_id", sorted(SNAPSHOT))
def test_schema_in_the_host(amg, describe_schema, node_id):
    schema = amg.nodes[node_id].GET_SCHEMA()
    schema.validate()
    assert describe_schema(schema) == SNAPSHOT[node_id]
    amg.nodes[node_id].INPUT_TYPES()


def test_sampler_has_the_widgets_of_ksampler(amg):
    import nodes

    wanted = list(nodes.KSampler.INPUT_TYPES()["required"])
    ours = amg.nodes["AMG_Sampler"].INPUT_TYPES()["required"]
    assert list(ours)[: len(wanted)] == wanted
    for name, (kind, *options) in nodes.KSampler.INPUT_TYPES()["required"].items():
        for key in ("default", "min", "max", "step", "round", "control_after_generate"):
            if options and key in options[0]:
                assert ours[name][1][key] == options[0][key]
        assert isinstance(kind, list) or ours[name][0] == kind


def test_model_folders(amg):
    import folder_paths

    for name in ("amg_indexes", "amg"):
        (folder,) = folder_paths.get_folder_paths(name)
        assert Path(folder) == Path(folder_paths.models_dir) / name
        assert Path(folder).is_dir()
    assert folder_paths.folder_names_and_paths["amg"][1] >= {".pt", ".safetensors"}
