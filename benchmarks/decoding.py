"""A smaller decode against the full one: `python -m benchmarks.decoding --weights DIR PICTURE …`.

DIR holds taef2_encoder.pth and taef2_decoder.pth. Each picture is cropped to each size, encoded, decoded
in full and with 1, 2 and 3 enlargements left out (`decoders.reduced`). Printed, averaged over the
pictures and low-passed to 16, 32, 48 and 96 px a side: the RMS difference from the full decode, the worst
one, its correlation, and the RMS difference of the full decode from the picture. "latent averaged" is
what version 0.1 did. Then the work of each, counted and not run.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from amg_core.decoders import TAESDDecoder, load_taesd, reduced
from amg_core.descriptors.latent import load_taesd_encoder

from . import harness

SIDES = (16, 32, 48, 96)


def cropped(path: Path, width: int, height: int) -> Tensor:
    """(1, 3, height, width) in [0, 1]: the middle of the picture, on white where it is transparent."""
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    ground = Image.new("RGBA", drawn.size, "white")
    ground.alpha_composite(drawn)
    fitted = ImageOps.fit(ground.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return harness.to_tensor(fitted)


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def correlation(a: Tensor, b: Tensor) -> float:
    """Of the values of two pictures, each channel's mean taken away; 1 for two flat pictures."""
    a, b = (x - x.mean(dim=(2, 3), keepdim=True) for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-9)) if a.norm() > 0 else 1.0


def compare(seen: dict[str, Tensor], picture: Tensor, table: dict[tuple[str, int], list]) -> None:
    """Adds (RMS, correlation, RMS of the full decode from the picture) to `table`."""
    for name, small in seen.items():
        for side in SIDES:
            if side <= min(small.shape[-2:]):
                near, full, true = (
                    F.adaptive_avg_pool2d(x, side) for x in (small, seen["full"], picture)
                )
                row = rms(near, full), correlation(near, full), rms(full, true)
                table[name, side].append(row)


@torch.no_grad()
def fidelity(folder: Path, pictures: list[Path], width: int, height: int) -> None:
    encode, _ = load_taesd_encoder(folder / "taef2_encoder.pth")
    network = load_taesd(folder / "taef2_decoder.pth").network
    without = {times: reduced(network, times) for times in (1, 2, 3)}
    table: dict[tuple[str, int], list] = defaultdict(list)
    for path in pictures:
        picture = cropped(path, width, height)
        latent = encode(picture)
        seen = {"full": network(latent)}
        seen |= {f"without {times}": small(latent) for times, small in without.items()}
        seen["latent averaged"] = network(F.adaptive_avg_pool2d(latent, 16))
        compare(seen, picture, table)
    for (name, side), rows in table.items():
        if name != "full":
            mean, worst = np.mean(rows, axis=0), max(row[0] for row in rows)
            print(
                f"{width}x{height} | {name} | {side} px | RMS {mean[0]:.4f}, worst {worst:.4f} | "
                f"correlation {mean[1]:.4f} | full from the picture {mean[2]:.4f}",
                flush=True,
            )


def work(cells: int) -> None:
    """Multiply-accumulates of TAEF2 for cells x cells."""
    with torch.device("meta"):
        network, latent = TAESDDecoder(32, normed=True), torch.empty(1, 32, cells, cells)
    for times in range(4):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            picture = reduced(network, times)(latent)
        total = counter.get_total_flops() / 2e9
        print(f"{cells} cells | without {times} | {picture.shape[-1]} px | {total:.1f} GMAC")


def main() -> None:
    parser = harness.parser("benchmarks.decoding", __doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--sizes", nargs="+", default=["256x256", "512x512", "768x1152", "1024x1024"]
    )
    parser.add_argument("pictures", type=Path, nargs="*")
    args = harness.parse(parser)
    for cells in (32, 64, 128):
        work(cells)
    for size in args.sizes if args.pictures else ():
        fidelity(args.weights, args.pictures, *map(int, size.split("x")))


if __name__ == "__main__":
    main()
