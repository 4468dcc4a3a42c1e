"""From an index folder, or the name of a descriptor, to what goes over the wires."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..amg_core.descriptors import registry
from ..amg_core.errors import AMGError
from . import latents, paths

CHOICES = [kind.name for kind in registry.guarding(latents=True)]


def make_descriptor(name: str, vae=None, model=None):
    """The descriptor of that name for a new index. AMGError where what it needs is not there."""
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

    An index of latents needs no encoder to guard; with `vae` and `model` it can look at pictures.

    Raises
    ------
    AMGError
        Its weights are not there, or are others.
    """
    kind = registry.of(spec)
    if kind.space == "latent" and (vae is not None or model is not None):
        return latents.make(kind, vae, model, spec)
    return registry.for_index(spec, paths.weights)


def open_probe(folder: Path, descriptor=None):
    """A `Matcher` (without decoder) on the index in `folder`.

    Raises
    ------
    AMGError
        No index, a damaged one, or the weights of its descriptor are absent or others.
    """
    from ..amg_core.index import Index

    index = Index.open(folder)
    if descriptor is None:
        descriptor = descriptor_of(index.spec)
    index.check_descriptor(descriptor.spec)
    return as_probe([index], descriptor)


def as_probe(indexes: Sequence, descriptor):
    """A `Matcher` on one or several open indexes, which stay open as long as anything uses them."""
    from ..amg_core.index import Index
    from ..amg_core.index.search import Searcher
    from ..amg_core.similarity.matcher import Matcher

    return Matcher(Searcher(Index.combine(indexes)), descriptor)
