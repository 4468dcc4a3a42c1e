"""Encoded prompts changed without a model: noise (GNI), and padding that is taken away.

Embeddings are (B, T, C): what a text encoder gives for T tokens. Every row has a generator of its own,
so that a picture never depends on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASKED = 0.7  # of the padding: all of it, and pictures collapse


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One for each row, on the CPU: row i is seeded with `seed` + i."""
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
        0 gives the very tensor back.
    relative : bool
        In units of each row's own standard deviation. That of the CLIP of Stable Diffusion 1.x is about
        1, other encoders have others. The paper's is absolute.

    The authors' code adds noise to the embeddings of prompt *and* no prompt: call it for both.
    """
    if scale == 0:
        return embedding
    shape = embedding.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators])
    noise = scale * noise.to(embedding.device)
    if relative:
        noise = noise * embedding.float().std(dim=(1, 2), keepdim=True)
    return (embedding.float() + noise).to(embedding.dtype)


def padding_after(ids: Sequence[object], end: int) -> list[bool]:
    """Which tokens are padding: everything behind the first `end` token, which is not."""
    ended, out = False, []
    for token in ids:
        out.append(ended)
        ended = ended or _is(token, end)
    return out


def first_end(ids: Sequence[object], end: int) -> int | None:
    """Place of the first `end` token: the true one. None: the text was too long for one."""
    return next((i for i, token in enumerate(ids) if _is(token, end)), None)


def zero_padding(
    embedding: Tensor, padding: Tensor, share: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Set `share` of the padding tokens of each row, chosen at random, to zero.

    padding : (B, T) or (1, T) bool; share in [0, 1], rounded to whole tokens. The rest is bit for bit
    what it was.
    """
    out = embedding.clone()
    for row, one in enumerate(generators):
        places = padding[row % len(padding)].nonzero()[:, 0]
        chosen = torch.randperm(len(places), generator=one)[: round(share * len(places))]
        out[row, places[chosen].to(out.device)] = 0
    return out


def _is(token: object, end: int) -> bool:
    """Hosts mix whole embeddings in among the ids: those are no end."""
    return isinstance(token, int) and token == end
