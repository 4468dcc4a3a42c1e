"""What every descriptor is: a differentiable map from pictures to embeddings, with its own identity."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class DescriptorSpec:
    """The identity of a descriptor. Two embeddings compare only if their specs are equal.

    Attributes
    ----------
    id : str
        For instance ``pixel``, ``sscd_disc_mixup``, ``latent_sd15`` or ``clip_vit_b_32``. What stands
        before the first "_" is the name of the descriptor, `kind`.
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

    @property
    def kind(self) -> str:
        """The name that `registry.create` takes."""
        return self.id.partition("_")[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"scales": list(self.scales)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DescriptorSpec:
        return cls(**(data | {"scales": tuple(int(s) for s in data["scales"])}))


class Descriptor(Protocol):
    """E(·) of the papers.

    `space` says what the guard hands over at each step: "picture" = a decoded prediction, to `embed`;
    "latent" = the prediction as it is, to `LatentSpace.embed_latents`. What some descriptors can do
    besides: `Shrinking`, `MultiScale`, `LatentSpace`.
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


@runtime_checkable
class Shrinking(Descriptor, Protocol):
    """A descriptor that brings pictures of all sizes down to one: builders batch through it."""

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, 3, s, s), of which `embed` gives the very same rows."""
        ...


@runtime_checkable
class MultiScale(Descriptor, Protocol):
    """A descriptor whose scales share work: `latent` encodes a picture once for all of them."""

    def embed_scales(self, pictures: Tensor) -> dict[int, Tensor]:
        """(B, 3, H, W) in [0, 1] -> {scale: (B, D)}, the rows that `embed` gives."""
        ...


class LatentSpace(Descriptor, Protocol):
    """A descriptor of `space` "latent": it compares latents of `channels` channels."""

    channels: int

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, C, h, w) float32. AMGError without an encoder."""
        ...

    def embed_latents(self, latents: Tensor, scale: int) -> Tensor:
        """(B, C, h, w) latents in the sampler's space -> (B, C·scale²): `reduce`, flattened."""
        ...

    def reduce(self, latents: Tensor, scale: int) -> Tensor:
        """(B, C, h, w) -> (B, C, scale, scale) float32. Linear."""
        ...

    def adjoint(self, gradient: Tensor, size: Sequence[int]) -> Tensor:
        """The transpose of `reduce`: ∇ of what it makes -> ∇ of latents of that `size` (h, w)."""
        ...


def compares_latents(descriptor: Descriptor) -> TypeGuard[LatentSpace]:
    """Whether the guard hands over the prediction as it is, without decoding it."""
    return descriptor.space == "latent"


def subset(wanted: Sequence[int] | None, possible: tuple[int, ...]) -> tuple[int, ...]:
    """The wanted ones of the `possible` scales, ascending and at least one; all where None."""
    chosen = possible if wanted is None else tuple(sorted({int(scale) for scale in wanted}))
    if not chosen or not set(chosen) <= set(possible):
        raise ValueError(f"scales {list(chosen)} must be some of {list(possible)}")
    return chosen


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast: a row must not depend on what the host has switched on."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a device that knows no autocast
        return nullcontext()


def embed_scales(descriptor: Descriptor, pictures: Tensor) -> dict[int, Tensor]:
    """Embeddings at every scale: {scale: (B, D)}. For builders."""
    if isinstance(descriptor, MultiScale):
        return descriptor.embed_scales(pictures)
    return {scale: descriptor.embed(pictures, scale) for scale in descriptor.spec.scales}
