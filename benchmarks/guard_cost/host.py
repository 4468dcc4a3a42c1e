"""The real host around random weights: what a run needs, in the sizes of Stable Diffusion 1.5.

Weights are random, for time and memory do not depend on them. Everything else is real: ComfyUI's own
UNet, VAE and text encoder classes, its sampler, and the plugin as it is loaded by users.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
PACK = "amg_pack"
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "adm_in_channels": None, "use_temporal_attention": False, "use_temporal_resblock": False,
    "num_heads": 8, "num_head_channels": -1,
}  # fmt: skip
XL_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "legacy": False, "adm_in_channels": 2816, "num_classes": "sequential",
    "use_temporal_attention": False, "use_temporal_resblock": False, "num_heads": -1,
    "num_head_channels": 64,
}  # fmt: skip
SMALL_UNET = UNET | {"model_channels": 32, "num_heads": 2}
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
SMALL_VAE = VAE | {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TEXT_ENCODER = {}  # the host's default, CLIP ViT-L
SMALL_TEXT_ENCODER = {
    "hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "projection_dim": 64,
}  # fmt: skip
TOKENS, CONTEXT = 77, 768


def load(device: str) -> None:
    """Make the host importable, and the plugin as the package `PACK`: it is imported by `module`.

    The host's folder goes before ours, whose `nodes` it must not take for its own.
    """
    path = os.environ.get("COMFYUI_PATH", "")
    if not (Path(path) / "comfy").is_dir():
        sys.exit("Set COMFYUI_PATH to the folder of a ComfyUI, and use a Python that can run it.")
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    logging.getLogger().setLevel(logging.WARNING)
    place = {"submodule_search_locations": [str(ROOT)]}
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", **place)
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])


def module(name: str) -> ModuleType:
    """A module of the plugin."""
    return importlib.import_module(f"{PACK}.{name}")


def fill(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights in place that keep the size of what flows through; frozen."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fan = 1.0 if "embedding" in name else parameter[0].numel()
                bound = (3 / fan) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return network.eval().requires_grad_(False)


def diffusion_model(small: bool):
    """A ModelPatcher of the host's own SD15, in the precision the host would choose."""
    import comfy.model_base
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    class Sane(UNetModel):
        """Says nearly what a model without knowledge can say: the noise is what it was given."""

        def forward(self, x, *args, **kwargs):
            return x + 0.1 * super().forward(x, *args, **kwargs)

    device, rest = management.get_torch_device(), management.unet_offload_device()
    config = comfy.supported_models.SD15(SMALL_UNET if small else UNET)
    kind = management.unet_dtype(
        device=device, model_params=860_000_000, supported_dtypes=config.supported_inference_dtypes
    )
    config.set_inference_dtype(kind, management.unet_manual_cast(kind, device))
    config.unet_config = config.unet_config | {"dtype": kind}
    types = comfy.model_base.ModelType
    model = comfy.model_base.BaseModel(config, types.EPS, device=device, unet_model=Sane)
    fill(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=rest)


def vae(small: bool):
    """The host's VAE class around its AutoencoderKL."""
    import comfy.ldm.models.autoencoder as autoencoder
    import comfy.sd

    made = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    config = SMALL_VAE if small else VAE
    made.first_stage_model = fill(autoencoder.AutoencoderKL(ddconfig=config, embed_dim=4))
    made.latent_channels, made.upscale_ratio, made.downscale_ratio = 4, 8, 8
    return made


def text_encoder(small: bool):
    """The host's CLIP, with which captions are encoded."""
    import comfy.sd
    import comfy.sd1_clip

    target = SimpleNamespace(
        params={}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer
    )
    options = {"clip_l_model_config": SMALL_TEXT_ENCODER} if small else {}
    made = comfy.sd.CLIP(target, model_options=options)
    fill(made.cond_stage_model)
    return made


def install_taesd(folder: Path) -> None:
    """A TAESD decoder of random weights where the host keeps such files, in `folder` for this run."""
    import folder_paths
    from safetensors.torch import save_file

    network = fill(module("amg_core.decoders").TAESDDecoder())
    save_file(network.state_dict(), folder / "taesd_decoder.safetensors")
    folder_paths.folder_names_and_paths["vae_approx"] = ([str(folder)], {".safetensors"})


def descriptor(name: str):
    """One of the plugin's descriptors; SSCD with random weights."""
    if name in ("compact", "pixel"):
        return module("amg_core.descriptors").create(name)
    if name == "latent":
        return module("amg_core.descriptors.latent").LatentDescriptor(None, "sd15", "0" * 64, 4)
    generator, state = torch.Generator().manual_seed(0), {}
    for key, shape in module("amg_core.descriptors.sscd").expected_shapes().items():
        if len(shape) > 1:
            fan = torch.Size(shape[1:]).numel()
            state[key] = torch.randn(shape, generator=generator) / fan**0.5
        else:
            state[key] = torch.full(shape, float(key.endswith(("weight", "running_var"))))
    with torch.inference_mode(False):
        state = {key: value.clone() for key, value in state.items()}
        return module("amg_core.descriptors.sscd").SSCDDescriptor(state, "0" * 64)


class RandomIndex:
    """As much of an index as the guard needs: random rows in files, one caption a picture."""

    name, hash, muted, path = "random", "random", {}, None

    def __init__(self, folder: Path, spec, count: int):
        self.spec, self.count, self.cache = spec, count, folder
        self._rows = {}
        for scale in spec.scales:
            rng = np.random.default_rng(scale)
            if spec.metric == "cosine":
                dim = 256 if spec.id == "compact" else 512
                rows = rng.standard_normal((count, dim), np.float32)
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            else:
                channels = 4 if spec.id.startswith("latent") else 3
                rows = rng.random((count, channels * scale * scale), np.float32)
            file = folder / f"{spec.id}.{scale}.npy"
            np.save(file, rows.astype(np.float16))
            self._rows[scale] = np.load(file, mmap_mode="r")

    def rows(self, scale: int) -> np.ndarray:
        return self._rows[scale]

    def caption(self, i: int) -> str:
        return f"picture {i % 16} of a random index"

    def captions(self, i: int) -> list[str]:
        return [self.caption(i)]

    def source(self, i: int) -> str:
        return f"{i}.png"

    def thumbnail(self, i: int) -> Image.Image:
        values = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        return Image.fromarray(values)


def prompts(device: str) -> tuple[list, list]:
    """Random (positive, negative) CONDITIONING."""
    generator = torch.Generator().manual_seed(1)

    def one() -> Tensor:
        return torch.randn(1, TOKENS, CONTEXT, generator=generator).to(device)

    return [[one(), {}]], [[one(), {}]]
