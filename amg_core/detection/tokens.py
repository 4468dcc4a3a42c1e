"""Finds the trigger words of a prompt, by leaving words out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..messages import Message, message

GROUPS = 16  # a longer prompt is split into this many groups of neighbouring words


@dataclass(frozen=True)
class Words:
    """Neighbouring words, and the prompt without them."""

    words: str
    without: str


def groups(text: str, limit: int = GROUPS) -> list[Words]:
    """Split a prompt into its words, or into at most `limit` groups of neighbours of nearly equal length.

    Returns [] for a prompt of fewer than two words.
    """
    words = text.split()
    count = min(limit, len(words))
    if count < 2:
        return []
    edges = [round(i * len(words) / count) for i in range(count + 1)]
    return [
        Words(" ".join(words[a:b]), " ".join(words[:a] + words[b:])) for a, b in pairwise(edges)
    ]


@dataclass(frozen=True)
class TriggerWords:
    """By how much the score falls without these words. Negative if it rises."""

    words: str
    drop: float


def leave_out(text: str, score: Callable[[str], float], limit: int = GROUPS) -> list[TriggerWords]:
    """Score the prompt without each of its parts, and sort the parts by effect, largest first.

    Needs no gradient. `score` is called with the whole prompt, then once for each group. Parts of equal
    effect keep the order of the prompt.
    """
    parts = groups(text, limit)
    if not parts:
        return []
    whole = score(text)
    found = [TriggerWords(part.words, whole - score(part.without)) for part in parts]
    return sorted(found, key=lambda part: -part.drop)


def messages(parts: Sequence[TriggerWords], shown: int = 3) -> list[Message]:
    """A message that names the `shown` parts with the largest effect. [] if no part lowers the score."""
    trigger = [part for part in parts if part.drop > 0][:shown]
    messages = [message("key_word", words=part.words, drop=part.drop) for part in trigger]
    return [message("key_words", parts=messages)] if messages else []
