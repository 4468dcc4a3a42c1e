"""The demo's LoRA in the host's own list and loader."""

from __future__ import annotations

import logging

import pytest
import torch

NAME = "amg-demo-lora.safetensors"


@pytest.fixture(scope="module")
def listed(amg):
    import folder_paths

    amg.paths.register()  # again: nothing is there twice
    return folder_paths.get_filename_list("loras"), folder_paths.get_folder_paths("loras")


def test_one_file_joins_the_list_and_the_users_folder_stays_first(listed):
    names, folders = listed
    ours = [folder for folder in folders if folder.endswith("lora") and "amg_demo" in folder]
    assert len(ours) == 1 and folders.index(ours[0]) == len(folders) - 1 > 0
    assert [name for name in names if "amg" in name] == [NAME]


def test_the_hosts_loader_understands_every_key(amg, demo, listed, caplog):
    """And makes the very weights that the training program means."""
    import comfy.model_management

    import nodes

    def weights(model) -> dict:
        comfy.model_management.load_models_gpu([model])
        state = model.model.diffusion_model.state_dict()
        return {key: value.cpu().clone() for key, value in state.items()}

    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        weights(demo["model"])  # as after a run without the LoRA
        model, _ = nodes.LoraLoader().load_lora(demo["model"], demo["clip"], NAME, 1.0, 1.0)
        got, clean = weights(model), weights(demo["model"])
    assert "not loaded" not in caplog.text
    adapter = amg.module("amg_demo.adapter")
    unet = adapter.with_lora().unet
    plain = amg.module("amg_demo.model").load().unet.state_dict()
    changed = 0
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-5)
        changed += not torch.equal(value, plain[key])
    assert changed == len(adapter.layers(unet))
    assert all(torch.equal(clean[key], value) for key, value in plain.items())


def test_the_demo_names_the_folder_of_its_pictures(amg, demo, run_node):
    matcher, summary = run_node(
        "AMG_BuildIndex", folder=demo["lora_pictures"], name="of the lora", descriptor="pixel"
    )
    assert summary.startswith("8 pictures")
    index = matcher.searcher.index
    assert sorted(index.caption(i) for i in range(8))[0] == "fox face at midnight"
