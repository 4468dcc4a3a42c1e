"""Changes of encoded prompts without a model: noise (GNI, GN), and padding set to zero.

Embeddings are (B, T, C), from a text encoder for T tokens. Every row has its own random generator, so a
picture does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = 0.1  # the paper's scale of GN and GNI
MASKED = 0.7  # share of the padding; without any padding, pictures collapse


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator for each row, on the CPU. Row i has the seed `seed` + i."""
    return [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(count)]


def gaussian_noise(
    embedding: Tensor,
    scale: float,
    generators: Sequence[torch.Generator],
    relative: bool = False,
) -> Tensor:
    """GNI: embedding + scale·N(0, I)   (Somepalli et al. 2023: scale 0.1 on the caption's embedding).

    Parameters
    ----------
    scale : float
        0 returns the same tensor.
    relative : bool
        Whether `scale` is in units of each row's standard deviation. With the CLIP of Stable Diffusion
        1.x that is about 1, with other encoders it differs. In the paper the scale is absolute.

    Notes
    -----
    The authors' code adds noise to the embeddings of the prompt *and* of no prompt: call this for both.
    """
    if scale == 0:
        return embedding
    shape = embedding.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators])
    noise = scale * noise.to(embedding.device)
    if relative:
        noise = noise * embedding.float().std(dim=(1, 2), keepdim=True)
    return (embedding.float() + noise).to(embedding.dtype)


def training_noise(embedding: Tensor, generator: torch.Generator, scale: float = NOISE) -> Tensor:
    """GN: captions' embeddings + scale·N(0, I), for one step of training (Somepalli et al. 2023).

    So the model never sees a caption twice in exactly the same place. Call it in every step, between
    the text encoder and the network: `generator` goes on, and each step has new noise. Gradients pass,
    if the text encoder is trained too.

    Parameters
    ----------
    embedding : Tensor (B, T, C)
        Any device and type. The result has the same.
    generator : torch.Generator
        On the CPU. The global generator is not used.
    scale : float
        In units of the embedding. 0 returns the same tensor and draws nothing.
    """
    return gaussian_noise(embedding, scale, [generator] * len(embedding))


def padding_after(ids: Sequence[object], end: int) -> list[bool]:
    """Which tokens are padding: all after the first `end` token."""
    ended, out = False, []
    for token in ids:
        out.append(ended)
        ended = ended or _is(token, end)
    return out


def first_end(ids: Sequence[object], end: int) -> int | None:
    """The position of the first `end` token, which ends the text. None if the text was too long for one."""
    return next((i for i, token in enumerate(ids) if _is(token, end)), None)


def zero_padding(
    embedding: Tensor, padding: Tensor, share: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Set a random `share` of the padding tokens of each row to zero.

    `padding` is (B, T) or (1, T) bool. `share` is in [0, 1] and rounded to whole tokens. All other values
    stay the same, bit for bit.
    """
    out = embedding.clone()
    for row, one in enumerate(generators):
        places = padding[row % len(padding)].nonzero()[:, 0]
        chosen = torch.randperm(len(places), generator=one)[: round(share * len(places))]
        out[row, places[chosen].to(out.device)] = 0
    return out


def _is(token: object, end: int) -> bool:
    """Whether a token is `end`. Hosts put whole embeddings among the ids, which are not."""
    return isinstance(token, int) and token == end
