"""SSCD's network without its weights, which are Meta's to give away."""

from __future__ import annotations

import pytest
import torch

from amg_core.descriptors.sscd import expected_shapes


@pytest.fixture(scope="session")
def sscd_state() -> dict[str, torch.Tensor]:
    """SSCD's tensors under torchvision's names: random, scaled so that signal survives 50 layers."""
    draw = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in expected_shapes().items():
        if name.endswith("running_var"):
            tensors[name] = torch.rand(shape, generator=draw) + 0.5
        elif len(shape) > 1:
            fan_in = torch.Size(shape[1:]).numel()
            tensors[name] = torch.randn(shape, generator=draw) * (2 / fan_in) ** 0.5
        elif ("bn" in name and name.endswith(".weight")) or name.endswith("downsample.1.weight"):
            tensors[name] = 0.4 + 0.4 * torch.rand(shape, generator=draw)
        else:
            tensors[name] = 0.1 * torch.randn(shape, generator=draw)
    return tensors
