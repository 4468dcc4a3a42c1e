"""Splits a prompt into words that can be left out, with the hosts' syntax kept whole.

Hosts write weights as `(red fox:1.2)`, LoRA and network tags as `<lora:name:1>`, embeddings as
`embedding:name`, choices as `{red|blue}`, scheduled words as `[red:blue:0.5]`. Leaving out a word must
not change what the rest means, so brackets, weights and tags stay, and a choice or a schedule is one word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PARTS = 16  # a longer prompt is split into this many groups of neighbouring words

_WEIGHT = r":\s*[-+]?\d*\.?\d+\s*(?=[)\]])"
_PIECE = re.compile(
    r"<[^<>]*>"  # a tag
    r"|(?P<group>\{[^{}]*\}|\[[^\[\]]*[:|][^\[\]]*\])"
    rf"|{_WEIGHT}"
    r"|(?<!\S)(?:AND|BREAK)(?!\S)"
    r"|[()\[\],，、]"
    rf"|(?P<word>(?:\\.|(?!{_WEIGHT})[^\s()\[\],，、<>{{}}])+)"
)
_EMPTY = re.compile(rf"\([\s,]*(?:{_WEIGHT})?\)|\[[\s,]*(?:{_WEIGHT})?\]")
_COMMAS = re.compile(r"\s+,|\s*,(?:\s*,)+")
_SPACES = re.compile(r"[ \t]{2,}")


@dataclass(frozen=True)
class Prompt:
    """A text, and the places (start, end) of its words in each of its parts."""

    text: str
    parts: tuple[tuple[tuple[int, int], ...], ...]

    def words(self, part: int) -> str:
        """The words of a part."""
        return " ".join(self.text[a:b] for a, b in self.parts[part])

    def missing(self, kept: Sequence[bool]) -> str:
        """The words of the parts that are not kept."""
        pairs = zip(range(len(self.parts)), kept, strict=False)
        return " ".join(self.words(part) for part, stays in pairs if not stays)

    def keep(self, kept: Sequence[bool]) -> str:
        """The text with only these parts. Entries beyond the last part are ignored."""
        gone = [
            place
            for part, stays in zip(self.parts, kept, strict=False)
            if not stays
            for place in part
        ]
        if not gone:
            return self.text
        ends = [0, *(end for _, end in gone)]
        starts = [*(start for start, _ in gone), len(self.text)]
        return _tidied("".join(self.text[a:b] for a, b in zip(ends, starts, strict=True)))


def split(text: str, limit: int = PARTS) -> Prompt:
    """A prompt with its words as parts, or with `limit` groups of neighbouring words as parts."""
    words = [match.span() for match in _PIECE.finditer(text) if match["word"] or match["group"]]
    count = min(limit, len(words))
    edges = [round(i * len(words) / count) for i in range(count + 1)] if count else [0]
    return Prompt(text, tuple(tuple(words[a:b]) for a, b in pairwise(edges)))


def counts(texts: Sequence[str]) -> list[int]:
    """The number of parts of each text."""
    return [len(split(text).parts) for text in texts]


def keep(texts: Sequence[str], kept: Sequence[Sequence[bool]]) -> list[str]:
    """Each text with only its parts that are kept, see `Prompt.keep`."""
    return [split(text).keep(row) for text, row in zip(texts, kept, strict=True)]


def missing(texts: Sequence[str], kept: Sequence[Sequence[bool]]) -> list[str]:
    """The words of each text that are not kept."""
    return [split(text).missing(row) for text, row in zip(texts, kept, strict=True)]


def _tidied(text: str) -> str:
    """The text without empty brackets, repeated commas and commas at the ends."""
    before = None
    while text != before:
        before, text = text, _EMPTY.sub("", text)
    return _SPACES.sub(" ", _COMMAS.sub(",", text)).strip(" \t,")
