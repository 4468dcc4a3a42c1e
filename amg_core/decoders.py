"""Latent -> picture, differentiable and our own.

The guidance follows gradients through a decoder, so the decoder must not be the host's (its weights
are inference tensors, moved and evicted at will). Each decoder here maps a *model-space* latent
(B, C, H, W), the space of D, to a picture (B, 3, h, w) about [0, 1], not clamped: a clamp would
cut the gradient where the picture saturates.

A latent is never averaged to save work: what a network makes of an averaged latent is not the average
of what it makes of the latent. To save work, the last enlargements are left out of the network.

References
----------
.. [1] O. Boer Bohan, TAESD, https://github.com/madebyollin/taesd (MIT).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .descriptors.tensors import read_tensors
from .errors import AMGError
from .files import brief

MOST = 2  # enlargements that are left out at most: without three, edges come out visibly weak
LEAST = 128  # pixels of the shorter side that a reduced decode makes at least, for the same reason


class Decoder(Protocol):
    """name : str; channels : int, C; factor : int, pixels of the picture a side of a latent cell."""

    name: str
    channels: int
    factor: int

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        """(B, C, H, W) -> (B, 3, h, w) in about [0, 1], the whole of the latent. Differentiable.

        h, w = factor·H, factor·W unless `at_least` is given: pixels of the shorter side that will do.
        Then the picture may be smaller by 2 or 4, not below `at_least`, as if area-averaged to
        that size; a decoder that cannot save work by it makes the full picture.
        """
        ...

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

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        """See `Decoder`: one pixel a cell, whatever `at_least` is."""
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

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        """See `Decoder`: the full picture, whatever `at_least` is."""
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


class TAESD(ModuleDecoder):
    """A TAESD decoder of the taesd family: it can make the picture smaller for a fraction of the work.

    channels : int, optional
        Of the latents. Four times the network's for a model whose cells are 2 x 2 of the network's
        (FLUX.2 in ComfyUI): they are unpacked.

    Raises ValueError for another number of channels than these two.
    """

    def __init__(self, name: str, network: TAESDDecoder, channels: int | None = None):
        packed = channels == 4 * network.channels
        if channels not in (None, network.channels) and not packed:
            raise ValueError(f"it decodes {network.channels} channels, not {channels}")
        super().__init__(
            name, network, channels or network.channels,
            enter=nn.PixelShuffle(2) if packed else nn.Identity(), factor=16 if packed else 8,
        )  # fmt: skip
        self._reduced: dict[int, nn.Module] = {}

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        """See `Decoder`."""
        times = 0
        if at_least is not None:
            times = halvings(self.factor * min(latent.shape[-2:]), at_least)
        picture: Tensor = self._network(times)(self.enter(latent.float()))
        return picture

    def to(self, device: torch.device | str) -> TAESD:
        self._reduced.clear()
        super().to(device)
        return self

    def _network(self, times: int) -> nn.Module:
        if times == 0:
            return self.network
        if times not in self._reduced:
            with torch.inference_mode(False), torch.no_grad():
                self._reduced[times] = reduced(self.network, times)
        return self._reduced[times]


def halvings(side: int, at_least: int) -> int:
    """How often a picture of shorter side `side` can be halved, no smaller than `at_least` and LEAST."""
    return max((n for n in range(1, MOST + 1) if side / 2**n >= max(at_least, LEAST)), default=0)


class TAESDDecoder(nn.Sequential):
    """The decoder of TAESD [1]_, 1.2 M parameters: (B, C, H, W) -> (B, 3, 8H, 8W).

    normed : bool
        Whether the blocks of the coarsest stage have the normalised branch of TAEF2 (FLUX.2).
    """

    def __init__(self, channels: int = 4, normed: bool = False):
        def grow() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]

        super().__init__(
            _Squash(), nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), *blocks(3, normed),
            *grow(), *blocks(3), *grow(), *blocks(3), *grow(), *blocks(1),
            nn.Conv2d(64, 3, 3, padding=1),
        )  # fmt: skip
        self.channels = channels


class _Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions and a skip, of TAESD's encoders and decoders: (B, 64, H, W) -> the same shape.

    normed : bool
        With a branch of 1 x 1 convolutions around a group normalisation before them.
    """

    def __init__(self, normed: bool = False):
        super().__init__()
        conv = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])
        self.pool = _pool() if normed else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _pool() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(),
        nn.Conv2d(256, 64, 1, bias=False),
    )  # fmt: skip


def blocks(count: int, normed: bool = False) -> list[nn.Module]:
    """A stage of TAESD."""
    return [Block(normed) for _ in range(count)]


# ---------------------------------------------------------------- a smaller picture for less work


def reduced(network: nn.Module, times: int) -> nn.Sequential:
    """`network` without its last `times` enlargements: its picture is smaller by 2**times a side.

    What comes behind them sees features that are constant in each block of pixels they would have
    become. Convolutions are replaced by their mean over such blocks: exact for one convolution right
    behind an enlargement, near for several with rectifiers between them. The layers before
    are shared with `network`.
    """
    enlargements = [
        i for i, layer in enumerate(network.children()) if isinstance(layer, nn.Upsample)
    ]
    without, layers, block = enlargements[len(enlargements) - times :], [], 1
    for i, layer in enumerate(network.children()):
        if i in without:
            block *= 2
        else:
            layers.append(layer if block == 1 else _for_blocks(layer, block))
    return nn.Sequential(*layers)


def _for_blocks(layer: nn.Module, block: int) -> nn.Module:
    layer = copy.deepcopy(layer)
    for part in layer.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
            part.weight.copy_(block_mean(part.weight, block))
    return layer


def block_mean(kernel: Tensor, block: int) -> Tensor:
    """Kernels (O, I, 3, 3) for blocks -> (O, I, 3, 3): convolve, then enlarge, not the other way round.

    On features that were enlarged by repetition, `block` a side, the convolution with `kernel`
    (padding 1) has this mean over each block.
    """
    for axis in (2, 3):
        before, middle, behind = kernel.unbind(axis)
        middle = middle + (before + behind) * (1 - 1 / block)
        kernel = torch.stack([before / block, middle, behind / block], axis)
    return kernel


# ---------------------------------------------------------------- files


def load_taesd(path: Path, channels: int | None = None) -> TAESD:
    """TAESD or TAEF2 from a `*_decoder` file (.safetensors, or .pth read without unpickling code).

    channels : int, optional
        Of the model's latents, see `TAESD`.

    Raises
    ------
    AMGError
        Where the file is not a TAESD decoder of this shape; names the file.
    """
    try:
        state = read_tensors(path)
        network = TAESDDecoder(state["1.weight"].shape[1], "3.pool.0.weight" in state)
        network.load_state_dict(state)
        return TAESD(path.stem, network, channels)
    except Exception as error:
        raise AMGError(
            f"{path.name} is not a readable TAESD decoder ({brief(error)}). Download it again into "
            f"{path.parent}, or remove it and the guard will use another decoder."
        ) from error
