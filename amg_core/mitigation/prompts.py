"""Prompts with words put in at random (Somepalli et al., NeurIPS 2023, "Understanding and Mitigating …").

A prompt that is a key stops fitting when it is no longer the caption that was learned word by word. The
paper and its published code differ, so both are here by name: `PAPER`, `CODE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..errors import AMGError

Item = TypeVar("Item")  # a word, or the id of a token
METHODS = ("RT", "CWR", "RNA")
# Brackets and weights of a prompt, such as in "(red:1.2)": kept in place, never repeated.
MARKS = re.compile(r"[()\[\]{}<>\\]|:\d*\.?\d+(?=[)\]}>])")


@dataclass(frozen=True)
class Recipe:
    """How often a prompt is changed.

    Attributes
    ----------
    probability : float
        That one round changes anything, in [0, 1].
    repeats : int
        Rounds.
    replaces : bool
        RT: half of the rounds that act replace a word instead of adding one.
    numbers : int
        RNA: numbers are drawn from 0 to this, not included.
    """

    probability: float = 1.0
    repeats: int = 4
    replaces: bool = False
    numbers: int = 100_000


PAPER = {
    "RT": Recipe(probability=0.1, replaces=True),
    "CWR": Recipe(probability=0.4),
    "RNA": Recipe(probability=0.4, numbers=1_000_001),  # 10⁶ itself is in the paper's range
}
CODE = {method: Recipe() for method in METHODS}
RECIPES = {"paper": PAPER, "code": CODE}


def random_tokens(
    items: Sequence[Item],
    draw: Callable[[torch.Generator], Item],
    recipe: Recipe,
    generator: torch.Generator,
    swap: Callable[[Item, Item], Item] = lambda old, new: new,
) -> list[Item]:
    """RT: add what `draw` gives at a random place, or put it in the place of another item.

    Works on words and on token ids alike; start, end and padding tokens are not to be among `items`.
    `swap` makes of an item and what replaces it the item that stands there.
    """
    out = list(items)
    for _ in range(recipe.repeats):
        if not _happens(recipe.probability, generator):
            continue
        if recipe.replaces and out and _happens(0.5, generator):
            place = below(len(out), generator)
            out[place] = swap(out[place], draw(generator))
        else:
            out.insert(below(len(out) + 1, generator), draw(generator))
    return out


def repeated_words(
    items: Sequence[Item],
    recipe: Recipe,
    generator: torch.Generator,
    candidates: Sequence[Item] | None = None,
) -> list[Item]:
    """CWR: one of `candidates` (default: of the items) once more, at a random place."""
    out, candidates = list(items), items if candidates is None else candidates
    for _ in range(recipe.repeats):
        if candidates and _happens(recipe.probability, generator):
            again = candidates[below(len(candidates), generator)]
            out.insert(below(len(out) + 1, generator), again)
    return out


def random_numbers(words: Sequence[str], recipe: Recipe, generator: torch.Generator) -> list[str]:
    """RNA: a number at a random place. It says nothing, so it changes the meaning least."""
    return random_tokens(words, lambda g: str(below(recipe.numbers, g)), recipe, generator)


def randomise(
    prompt: str,
    method: str,
    recipe: Recipe,
    generator: torch.Generator,
    draw: Callable[[torch.Generator], str] | None = None,
) -> str:
    """`prompt` after one of `METHODS`, at the level of words. The same generator, the same prompt.

    Brackets and weights such as in "(red:1.2)" stay where they are: a word that is replaced keeps its
    own, a word that is repeated comes without. Words are parted by single spaces.

    Parameters
    ----------
    draw : callable, optional
        RT: a random word, from the vocabulary of the text encoder.

    Raises
    ------
    AMGError
        For an unknown method, and for RT without `draw`.
    """
    words = prompt.split()
    if method == "RNA":
        return " ".join(random_numbers(words, recipe, generator))
    if method == "CWR":
        candidates = [bare(word) for word in words if bare(word)]
        return " ".join(repeated_words(words, recipe, generator, candidates))
    if method != "RT":
        raise AMGError(f"method: {method!r} is unknown. Choose one of {', '.join(METHODS)}.")
    if draw is None:
        raise AMGError(
            "method: RT needs words to choose from. Connect the CLIP of your model: they come from "
            "its vocabulary. Or choose CWR or RNA, which need none."
        )
    return " ".join(random_tokens(words, draw, recipe, generator, _within_marks))


def bare(word: str) -> str:
    """A word without brackets and weights: "(red:1.2)" -> "red"."""
    return MARKS.sub("", word)


def below(count: int, generator: torch.Generator) -> int:
    """A whole number from 0 to count − 1."""
    return int(torch.randint(count, (), generator=generator))


def _within_marks(old: str, new: str) -> str:
    core = bare(old)
    return old.replace(core, new, 1) if core and core in old else f"{old} {new}"


def _happens(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability
