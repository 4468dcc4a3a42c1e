"""Descriptors turn pictures into rows of numbers for comparison: one file each, listed in `registry`."""

from .base import Descriptor, DescriptorSpec, embed_scales
from .registry import DEFAULT, create, for_spec

__all__ = ["DEFAULT", "Descriptor", "DescriptorSpec", "create", "embed_scales", "for_spec"]
