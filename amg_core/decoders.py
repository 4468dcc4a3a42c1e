"""Latent -> picture, differentiable and our own.

The guidance follows gradients through a decoder, so the decoder must not be the host's (its weights
are inference tensors, moved and evicted at will). Each decoder here maps a *model-space* latent
(B, C, H, W), the space of D, to a picture (B, 3, h, w) about [0, 1], not clamped: a clamp would
cut the gradient where the picture saturates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import AMGError

# Cells of the shorter side that a network is shown at least: a smaller latent is no picture to it.
FEWEST = 16


class Decoder(Protocol):
    """name : str; channels : int, C; factor : int, pixels of the picture a side of a latent cell."""

    name: str
    channels: int
    factor: int

    def __call__(self, latent: Tensor) -> Tensor: ...

    def to(self, device: torch.device | str) -> Decoder: ...


class LinearDecoder:
    """The last resort: one RGB colour per latent position, from the host's preview factors.

    Coarse (a 512 px picture becomes 64 px), but right in layout and roughly in colour, which is what
    the `pixel` descriptor compares. factors (C, 3) and bias (3,) map to about [−1, 1].
    """

    name, factor = "linear", 1

    def __init__(self, factors: Tensor, bias: Tensor | None = None):
        with torch.inference_mode(False):
            self.factors = torch.as_tensor(factors, dtype=torch.float32).detach().clone()
            bias = torch.zeros(3) if bias is None else bias
            self.bias = torch.as_tensor(bias, dtype=torch.float32).detach().clone()
        self.channels = self.factors.shape[0]

    def __call__(self, latent: Tensor) -> Tensor:
        rgb = torch.einsum("bchw,cr->brhw", latent.float(), self.factors)
        return (rgb + self.bias[:, None, None] + 1) / 2

    def to(self, device: torch.device | str) -> LinearDecoder:
        with torch.inference_mode(False):
            self.factors, self.bias = self.factors.to(device), self.bias.to(device)
        return self


class ModuleDecoder:
    """An owned network: `network` maps `enter(latent)` to pictures, `leave` maps those to [0, 1].

    The module is deep-copied outside inference mode with its parameters re-wrapped as normal
    tensors, frozen and in float32, so autograd works under a host's ``torch.inference_mode``.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        channels: int,
        enter: Callable[[Tensor], Tensor] = lambda latent: latent,
        leave: Callable[[Tensor], Tensor] = lambda picture: picture,
        factor: int = 8,
    ):
        self.name, self.channels, self.enter, self.leave = name, channels, enter, leave
        self.factor = factor
        self.network = own(network)

    def __call__(self, latent: Tensor) -> Tensor:
        return self.leave(self.network(self.enter(latent.float())))

    def to(self, device: torch.device | str) -> ModuleDecoder:
        with torch.inference_mode(False):
            self.network.to(device)
        return self


def own(module: nn.Module) -> nn.Module:
    """A frozen float32 copy of `module` whose tensors are not inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        duplicate = copy.deepcopy(module)
        for part in duplicate.modules():
            for name, parameter in part.named_parameters(recurse=False):
                fresh = nn.Parameter(parameter.detach().clone().float(), requires_grad=False)
                setattr(part, name, fresh)
            for name, buffer in part.named_buffers(recurse=False):
                value = buffer.detach().clone()
                setattr(part, name, value.float() if value.is_floating_point() else value)
        return duplicate.eval()


def side_for(decoder: Decoder, latent: Tensor, scale: int) -> int | None:
    """The longer side to `shrink` a latent to where its picture is compared at scale x scale pixels.

    The picture's shorter side then has `scale` pixels, and its latent at least `FEWEST` cells. Most of a
    run is compared coarsely, and a picture of half the side takes a quarter of the work. None where
    there is nothing to save: the decoder does not enlarge.
    """
    factor = getattr(decoder, "factor", 1)
    if factor == 1:
        return None
    short, long = sorted(latent.shape[-2:])
    return -(-max(FEWEST, -(-scale // factor)) * long // short)


def shrink(latent: Tensor, side: int | None) -> Tensor:
    """Area-average a latent so that its longer side is at most `side`: decode no more than is used."""
    height, width = latent.shape[-2:]
    if side is None or max(height, width) <= side:
        return latent
    ratio = side / max(height, width)
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return F.adaptive_avg_pool2d(latent, size)


class TAESDDecoder(nn.Sequential):
    """The decoder of TAESD (Ollin Boer Bohan, MIT), 1.2 M parameters: (B, C, H, W) -> (B, 3, 8H, 8W)."""

    def __init__(self, channels: int = 4):
        def stage(blocks: int) -> list[nn.Module]:
            return [_Block() for _ in range(blocks)]

        def grow() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]

        super().__init__(
            _Squash(), nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(),
            *stage(3), *grow(), *stage(3), *grow(), *stage(3), *grow(), *stage(1),
            nn.Conv2d(64, 3, 3, padding=1),
        )  # fmt: skip


class _Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        conv = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def load_taesd(path: Path) -> ModuleDecoder:
    """TAESD from a `*_decoder` file (.safetensors, or .pth read without unpickling code).

    Raises
    ------
    AMGError
        Where the file is not a TAESD decoder of this shape; names the file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network = TAESDDecoder(state["1.weight"].shape[1])
        network.load_state_dict(state)
    except Exception as error:
        raise AMGError(
            f"{path.name} is not a readable TAESD decoder ({error}). Download it again into "
            f"{path.parent}, or remove it and the guard will use another decoder."
        ) from error
    return ModuleDecoder(path.stem, network, state["1.weight"].shape[1])
