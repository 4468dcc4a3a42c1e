"""Decoders from latents to pictures: differentiable, and owned by this package.

The guidance takes gradients through a decoder, so it cannot use the host's: those weights are
inference tensors, and the host moves and unloads them at any time. Each decoder here maps a
*model-space* latent (B, C, H, W), the space of D, to a picture (B, 3, h, w) of about [0, 1]. The
picture is not clamped, because a clamp would cut the gradient where the picture saturates.

A latent is never averaged to save work, because decoding an averaged latent does not give the
averaged picture. To save work, the last upsampling layers are left out of the network.

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

MOST = 2  # upsampling layers left out at most: without three of them, edges are visibly weak
LEAST = 128  # smallest shorter side of a reduced decode, in pixels, for the same reason


class Decoder(Protocol):
    """A differentiable map from latents to pictures.

    Attributes
    ----------
    name : str
    channels : int
        C, the channels of the latents.
    factor : int
        Pixels of the picture for each latent cell, along one side.
    """

    name: str
    channels: int
    factor: int

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        """Decode a whole latent: (B, C, H, W) -> (B, 3, h, w) in about [0, 1]. Differentiable.

        h, w = factor·H, factor·W. `at_least` is the shorter side, in pixels, that is enough for the
        caller. With it the picture may be smaller by a factor of 2 or 4, but not below `at_least`, as
        if it had been area-averaged to that size. A decoder that saves no work by this makes the full
        picture.
        """
        ...

    def to(self, device: torch.device | str) -> Decoder: ...


class LinearDecoder:
    """One RGB colour for each latent cell, from the host's preview factors. The last resort.

    It is coarse (a 512 px picture becomes 64 px). The layout is right and the colour roughly, which
    is enough for the `pixel` descriptor. `factors` (C, 3) and `bias` (3,) map to about [−1, 1].
    """

    name, factor = "linear", 1

    def __init__(self, factors: Tensor, bias: Tensor | None = None):
        with torch.inference_mode(False):
            self.factors = torch.as_tensor(factors, dtype=torch.float32).detach().clone()
            bias = torch.zeros(3) if bias is None else bias
            self.bias = torch.as_tensor(bias, dtype=torch.float32).detach().clone()
        self.channels = self.factors.shape[0]

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        """See `Decoder`. Makes one pixel for each cell and ignores `at_least`."""
        rgb = torch.einsum("bchw,cr->brhw", latent.float(), self.factors)
        return (rgb + self.bias[:, None, None] + 1) / 2

    def to(self, device: torch.device | str) -> LinearDecoder:
        with torch.inference_mode(False):
            self.factors, self.bias = self.factors.to(device), self.bias.to(device)
        return self


class ModuleDecoder:
    """An owned copy of a decoder: ``leave(network(enter(latent)))`` is the picture, in about [0, 1].

    The module is deep-copied outside inference mode, and its parameters become ordinary frozen
    float32 tensors. So autograd works under a host's ``torch.inference_mode``.
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
        """See `Decoder`. Makes the full picture and ignores `at_least`."""
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
    """A decoder of the TAESD family. It can make a smaller picture for a fraction of the work.

    channels : int, optional
        Channels of the latents: those of the network, or four times as many for a model that packs
        2 x 2 cells of the network into one (FLUX.2 in ComfyUI). Packed cells are unpacked.

    Raises
    ------
    ValueError
        `channels` is neither of the two.
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
    """How often the shorter side `side` can be halved and stay at least `at_least` and LEAST."""
    return max((n for n in range(1, MOST + 1) if side / 2**n >= max(at_least, LEAST)), default=0)


class TAESDDecoder(nn.Sequential):
    """The decoder of TAESD [1]_, 1.2 M parameters: (B, C, H, W) -> (B, 3, 8H, 8W).

    normed : bool
        Whether the blocks of the coarsest stage have the normalised branch that TAEF2 (FLUX.2) adds.
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
    """The residual block of TAESD, three convolutions and a skip: (B, 64, H, W) -> the same shape.

    normed : bool
        Whether a branch of 1 x 1 convolutions around a group normalisation comes before them.
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
    """One stage of TAESD: `count` blocks."""
    return [Block(normed) for _ in range(count)]


# ---------------------------------------------------------------- a smaller picture for less work


def reduced(network: nn.Module, times: int) -> nn.Sequential:
    """`network` without its last `times` upsampling layers. The picture is 2**times smaller a side.

    With upsampling, the layers after it would get features that are constant in each block of pixels.
    Each convolution there is replaced by its mean over such a block. This is exact for one convolution
    directly after an upsampling layer, and approximate for several with rectifiers between them. The
    layers before are shared with `network`.
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
    """The kernel whose result before upsampling is the block mean of `kernel` after it.

    If features are upsampled by repetition, `block` times a side, and convolved with `kernel`
    (O, I, 3, 3) at padding 1, the mean of each block equals the convolution of the small features with
    the returned kernel (O, I, 3, 3).
    """
    for axis in (2, 3):
        before, middle, behind = kernel.unbind(axis)
        middle = middle + (before + behind) * (1 - 1 / block)
        kernel = torch.stack([before / block, middle, behind / block], axis)
    return kernel


# ---------------------------------------------------------------- files


def load_taesd(path: Path, channels: int | None = None) -> TAESD:
    """Load TAESD or TAEF2 from a `*_decoder` file (.safetensors, or .pth, of which no code is run).

    Parameters
    ----------
    path : Path
    channels : int, optional
        Channels of the model's latents, see `TAESD`.

    Raises
    ------
    AMGError
        The file is not a TAESD decoder of this shape. The message names the file.
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
