"""Opens index folders and makes descriptors for the values of the wires."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..amg_core.descriptors import registry
from ..amg_core.errors import AMGError
from . import latents, paths

CHOICES = [kind.name for kind in registry.guarding(latents=True)]


def make_descriptor(name: str, vae=None, model=None):
    """The descriptor of that name for a new index. AMGError if an input or file is missing."""
    if name not in CHOICES:
        raise AMGError(
            f"descriptor: {name!r} is not one of the choices. Choose one of {', '.join(CHOICES)}."
        )
    kind = registry.named(name)
    if kind.space == "latent":
        return latents.make(kind, vae, model)
    return registry.for_new(name, paths.weights)


def descriptor_of(spec, vae=None, model=None):
    """The descriptor that made an index of that `spec`.

    An index of latents needs no encoder to guard. With `vae` and `model` it can also compare pictures.

    Raises
    ------
    AMGError
        The weights are missing or are not those of the index.
    """
    kind = registry.of(spec)
    if kind.space == "latent" and (vae is not None or model is not None):
        return latents.make(kind, vae, model, spec)
    return registry.for_index(spec, paths.weights)


def open_matcher(folder: Path, descriptor=None):
    """A `Matcher` (without decoder) on the index in `folder`.

    Raises
    ------
    AMGError
        There is no index, it is damaged, or the weights of its descriptor are missing or different.
    """
    from ..amg_core.index import Index

    index = Index.open(folder)
    if descriptor is None:
        descriptor = descriptor_of(index.spec)
    index.check_descriptor(descriptor.spec)
    return as_matcher([index], descriptor)


def as_matcher(indexes: Sequence, descriptor):
    """A `Matcher` on one or several open indexes, which stay open while they are in use."""
    from ..amg_core.index import Index
    from ..amg_core.index.search import Searcher
    from ..amg_core.similarity.matcher import Matcher

    return Matcher(Searcher(Index.combine(indexes)), descriptor)
