"""Adds random words to a prompt (Somepalli et al., NeurIPS 2023, "Understanding and Mitigating …").

A memorised prompt draws its picture less often if it is no longer the training caption word for word. The
paper and its published code differ, so there are constants for both: `PAPER`, `CODE`.
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
# Brackets and weights of a prompt, as in "(red:1.2)", are kept in place and never repeated.
MARKS = re.compile(r"[()\[\]{}<>\\]|:\d*\.?\d+(?=[)\]}>])")


@dataclass(frozen=True)
class Recipe:
    """How often a prompt is changed.

    Attributes
    ----------
    probability : float
        The probability, in [0, 1], that one round changes anything.
    repeats : int
        The number of rounds.
    replaces : bool
        For RT: whether half of the changes replace a word instead of adding one.
    numbers : int
        For RNA: numbers are drawn from 0 to this, which is not included.
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
    """RT, random tokens: insert the result of `draw` at a random place, or replace an item by it.

    Works on words and on token ids. `items` must not contain start, end or padding tokens. ``swap(old,
    new)`` returns the item to put in the place of `old`.
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
    """CWR, caption word repetition: insert one of `candidates` (default: the items) at a random place."""
    out, candidates = list(items), items if candidates is None else candidates
    for _ in range(recipe.repeats):
        if candidates and _happens(recipe.probability, generator):
            again = candidates[below(len(candidates), generator)]
            out.insert(below(len(out) + 1, generator), again)
    return out


def random_numbers(words: Sequence[str], recipe: Recipe, generator: torch.Generator) -> list[str]:
    """RNA, random numbers: insert a number at a random place, which changes the meaning least."""
    return random_tokens(words, lambda g: str(below(recipe.numbers, g)), recipe, generator)


def randomise(
    prompt: str,
    method: str,
    recipe: Recipe,
    generator: torch.Generator,
    draw: Callable[[torch.Generator], str] | None = None,
) -> str:
    """Change the words of `prompt` by one of `METHODS`. The same generator state gives the same result.

    Brackets and weights, as in "(red:1.2)", stay in place. A replaced word keeps them, and a repeated word
    comes without. The result has single spaces between words.

    Parameters
    ----------
    draw : callable, optional
        For RT: returns a random word from the vocabulary of the text encoder.

    Raises
    ------
    AMGError
        The method is unknown, or it is RT and there is no `draw`.
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
