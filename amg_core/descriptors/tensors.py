"""Weights as named tensors: read without running anything in the file, and identified by content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that torch reads as weights only.

    Raises whatever a damaged or foreign file provokes; the caller names the file.
    """
    with torch.inference_mode(False):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it is no table of tensors")
    return dict(state)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a network: the same for every file layout and precision that holds these numbers.

    Over the tensors in the order of their names: the name and the shape as one line of UTF-8,
    ``layer1.0.conv1.weight 64,64,1,1\\n``, then the values as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name} {','.join(map(str, values.shape))}\n".encode())
        digest.update(values.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
