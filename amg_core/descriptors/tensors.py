"""Reads weights as named tensors without running code from the file, and hashes them by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import open_regular
from . import pickled

MOST_BYTES = 1 << 30
_MOST_ENTRIES = 20_000
_WRAPPERS = ("classy_state_dict", "base_model", "state_dict", "model_state_dict", "model")


def read_tensors(path: Path, most: int = MOST_BYTES) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file in any of its layouts.

    All weights are read by this function. `pickled` says why torch's own reader is not used.

    Parameters
    ----------
    path : Path
        The layout is recognised by the contents, not by the name.
    most : int
        Largest size of the file, in bytes.

    Returns
    -------
    dict of str to Tensor
        On the CPU, none of them empty. Nested tables have dotted names. Other contents of a checkpoint
        are left out.

    Raises
    ------
    Exception
        A damaged or foreign file can raise any exception. The caller adds the name of the file.
    """
    with open_regular(path) as file:
        head, size = file.read(9), os.fstat(file.fileno()).st_size
    if size > most:
        raise ValueError(f"it is over {most >> 20} MiB, far larger than the real file")
    with torch.inference_mode(False):
        if head[8:] == b"{":
            from safetensors.torch import load_file

            found = load_file(path)
        elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
            found = _flat(pickled.read(path))
        else:
            raise ValueError("it is neither a PyTorch file nor safetensors")
    if not found:
        raise ValueError(
            "it has no named tensors; a frozen TorchScript module has lost the names of its layers"
        )
    for name, tensor in found.items():
        if not tensor.numel():
            raise ValueError(f"{name} holds no values")
    return found


def _flat(root: object) -> dict[str, Tensor]:
    """Nested dicts and modules -> tensors with dotted names. Other contents are left out."""
    node = _children(root)
    if node is None:
        raise ValueError("it is no table of tensors")
    for wrapper in _WRAPPERS:
        inner = _children(node.get(wrapper))
        if inner is not None:
            node = inner
    seen = 0

    def walk(node: Mapping[Any, object], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal seen
        for key, value in node.items():
            seen += 1
            if seen > _MOST_ENTRIES or depth > 12:
                raise ValueError("far too many entries")
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            elif (inner := _children(value)) is not None:
                yield from walk(inner, f"{prefix}{key}.", depth + 1)

    return dict(walk(node, "", 0))


def _children(node: object) -> Mapping[Any, object] | None:
    if isinstance(node, pickled.Module):
        node = node.attributes
    return node if isinstance(node, Mapping) else None


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a network, the same for every file layout and precision that holds these numbers.

    It covers the tensors in the order of their names: the name and the shape as one line of UTF-8,
    ``layer1.0.conv1.weight 64,64,1,1\\n``, then the values as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name} {','.join(map(str, values.shape))}\n".encode())
        digest.update(values.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
