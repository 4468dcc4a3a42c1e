"""Tests inside a real ComfyUI: set COMFYUI_PATH to its folder and use a Python that can run it."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
FOLDER = "anti-memorization-guidance"  # dashes, as users have them
DEMO = ("model", "clip", "vae", "folder", "lora_pictures")


def pytest_collection_modifyitems(items):
    if COMFYUI:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason="needs ComfyUI: set COMFYUI_PATH to its folder")
            )


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return Path(COMFYUI)


@pytest.fixture(scope="session")
def amg(tmp_path_factory, comfyui):
    """The pack, loaded by ComfyUI's own loader from a folder with dashes; its modules by name."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import folder_paths

    import nodes

    base = tmp_path_factory.mktemp("comfy")
    folder_paths.models_dir = str(base / "models")
    empty = ([str(base / "vae_approx")], {".safetensors", ".pth"})
    folder_paths.folder_names_and_paths["vae_approx"] = empty  # whatever the host has there
    link = base / "custom_nodes" / FOLDER
    link.parent.mkdir()
    link.symlink_to(ROOT, target_is_directory=True)
    before = set(sys.modules)
    started = time.process_time()
    loaded = asyncio.run(nodes.load_custom_node(str(link)))
    seconds = time.process_time() - started
    name = str(link).replace(".", "_x_")

    def module(path: str):
        return importlib.import_module(f"{name}.{path}")

    return SimpleNamespace(
        loaded=loaded,
        seconds=seconds,
        imported=set(sys.modules) - before,
        module=module,
        hook=module("nodes.hook"),
        conditioning=module("nodes.conditioning"),
        drawing=module("nodes.drawing"),
        decoding=module("nodes.decoding"),
        paths=module("nodes.paths"),
        AMGError=module("amg_core.errors").AMGError,
        Settings=module("amg_core.run").Settings,
        Schedule=module("amg_core.schedule").Schedule,
        nodes=nodes.NODE_CLASS_MAPPINGS,
    )


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """24 captioned pictures."""
    from tests.index.helpers import demo_pictures

    return demo_pictures(tmp_path_factory.mktemp("pictures"), 24)


@pytest.fixture(scope="session")
def run_node(amg):
    """`run_node(id, **inputs)` executes a node as the host does and returns its outputs."""

    def run(node_id: str, **inputs):
        node = amg.nodes[node_id].PREPARE_CLASS_CLONE({"UNIQUE_ID": "7"})
        with torch.inference_mode():
            return node.EXECUTE_NORMALIZED(**inputs).args

    return run


@pytest.fixture(scope="session")
def demo(amg, run_node):
    """The demo model's "model", "clip", "vae", "folder" of training pictures, "lora_pictures"."""
    return dict(zip(DEMO, run_node("AMG_DemoModel"), strict=True))


@pytest.fixture(scope="session")
def encode(demo):
    """`encode(*texts)`: their CONDITIONING by the demo's CLIP, a text a sample of the batch."""

    def make(*texts: str) -> list:
        clip = demo["clip"]
        with torch.inference_mode():
            conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts]
        return [[torch.cat([cond for cond, _ in conds]), conds[0][1]]]

    return make


@pytest.fixture(scope="session")
def drawing(demo, encode):
    """`drawing(**more)`: inputs of a sampler node that draws a memorised prompt twice."""

    def make(**more) -> dict:
        return {
            "model": demo["model"], "seed": 7, "steps": 3, "cfg": 4.0, "sampler_name": "euler",
            "scheduler": "normal", "positive": encode("fox face on violet rays"),
            "negative": encode(""), "latent_image": {"samples": torch.zeros(2, 4, 16, 16)},
            "denoise": 1.0, "preset": "main", "clip": demo["clip"],
        } | more  # fmt: skip

    return make


@pytest.fixture(scope="session")
def build(run_node):
    """`build(source, name)` -> (MEMORIZATION_INDEX, summary)."""

    def make(source, name: str, descriptor: str = "pixel", **more) -> tuple:
        return run_node(
            "AMG_BuildIndex", folder=str(source), name=name, descriptor=descriptor, **more
        )

    return make


@pytest.fixture(scope="session")
def index(build, pictures):
    """A MEMORIZATION_INDEX of `pictures`."""
    return build(pictures, "few")[0]


@pytest.fixture(scope="session")
def settings(amg):
    """Settings that always act by the paper's terms ("active") or by the early exit ("leaving"),
    never act ("dormant"), or act with strength 0 ("zero")."""

    def make(kind: str):
        level = 2.0 if kind == "dormant" else -10.0  # in likeness
        strength = 0.0 if kind == "zero" else 1.0
        ways = amg.module("amg_core.guidance")
        if kind == "leaving":
            words = ways.PromptReduction(strength, first=1.5), ways.AwayFromCaption(strength, 1.0)
        else:
            words = ways.Despecification(strength, 1.0), ways.Deduplication(strength, 1.0)
        level = amg.Schedule("constant", level, level)
        return amg.Settings(level, (*words, ways.Projection(strength)))

    return make


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that keep the size of what flows through: the host's layers come empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel() ** 0.5 if "embedding" not in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny(amg):
    """`tiny(kind)` -> MODEL: a small random UNet of kind "eps", "v", "edm" or "flow"."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    class Sane(UNetModel):
        """Near the best that a model without knowledge can say: the noise is what it was given."""

        lean = 0.0

        def forward(self, x, *args, **kwargs):
            return self.lean * x + 0.3 * super().forward(x, *args, **kwargs)

    def make(kind: str = "eps"):
        types = comfy.model_base.ModelType
        kinds = {"eps": types.EPS, "v": types.V_PREDICTION, "edm": types.EDM, "flow": types.FLOW}
        config = comfy.supported_models_base.BASE(
            {
                "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32,
                "num_res_blocks": [1, 1], "channel_mult": (1, 2), "transformer_depth": [1, 1],
                "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
                "context_dim": 64, "use_spatial_transformer": True, "dtype": torch.float32,
                "num_heads": 2, "num_head_channels": -1, "use_linear_in_transformer": False,
                "adm_in_channels": None, "use_temporal_attention": False,
            }
        )  # fmt: skip
        config.unet_config |= {"num_heads": 2, "num_head_channels": -1}
        config.latent_format = comfy.latent_formats.SD15()
        model = comfy.model_base.BaseModel(config, kinds[kind], device="cpu", unet_model=Sane)
        fill(model.diffusion_model).lean = float(kind in ("eps", "flow"))
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return make


@pytest.fixture(scope="session")
def clip(amg):
    """The host's own CLIP around a small random text encoder, 64 values a token."""
    import comfy.sd
    import comfy.sd1_clip

    target = SimpleNamespace(
        params={}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer
    )
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 64,
    }  # fmt: skip
    made = comfy.sd.CLIP(target, model_options={"clip_l_model_config": shape})
    fill(made.cond_stage_model)
    return made


@pytest.fixture(scope="session")
def prompts(clip):
    """(positive, negative) CONDITIONING."""
    with torch.inference_mode():
        return tuple(
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red fox", "")
        )


@pytest.fixture(scope="session")
def sample(amg, prompts):
    """`sample(model, ...)` -> samples, by the host's common_ksampler, in inference mode."""
    import nodes

    def draw(model, sampler="euler", *, steps=4, cfg=5.0, batch=2, seed=3, latent=None, **kwargs):
        latent = {"samples": torch.zeros(batch, 4, 16, 16)} if latent is None else latent
        with torch.inference_mode():
            return nodes.common_ksampler(
                model, seed, steps, cfg, sampler, "normal", *prompts, latent, **kwargs
            )[0]["samples"]

    return draw
