"""Make the background set: python -m training.background --drawings DIR … --weights FILE

It holds rows, for the `compact` descriptor, of pictures that are in no index (from `pool`, with another
seed than the training). See `amg_core/similarity/background.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from amg_core.descriptors.compact import CompactDescriptor
from amg_core.similarity import background
from benchmarks import harness

from . import pool

PICTURES = 1000
SEED = 77


def main() -> int:
    parser = pool.parser("training.background", __doc__)
    parser.add_argument("--weights", type=Path, help="weights of compact (those of the plugin)")
    arguments = harness.parse(parser)
    drawn = pool.drawings(arguments.drawings, arguments.halves)
    made = pool.pictures(PICTURES, drawn, np.random.default_rng(SEED))
    pictures = torch.from_numpy(np.stack(list(made))).permute(0, 3, 1, 2).float() / 255
    descriptor = CompactDescriptor.from_file(arguments.weights)
    rows = {}
    for scale in descriptor.spec.scales:
        found = torch.cat([descriptor.embed(part, scale) for part in pictures.split(50)])
        rows[background.key(descriptor.spec, scale)] = found.half().contiguous()
    save_file(rows, background.FILE)
    print(f"{background.FILE}: {background.FILE.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
