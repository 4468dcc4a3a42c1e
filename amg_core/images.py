"""Pictures as tensors: (B, 3, H, W) float in [0, 1], RGB."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def low_pass(pictures: Tensor, side: int) -> Tensor:
    """Shrink to (B, 3, side, side) by area averaging: what is left when finer detail is undecided.

    Differentiable; the aspect ratio is not kept (a copy stretched to another format is a copy).
    A picture smaller than `side` is enlarged bilinearly.
    """
    if min(pictures.shape[-2:]) < side:
        return resize(pictures, side)
    return F.adaptive_avg_pool2d(pictures, side)


def resize(pictures: Tensor, side: int) -> Tensor:
    """Antialiased bilinear resize to (B, 3, side, side); agrees with Pillow's BILINEAR."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)


PARTS = 5


def parts(picture: Tensor) -> list[Tensor]:
    """The middle and the four quarters of a picture (1, 3, H, W): what a border or a collage is around."""
    height, width = picture.shape[-2:]
    rows = [slice(0, -(-height // 2)), slice(height // 2, height)]
    columns = [slice(0, -(-width // 2)), slice(width // 2, width)]
    top, left = height // 8, width // 8
    middle = picture[..., top : height - top, left : width - left]
    return [middle, *(picture[..., row, column] for row in rows for column in columns)]


def luminance(pictures: Tensor) -> Tensor:
    """Rec. 601 grey, (B, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pictures.dtype, device=pictures.device)
    return torch.einsum("bchw,c->bhw", pictures, weights)


def thumbnail(index, i: int) -> Tensor:
    """The thumbnail of row i of an index, (3, h, w) in [0, 1], longest side at most 256."""
    return torch.from_numpy(np.array(index.thumbnail(i), dtype=np.float32)).permute(2, 0, 1) / 255
