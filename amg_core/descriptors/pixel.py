"""The `pixel` descriptor: the reduced picture itself, compared by nL2 (Eq. 8). It needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images import low_pass
from ..messages import message
from .base import DescriptorSpec, subset
from .registry import Kind


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

    @classmethod
    def from_file(cls, path: Path | None = None, **options: Any) -> PixelDescriptor:
        """The descriptor. It has no file, so `path` is ignored."""
        return cls(**options)

    @classmethod
    def for_spec(cls, spec: DescriptorSpec, path: Path | None = None) -> PixelDescriptor:
        return cls(spec.scales)

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) -> (B, 3, scale, scale). `embed` of the result gives the same rows."""
        return low_pass(pictures.float(), scale)

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        if scale not in self.spec.scales:
            raise ValueError(f"pixel has no scale {scale}, only {self.spec.scales}")
        return low_pass(pictures.float(), scale).flatten(1)

    def to(self, device: torch.device | str) -> PixelDescriptor:
        return self


KIND = Kind(
    name="pixel",
    description="compares layout and colour only.",
    misses=message("misses_pixel"),
    descriptor=PixelDescriptor,
    levels={
        16: ((-1.48, -0.90), (-1.28, -0.86), (-1.11, -0.74), (-0.96, -0.64), (-0.83, -0.56)),
        32: ((-1.54, -1.03), (-1.35, -0.94), (-1.19, -0.82), (-1.04, -0.72), (-0.92, -0.64)),
    },
    duplicates=0.7,  # see docs/dedup.md
)
