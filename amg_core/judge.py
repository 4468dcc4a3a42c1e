"""The second judge: measures that the guidance never follows, so that it cannot have fooled them."""

from __future__ import annotations

import torch
from torch import Tensor

from .images import low_pass, luminance

ZNCC_SIDE = 16


def zncc(a: Tensor, b: Tensor) -> Tensor:
    """Zero-mean normalised cross-correlation of the 16x16 grey pictures.

    Blind to brightness, contrast and fine detail: 1 = the same picture up to these, about 0 =
    unrelated. A flat picture correlates with nothing (0).

    Parameters
    ----------
    a, b : Tensor (B, 3, H, W) in [0, 1], any size each.

    Returns
    -------
    Tensor (B,) in [−1, 1].
    """
    return (_standardised(a) * _standardised(b)).sum(dim=1)


def zncc_matrix(a: Tensor, b: Tensor) -> Tensor:
    """ZNCC of every picture of `a` with every picture of `b`: (A, B)."""
    return _standardised(a) @ _standardised(b).T


def _standardised(pictures: Tensor) -> Tensor:
    grey = luminance(low_pass(pictures.float(), ZNCC_SIDE)).flatten(1)
    grey = grey - grey.mean(dim=1, keepdim=True)
    return grey / grey.norm(dim=1, keepdim=True).clamp_min(1e-3)


def over_index(picture: Tensor, ids: list[int], thumbnails) -> Tensor:
    """ZNCC of a picture (1, 3, H, W) with each candidate's thumbnail or its mirror image: (len(ids),).

    thumbnails: row id -> (3, h, w) in [0, 1].
    """
    others = torch.cat([low_pass(thumbnails(i)[None], ZNCC_SIDE) for i in ids]).to(picture)
    return torch.maximum(zncc_matrix(picture, others), zncc_matrix(picture, others.flip(-1)))[0]
