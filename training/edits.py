"""Edits of pictures by people and models, on batches of tensors: the views for training the descriptor.

Each is drawn anew for each picture: shift, crop, stretch, turn, border, collage, replaced part, overlay,
colours, blur, noise, recompression, and the soft, grainy predictions of a model that is half-way.
Mirror images are not among them: the guard asks for both ways round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(pictures: Tensor, side: int) -> Tensor:
    """As an index holds them: (B, 3, S, S) -> (B, 3, side, side)."""
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)


def edited(pictures: Tensor, others: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """One edited view of each picture (B, 3, S, S) in [0, 1] -> (B, 3, side, side) in [0, 1].

    others : Tensor (B, 3, S, S), pictures that are pasted in and are no copy of anything here.
    """
    others = reference(others, side)
    x = _moved(pictures, others, side, rng)
    x = _replaced(x, others.roll(1, 0), rng)
    x = _coloured(x, rng)
    x = _overlaid(x, others.roll(2, 0), rng)
    x = _softened(x, rng)
    x = _grainy(x, rng)
    return _recompressed(x, rng).clamp(0, 1)


def half_formed(x: Tensor, cells: int, rng: torch.Generator) -> Tensor:
    """As a model predicts it early: `cells` pixels a side, some contrast lost, clouds of noise."""
    b = len(x)
    low = F.adaptive_avg_pool2d(x, cells)
    mean = low.mean(dim=(2, 3), keepdim=True)
    low = mean + (low - mean) * _between(b, 0.5, 1.2, rng)
    noise = torch.randn(low.shape, generator=rng)
    low = low + noise * _between(b, 0.0, 0.06, rng) * _chance(b, 0.5, rng)
    return F.interpolate(low, x.shape[-2:], mode="bilinear").clamp(0, 1)


def _between(b: int, low: float, high: float, rng, *more: int) -> Tensor:
    shape = (b, 1, 1, 1) if not more else (b, *more)
    return torch.rand(shape, generator=rng) * (high - low) + low


def _chance(b: int, p: float, rng) -> Tensor:
    return (torch.rand((b, 1, 1, 1), generator=rng) < p).float()


def _moved(pictures: Tensor, others: Tensor, side: int, rng) -> Tensor:
    """Shift, crop, stretch, turn; or the whole picture, smaller, on something else."""
    b = len(pictures)
    kind = torch.rand(b, generator=rng)
    u = lambda low, high: torch.rand(b, generator=rng) * (high - low) + low  # noqa: E731
    zoom = torch.where(kind < 0.35, u(0.92, 1.08), u(0.5, 1.0))  # share of the side that is seen
    pasted = kind > 0.74
    zoom = torch.where(pasted, 1 / u(0.4, 0.95), zoom)
    aspect = torch.exp(u(-0.25, 0.25) * (kind > 0.3))
    sx, sy = zoom * aspect.sqrt(), zoom / aspect.sqrt()
    angle = u(-25, 25) * math.pi / 180 * ((kind > 0.25) & (kind < 0.5))
    room_x, room_y = (1 - sx).abs().clamp_min(0.06), (1 - sy).abs().clamp_min(0.06)
    tx, ty = u(-1, 1) * room_x, u(-1, 1) * room_y
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [torch.stack([sx * cos, -sy * sin, tx], 1), torch.stack([sx * sin, sy * cos, ty], 1)], 1
    )
    grid = F.affine_grid(theta, (b, 3, side, side), align_corners=False)
    small = F.interpolate(F.avg_pool2d(pictures, 2), pictures.shape[-2:], mode="bilinear")
    source = torch.where((zoom > 1.15)[:, None, None, None], small, pictures)
    x = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    outside = (grid.abs() > 1).any(dim=-1)[:, None].float()
    fill = torch.rand((b, 3, 1, 1), generator=rng).expand_as(x)
    fill = torch.where(_chance(b, 0.4, rng) > 0, fill.round(), fill)  # white, black, pure colours
    fill = torch.where(_chance(b, 0.5, rng) * pasted[:, None, None, None] > 0, others, fill)
    keep = ~pasted & (torch.rand(b, generator=rng) < 0.3)  # the edge goes on
    return torch.where((outside > 0) & ~keep[:, None, None, None], fill, x)


def _box(x: Tensor, low: float, high: float, rng) -> Tensor:
    """A mask (B, 1, H, W) of a rectangle of `low` to `high` of the sides."""
    b, side = len(x), x.shape[-1]
    place = torch.arange(side)[None] / side
    spans = []
    for _ in range(2):
        length = torch.rand((b, 1), generator=rng) * (high - low) + low
        start = torch.rand((b, 1), generator=rng) * (1 - length)
        spans.append(((place >= start) & (place < start + length)).float())
    return (spans[0][:, :, None] * spans[1][:, None])[:, None]


def _replaced(x: Tensor, others: Tensor, rng) -> Tensor:
    """A part is something else: another picture or a flat colour."""
    mask = _box(x, 0.3, 0.65, rng) * _chance(len(x), 0.3, rng)
    flat = torch.rand((len(x), 3, 1, 1), generator=rng)
    fill = torch.where(_chance(len(x), 0.3, rng) > 0, flat, others)
    return x * (1 - mask) + fill * mask


def _overlaid(x: Tensor, others: Tensor, rng) -> Tensor:
    """Stripes like lines of text, or another picture shining through."""
    b, side = len(x), x.shape[-1]
    lines = (torch.rand((b, 1, side, side), generator=rng) < 0.6).float()
    rows = (torch.arange(side) % 9 < 5).float()[:, None]
    text = _box(x, 0.2, 0.9, rng) * lines * rows * _chance(b, 0.2, rng)
    ink = torch.rand((b, 3, 1, 1), generator=rng).round()
    x = x * (1 - text) + ink * text
    share = _between(b, 0.1, 0.4, rng) * _chance(b, 0.1, rng)
    return x * (1 - share) + others * share


def _coloured(x: Tensor, rng) -> Tensor:
    """Brightness, contrast, gamma, tint, saturation, hue, grey."""
    b = len(x)
    on = _chance(b, 0.65, rng)
    grey = x.mean(dim=1, keepdim=True)
    saturation = torch.where(_chance(b, 0.15, rng) > 0, 0.0, _between(b, 0.3, 1.7, rng))
    y = grey + (x - grey) * saturation
    turn = torch.where(
        _chance(b, 0.35, rng) > 0, _between(b, -math.pi, math.pi, rng), _between(b, -0.3, 0.3, rng)
    )
    y = torch.where(_chance(b, 0.5, rng) > 0, _hue(y, turn.flatten()), y)
    y = y * _between(b, 0.75, 1.25, rng, 3, 1, 1)
    mean = y.mean(dim=(1, 2, 3), keepdim=True)
    y = mean + (y - mean) * _between(b, 0.45, 1.5, rng)
    y = y * _between(b, 0.4, 1.4, rng) + _between(b, -0.12, 0.12, rng)
    y = y.clamp(1e-3, 1) ** torch.exp(_between(b, -0.5, 0.5, rng))
    return torch.where(on > 0, y, x)


def _hue(x: Tensor, angle: Tensor) -> Tensor:
    """Turn colours about the grey axis by `angle` (B,) radians (Rodrigues)."""
    k = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -k, k], [k, 0, -k], [-k, k, 0]])
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turn = torch.eye(3) * cos + cross * sin + (1 - cos) / 3
    return torch.einsum("bij,bjhw->bihw", turn, x).clamp(0, 1)


def _softened(x: Tensor, rng) -> Tensor:
    """Less detail, to sides from 12 pixels on; a different one for each quarter of the batch."""
    parts = []
    for part in x.chunk(4):
        side = int(torch.randint(14, 80, (1,), generator=rng))
        soft = F.interpolate(F.adaptive_avg_pool2d(part, side), x.shape[-2:], mode="bilinear")
        parts.append(torch.where(_chance(len(part), 0.4, rng) > 0, soft, part))
    return torch.cat(parts)


def _grainy(x: Tensor, rng) -> Tensor:
    """Noise of single pixels and of patches, as a model leaves it."""
    b, side = len(x), x.shape[-1]
    x = x.clone()
    chosen = torch.rand(b, generator=rng) < 0.3
    fine = torch.randn(x[chosen].shape, generator=rng)
    x[chosen] += fine * _between(len(fine), 0, 0.14, rng)
    coarse = torch.randn((b, 3, side // 6, side // 6), generator=rng)
    coarse = F.interpolate(coarse, x.shape[-2:], mode="bilinear")
    return x + coarse * _between(b, 0, 0.12, rng) * _chance(b, 0.25, rng)


_LUMINANCE = torch.tensor([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113,
    92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]).reshape(8, 8) / 255  # fmt: skip
_DCT = torch.tensor(
    [
        [
            math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * n + 1) * k / 16)
            for n in range(8)
        ]
        for k in range(8)
    ]
)


def _recompressed(x: Tensor, rng) -> Tensor:
    """JPEG's quantised cosine transform of 8x8 blocks, a fifth of the pictures; side divisible by 8."""
    chosen = torch.rand(len(x), generator=rng) < 0.2
    if not chosen.any():
        return x
    part = x[chosen]
    b, c, h, w = part.shape
    blocks = part.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    spectrum = _DCT @ (blocks - 0.5) @ _DCT.T
    step = _LUMINANCE * _between(b, 0.8, 6, rng)[..., None, None]
    back = _DCT.T @ (torch.round(spectrum / step) * step) @ _DCT + 0.5
    out = x.clone()
    out[chosen] = back.transpose(3, 4).reshape(b, c, h, w)
    return out
