"""Pictures as tensors: (B, 3, H, W) float in [0, 1], RGB."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .threads import one_thread

if TYPE_CHECKING:
    from PIL import Image


class Pictured(Protocol):
    """An index, or part of one, that keeps small pictures."""

    def thumbnail(self, i: int) -> Image.Image: ...


def to_tensor(pixels: np.ndarray | Image.Image, device: torch.device | str = "cpu") -> Tensor:
    """Pixels (H, W, 3) uint8, or a picture in RGB, as (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).to(device).permute(2, 0, 1)[None].float().div_(255)


@one_thread()
def low_pass(pictures: Tensor, side: int) -> Tensor:
    """Reduce to (B, 3, side, side) by area averaging, which removes detail that noise still hides.

    Differentiable. The aspect ratio is not kept, because a copy stretched to another format is a copy.
    A picture smaller than `side` is enlarged bilinearly.
    """
    if min(pictures.shape[-2:]) < side:
        return resize(pictures, side)
    return F.adaptive_avg_pool2d(pictures, side)


@one_thread()
def resize(pictures: Tensor, side: int) -> Tensor:
    """Antialiased bilinear resize to (B, 3, side, side), as Pillow's BILINEAR."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)


PARTS = 5


def parts(picture: Tensor) -> list[Tensor]:
    """The middle and the four quarters of a picture (1, 3, H, W): a copy may lie in a border or collage."""
    height, width = picture.shape[-2:]
    rows = [slice(0, -(-height // 2)), slice(height // 2, height)]
    columns = [slice(0, -(-width // 2)), slice(width // 2, width)]
    top, left = height // 8, width // 8
    middle = picture[..., top : height - top, left : width - left]
    return [middle, *(picture[..., row, column] for row in rows for column in columns)]


Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the sides


def largest_box(free: Tensor) -> Box | None:
    """The largest rectangle in which `free` (H, W) bool is True everywhere, or None."""
    height, width = free.shape
    best, box, above = 0, None, [0] * width
    for bottom, row in enumerate(free.tolist(), 1):
        above = [high + 1 if here else 0 for high, here in zip(above, row, strict=True)]
        left_of: list[tuple[int, int]] = []  # (where a rectangle could begin, its height)
        for right, high in enumerate([*above, 0]):
            begin = right
            while left_of and left_of[-1][1] >= high:
                begin, tall = left_of.pop()
                if tall * (right - begin) > best:
                    best = tall * (right - begin)
                    box = (
                        (bottom - tall) / height, begin / width, bottom / height, right / width
                    )  # fmt: skip
            left_of.append((begin, high))
    return box


def cut(pictures: Tensor, box: Box) -> Tensor:
    """Crop pictures or latents (B, C, H, W) to a box, to the nearest pixel."""
    height, width = pictures.shape[-2:]
    top, left, bottom, right = box
    rows = slice(round(top * height), round(bottom * height))
    return pictures[..., rows, round(left * width) : round(right * width)]


def luminance(pictures: Tensor) -> Tensor:
    """Rec. 601 grey, (B, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pictures.dtype, device=pictures.device)
    return torch.einsum("bchw,c->bhw", pictures, weights)


def thumbnail(index: Pictured, i: int) -> Tensor:
    """The thumbnail of row i of an index, (3, h, w) in [0, 1], longest side at most 256."""
    return to_tensor(index.thumbnail(i))[0]


def without_brightness_and_contrast(gradient: Tensor, pictures: Tensor) -> Tensor:
    """Remove the part of a picture gradient that only changes brightness, tint or contrast.

    For each sample the components along each channel's constant and along the picture's deviation from
    its mean are projected out. A move along them lowers the similarity, but the picture stays a copy.
    gradient, pictures : (B, 3, H, W) -> (B, 3, H, W), orthogonal to both.
    """
    flat = gradient - gradient.mean(dim=(2, 3), keepdim=True)
    deviation = pictures - pictures.mean(dim=(2, 3), keepdim=True)
    along = (flat * deviation).sum(dim=(1, 2, 3), keepdim=True)
    length = deviation.square().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return flat - deviation * along / length


def resolved_side(sigma: float, latent_side: int) -> float:
    """The side, in pixels, up to which detail is above the noise at `sigma`, for a latent of that side L.

    A unit-variance latent with the 1/f² spectrum of natural pictures has coefficients of size
    L/(k·√(π/2·ln L)) at a radial frequency of k half-cycles. Those above σ are larger than the noise.
    """
    side = max(2, latent_side)
    return side / (math.sqrt(math.pi / 2 * math.log(side)) * max(sigma, 1e-6))
