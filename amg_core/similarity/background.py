"""The background set: rows of pictures that are in no index.

Copy detection normalises scores with such a set [1]_. If a picture is like many pictures that it is no
copy of, the same likeness to another picture is no sign of a copy. The set is the same for every index,
so the contents of an index do not move a limit.

`background.safetensors` holds the rows of 1,000 pictures (drawings and synthetic scenes, see
`training/background.py`) for the `compact` descriptor. Other descriptors have no rows there, and their
scores are not normalised.

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
    """Rows of the background set at one scale, (N, D) float32 of norm 1, or None if there are none."""
    return _stored().get(key(spec, scale))


def key(spec: DescriptorSpec, scale: int) -> str:
    """The name of a descriptor's rows in the file."""
    return f"{spec.id}/{spec.preprocessing}/{spec.weights_sha256[:16]}/{scale}"


@lru_cache(maxsize=1)
def _stored() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with torch.inference_mode(False):
        return {name: values.float() for name, values in load_file(FILE).items()}
