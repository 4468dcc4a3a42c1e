"""Descriptors by name. Weights are loaded on first use only."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import AMGError
from .base import Descriptor, DescriptorSpec, embed_scales

DEFAULT = "compact"  # needs no weights of anybody's
IDS = (DEFAULT, "pixel", "sscd")  # those that guard on any host without further choices
NAMES = (*IDS, "latent", "clip")


def create(name: str, weights: str | Path | None = None, **options) -> Descriptor:
    """The descriptor of that name.

    Parameters
    ----------
    name : one of NAMES
    weights : path, optional
        sscd: Meta's file. latent: a TAESD encoder, see `latent`; without it nothing can be encoded, but
        latents can be compared. clip: a file or a folder, see `clip`. compact: a file instead of the one
        in the box. pixel has none.
    options
        `scales`, a subset of the descriptor's own; sscd: `side` (224, 288 or 320); latent: `family`,
        `side`, `channels`; clip: `activation`, `heads`.

    Raises
    ------
    AMGError
        For an unknown name or option value, or absent or unreadable weights; says what to do.
    """
    path = None if weights is None else Path(weights).expanduser()
    try:
        if name == "compact":
            from .compact import CompactDescriptor

            return CompactDescriptor.from_file(path, **options)
        if name == "pixel":
            from .pixel import PixelDescriptor

            return PixelDescriptor(**options)
        if name == "sscd":
            from .sscd import SSCDDescriptor

            return SSCDDescriptor.from_file(path, **options)
        if name == "latent":
            from .latent import LatentDescriptor

            return LatentDescriptor.from_file(path, **options)
        if name == "clip":
            from .clip import CLIPDescriptor

            return CLIPDescriptor.from_file(path, **options)
    except (TypeError, ValueError) as error:
        raise AMGError(f"The descriptor {name} cannot be made: {error}.") from error
    raise AMGError(f"Unknown descriptor {name!r}: choose one of {', '.join(NAMES)}.")


def for_spec(spec: DescriptorSpec, weights: str | Path | None = None) -> Descriptor:
    """The descriptor that made an index: of that very spec, with its input side and its scales.

    A `latent` index needs no weights to be searched with latents; with weights it can look at pictures.
    For embeddings imported from clip-retrieval any weights of that size of CLIP are taken: nobody
    stated which they were.

    Raises
    ------
    AMGError
        The index was made by a descriptor that is not known here, or with other weights.
    """
    kind = spec.id.partition("_")[0]
    options: dict[str, Any] = {"scales": spec.scales}
    if kind not in NAMES:
        raise AMGError(
            f"The index was made with the descriptor {spec.id}, which this version does not know: "
            f"update the plugin, or build the index again with one of {', '.join(NAMES)}."
        )
    if kind == "sscd" and (found := re.match(r"square(\d+)-", spec.preprocessing)):
        options["side"] = int(found[1])
    if kind == "latent":
        from .latent import LatentDescriptor

        if weights is None:
            return LatentDescriptor.for_spec(spec)
        options |= LatentDescriptor.options_of(spec)
    if kind == "clip":
        from .clip import imported, options_of

        options |= options_of(spec)
    made = create(kind, weights, **options)
    if kind == "clip" and imported(spec):
        made.spec = replace(made.spec, preprocessing=spec.preprocessing, weights_sha256="")
    if made.spec == spec:
        return made
    if replace(made.spec, weights_sha256=spec.weights_sha256) == spec:
        if weights is not None and _file_sha256(Path(weights).expanduser()) == spec.weights_sha256:
            made.spec = spec  # an index of format 1 names the hash of the file
            return made
        raise AMGError(
            f"The index was made with other weights of {spec.id} than {weights}: give the file it was "
            f"made with (hash {spec.weights_sha256[:12]}…), or build the index again."
        )
    raise AMGError(
        f"The index was made with {spec.id}, {spec.preprocessing}, scales {list(spec.scales)}, and here "
        f"is {made.spec.id}, {made.spec.preprocessing}, scales {list(made.spec.scales)}: use the "
        f"version and the weights it was made with, or build the index again."
    )


def _file_sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


__all__ = [
    "DEFAULT",
    "IDS",
    "NAMES",
    "Descriptor",
    "DescriptorSpec",
    "create",
    "embed_scales",
    "for_spec",
]
