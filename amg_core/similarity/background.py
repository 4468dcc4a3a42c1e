"""The background set: pictures that are in no index, as rows of each descriptor.

Copy detection normalises scores against such a set [1]_: what a picture has in common with a thousand
pictures that it is no copy of says nothing about the one that it may be a copy of. The set is the same
for every index, so nothing that an index holds moves a limit.

`background.safetensors` holds the rows of 1,000 pictures (drawings and made-up scenes, see
`training/background.py`) for the `compact` descriptor. Others have none, and are not normalised.

References
----------
.. [1] E. Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022, §5.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..descriptors.base import DescriptorSpec

FILE = Path(__file__).with_name("background.safetensors")


def rows(spec: DescriptorSpec, scale: int) -> Tensor | None:
    """Unit rows (N, D) float32 of the background set at one scale; None where there is none."""
    return _stored().get(key(spec, scale))


def key(spec: DescriptorSpec, scale: int) -> str:
    """What the rows of a descriptor are called in the file."""
    return f"{spec.id}/{spec.preprocessing}/{spec.weights_sha256[:16]}/{scale}"


@lru_cache(maxsize=1)
def _stored() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with torch.inference_mode(False):
        return {name: values.float() for name, values in load_file(FILE).items()}
