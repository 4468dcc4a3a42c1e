"""The interface of descriptors: differentiable maps from pictures to embeddings, each with an identity."""

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
        For instance ``pixel``, ``sscd_disc_mixup``, ``latent_sd15`` or ``clip_vit_b_32``. The part
        before the first "_" is the name of the descriptor, `kind`.
    metric : {"nl2", "cosine"}
        How embeddings are compared: by normalised L2 (AMG Eq. 8) or by the cosine (Eq. 9).
    preprocessing : str
        Versioned name of all that happens to a picture in [0, 1] before the network.
    scales : tuple of int
        Sides in pixels (latent descriptors: in latent cells), ascending, so the last is the finest. At
        scale s a picture is first low-passed to s x s, so that a noisy prediction is compared with
        equally blurred pictures of the index.
    weights_sha256 : str
        Hash of the weights (`tensors.tensors_sha256`), "" if there are none.
    """

    id: str
    metric: str
    preprocessing: str
    scales: tuple[int, ...]
    weights_sha256: str = ""

    @property
    def kind(self) -> str:
        """The descriptor's name, as `registry.create` takes it."""
        return self.id.partition("_")[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"scales": list(self.scales)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DescriptorSpec:
        return cls(**(data | {"scales": tuple(int(s) for s in data["scales"])}))


class Descriptor(Protocol):
    """The embedding E(·) of the papers.

    `space` says what the guard passes at each step. For "picture" it passes the decoded prediction to
    `embed`, for "latent" the prediction itself to `LatentSpace.embed_latents`. Some descriptors also
    implement `Shrinking`, `MultiScale` or `LatentSpace`.
    """

    spec: DescriptorSpec
    space: str

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        """Embed pictures (B, 3, H, W) in [0, 1] of any size at one of `spec.scales`: (B, D) float32.

        Differentiable with respect to `pictures`. Rows are independent: a picture has the same row in
        a batch and alone, to float tolerance. Cosine descriptors return rows of norm 1.
        """
        ...

    def to(self, device: torch.device | str) -> Descriptor:
        """Move the weights. Call inside ``torch.inference_mode(False)`` if gradients are needed."""
        ...


@runtime_checkable
class Shrinking(Descriptor, Protocol):
    """A descriptor that first resizes every picture to one size, so that index builds can batch them."""

    def shrink(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, 3, s, s). `embed` of the result gives the same rows."""
        ...


@runtime_checkable
class MultiScale(Descriptor, Protocol):
    """A descriptor whose scales share work, such as `latent`, which encodes a picture once for all."""

    def embed_scales(self, pictures: Tensor) -> dict[int, Tensor]:
        """(B, 3, H, W) in [0, 1] -> {scale: (B, D)}, the same rows as `embed`."""
        ...


class LatentSpace(Descriptor, Protocol):
    """A descriptor with `space` "latent". It compares latents of `channels` channels."""

    channels: int

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, C, h, w) float32. Raises AMGError without an encoder."""
        ...

    def embed_latents(self, latents: Tensor, scale: int) -> Tensor:
        """(B, C, h, w) latents in the sampler's space -> (B, C·scale²): `reduce`, flattened."""
        ...

    def reduce(self, latents: Tensor, scale: int) -> Tensor:
        """(B, C, h, w) -> (B, C, scale, scale) float32. Linear."""
        ...

    def adjoint(self, gradient: Tensor, size: Sequence[int]) -> Tensor:
        """The transpose of `reduce`: the gradient in its output -> in latents of `size` (h, w)."""
        ...


def compares_latents(descriptor: Descriptor) -> TypeGuard[LatentSpace]:
    """Whether the guard passes the prediction to this descriptor without decoding it."""
    return descriptor.space == "latent"


def subset(wanted: Sequence[int] | None, possible: tuple[int, ...]) -> tuple[int, ...]:
    """The `wanted` scales in ascending order, or all `possible` ones for None.

    ValueError if there are none, or if one of them is not possible.
    """
    chosen = possible if wanted is None else tuple(sorted({int(scale) for scale in wanted}))
    if not chosen or not set(chosen) <= set(possible):
        raise ValueError(f"scales {list(chosen)} must be some of {list(possible)}")
    return chosen


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, so that a row does not depend on the host's settings."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # a device without autocast
        return nullcontext()


def embed_scales(descriptor: Descriptor, pictures: Tensor) -> dict[int, Tensor]:
    """Embeddings at every scale, {scale: (B, D)}, for index builds."""
    if isinstance(descriptor, MultiScale):
        return descriptor.embed_scales(pictures)
    return {scale: descriptor.embed(pictures, scale) for scale in descriptor.spec.scales}
