"""Descriptors: how pictures are compared. `registry` knows them all, each by its own file."""

from __future__ import annotations

from .base import Descriptor, DescriptorSpec, embed_scales
from .registry import (
    DEFAULT,
    Kind,
    Weights,
    create,
    described,
    for_index,
    for_new,
    for_spec,
    guarding,
    kinds,
    named,
    of,
    register,
)

__all__ = [
    "DEFAULT",
    "Descriptor",
    "DescriptorSpec",
    "Kind",
    "Weights",
    "create",
    "described",
    "embed_scales",
    "for_index",
    "for_new",
    "for_spec",
    "guarding",
    "kinds",
    "named",
    "of",
    "register",
]
