"""The `latent` descriptor: the model's own latents, reduced and compared by nL2 (Eq. 8).

The prediction of a diffusion model *is* a latent, so a comparison costs an average and a product.
Nothing is decoded, and the gradient has a closed form (`metrics.nl2_gradient`, `low_pass_adjoint`). The
price is that an index belongs to one latent space: `family` is part of its identity.

The index holds the encoder's latent of each picture in the sampler's space (in ComfyUI: after the latent
format's ``process_in``). The picture is squeezed to a square, and its latent averaged to 8, 16 and 32
cells a side.

References
----------
.. [1] R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.
.. [2] O. Boer Bohan, TAESD, https://github.com/madebyollin/taesd (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoders import Block, blocks
from ..errors import AMGError
from ..files import brief
from ..images import low_pass, resize
from ..messages import message
from .base import DescriptorSpec, subset
from .registry import Kind, Weights
from .tensors import read_tensors, tensors_sha256

SCALES = (8, 16, 32)  # cells a side
SIDE = 512  # side in pixels at which pictures are encoded: 64 cells
FAMILIES = {
    "sd15": 4,
    "sdxl": 4,
    "sd3": 16,
    "flux": 16,
    "flux2": 32,
}  # latent spaces that have a TAESD, and their channels
_TAESD = {
    "taesd": "sd15", "taesdxl": "sdxl", "taesd3": "sd3", "taef1": "flux", "taef2": "flux2",
}  # fmt: skip
_PREPROCESSING = re.compile(r"([a-z0-9]+)-(\d+)px-c(\d+)-square-area/1")


class LatentDescriptor:
    """Low-passed latents, flattened: (B, C·s·s), about ±5 for a latent space of unit variance.

    Parameters
    ----------
    encode : callable or None
        (B, 3, S, S) pictures in [0, 1] -> (B, C, h, w) latents in the sampler's space. A host wraps its
        VAE, see also `from_file`. With None latents can be compared, but pictures cannot be encoded.
    family : str
        The latent space: "sd15", "sdxl", "sd3", "flux", "flux2", or a name of the host's ([a-z0-9]+).
    weights_sha256 : str
        Hash of the encoder (`tensors.tensors_sha256`).
    channels : int
        C.
    kind : str
        The encoder of the latents: "vae", or "taesd" for the small approximation.
    side : int
        S, the side in pixels to which a picture is squeezed before it is encoded.
    scales : subset of SCALES, optional
    """

    space = "latent"

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor] | None,
        family: str,
        weights_sha256: str,
        channels: int,
        *,
        kind: str = "vae",
        side: int = SIDE,
        scales: Sequence[int] | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9]+", family) or not re.fullmatch(r"[a-z0-9]+", kind):
            raise ValueError(f"family {family!r} and kind {kind!r} must be of a-z and 0-9")
        if not 1 <= channels <= 1024 or not 8 <= side <= 2048:
            raise ValueError(
                f"channels must be 1 to 1024, not {channels}, and side 8 to 2048, not {side}"
            )
        self.family, self.channels, self.side = family, channels, side
        self._encode = encode
        self.spec = DescriptorSpec(
            id=f"latent_{family}",
            metric="nl2",
            preprocessing=f"{kind}-{side}px-c{channels}-square-area/1",
            scales=subset(scales, SCALES),
            weights_sha256=weights_sha256,
        )

    @classmethod
    def from_file(
        cls,
        path: Path | None,
        family: str | None = None,
        side: int = SIDE,
        scales: Sequence[int] | None = None,
    ) -> LatentDescriptor:
        """The descriptor with a TAESD encoder, which approximates the model's VAE. For the command line.

        Unless `family` is given, it follows from the name of the file (taesd_encoder, taesdxl_encoder,
        taesd3_encoder, taef1_encoder, taef2_encoder).

        Raises
        ------
        AMGError
            The file is missing or of another network, or its name does not show the family.
        """
        if path is None:
            raise AMGError(
                "The descriptor latent needs an encoder: give taesd_encoder.safetensors (SD 1.5), "
                "taesdxl_encoder, taesd3_encoder, taef1_encoder (Flux) or taef2_encoder (FLUX.2) from "
                "github.com/madebyollin/taesd, or build the index in ComfyUI with the model's VAE."
            )
        family = family or _TAESD.get(path.stem.lower().removesuffix("_encoder"))
        if family is None:
            raise AMGError(
                f"{path.name} does not show which models its latents are for: rename it as published "
                f"({', '.join(f'{name}_encoder' for name in _TAESD)}), or give the family "
                f"({', '.join(FAMILIES)})."
            )
        network, sha256 = load_taesd_encoder(path)
        return cls(
            network,
            family,
            sha256,
            network.channels,
            kind="taesd",
            side=side,
            scales=scales,
        )

    @classmethod
    def for_spec(cls, spec: DescriptorSpec, path: Path | None = None) -> LatentDescriptor:
        """The descriptor of `spec`. Without an encoder it can guard, but not encode pictures."""
        parts = _parts(spec)
        if path is None:
            return cls(None, weights_sha256=spec.weights_sha256, scales=spec.scales, **parts)
        return cls.from_file(path, parts["family"], parts["side"], spec.scales)

    @classmethod
    def encoded(
        cls,
        encode: Callable[[Tensor], Tensor],
        family: str,
        weights_sha256: str,
        channels: int,
        side: int | None = None,
        spec: DescriptorSpec | None = None,
    ) -> LatentDescriptor:
        """The descriptor with a host's VAE as `encode`.

        Side and scales are those of `spec`. Without one, `side` is used with the scales that fit in it.
        """
        side = (side or SIDE) if spec is None else _parts(spec)["side"]
        scales = [s for s in SCALES if s <= side // 8] if spec is None else spec.scales
        return cls(encode, family, weights_sha256, channels, side=side, scales=scales)

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [0, 1] of any size: (B, C, h, w) float32 in the sampler's space.

        Raises
        ------
        AMGError
            There is no encoder, or it makes latents of another shape.
        """
        if self._encode is None:
            raise AMGError(
                f"Pictures cannot be compared with an index of latents ({self.spec.id}) without the "
                f"encoder that made it: connect vae and model, or give the TAESD encoder file."
            )
        latents = self._encode(resize(pictures.float(), self.side)).float()
        self._check(latents)
        return latents

    def embed(self, pictures: Tensor, scale: int) -> Tensor:
        """See `Descriptor.embed`: encode, then `embed_latents`."""
        return self.embed_latents(self.encode(pictures), scale)

    def embed_scales(self, pictures: Tensor) -> dict[int, Tensor]:
        """All scales from one encoding: {scale: (B, C·scale²)}."""
        latents = self.encode(pictures)
        return {scale: self.embed_latents(latents, scale) for scale in self.spec.scales}

    def embed_latents(self, latents: Tensor, scale: int) -> Tensor:
        """(B, C, h, w) latents in the sampler's space -> (B, C·scale²). Differentiable."""
        if scale not in self.spec.scales:
            raise ValueError(f"latent has no scale {scale}, only {self.spec.scales}")
        self._check(latents)
        return self.reduce(latents, scale).flatten(1)

    def reduce(self, latents: Tensor, scale: int) -> Tensor:
        """See `LatentSpace.reduce`."""
        return low_pass(latents.float(), scale)

    def adjoint(self, gradient: Tensor, size: Sequence[int]) -> Tensor:
        """See `LatentSpace.adjoint`."""
        return low_pass_adjoint(gradient, size)

    def to(self, device: torch.device | str) -> LatentDescriptor:
        """Move the TAESD encoder. A host's callable manages its own device."""
        if isinstance(self._encode, nn.Module):
            with torch.inference_mode(False):
                self._encode.to(device)
        return self

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise AMGError(
                f"The index holds latents of {self.channels} channels ({self.spec.id}) and this model "
                f"makes {tuple(latents.shape)}: an index of latents works with one kind of model only. "
                f"Choose the index made for this model, or one of pictures (compact, pixel, sscd)."
            )


def _parts(spec: DescriptorSpec) -> dict[str, Any]:
    found = _PREPROCESSING.fullmatch(spec.preprocessing)
    if not found:
        raise AMGError(
            f"The index was made with {spec.id}, {spec.preprocessing!r}, which this version does not "
            f"support: update the plugin, or build the index again."
        )
    return {
        "family": spec.id.partition("_")[2], "kind": found[1], "side": int(found[2]),
        "channels": int(found[3]),
    }  # fmt: skip


# ---------------------------------------------------------------- the gradient of the low-pass


def low_pass_adjoint(gradient: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of `images.low_pass`: the gradient in its output -> the gradient in its input.

    `gradient` (B, C, s, s) and `size` (H, W) give (B, C, H, W). The low-pass is separable, Y = A·X·Bᵀ,
    so its transpose is Aᵀ·G·B.
    """
    side = gradient.shape[-1]
    rows, columns = (_low_pass_matrix(n, side, min(size) < side).to(gradient.device) for n in size)
    return rows.T @ gradient @ columns


def _low_pass_matrix(n: int, side: int, enlarge: bool) -> Tensor:
    """The matrix (side, n) that `low_pass` applies along one axis of n values."""
    eye = torch.eye(n)[None, None]
    if enlarge:
        return F.interpolate(eye, size=(side, n), mode="bilinear", antialias=True)[0, 0]
    return F.adaptive_avg_pool2d(eye, (side, n))[0, 0]


# ---------------------------------------------------------------- TAESD


class TAESDEncoder(nn.Sequential):
    """The encoder of TAESD, the mirror of `decoders.TAESDDecoder`: (B, 3, 8h, 8w) -> (B, C, h, w)."""

    def __init__(self, channels: int = 4, normed: bool = False):
        def halve() -> nn.Module:
            return nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)

        super().__init__(
            nn.Conv2d(3, 64, 3, padding=1), Block(), halve(), *blocks(3), halve(), *blocks(3),
            halve(), *blocks(3, normed), nn.Conv2d(64, channels, 3, padding=1),
        )  # fmt: skip
        self.channels = channels


def load_taesd_encoder(path: Path) -> tuple[TAESDEncoder, str]:
    """Load TAESD or TAEF2 from an `*_encoder` file (.safetensors, or .pth, of which no code is run).

    Returns the encoder and the hash of its weights.

    Raises
    ------
    AMGError
        The file is missing or is not a TAESD encoder. The message names the file.
    """
    try:
        with torch.inference_mode(False):  # also where float16 is widened
            state = {
                name.removeprefix("encoder.layers."): tensor.float()
                for name, tensor in read_tensors(path).items()
                if not name.startswith("decoder.")
            }
            with torch.device("meta"):  # no draw from the global generator
                network = TAESDEncoder(state["14.weight"].shape[0], "11.pool.0.weight" in state)
            network.load_state_dict(state, assign=True)
            network.eval().requires_grad_(False)
    except Exception as error:
        raise AMGError(
            f"{path} is not a readable TAESD encoder ({brief(error)}). Take the *_encoder file from "
            f"github.com/madebyollin/taesd; the *_decoder file cannot make an index."
        ) from error
    return network, tensors_sha256(state)


KIND = Kind(
    name="latent",
    description="like pixel, in your model's latents. Guards one family of models only, needs its VAE.",
    misses=message("misses_latent"),
    descriptor=LatentDescriptor,
    # Measured with the demo's autoencoder. In FLUX.2's, pictures that are not in the index are less
    # alike.
    levels={
        8: ((-1.40, -0.95), (-1.19, -0.81), (-1.01, -0.69), (-0.86, -0.59), (-0.73, -0.50)),
        16: ((-1.56, -1.15), (-1.39, -1.03), (-1.24, -0.91), (-1.10, -0.81), (-0.98, -0.72)),
    },
    weights=Weights("TAESD encoder", (("vae_approx", "tae*_encoder"),), optional=True),
    options={"family": "latent space of a latent index: sd15, sdxl, sd3, flux"},
)
