"""Are two stored pictures one? What the descriptor finds alike is compared in full detail.

The descriptor finds candidates, among them whole series: stars with 97 and 98 points, clocks that show
another time, a button in another colour. The second check (`amg_core.similarity.verifier`) finds how one
picture lies in the other. There the two are compared at the size of the stored pictures:

- **detail**: each patch with the patch in the same place. A copy may have lost detail or gained noise.
  Other detail in the same place makes another picture.
- **colour**: a part in another colour makes another picture.
- **direction**: a mirror image is another picture, because a left foot is no right foot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from amg_core.images import luminance, resize, thumbnail
from amg_core.similarity import verifier
from amg_core.similarity.metrics import GAIN

if TYPE_CHECKING:
    from amg_core.index import Index

Verify = Callable[[int, list[int], bool], list[float]]
VARIANTS = MIRRORED, RECOLOURED = "mirrored", "recoloured"  # which may count as duplicates

SIDE = 256  # px at which detail is compared: the longest side of a stored picture
BAND = 0.8, 4.0  # widths in px of the two blurs whose difference is the detail
PATCH = 32  # px of a patch of detail; they overlap by half
COARSE = 4  # how far both are reduced for coarse detail
SLACK = 1  # px by which a patch may be displaced
VISIBLE = 2e-3  # power of the detail, in grey levels from 0 to 1, at which a patch counts half
LOST = 0.05  # power that a copy has at least, of that of the other
LEAST = 4.0  # patches with visible detail that a comparison needs
CELL = 16  # px of a cell whose colour is compared
REGISTERED = 0.5  # score of the second check from which its alignment is tried
# Distances of red and blue from grey (0 to 1) by which no cell may differ: in any case, and as a share of
# the strongest colour where there is more than a TRACE of it.
COLOUR, HUE, TRACE = 0.15, 0.4, 0.05
# docs/dedup.md has what other values find, and what they take for a copy.
AGREES = 0.5  # part of the weaker patch's detail that the other must have
DIFFERENT = 0.05  # the largest share of the visible detail that may lie in other patches
SAME = 0.05  # in a series: the largest difference of the greys, as a share of their own deviation


def verification(index: Index, also: Collection[str] = ()) -> Verify:
    """A function that compares row i of an index with others.

    Parameters
    ----------
    also : VARIANTS that are duplicates, too

    Returns
    -------
    (i, others, series) -> for each other the share of the detail that agrees, in (0, 1], or 0 if it is
    another picture. `series`: row i is like many others. Then both must be nearly the same, in the same
    place.
    """
    stored = lru_cache(maxsize=256)(lambda i: thumbnail(index, i)[None])

    def verify(i: int, others: list[int], series: bool) -> list[float]:
        return compare(stored(i), [stored(other) for other in others], also, series)

    return verify


@torch.no_grad()
def compare(
    picture: Tensor,
    others: list[Tensor],
    also: Collection[str] = (),
    series: bool = False,
    different: float | None = None,
) -> list[float]:
    """The share of the detail of each of K others that a picture shows, or 0 if it is another picture.

    Parameters
    ----------
    picture : Tensor (1, 3, H, W) in [0, 1]
    others : K Tensors (1, 3, h, w) in [0, 1]
    series : nothing but nearly the same picture counts
    different : the largest share that may differ, in place of DIFFERENT
    """
    most = DIFFERENT if different is None else different
    mine, theirs = resize(picture, SIDE), torch.cat([resize(other, SIDE) for other in others])
    found = [0.0] * len(others)
    same = _unlike(mine, theirs) <= SAME if series else torch.ones(len(others), dtype=torch.bool)
    if same.any():
        seen = theirs[same]
        shares = _shares(mine.expand_as(seen), seen, torch.ones_like(seen[:, :1]), also)
        for k, share in zip(same.nonzero()[:, 0].tolist(), shares, strict=True):
            found[k] = share
    left = [k for k, share in enumerate(found) if share < 1 - DIFFERENT and not series]
    if left:
        match = verifier.registered(picture, [others[k] for k in left])
        at = torch.einsum("ijk,bck->bijc", verifier.grid(SIDE, mine.device), match.place)
        inside = (at.abs() <= 1).all(-1)[:, None].float()
        # A symmetric picture is found whichever way the second check turned it.
        for view in [mine] + [mine.flip(-1)] * (MIRRORED in also):
            moved = F.grid_sample(
                view.expand(len(left), -1, -1, -1), at.clamp(-1, 1), align_corners=False,
                padding_mode="border",
            )  # fmt: skip
            shares = _shares(moved, theirs[left], inside, also)
            for k, share, score in zip(left, shares, match.score.tolist(), strict=True):
                if score > REGISTERED:
                    found[k] = max(found[k], share)
    return [share if share >= 1 - most else 0.0 for share in found]


def _shares(mine: Tensor, theirs: Tensor, inside: Tensor, also: Collection[str]) -> list[float]:
    """The share of the detail that agrees in aligned pictures (K, 3, SIDE, SIDE), 0 in other colours.

    `inside` (K, 1, SIDE, SIDE) is 1 where they overlap.
    """
    share = 1 - _different(mine, theirs, inside)
    if RECOLOURED not in also:
        share = share * ~_recoloured(mine, theirs, inside)
    shares: list[float] = share.tolist()
    return shares


def _different(mine: Tensor, theirs: Tensor, inside: Tensor) -> Tensor:
    """The share (K,) of the visible detail that differs, fine or coarse, whichever is larger.

    1 if next to nothing is to be seen.
    """
    both = []
    for reduced in (1, COARSE):
        a, b, where = (F.avg_pool2d(x, reduced) for x in (_grey(mine), _grey(theirs), inside))
        both.append(_differs(_detail(a) * where, _detail(b) * where, PATCH // reduced))
    share, seen = (torch.stack(found) for found in zip(*both, strict=True))
    return torch.where(seen.any(0), (share * seen).amax(0), 1.0)


def _differs(a: Tensor, b: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """The share (K,) of the detail (K, 1, H, W) that differs, and whether there is enough of it.

    A patch agrees if its product with the other is at least AGREES of the weaker one's power, or of
    LOST of the stronger one's. So missing detail does no harm, nor does noise, which has no product with
    anything. But something in a place where the other has nothing does.
    """
    patches = partial(F.avg_pool2d, kernel_size=patch, stride=patch // 2)
    power_b = patches(b * b)
    agrees, power = torch.zeros_like(power_b, dtype=torch.bool), power_b
    for dy in range(-SLACK, SLACK + 1):
        for dx in range(-SLACK, SLACK + 1):
            moved = torch.roll(a, (dy, dx), (2, 3))
            power_a = patches(moved * moved)
            weaker = torch.maximum(
                torch.minimum(power_a, power_b), LOST * torch.maximum(power_a, power_b)
            )
            agrees |= patches(moved * b) > AGREES * weaker
            power = torch.maximum(power, power_a)
    weight = power / (power + VISIBLE)
    total = weight.sum((1, 2, 3))
    return (weight * ~agrees).sum((1, 2, 3)) / total.clamp_min(1e-6), total >= LEAST


def _grey(pictures: Tensor) -> Tensor:
    return luminance(pictures)[:, None]


def _detail(grey: Tensor) -> Tensor:
    """What is between the two widths of BAND, (K, 1, H, W)."""
    fine, coarse = (_blurred(grey, width) for width in BAND)
    return fine - coarse


def _blurred(grey: Tensor, width: float) -> Tensor:
    r = math.ceil(2.5 * width)
    t = torch.arange(-r, r + 1, device=grey.device, dtype=grey.dtype)
    kernel = torch.softmax(-(t**2) / (2 * width**2), 0)
    padded = F.pad(grey, (r, r, r, r), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])


def _unlike(mine: Tensor, theirs: Tensor) -> Tensor:
    """The mean difference of the greys (K,), as a share of the deviation of `mine`."""
    a, b = _grey(mine), _grey(theirs)
    deviation = (a - a.mean()).abs().mean().clamp_min(1e-6)
    return (a - b).abs().mean((1, 2, 3)) / deviation


def _recoloured(mine: Tensor, theirs: Tensor, inside: Tensor) -> Tensor:
    """Whether any cell has another colour, (K,) bool, at the best saturation (½ to 2)."""
    area = F.avg_pool2d(inside, CELL)
    a, b = (
        F.avg_pool2d((x[:, ::2] - x.mean(1, keepdim=True)) * inside, CELL) / area.clamp_min(1e-6)
        for x in (mine, theirs)
    )
    seen = (area > 0.5).float()
    a, b = a * seen, b * seen
    power = (a * a).sum((1, 2, 3))
    gain = torch.where(power > 0, (a * b).sum((1, 2, 3)) / power.clamp_min(1e-6), 1).clamp(*GAIN)
    a = gain[:, None, None, None] * a
    apart, strong, other = (x.square().sum(1).sqrt().flatten(1).amax(1) for x in (a - b, a, b))
    strongest = torch.maximum(strong / gain, other)  # before the match, so that grey is no match
    return (apart > COLOUR) | (apart > (HUE * strongest).clamp_min(TRACE))
