"""The `compact` descriptor: a small network that recognises copies and comes with the plugin.

Rows are compared by cosine. `training/compact.py` trains the network to tell a picture from all others
in spite of edits by people and models: instance discrimination under edits [1]_, as for SSCD [2]_, at a
hundredth of its work. No download is needed.

References
----------
.. [1] T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
.. [2] E. Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022.
.. [3] F. Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018 (GeM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AMGError
from ..files import brief
from ..images import resize
from ..messages import message
from ..threads import one_thread
from .base import DescriptorSpec, full_precision, subset
from .registry import Kind
from .tensors import read_tensors, tensors_sha256

WEIGHTS = Path(__file__).with_name("compact.safetensors")
SIDE = 96  # px of the network's input
SCALES = (16, 32, 48, SIDE)
WIDTHS = (32, 64, 128, 256)
DIMENSIONS = 256
GEM_POWER = 3.0
FEW = 2  # pictures that one core embeds faster than several share them out
FLOOR = 0.05  # smallest standard deviation that a picture's contrast is divided by


def _conv(inputs: int, outputs: int, kernel: int, stride: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
    ]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs)) if norm else nn.Sequential(*layers)


class _Residual(nn.Module):
    def __init__(self, width: int, norm: bool):
        super().__init__()
        self.first, self.second = (_conv(width, width, 3, 1, norm) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class CompactNetwork(nn.Module):
    """(B, 3, SIDE, SIDE) in [0, 1] -> (B, DIMENSIONS) rows of norm 1.

    Brightness, contrast and tint are removed first.

    Parameters
    ----------
    norm : bool
        Whether the network has batch normalisation, as in training. Without it, normalisation is part
        of the convolutions (`fold`).
    """

    def __init__(self, norm: bool = False):
        super().__init__()
        layers: list[nn.Module] = [_conv(3, WIDTHS[0], 5, 2, norm), nn.ReLU()]
        for before, width in pairwise(WIDTHS):
            layers += [_conv(before, width, 3, 2, norm), nn.ReLU(), _Residual(width, norm)]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], DIMENSIONS)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures - pictures.mean(dim=(2, 3), keepdim=True)
        x = x / (x.square().mean(dim=(1, 2, 3), keepdim=True) + FLOOR**2).sqrt()
        x = self.trunk(x).float().clamp_min(1e-6).pow(GEM_POWER)
        return F.normalize(self.head(x.mean(dim=(2, 3)).pow(1 / GEM_POWER)))


def fold(trained: CompactNetwork) -> CompactNetwork:
    """The same network in float32, with batch normalisation folded into the convolutions."""
    folded = CompactNetwork()
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    for own, (conv, norm) in zip(convolutions, batch_norms(trained), strict=True):
        scale = norm.weight / (norm.get_buffer("running_var") + norm.eps).sqrt()
        own.weight.data = (conv.weight * scale[:, None, None, None]).detach().clone()
        assert own.bias is not None
        own.bias.data = (norm.bias - norm.get_buffer("running_mean") * scale).detach().clone()
    folded.head.load_state_dict(trained.head.state_dict())
    return folded.eval().requires_grad_(False)


def batch_norms(network: CompactNetwork) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution of a network with batch normalisation, paired with its normalisation layer."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return list(zip(convolutions, norms, strict=True))


class CompactDescriptor:
    """The network at several scales: (B, 3, H, W) in [0, 1] -> (B, 256) rows of norm 1.

    At a scale below the input side the picture is first reduced to scale x scale, then enlarged, so
    that a noisy prediction is compared with equally blurred pictures of the index. The filter does not
    depend on the size of the picture, unlike an area average of a size that is no multiple. Every
    picture is squeezed into a square. `scales` picks some of 16, 32, 48 and 96.
    """

    space = "picture"

    def __init__(
        self,
        state: Mapping[str, Tensor],
        scales: Sequence[int] | None = None,
    ) -> None:
        self.spec = DescriptorSpec(
            id="compact",
            metric="cosine",
            preprocessing=f"square{SIDE}-bilinear/1",
            scales=subset(scales, SCALES),
            weights_sha256=tensors_sha256(state),
        )
        # A host may call this in inference mode, where new tensors cannot take part in autograd.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            network = CompactNetwork()
            network.load_state_dict(dict(state))
            self.network = network.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: Path | None = None, **options: Any) -> CompactDescriptor:
        """The descriptor that comes with the plugin, or a retrained one from `path`.

        Raises
        ------
        AMGError
            The file is missing or holds another network.
        """
        return cls(_state(path or WEIGHTS), **options)

    @classmethod
    def for_spec(cls, spec: DescriptorSpec, path: Path | None = None) -> CompactDescriptor:
        return cls.from_file(path, scales=spec.scales)

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) -> the small picture that is compared. `embed` of it gives the same rows."""
        if scale not in self.spec.scales:
            raise ValueError(f"compact has no scale {scale}, only {self.spec.scales}")
        return resize(pictures.float(), scale)

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        small = resize(self.shrink(pictures, scale), SIDE)
        alone = one_thread() if len(small) <= FEW else nullcontext()
        with alone, full_precision(small.device):
            rows: Tensor = self.network(small)
        return rows

    def to(self, device: torch.device | str) -> CompactDescriptor:
        self.network.to(device)
        return self


@lru_cache(maxsize=2)
def _state(path: Path) -> dict[str, Tensor]:
    try:
        state = {name: tensor.float() for name, tensor in read_tensors(path).items()}
        expected = {name: tuple(t.shape) for name, t in CompactNetwork().state_dict().items()}
        if {name: tuple(t.shape) for name, t in state.items()} != expected:
            raise ValueError("it holds another network")
    except Exception as error:
        raise AMGError(
            f"{path} does not hold the compact descriptor ({brief(error)}). Install the plugin again."
        ) from error
    return state


KIND = Kind(
    name="compact",
    description="recognises edited copies too, nothing to download.",
    misses=message("misses_compact"),
    descriptor=CompactDescriptor,
    # Measured with these weights, as `limits.ROWS` says. 1 in 400 passes the limit, not 1 in 100, because a
    # sampling run makes many comparisons.
    levels={
        16: ((0.65, 0.89), (0.73, 0.89), (0.80, 0.92), (0.84, 0.94), (0.88, 0.95)),
        32: ((0.64, 0.87), (0.72, 0.88), (0.78, 0.90), (0.83, 0.92), (0.87, 0.94)),
        48: ((0.64, 0.86), (0.72, 0.87), (0.78, 0.90), (0.83, 0.92), (0.87, 0.94)),
        96: ((0.64, 0.85), (0.72, 0.87), (0.78, 0.90), (0.83, 0.92), (0.87, 0.94)),
    },
    usual={16: 0.42, 32: 0.395, 48: 0.395, 96: 0.40},
    duplicates=0.8,  # docs/dedup.md, table
    candidates=0.75,  # docs/dedup.md: 90 % of 14 edits of 190 real pictures lie above it
)
