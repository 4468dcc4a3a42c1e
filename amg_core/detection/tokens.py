"""Which words of a prompt are the key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..messages import Message, message
from .predictions import Predictions
from .statistics import norm

GROUPS = 16  # a longer prompt is taken apart into this many groups of neighbouring words


def gradient_significance(predict: Callable[[Tensor], Predictions], embedding: Tensor) -> Tensor:
    """‖∂L/∂e_i‖₂ of every token i, L = mean ‖Δ‖ (Wen et al., ICLR 2024, §4.2). (1, T, C) -> (T,).

    Differentiates the model: a backward pass, about twice the time and several times the memory of a
    forward pass, and weights that are not inference tensors. `leave_out` needs neither.

    Parameters
    ----------
    predict : callable
        Embedding (1, T, C) -> predictions for n noises at the highest level, differentiable in it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = embedding.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(norm(predict(leaf)).mean(), leaf)
    return gradient[0].norm(dim=1)


@dataclass(frozen=True)
class Group:
    """Neighbouring words, and the prompt without them."""

    words: str
    without: str


def groups(text: str, limit: int = GROUPS) -> list[Group]:
    """A prompt -> its words, or at most `limit` groups of neighbours of nearly equal length.

    Fewer than two words have no parts to tell apart: [].
    """
    words = text.split()
    count = min(limit, len(words))
    if count < 2:
        return []
    edges = [round(i * len(words) / count) for i in range(count + 1)]
    return [
        Group(" ".join(words[a:b]), " ".join(words[:a] + words[b:])) for a, b in pairwise(edges)
    ]


@dataclass(frozen=True)
class Part:
    """How far suspicion falls without these words; negative: it rises."""

    words: str
    drop: float


def leave_out(text: str, score: Callable[[str], float], limit: int = GROUPS) -> list[Part]:
    """Score the prompt without each of its parts, the part that matters most first.

    Needs no gradient. `score` is called with the whole prompt, then once a group; equal parts keep
    the order of the prompt.
    """
    parts = groups(text, limit)
    if not parts:
        return []
    whole = score(text)
    found = [Part(part.words, whole - score(part.without)) for part in parts]
    return sorted(found, key=lambda part: -part.drop)


def messages(parts: Sequence[Part], shown: int = 3) -> list[Message]:
    """The parts that lower the score most; [] where no part lowers it."""
    key = [part for part in parts if part.drop > 0][:shown]
    told = [message("key_word", words=part.words, drop=part.drop) for part in key]
    return [message("key_words", parts=told)] if told else []
