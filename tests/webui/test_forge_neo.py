"""Forge Neo runs every layer of its VAE in inference mode: the guard looks through it all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from webui import Processing

from amg_webui import entry


class Layer(nn.Module):
    """As Neo has them: `forward` makes inference tensors, whatever it is called in."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    @torch.inference_mode()
    def forward(self, x):
        return self.inner(x)


def guarded(host):
    p = Processing(host, ["fox face on violet rays"], [50])
    words = {"despecification": 0, "deduplication": 0}  # the picture itself is moved
    entry.begin(p, ({"enabled": True, "index": "demo"} | words,))
    latents, run = p.sample(), p.amg_guard.runs[0]
    entry.end(p)
    return latents, run


@pytest.mark.parametrize("host", ["forge", "forge real"], indirect=True)
def test_a_vae_in_inference_mode_is_looked_through(host):
    wanted, _ = guarded(host)
    vae = host.objects.vae.first_stage_model
    plain, layer = vae.decoder, Layer(vae.decoder)
    vae.decoder = layer
    try:
        latents, run = guarded(host)
    finally:
        vae.decoder = plain
    assert any(any(record.active) for record in run.records)
    assert torch.equal(latents, wanted)
    x = torch.zeros(1, 4, 16, 16)
    assert "forward" not in vars(layer) and layer(x).is_inference(), "the host's own stays"
