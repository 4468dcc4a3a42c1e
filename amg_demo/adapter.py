"""A LoRA for the demo model: W + up·down on every layer of its UNet (Hu et al. 2021, Eq. 3).

The file is a LoRA as any other: ``diffusion_model.<layer>.lora_down.weight`` and ``….lora_up.weight``,
which the host's own *Load LoRA* node reads. A 3x3 convolution has a 3x3 down and a 1x1 up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .model import LORA, DemoModel, load

PREFIX, DOWN, UP = "diffusion_model.", ".lora_down.weight", ".lora_up.weight"


def layers(unet: nn.Module) -> dict[str, Tensor]:
    """Name -> weight (O, I, …) of each linear and convolutional layer."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: layer.weight for name, layer in unet.named_modules() if isinstance(layer, kinds)}


def create(unet: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A fresh adapter, key -> tensor: down random, up zero, so that it changes nothing yet."""
    adapter = {}
    for name, weight in layers(unet).items():
        out, *rest = weight.shape
        down = torch.randn(rank, *rest, generator=generator) / weight[0].numel() ** 0.5
        adapter[f"{PREFIX}{name}{DOWN}"] = down
        adapter[f"{PREFIX}{name}{UP}"] = torch.zeros(out, rank, *[1] * (len(rest) - 1))
    return adapter


def merged(
    unet: nn.Module, adapter: Mapping[str, Tensor], strength: float = 1.0
) -> dict[str, Tensor]:
    """The layers' weights with the adapter on them, by parameter name. Differentiable in `adapter`."""
    found = {}
    for name, weight in layers(unet).items():
        down, up = (adapter.get(f"{PREFIX}{name}{end}") for end in (DOWN, UP))
        if down is not None and up is not None:
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            found[f"{name}.weight"] = weight + strength * change
    return found


def with_lora(path: Path = LORA, strength: float = 1.0) -> DemoModel:
    """The demo model with a LoRA on it, as *Load LoRA* gives it. FileNotFoundError without the file."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"The demo's LoRA is missing: {path}. Reinstall the plugin folder.")
    model = load()
    adapter = {key: value.float() for key, value in load_file(path).items()}
    model.unet.load_state_dict(merged(model.unet, adapter, strength), strict=False)
    return model


def write(adapter: Mapping[str, Tensor], path: Path) -> None:
    """In half precision."""
    from safetensors.torch import save_file

    save_file({key: value.detach().half().contiguous() for key, value in adapter.items()}, path)
