"""The embedded model as a checkpoint of Automatic1111: its own LatentDiffusion around our networks.

Imported by the host, by the names in the .yaml beside the .safetensors. `write` makes both files.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from amg_demo import model as demo

TOKENS = 77  # of the host's text encoder; ours has 8
SCALE = 0.18215
START, END, COMMA, UNKNOWN = 0, 1, 2, 3  # and then the words
CONFIG = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: {parameterization}
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {scale}
    use_ema: false
    unet_config: {{target: checkpoint.{unet}, params: {{}}}}
    first_stage_config: {{target: checkpoint.VAE, params: {{ddconfig: {{}}}}}}
    cond_stage_config: {{target: checkpoint.clip, params: {{words: {words}}}}}
"""


class UNet(demo.UNet):
    """v-prediction. Reads 8 of the 77 tokens, spread over them."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, x, timesteps=None, context=None, **_):
        at = [int((j + 0.5) * context.shape[1] / demo.TOKENS) for j in range(demo.TOKENS)]
        return super().forward(x, timesteps, context[:, at])


class NoiseUNet(UNet):
    """The same as a model that predicts the noise: ε = √ᾱ·v + √(1 − ᾱ)·x."""

    def __init__(self, **_):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas", torch.cumprod(1 - betas, 0).float(), persistent=False)

    def forward(self, x, timesteps=None, context=None, **_):
        a = self.alphas[timesteps.long()][:, None, None, None]
        return a.sqrt() * super().forward(x, timesteps, context) + (1 - a).sqrt() * x


class _Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.conv_out = demo.Decoder(), nn.Conv2d(1, 1, 1)

    def forward(self, latent):
        return self.inner(latent * SCALE) * 2 - 1


class VAE(nn.Module):
    """Pictures about ±1, latents divided by SCALE."""

    def __init__(self, **_):
        super().__init__()
        self.decoder, self.encoder = _Decoder(), demo.Encoder()

    @property
    def dtype(self):
        return self.decoder.conv_out.weight.dtype

    def encode(self, pictures):
        return self.encoder((pictures + 1) / 2) / SCALE

    def decode(self, latents):
        return self.decoder(latents)


class Tokenizer:
    """A word is a token."""

    bos_token_id, eos_token_id = START, END

    def __init__(self, words):
        self.ids = {",</w>": COMMA} | {word: i for i, word in enumerate(words, UNKNOWN + 1)}

    def get_vocab(self):
        return self.ids

    def __call__(self, texts, return_tensors=None, **_):
        texts = [texts] if isinstance(texts, str) else texts
        rows = [
            [self.ids.get(w, UNKNOWN) for w in t.lower().replace(",", " ,</w> ").split()]
            for t in texts
        ]
        return {"input_ids": torch.tensor(rows) if return_tensors else rows}


class Transformer(demo.TextEncoder):
    """Token ids (B, 77) -> the embedded text encoder's 8 states, each repeated, (B, 77, 128)."""

    def __init__(self, words):
        super().__init__(words)
        self.text_model, self.text_model.embeddings = nn.Module(), nn.Module()
        self.text_model.embeddings.token_embedding = nn.Embedding(len(words) + UNKNOWN + 1, 128)

    def forward(self, input_ids=None, **_):
        ids = torch.zeros(len(input_ids), demo.TOKENS, dtype=torch.long)
        for row, tokens in zip(ids, input_ids.tolist(), strict=True):
            kept = [t for t in tokens if t >= UNKNOWN][: demo.TOKENS]
            for i, token in enumerate(kept):  # the encoder's own ids begin with padding and unknown
                row[i] = self.UNKNOWN if token == UNKNOWN else token - UNKNOWN - 1 + 2
        states = super().forward(ids)
        at = [i * demo.TOKENS // TOKENS for i in range(TOKENS)]
        return SimpleNamespace(last_hidden_state=states[:, at])


def clip(words):
    """The host's own wrapper around that: it looks for exactly this class."""
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

    made = FrozenCLIPEmbedder.__new__(FrozenCLIPEmbedder)
    nn.Module.__init__(made)
    made.tokenizer, made.transformer = Tokenizer(list(words)), Transformer(list(words))
    made.device, made.max_length, made.layer = "cpu", TOKENS, "last"
    made.freeze()
    return made


def write(folder: Path, name: str, noise: bool = False) -> None:
    """NAME.safetensors and NAME.yaml. noise : the one that predicts ε instead of v."""
    from safetensors.torch import save_file

    made = demo.load()
    parts = {
        "model.diffusion_model.": made.unet,
        "first_stage_model.decoder.inner.": made.decoder,
        "first_stage_model.encoder.": made.encoder,
        "cond_stage_model.transformer.": made.text,
    }
    state = {p + k: v.clone() for p, net in parts.items() for k, v in net.state_dict().items()}
    for key, shape in {"weight": (1, 1, 1, 1), "bias": (1,)}.items():
        state["first_stage_model.decoder.conv_out." + key] = torch.zeros(shape)
    words = made.text.words
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state[embedding] = torch.zeros(len(words) + UNKNOWN + 1, 128)
    state["name_" + name.replace("-", "_")] = torch.zeros(1)  # hosts tell files apart by their hash
    save_file(state, folder / f"{name}.safetensors")
    kind = {"parameterization": "eps" if noise else "v", "unet": "NoiseUNet" if noise else "UNet"}
    text = CONFIG.format(scale=SCALE, words=json.dumps(words), **kind)
    (folder / f"{name}.yaml").write_text(text)
