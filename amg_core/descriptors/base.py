"""What every descriptor is: a differentiable map from pictures to embeddings, with its own identity."""

from __future__ import annotations

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
        For instance ``pixel`` or ``sscd_disc_mixup``.
    metric : {"nl2", "cosine"}
        How embeddings compare: normalised L2 (AMG Eq. 8) or cosine (Eq. 9).
    preprocessing : str
        Versioned name of everything between a picture in [0, 1] and the network.
    scales : tuple of int
        Sides in pixels, ascending. At scale s a picture is first low-passed to s x s, so that a
        half-formed prediction is compared with equally blurred index pictures. The last is full detail.
    weights_sha256 : str
        Hash of the weights file, "" where there is none.
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
    """E(·) of the papers."""

    spec: DescriptorSpec

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, D) float32 embeddings at one of `spec.scales`.

        Differentiable with respect to `pictures`. Rows are independent: a batch gives what its
        members give alone (to float tolerance). Cosine descriptors return unit rows.
        """
        ...

    def to(self, device: torch.device | str) -> Descriptor:
        """Move the weights. Call inside ``torch.inference_mode(False)`` where gradients are wanted."""
        ...
