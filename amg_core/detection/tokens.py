"""Which words of a prompt are the key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..messages import Message, message

GROUPS = 16  # a longer prompt is taken apart into this many groups of neighbouring words


@dataclass(frozen=True)
class Words:
    """Neighbouring words, and the prompt without them."""

    words: str
    without: str


def groups(text: str, limit: int = GROUPS) -> list[Words]:
    """A prompt -> its words, or at most `limit` groups of neighbours of nearly equal length.

    Fewer than two words have no parts to tell apart: [].
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
    """How far suspicion falls without these words; negative: it rises."""

    words: str
    drop: float


def leave_out(text: str, score: Callable[[str], float], limit: int = GROUPS) -> list[TriggerWords]:
    """Score the prompt without each of its parts, the part that matters most first.

    Needs no gradient. `score` is called with the whole prompt, then once a group; equal parts keep
    the order of the prompt.
    """
    parts = groups(text, limit)
    if not parts:
        return []
    whole = score(text)
    found = [TriggerWords(part.words, whole - score(part.without)) for part in parts]
    return sorted(found, key=lambda part: -part.drop)


def messages(parts: Sequence[TriggerWords], shown: int = 3) -> list[Message]:
    """The parts that lower the score most; [] where no part lowers it."""
    trigger = [part for part in parts if part.drop > 0][:shown]
    messages = [message("key_word", words=part.words, drop=part.drop) for part in trigger]
    return [message("key_words", parts=messages)] if messages else []
