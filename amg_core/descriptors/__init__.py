"""Descriptors by id. `create` loads weights on first use only."""

from __future__ import annotations

from pathlib import Path

from ..errors import AMGError
from .base import Descriptor, DescriptorSpec

IDS = ("pixel", "sscd")


def create(name: str, weights: Path | None = None) -> Descriptor:
    """The descriptor of that name: "pixel", or "sscd" with the path of Meta's weights file.

    Raises
    ------
    AMGError
        For an unknown name, or for absent or unreadable weights; says where to put the file.
    """
    if name == "pixel":
        from .pixel import PixelDescriptor

        return PixelDescriptor()
    if name == "sscd":
        from .sscd import SSCDDescriptor

        return SSCDDescriptor.from_file(weights)
    raise AMGError(f"Unknown descriptor {name!r}: choose one of {', '.join(IDS)}.")


__all__ = ["IDS", "Descriptor", "DescriptorSpec", "create"]
