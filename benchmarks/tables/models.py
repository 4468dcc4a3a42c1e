"""A small pixel-space model, class-conditional, and unconditional where it is asked without a class.

It is the demo's UNet over 2x2 blocks of 32 px pictures and predicts x0, over the demo's noise levels.
Predicting v or EDM's mixture instead, it left noise in every picture after as many steps: too few
channels pass 4x4 pixels of noise on, and a memorised picture need not be passed on at all. Model space is
(picture − ½)·4, about unit variance.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from amg_demo.model import CONTEXT, UNet, noise_sigmas

SIDE, SPREAD = 32, 4.0


def to_space(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] -> the space the pixel models work in."""
    return (pictures - 0.5) * SPREAD


def to_pictures(x: Tensor) -> Tensor:
    """The way back, not clamped: gradients pass."""
    return x / SPREAD + 0.5


class PixelUNet(UNet):
    """The demo's UNet on (B, 3, H, W); H and W multiples of 8."""

    def __init__(self, width: int, deep: int):
        super().__init__(width, deep)
        self.inp = nn.Conv2d(48, width, 3, padding=1)
        self.out = nn.Conv2d(width, 48, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: object) -> Tensor:
        return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x, 2), timesteps, context), 2)


class PixelModel(nn.Module):
    """D(x; σ, class). The last row of the table is "no class"."""

    def __init__(self, classes: int, width: int = 112, deep: int = 160):
        super().__init__()
        self.classes = classes
        self.unet = PixelUNet(width, deep)
        self.table = nn.Embedding(classes + 1, CONTEXT)
        self.register_buffer("sigmas", noise_sigmas(), persistent=False)

    def context(self, labels: Tensor) -> Tensor:
        """Labels (B,), `classes` = none -> (B, 1, CONTEXT)."""
        return self.table(labels)[:, None]

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """x = x0 + sigma·noise (B, 3, H, W), sigma (B,) -> the prediction of x0, the same shape."""
        t = (self.sigmas.log()[None] - sigma.log()[:, None]).abs().argmin(dim=1)
        s = sigma[:, None, None, None]
        scale = (s**2 + 1).sqrt()
        return self.unet(x / scale, t, context)


def save(model: PixelModel, path: Path) -> None:
    """Half-precision weights, written whole or not at all."""
    from safetensors.torch import save_file

    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(state, part)
    part.replace(path)


def load(path: Path, classes: int, **shape: int) -> PixelModel:
    """In float32 on the CPU, in eval mode. Raises FileNotFoundError where there is none."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(
            f"No trained model: {path}. Run `python -m benchmarks.tables` once more to train it."
        )
    model = PixelModel(classes, **shape)
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
