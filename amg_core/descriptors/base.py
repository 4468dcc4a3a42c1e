"""What every descriptor is: a differentiable map from pictures to embeddings, with its own identity."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class DescriptorSpec:
    """The identity of a descriptor. Two embeddings compare only if their specs are equal.

    Attributes
    ----------
    id : str
        For instance ``pixel``, ``sscd_disc_mixup``, ``latent_sd15`` or ``clip_vit_b_32``. What stands
        before the first "_" is the name that `descriptors.create` takes.
    metric : {"nl2", "cosine"}
        How embeddings compare: normalised L2 (AMG Eq. 8) or cosine (Eq. 9).
    preprocessing : str
        Versioned name of everything between a picture in [0, 1] and the network.
    scales : tuple of int
        Sides in pixels (latent descriptors: in latent cells), ascending. At scale s a picture is first
        low-passed to s x s, so that a half-formed prediction is compared with equally blurred index
        pictures. The last is the finest.
    weights_sha256 : str
        Hash of the weights (`tensors.tensors_sha256`), "" where there are none.
    """

    id: str
    metric: str
    preprocessing: str
    scales: tuple[int, ...]
    weights_sha256: str = ""

    def to_json(self) -> dict:
        return asdict(self) | {"scales": list(self.scales)}

    @classmethod
    def from_json(cls, data: dict) -> DescriptorSpec:
        return cls(**(data | {"scales": tuple(int(s) for s in data["scales"])}))


class Descriptor(Protocol):
    """E(·) of the papers.

    `space` says what the guard hands over at each step: "picture" = a decoded prediction, to `embed`;
    "latent" = the prediction as it is, to `latent.LatentDescriptor.embed_latents`.

    Where pictures of all sizes come down to one, a method ``shrink(pictures, scale)`` gives that small
    picture, and `embed` of it gives the very same rows: builders batch through it.
    """

    spec: DescriptorSpec
    space: str

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, D) float32 embeddings at one of `spec.scales`.

        Differentiable with respect to `pictures`. Rows are independent: a batch gives what its
        members give alone (to float tolerance). Cosine descriptors return unit rows.
        """
        ...

    def to(self, device: torch.device | str) -> Descriptor:
        """Move the weights. Call inside ``torch.inference_mode(False)`` where gradients are wanted."""
        ...


def subset(wanted: Sequence[int] | None, possible: tuple[int, ...]) -> tuple[int, ...]:
    """The wanted ones of the `possible` scales, ascending and at least one; all where None."""
    chosen = possible if wanted is None else tuple(sorted({int(scale) for scale in wanted}))
    if not chosen or not set(chosen) <= set(possible):
        raise ValueError(f"scales {list(chosen)} must be some of {list(possible)}")
    return chosen


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast: a row must not depend on what the host has switched on."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a device that knows no autocast
        return nullcontext()


def embed_scales(descriptor: Descriptor, pictures: Tensor) -> dict[int, Tensor]:
    """Embeddings at every scale: {scale: (B, D)}. For builders.

    A descriptor whose scales share work (`latent` encodes once) has a method of this name.
    """
    if hasattr(descriptor, "embed_scales"):
        return descriptor.embed_scales(pictures)
    return {scale: descriptor.embed(pictures, scale) for scale in descriptor.spec.scales}
