"""The `sscd` descriptor: a ResNet-50 that Meta trained to recognise copies, compared by cosine.

The literature measures with it (AMG Eq. 9). Meta publishes the network in three layouts, all of them zip
archives around a pickle:

=====================  ===========================================================================
``*.torchvision.pt``   state dict, ``backbone.layer1.0.conv1.weight`` … ``backbone.fc.weight``
``*.classy.pt``        state dict, ``backbone.blocks.0.block0-0.convolutional_block.0.weight`` …
``*.torchscript.pt``   traced module of the Classy Vision network: code, with the same names as
                       attributes of nested modules
=====================  ===========================================================================

`tensors.read_tensors` reads all three, and safetensors with the same tensor names.

References
----------
.. [1] E. Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022;
   https://github.com/facebookresearch/sscd-copy-detection (model.py, gem_pooling.py).
.. [2] K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (stride in the 3x3
   convolution, as torchvision and Classy Vision have it).
.. [3] F. Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018 (GeM).
.. [4] Classy Vision's ``resnext.py``, for the names of its layers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AMGError
from ..files import brief, open_regular
from ..images import low_pass, resize
from ..messages import message
from .base import DescriptorSpec, full_precision, subset
from .registry import Kind, Weights
from .tensors import read_tensors, tensors_sha256

FILE_NAME = "sscd_disc_mixup.torchvision.pt"


class Layout(NamedTuple):
    """One of Meta's networks.

    `blocks` in each stage, `width` of the first stage's 3x3 convolutions, in so many `groups`.
    """

    name: str
    blocks: tuple[int, ...]
    width: int
    groups: int
    dimensions: int

    def stage(self, number: int) -> tuple[int, int]:
        """The widths of the 3x3 convolutions and of the outputs in a stage, 0, 1, …"""
        return self.width * 2**number, 256 * 2**number


MIXUP = Layout("ResNet-50", (3, 4, 6, 3), 64, 1, 512)  # sscd_disc_mixup
LARGE = Layout(
    "ResNeXt-101 32x4d", (3, 4, 23, 3), 128, 32, 1024
)  # sscd_disc_large: papers measure with it

_WHERE = (
    f"SSCD needs Meta's weights file {FILE_NAME} (98 MB, MIT licence), from the table of models in "
    "github.com/facebookresearch/sscd-copy-detection. Put it into the models/amg folder of your "
    "ComfyUI, or give its path. The descriptor 'pixel' works without any file."
)

SIDES, SIDE = (224, 288, 320), 288
LOW_SCALES = (16, 32, 64)
GEM_POWER = 3.0
BN_EPSILON = 1e-5
_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB
_STD = (0.229, 0.224, 0.225)


def preprocessing(side: int) -> str:
    """The name, for the spec, of the preprocessing for input side `side`."""
    return f"square{side}-bilinear-imagenet/1"


class _Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 with a shortcut. Batch normalisation is folded in."""

    def __init__(
        self, inputs: int, width: int, outputs: int, stride: int, groups: int, shortcut: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups)
        self.conv3 = nn.Conv2d(width, outputs, 1)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        y = F.relu(self.conv2(y), inplace=True)
        y = self.conv3(y)
        y = y + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


class SSCDNetwork(nn.Module):
    """A residual trunk, GeM pooling (p = 3), linear, unit norm: (B, 3, H, W) -> (B, D), D = 512 for MIXUP.

    The input is normalised with ImageNet's mean and deviation. The network is for inference only,
    because batch normalisation is folded into the convolutions (`fold`).
    """

    def __init__(self, layout: Layout = MIXUP) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3)
        inputs, stages = 64, []
        for stage, blocks in enumerate(layout.blocks):
            (width, outputs), layers = layout.stage(stage), []
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(
                    _Bottleneck(inputs, width, outputs, stride, layout.groups, shortcut=block == 0)
                )
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, layout.dimensions)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.flatten(2).clamp(min=1e-6).pow(GEM_POWER).mean(2).pow(1 / GEM_POWER)
        return F.normalize(self.fc(x))


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names and tensors -> `SSCDNetwork`'s, with batch normalisation folded in."""
    folded = {}
    for name, weight in state.items():
        if weight.ndim != 4:
            continue
        conv = name.removesuffix(".weight")
        bn = f"{conv[:-1]}1" if conv.endswith("downsample.0") else conv.replace("conv", "bn")
        scale = state[f"{bn}.weight"].double()
        scale = scale / (state[f"{bn}.running_var"].double() + BN_EPSILON).sqrt()
        bias = state[f"{bn}.bias"].double() - scale * state[f"{bn}.running_mean"].double()
        conv = conv.removesuffix(".0") if "downsample" in conv else conv
        folded[f"{conv}.weight"] = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
        folded[f"{conv}.bias"] = bias.to(weight.dtype)
    return folded | {name: state[name] for name in ("fc.weight", "fc.bias")}


class SSCDDescriptor:
    """SSCD at several scales: (B, 3, H, W) in [0, 1] -> (B, 512) rows of norm 1.

    At a scale below the input side the picture is first reduced to scale x scale, then enlarged, so
    that a noisy prediction is compared with equally blurred pictures of the index. Every picture is
    squeezed into a square, the option that Meta recommends for batches.

    Use `from_file`. The constructor takes tensors as `load` returns them. `scales` picks some of 16,
    32, 64 and `side`: an index of many millions may keep only the full size.
    """

    space = "picture"

    def __init__(
        self,
        state: Mapping[str, Tensor],
        sha256: str,
        side: int = SIDE,
        scales: Sequence[int] | None = None,
    ) -> None:
        if side not in SIDES:
            raise ValueError(f"SSCD's input side is one of {SIDES}, not {side}")
        self.side = side
        self.spec = DescriptorSpec(
            id="sscd_disc_mixup",
            metric="cosine",
            preprocessing=preprocessing(side),
            scales=subset(scales, (*LOW_SCALES, side)),
            weights_sha256=sha256,
        )
        # A host may call this in inference mode, where new tensors cannot take part in autograd.
        with torch.inference_mode(False):
            with torch.device("meta"):  # no memory, and no draw from the global generator
                made = SSCDNetwork()
            made.load_state_dict(fold(state), assign=True)
            self._network = made.eval().requires_grad_(False)
            self._mean = torch.tensor(_MEAN, dtype=torch.float32, device="cpu").view(3, 1, 1)
            self._std = torch.tensor(_STD, dtype=torch.float32, device="cpu").view(3, 1, 1)
        self.to("cpu")

    @classmethod
    def from_file(
        cls, path: Path | None, side: int = SIDE, scales: Sequence[int] | None = None
    ) -> SSCDDescriptor:
        """Read Meta's weights in any of the layouts.

        Raises
        ------
        AMGError
            The file is missing, damaged, malicious or of another network. The message says what to do.
        """
        return cls(*load(path), side, scales)

    @classmethod
    def for_spec(cls, spec: DescriptorSpec, path: Path | None) -> SSCDDescriptor:
        """The descriptor with the input side of `spec`."""
        found = re.match(r"square(\d+)-", spec.preprocessing)
        return cls.from_file(path, int(found[1]) if found else SIDE, spec.scales)

    @property
    def device(self) -> torch.device:
        return self._mean.device

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) -> (B, 3, scale, scale). `embed` of the result gives the same rows."""
        pictures = pictures.float()
        return resize(pictures, scale) if scale == self.side else low_pass(pictures, scale)

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        """See `Descriptor.embed`. Always in float32, also under the host's autocast."""
        if scale not in self.spec.scales:
            raise ValueError(f"sscd has no scale {scale}, only {self.spec.scales}")
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"expected (B, 3, H, W), got {tuple(pictures.shape)}")
        with full_precision(pictures.device):
            pictures = pictures.float()
            if scale != self.side:
                pictures = low_pass(pictures, scale)
            pictures = (resize(pictures, self.side) - self._mean) / self._std
            rows: Tensor = self._network(pictures)
        return rows

    def to(self, device: torch.device | str) -> SSCDDescriptor:
        """Move the weights, outside inference mode. Returns self."""
        with torch.inference_mode(False):
            self._network.to(device)
            self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self


# ---------------------------------------------------------------- Meta's file


def network(path: Path | None, layout: Layout = MIXUP) -> SSCDNetwork:
    """One of Meta's networks with the weights of its file, for inference. Raises as `load` does."""
    state, _ = load(path, layout)
    with torch.device("meta"):
        made = SSCDNetwork(layout)
    made.load_state_dict(fold(state), assign=True)
    return made.eval().requires_grad_(False)


@dataclass(frozen=True)
class Examined:
    """What a weights file is.

    Attributes
    ----------
    name : str
        Of the file, without its folder.
    size : int
        Bytes.
    sha256 : str
        Of the file.
    weights_sha256 : str
        Of its tensors, by which an index knows the network.
    """

    name: str
    size: int
    sha256: str
    weights_sha256: str

    def words(self) -> str:
        return (
            f"{self.name} holds SSCD's ResNet-50: every tensor is there, in its shape. "
            f"{self.size} bytes, SHA-256 {self.sha256}. Hash of its tensors, as an index stores it: "
            f"{self.weights_sha256}. Choose the descriptor 'sscd' when you build an index."
        )


def examine(path: Path | None) -> Examined:
    """Read a weights file whole, and compare every tensor with the network's names and shapes.

    Nothing in it is run. Meta publishes no checksum, so this cannot say that a file is unchanged.

    Raises
    ------
    AMGError
        As for `load`. The sentence says where the file is published and where to put it.
    """
    _, tensors = load(path)
    file = Path(path or "").expanduser()
    digest, size = hashlib.sha256(), 0
    with open_regular(file) as opened:
        for block in iter(lambda: opened.read(1 << 20), b""):
            digest.update(block)
            size += len(block)
    return Examined(file.name, size, digest.hexdigest(), tensors)


def load(path: Path | None, layout: Layout = MIXUP) -> tuple[dict[str, Tensor], str]:
    """The network's tensors under torchvision's names, and their SHA-256.

    Parameters
    ----------
    path : Path or None
        A file in one of Meta's three layouts, or safetensors.

    Returns
    -------
    state : dict of str to Tensor
        Named as in `expected_shapes`, float32, on the CPU.
    sha256 : str
        Hash of the tensors, the same for all layouts (`tensors.tensors_sha256`).

    Raises
    ------
    AMGError
        The file is missing, damaged, malicious or of another network.
    """
    if path is None:
        raise AMGError(f"No weights for SSCD. {_WHERE}")
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "does not exist"
        raise AMGError(f"{path} {what}. {_WHERE}")
    try:
        with torch.inference_mode(False):
            state = _checked(_canonical(read_tensors(path)), layout)
    except _OtherNetwork as error:
        raise AMGError(
            f"{path} does not hold SSCD's {layout.name} with {layout.dimensions} dimensions "
            f"({brief(error)}). Give the file of this network. {_WHERE}"
        ) from None
    except (MemoryError, OSError) as error:
        raise AMGError(f"{path} could not be read: {brief(error)}") from error
    except Exception as error:  # a damaged or malicious file can raise anything
        raise AMGError(
            f"{path} is damaged or is not a weights file of SSCD ({brief(error)}). Nothing in it was run. "
            f"Download it again. {_WHERE}"
        ) from error
    return state, tensors_sha256(state)


def expected_shapes(layout: Layout = MIXUP) -> dict[str, tuple[int, ...]]:
    """Names and shapes: torchvision's, for MIXUP ``resnet50(num_classes=512)``, without its counters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(
        conv: str, bn: str, outputs: int, inputs: int, kernel: int, groups: int = 1
    ) -> None:
        shapes[f"{conv}.weight"] = (outputs, inputs // groups, kernel, kernel)
        shapes.update(
            {f"{bn}.{f}": (outputs,) for f in ("weight", "bias", "running_mean", "running_var")}
        )

    conv_bn("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate(layout.blocks):
        width, wide = layout.stage(stage)
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            conv_bn(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
            conv_bn(f"{at}.conv2", f"{at}.bn2", width, width, 3, layout.groups)
            conv_bn(f"{at}.conv3", f"{at}.bn3", wide, width, 1)
            if block == 0:
                conv_bn(f"{at}.downsample.0", f"{at}.downsample.1", wide, inputs, 1)
            inputs = wide
    shapes["fc.weight"] = (layout.dimensions, inputs)
    shapes["fc.bias"] = (layout.dimensions,)
    return shapes


class _OtherNetwork(Exception):
    """The file is readable, but holds another network."""


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
    name = _PREFIX.sub("", name, count=1)  # always matches at the start, perhaps an empty text
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


def _checked(state: Mapping[str, Tensor], layout: Layout = MIXUP) -> dict[str, Tensor]:
    """The expected tensors as contiguous float32. Raises an error if one is missing, extra or wrong."""
    shapes = expected_shapes(layout)
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


KIND = Kind(
    name="sscd",
    description="recognises most copies, needs Meta's weights in models/amg, slow on a CPU.",
    misses=message("misses_sscd"),
    descriptor=SSCDDescriptor,
    # Measured with an int8 export at 224 px in place of Meta's file. At full size the limit is 0.5, as in
    # the literature.
    levels={
        16: ((0.60, 0.73), (0.67, 0.77), (0.72, 0.81), (0.77, 0.84), (0.81, 0.87)),
        32: ((0.51, 0.66), (0.58, 0.71), (0.64, 0.75), (0.69, 0.79), (0.73, 0.82)),
        64: ((0.37, 0.56), (0.45, 0.62), (0.52, 0.66), (0.58, 0.71), (0.63, 0.74)),
        288: ((0.33, 0.50), (0.36, 0.50), (0.39, 0.50), (0.42, 0.50), (0.45, 0.50)),
    },
    duplicates=0.7,  # Somepalli et al., NeurIPS 2023
    weights=Weights("file", (("amg", "sscd_disc_mixup*"),)),
)
