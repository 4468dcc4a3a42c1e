"""The `pixel` descriptor: the picture itself, small. Needs no weights. Compared by nL2 (Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..images import low_pass
from .base import DescriptorSpec, subset


class PixelDescriptor:
    """Area-averaged RGB at 16 or 32 px a side, flattened: (B, 3·s·s) in [0, 1].

    `scales` picks one of the two.
    """

    space = "picture"
    spec = DescriptorSpec(
        id="pixel", metric="nl2", preprocessing="rgb01-square-area/1", scales=(16, 32)
    )

    def __init__(self, scales: Sequence[int] | None = None) -> None:
        self.spec = replace(self.spec, scales=subset(scales, self.spec.scales))

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) -> (B, 3, scale, scale), of which `embed` gives the very same rows."""
        return low_pass(pictures.float(), scale)

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        if scale not in self.spec.scales:
            raise ValueError(f"pixel has no scale {scale}, only {self.spec.scales}")
        return low_pass(pictures.float(), scale).flatten(1)

    def to(self, device: torch.device | str) -> PixelDescriptor:
        return self
