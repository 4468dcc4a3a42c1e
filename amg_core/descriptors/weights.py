"""Read SSCD's published weights without running anything the file says.

Meta publishes the network in three layouts, all of them zip archives around a pickle:

=====================  ===========================================================================
``*.torchvision.pt``   state dict, ``backbone.layer1.0.conv1.weight`` … ``backbone.fc.weight``
``*.classy.pt``        state dict, ``backbone.blocks.0.block0-0.convolutional_block.0.weight`` …
``*.torchscript.pt``   traced module of the Classy Vision network: code, and the same names as
                       attributes of nested modules
=====================  ===========================================================================

`tensors.read_tensors` reads them, as it does all weights; safetensors of the same keys are read too.

References
----------
.. [1] E. Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022;
   https://github.com/facebookresearch/sscd-copy-detection (model.py, gem_pooling.py).
.. [2] Classy Vision's ``resnext.py``, for the names of its layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AMGError
from ..files import brief
from .tensors import read_tensors, tensors_sha256

FILE_NAME = "sscd_disc_mixup.torchvision.pt"
STAGES = (3, 4, 6, 3)  # blocks a stage, ResNet-50
DIMENSIONS = 512

_WHERE = (
    f"SSCD needs Meta's weights file {FILE_NAME} (98 MB, MIT licence), from the table of models in "
    "github.com/facebookresearch/sscd-copy-detection. Put it into the models/amg folder of your "
    "ComfyUI, or give its path. The descriptor 'pixel' works without any file."
)


def load(path: Path | None) -> tuple[dict[str, Tensor], str]:
    """The network's tensors under torchvision's names, and their SHA-256.

    Parameters
    ----------
    path : Path or None
        Any of Meta's three layouts, or safetensors.

    Returns
    -------
    state : dict of str to Tensor
        `expected_shapes` names them; float32 on the CPU.
    sha256 : str
        Of the tensors, see `tensors.tensors_sha256`: one and the same for all layouts.

    Raises
    ------
    AMGError
        No such file, a damaged or hostile one, or one that holds another network.
    """
    if path is None:
        raise AMGError(f"No weights for SSCD. {_WHERE}")
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "does not exist"
        raise AMGError(f"{path} {what}. {_WHERE}")
    try:
        with torch.inference_mode(False):
            state = _checked(_canonical(read_tensors(path)))
    except _OtherNetwork as error:
        raise AMGError(
            f"{path} does not hold SSCD's ResNet-50 with 512 dimensions ({brief(error)}). Other sizes, "
            f"such as sscd_disc_large, are not supported. {_WHERE}"
        ) from None
    except (MemoryError, OSError) as error:
        raise AMGError(f"{path} could not be read: {brief(error)}") from error
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise AMGError(
            f"{path} is damaged or is not a weights file of SSCD ({brief(error)}). Nothing in it was run. "
            f"Download it again. {_WHERE}"
        ) from error
    return state, tensors_sha256(state)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes: torchvision's ``resnet50(num_classes=512)`` without its counters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(conv: str, bn: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update(
            {f"{bn}.{f}": (outputs,) for f in ("weight", "bias", "running_mean", "running_var")}
        )

    conv_bn("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate(STAGES):
        width = 64 * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            conv_bn(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
            conv_bn(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            conv_bn(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                conv_bn(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (DIMENSIONS, inputs), (DIMENSIONS,)
    return shapes


class _OtherNetwork(Exception):
    """The file is sound, its contents are not ours."""


# ---------------------------------------------------------------- names

_PREFIX = re.compile(r"(?:(?:module|model|trunk|backbone)\.)*")
_CLASSY = re.compile(
    r"blocks\.(\d)\.block\d-(\d+)\.(convolutional_block\.[01346]|bn|downsample\.[01])\.(\w+)"
)
_CLASSY_LAYERS = {
    "convolutional_block.0": "conv1",
    "convolutional_block.1": "bn1",
    "convolutional_block.3": "conv2",
    "convolutional_block.4": "bn2",
    "convolutional_block.6": "conv3",
    "bn": "bn3",
    "downsample.0": "downsample.0",
    "downsample.1": "downsample.1",
}
_CLASSY_ENDS = {
    "initial_block._module.0": "conv1",
    "initial_block._module.1": "bn1",
    "embeddings.1": "fc",
}


def _torchvision_name(name: str) -> str:
    """Classy Vision's or torchvision's name, with or without wrappers -> torchvision's."""
    name = _PREFIX.sub("", name, count=1)  # matches at the start, if only nothing
    if match := _CLASSY.fullmatch(name):
        stage, block, layer, field = match.groups()
        return f"layer{int(stage) + 1}.{block}.{_CLASSY_LAYERS[layer]}.{field}"
    layer, _, field = name.rpartition(".")
    return f"{_CLASSY_ENDS.get(layer, layer)}.{field}"


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        key = _torchvision_name(name)
        if key in state:
            raise ValueError(f"two tensors for {key}")
        state[key] = tensor
    return state


def _checked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exactly the expected tensors, as contiguous float32."""
    shapes = expected_shapes()
    for kind, names in (
        ("missing", [n for n in shapes if n not in state]),
        ("unexpected", [n for n in state if n not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise _OtherNetwork(f"{kind}: {', '.join(names[:3])}{more}")
    checked = {}
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise _OtherNetwork(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _OtherNetwork(f"{name} is {tensor.dtype}, expected float32")
        tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not numbers")
        checked[name] = tensor
    return checked
