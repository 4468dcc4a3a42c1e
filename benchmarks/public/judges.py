"""What every picture is graded by: SSCD in the three ways of the literature, the verdict, CLIP score.

The three ways are not interchangeable: 0.5 means something else in each (docs/benchmark.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from amg_core.descriptors import sscd
from amg_core.images import resize

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
Prepare = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [0, 1] -> what the network reads


@dataclass(frozen=True)
class Protocol:
    """A way to measure SSCD. `network` is MIXUP or LARGE, `who` the papers that measure so."""

    name: str
    network: sscd.Layout
    prepare: Prepare
    who: str


def normalised(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    middle, width = (pictures.new_tensor(each).view(3, 1, 1) for each in (mean, std))
    return (pictures - middle) / width


def squeezed(pictures: Tensor, side: int) -> Tensor:
    """Into a square, as `Resize([side, side])`."""
    return resize(pictures.float(), side)


def cropped(pictures: Tensor, short: int, side: int) -> Tensor:
    """The middle, as `Resize(short)` and `CenterCrop(side)`."""
    height, width = pictures.shape[-2:]
    scale = short / min(height, width)
    size = (
        (short, max(short, int(width * scale))) if height <= width
        else (max(short, int(height * scale)), short)
    )  # fmt: skip
    resized = F.interpolate(
        pictures.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (round((length - side) / 2) for length in size)
    return resized[..., top : top + side, left : left + side]


def in_meta(pictures: Tensor) -> Tensor:
    return normalised(squeezed(pictures, 320), *IMAGENET)


def in_wen(pictures: Tensor) -> Tensor:
    return normalised(cropped(pictures, 256, 224), *HALF)


PROTOCOLS = (
    Protocol("meta", sscd.MIXUP, in_meta, "Pizzi et al. 2022, localizing_memorization"),
    Protocol("wen", sscd.LARGE, in_wen, "Wen et al., SAIL, anisotropy, MemBench, GUARD"),
    Protocol(
        "amg", sscd.MIXUP, partial(squeezed, side=224), "AMG's code, which normalises nothing"
    ),
)

Embed = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [0, 1] -> rows (B, D) of norm 1


def embeddings(
    mixup: Path | None, large: Path | None, device: torch.device | str = "cpu"
) -> dict[str, Embed]:
    """The protocols whose network is given, by name. AMGError if a file is not of that network."""
    files = {sscd.MIXUP: mixup, sscd.LARGE: large}
    networks = {
        layout: sscd.network(path, layout).to(device)
        for layout, path in files.items()
        if path is not None
    }

    def embed(network: sscd.SSCDNetwork, prepare: Prepare, pictures: Tensor) -> Tensor:
        with torch.inference_mode():
            rows = [network(prepare(one.to(device))).cpu() for one in pictures.split(8)]
        return torch.cat(rows)

    return {
        one.name: partial(embed, networks[one.network], one.prepare)
        for one in PROTOCOLS
        if one.network in networks
    }


def missing(mixup: Path | None, large: Path | None) -> list[str]:
    """What has to be given for the other protocols, in words."""
    files = {
        sscd.MIXUP: (mixup, "--sscd sscd_disc_mixup"),
        sscd.LARGE: (large, "--sscd-large sscd_disc_large"),
    }
    return [
        f"SSCD as measured by {one.who}: {files[one.network][1]}.torchscript.pt"
        for one in PROTOCOLS
        if files[one.network][0] is None
    ]


@dataclass(frozen=True)
class References:
    """The training pictures' rows (N, D), one table for each protocol."""

    rows: Mapping[str, Tensor]

    @classmethod
    def of(cls, pictures: Iterable[Tensor], embed: Mapping[str, Embed]) -> References:
        """Pictures (1, 3, H, W) of any sizes, one after the other."""
        rows: dict[str, list[Tensor]] = {name: [] for name in embed}
        for picture in pictures:
            for name, f in embed.items():
                rows[name].append(f(picture))
        return cls({name: torch.cat(each) for name, each in rows.items()})

    def likeness(
        self, picture: Tensor, own: Tensor, embed: Mapping[str, Embed]
    ) -> dict[str, dict[str, float | None]]:
        """{protocol: {"any", "own"}} of a picture (1, 3, H, W).

        The largest cosine with any training picture, and with those of its prompt, `own` (N,) bool. None
        if it has none.
        """
        found: dict[str, dict[str, float | None]] = {}
        for name, f in embed.items():
            cosines = (f(picture) @ self.rows[name].T)[0]
            mine = cosines[own]
            found[name] = {
                "any": float(cosines.max()),
                "own": float(mine.max()) if len(mine) else None,
            }
        return found
