"""Parts and pipelines of diffusers from tiny configurations, with random weights."""

from __future__ import annotations

import json
import logging

import diffusers
import torch
import transformers

WORDS = [
    *"abcdefghijklmnopqrstuvwxyz",
    *(letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
]
WIDTH, POOLED, SIDE = 16, 8, 8  # of an encoded token, of a pooled text, of a latent
NETWORK = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
logging.getLogger("diffusers").setLevel(logging.ERROR)


def letters(folder):
    """A tokenizer with a token for each letter. `folder` is for its files."""
    words = [*WORDS, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=24
    )


def text_encoder(pooled: int | None = None):
    """A CLIP of random weights, with a projection to `pooled` values or without."""
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS) + 2, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=24, projection_dim=pooled or WIDTH,
        bos_token_id=len(WORDS), eos_token_id=len(WORDS) + 1, pad_token_id=len(WORDS) + 1,
    )  # fmt: skip
    kind = (
        transformers.CLIPTextModel if pooled is None else transformers.CLIPTextModelWithProjection
    )
    return kind(config).eval()


def autoencoder(channels: int = 4):
    torch.manual_seed(1)
    blocks = {f"{way}_block_types": (f"{way.title()}{coder}Block2D",) * 2
              for way, coder in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
    return diffusers.AutoencoderKL(
        **NETWORK, **blocks, latent_channels=channels, shift_factor=0.1
    ).eval()


def unet(channels: int = 4, **more):
    torch.manual_seed(2)
    return diffusers.UNet2DConditionModel(
        **NETWORK, sample_size=SIDE, in_channels=channels, out_channels=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **{"cross_attention_dim": WIDTH} | more,
    ).eval()  # fmt: skip


def plain(tokenizer, scheduler=None, kind=None, **parts):
    """A Stable Diffusion 1 pipeline with plain guidance."""
    given = {"unet": unet(), "vae": autoencoder(), "text_encoder": text_encoder()} | parts
    pipe = (kind or diffusers.StableDiffusionPipeline)(
        **given, tokenizer=tokenizer, scheduler=scheduler or diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def extra_large(tokenizer, kind=None):
    """A pipeline of the form of Stable Diffusion XL."""
    ids = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    wide = {
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
        "cross_attention_dim": 2 * WIDTH,
    }
    pipe = (kind or diffusers.StableDiffusionXLPipeline)(
        unet=unet(**ids, **wide), vae=autoencoder(), text_encoder=text_encoder(),
        text_encoder_2=text_encoder(POOLED), tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer():
    torch.manual_seed(4)
    return diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=2 * POOLED,
    ).eval()  # fmt: skip


def flow(tokenizer, kind=None):
    """A pipeline of the form of Stable Diffusion 3, without T5."""
    pipe = (kind or diffusers.StableDiffusion3Pipeline)(
        transformer=transformer(), vae=autoencoder(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder(POOLED), text_encoder_2=text_encoder(POOLED), text_encoder_3=None,
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
