"""Splits a prompt into words that can be left out, with the hosts' syntax kept whole.

Hosts write weights as `(red fox:1.2)`, LoRA and network tags as `<lora:name:1>`, embeddings as
`embedding:name`, choices as `{red|blue}`, scheduled words as `[red:blue:0.5]`. Leaving out a word must
not change what the rest means, so brackets, weights and tags stay, and a choice or a schedule is one word.
"""

from __future__ import annotations

import re
from collections import Counter
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
        gone.sort()
        ends = [0, *(end for _, end in gone)]
        starts = [*(start for start, _ in gone), len(self.text)]
        return _tidied("".join(self.text[a:b] for a, b in zip(ends, starts, strict=True)))


@dataclass(frozen=True)
class Prompts:
    """Texts that are encoded together, such as one for each text encoder of a model.

    Attributes
    ----------
    each : tuple of Prompt
        All have the same parts. A part is empty in a text that has none of its words.
    words : tuple of str
        The words of each part.
    """

    each: tuple[Prompt, ...]
    words: tuple[str, ...]

    def missing(self, kept: Sequence[bool]) -> str:
        """The words of the parts that are not kept."""
        return " ".join(words for words, stays in zip(self.words, kept, strict=False) if not stays)

    def keep(self, kept: Sequence[bool]) -> tuple[str, ...]:
        """The texts with only these parts, see `Prompt.keep`."""
        return tuple(prompt.keep(kept) for prompt in self.each)


def split(text: str, limit: int = PARTS) -> Prompt:
    """A prompt with its words as parts, or with `limit` groups of neighbouring words as parts."""
    return split_together([text], limit).each[0]


def split_together(texts: Sequence[str], limit: int = PARTS) -> Prompts:
    """Prompts with the same parts, see `split`. A word that stands in several texts is in one part.

    A word is the same in upper and lower case. Where a text has it twice, the second one is the second one
    of the other texts. The parts follow the first text. Words that only the others have come after them.
    """
    found = [_named(text) for text in texts]
    spelled: dict[tuple[str, int], str] = {}
    for text, places in zip(texts, found, strict=True):
        for name, (start, end) in places.items():
            spelled.setdefault(name, text[start:end])
    names = list(spelled)
    count = min(limit, len(names))
    edges = [round(i * len(names) / count) for i in range(count + 1)] if count else [0]
    parts = [names[a:b] for a, b in pairwise(edges)]
    each = tuple(
        Prompt(text, tuple(tuple(places[n] for n in part if n in places) for part in parts))
        for text, places in zip(texts, found, strict=True)
    )
    return Prompts(each, tuple(" ".join(spelled[name] for name in part) for part in parts))


def _named(text: str) -> dict[tuple[str, int], tuple[int, int]]:
    """The places of a text's words, by the word in lower case and how often it has come before."""
    before: Counter[str] = Counter()
    places = {}
    for match in _PIECE.finditer(text):
        if match["word"] or match["group"]:
            word = match[0].casefold()
            places[word, before[word]] = match.span()
            before[word] += 1
    return places


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
