"""The `pixel` descriptor: the picture itself, small. Needs no weights. Compared by nL2 (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..images import low_pass
from .base import DescriptorSpec


class PixelDescriptor:
    """Area-averaged RGB at 16 or 32 px a side, flattened: (B, 3·s·s) in [0, 1]."""

    spec = DescriptorSpec(
        id="pixel", metric="nl2", preprocessing="rgb01-square-area/1", scales=(16, 32)
    )

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        if scale not in self.spec.scales:
            raise ValueError(f"pixel has no scale {scale}, only {self.spec.scales}")
        return low_pass(pictures.float(), scale).flatten(1)

    def to(self, device: torch.device | str) -> PixelDescriptor:
        return self
