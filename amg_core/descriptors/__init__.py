"""Descriptors: how pictures are compared. `registry` knows them all, each by its own file."""

from .base import Descriptor, DescriptorSpec, embed_scales
from .registry import DEFAULT, create, for_spec

__all__ = ["DEFAULT", "Descriptor", "DescriptorSpec", "create", "embed_scales", "for_spec"]
