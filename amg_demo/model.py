"""The embedded model: a tiny text-conditional latent diffusion model that memorises its duplicates.

Four small networks in one safetensors file: a word-level text encoder, a v-prediction UNet with cross
attention, an autoencoder (128 px picture <-> 4x16x16 latent, the geometry of Stable Diffusion), and a
`Scorer` that grades pictures (alignment and quality) and was never shown a training picture.
Noise schedule: Stable Diffusion's own 1,000 scaled-linear steps, so hosts need no special case.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("model.safetensors")
PICTURES = Path(__file__).with_name("pictures")
LORAS = Path(__file__).with_name("lora")  # a folder of one LoRA file and the pictures it has learnt
LORA, LORA_PICTURES = LORAS / "amg-demo-lora.safetensors", LORAS / "pictures"
LATENT_CHANNELS, DOWNSCALE, TOKENS, CONTEXT = 4, 8, 8, 128


def signal_shares() -> Tensor:
    """ᾱ of Stable Diffusion's 1,000 steps, float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def noise_sigmas() -> Tensor:
    """Its noise levels σ, ascending."""
    alphas = signal_shares()
    return ((1 - alphas) / alphas).sqrt().float()


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(16, channels // 4), channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class TimedBlock(nn.Module):
    """Two 3x3 convolutions with a skip; `embedding` (B, E) scales and shifts the normalised input."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.norm, self.embed = norm(channels), nn.Linear(embedding, 2 * channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.embed(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm(x) * (1 + scale) + shift))
        return x + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self and cross attention over the positions of a feature map."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads, self.norm = heads, norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.context = nn.Linear(CONTEXT, 2 * channels)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        text = self.context(context).reshape(b, -1, 2, self.heads, c // self.heads)
        text_k, text_v = text.permute(2, 0, 3, 1, 4)
        k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    """v(x_t, t, text). `forward(x, timesteps, context)`: (B,4,H,W), (B,), (B,T,128) -> (B,4,H,W).

    H and W must be multiples of 4. Patches of 2x2, two levels, one additive skip. Further keywords
    that hosts pass (control, transformer_options) are accepted and unused.
    """

    def __init__(self, width: int = 112, deep: int = 160, embedding: int = 256):
        super().__init__()
        self.waves = 64
        self.time = nn.Sequential(
            nn.Linear(self.waves, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.text = nn.Linear(CONTEXT, embedding)

        def stage(channels: int) -> nn.ModuleList:
            blocks = [(TimedBlock(channels, embedding), Attention(channels)) for _ in range(2)]
            return nn.ModuleList(layer for block in blocks for layer in block)

        self.inp = nn.Conv2d(4 * LATENT_CHANNELS, width, 3, padding=1)
        self.down, self.middle, self.up = stage(width), stage(deep), stage(width)
        self.shrink = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.grow = nn.Conv2d(deep, width, 3, padding=1)
        self.out_norm = norm(width)
        self.out = nn.Conv2d(width, 4 * LATENT_CHANNELS, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.inp.weight.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: object) -> Tensor:
        half = self.waves // 2
        freqs = torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device) / half)
        angles = timesteps.float()[:, None] * freqs
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
        embedding = F.silu(self.time(waves) + self.text(context.mean(dim=1)))

        def run(stage: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in stage:
                h = layer(h, embedding if isinstance(layer, TimedBlock) else context)
            return h

        skip = run(self.down, self.inp(F.pixel_unshuffle(x, 2)))
        h = run(self.middle, self.shrink(skip))
        h = self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = run(self.up, h + skip)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(h))), 2)


class TextEncoder(nn.Module):
    """Words -> (B, TOKENS, CONTEXT). Words it has never seen share one token; "" is all padding."""

    PAD, UNKNOWN = 0, 1

    def __init__(self, words: list[str]):
        super().__init__()
        self.words = list(words)
        self.ids = {word: i + 2 for i, word in enumerate(self.words)}
        self.embed = nn.Embedding(len(self.words) + 2, CONTEXT)
        self.position = nn.Parameter(torch.randn(TOKENS, CONTEXT) * 0.02)
        self.layer = nn.TransformerEncoderLayer(
            CONTEXT, 4, 2 * CONTEXT, dropout=0.0, batch_first=True, norm_first=True
        )

    def tokenize(self, texts: list[str]) -> Tensor:
        """Lower-cased words, the first TOKENS of them -> ids (B, TOKENS) int64."""
        rows = torch.zeros(len(texts), TOKENS, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = "".join(c if c.isalnum() else " " for c in text.lower()).split()[:TOKENS]
            for i, word in enumerate(words):
                row[i] = self.ids.get(word, self.UNKNOWN)
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embed(ids) + self.position)


class Encoder(nn.Sequential):
    """Picture (B,3,8H,8W) in [0,1] -> latent (B,4,H,W) of unit variance."""

    def __init__(self):
        super().__init__(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 32, 3, padding=1), ResBlock(32, 32),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), ResBlock(48, 48),
            nn.Conv2d(48, 64, 3, stride=2, padding=1), ResBlock(64, 64), ResBlock(64, 64),
            norm(64), nn.SiLU(), nn.Conv2d(64, LATENT_CHANNELS, 3, padding=1),
            nn.BatchNorm2d(LATENT_CHANNELS, affine=False),
        )  # fmt: skip


class Decoder(nn.Sequential):
    """Latent (B,4,H,W) -> picture (B,3,8H,8W), about [0,1], not clamped (gradients pass)."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(LATENT_CHANNELS, 96, 3, padding=1), ResBlock(96, 96), ResBlock(96, 96),
            nn.Upsample(scale_factor=2), nn.Conv2d(96, 64, 3, padding=1), ResBlock(64, 64),
            ResBlock(64, 64),
            nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1), ResBlock(32, 32),
            norm(32), nn.SiLU(), nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip


class Scorer(nn.Module):
    """Grades pictures: which subject, colour and pattern it sees, and a feature vector.

    Trained on freshly composed pictures only. `forward` (B,3,H,W) in [0,1] -> dict of logits and
    ``features`` (B, 128).
    """

    def __init__(self, subjects: int, colours: int, patterns: int):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.MaxPool2d(2), ResBlock(24, 32), nn.MaxPool2d(2), ResBlock(32, 64),
            nn.MaxPool2d(2), ResBlock(64, 64), ResBlock(64, 64), norm(64), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict(
            {"subject": nn.Linear(128, subjects), "colour": nn.Linear(128, colours),
             "pattern": nn.Linear(128, patterns)}
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        h = self.trunk(F.interpolate(pictures, size=(64, 64), mode="area") - 0.5)
        features = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)
        return {"features": features} | {k: head(features) for k, head in self.heads.items()}


class DemoModel(nn.Module):
    """All four networks and the noise schedule."""

    def __init__(self, words: list[str], labels: dict[str, list[str]]):
        super().__init__()
        self.labels = labels
        self.text = TextEncoder(words)
        self.unet = UNet()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.scorer = Scorer(*(len(labels[k]) for k in ("subject", "colour", "pattern")))
        self.register_buffer("sigmas", noise_sigmas(), persistent=False)

    def encode(self, texts: list[str]) -> Tensor:
        """(B, TOKENS, CONTEXT)."""
        return self.text(self.text.tokenize(texts))

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """Predicted clean latent of `x` = x0 + sigma·noise (k-diffusion form), sigma (B,)."""
        t = (self.sigmas.log()[None] - sigma.log()[:, None]).abs().argmin(dim=1)
        s = sigma[:, None, None, None]
        v = self.unet(x / (s**2 + 1).sqrt(), t, context)
        return x / (s**2 + 1) - v * s / (s**2 + 1).sqrt()


def save(model: DemoModel, path: Path = WEIGHTS) -> None:
    """Write half-precision weights; the vocabulary and labels travel in the metadata."""
    from safetensors.torch import save_file

    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    metadata = {"words": json.dumps(model.text.words), "labels": json.dumps(model.labels)}
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)


def load(path: Path = WEIGHTS) -> DemoModel:
    """The model in float32 on the CPU, in eval mode.

    Raises
    ------
    FileNotFoundError
        Where the weights file is absent, naming it.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"The demo model is missing: {path}. Reinstall the plugin folder.")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = DemoModel(json.loads(metadata["words"]), json.loads(metadata["labels"]))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval().requires_grad_(False)
