"""The training pictures in a folder, and which of them belong to which prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amg_core.errors import AMGError
from amg_core.index.picture import Unreadable, decode
from amg_core.index.sources import open_source

from .prompts import Prompt


class Picture(NamedTuple):
    """A training picture: its name in the folder, its caption, and (H, W, 3) uint8."""

    name: str
    caption: str
    pixels: np.ndarray


def read(folder: Path) -> list[Picture]:
    """All readable pictures of a folder, an archive or a list. AMGError if there are none."""
    found = []
    for item in open_source(folder):
        try:
            pixels = decode(item.read(), item.source).pixels
        except Unreadable:
            continue
        found.append(Picture(item.source, item.caption, pixels))
    if not found:
        raise AMGError(f"{folder} has no picture that can be read.")
    return found


def own(prompts: Sequence[Prompt], pictures: Sequence[Picture]) -> Tensor:
    """Which pictures belong to which prompt, (P, N) bool.

    A picture belongs to a prompt if its caption is the prompt, or if its file or folder has the list's key
    as its name ("1030727993.jpg", "1030727993/0.jpg") or begins with the number in the list ("0012.jpg",
    "img_000012/0.jpg", "0012_03.png").
    """
    table = torch.zeros(len(prompts), len(pictures), dtype=torch.bool)
    names = [_names(one.name) for one in pictures]
    keys = {one.key: i for i, one in enumerate(prompts) if one.key}
    keyed = any(keys.keys() & each for each in names)
    for column, (one, each) in enumerate(zip(pictures, names, strict=True)):
        if one.caption:
            rows = [i for i, prompt in enumerate(prompts) if prompt.text == one.caption.strip()]
        elif keyed:
            rows = [keys[name] for name in each if name in keys]
        else:
            number = _number(one.name)
            rows = [i for i, prompt in enumerate(prompts) if prompt.number == number]
        table[rows, column] = True
    return table


def _names(name: str) -> set[str]:
    """Names of a file, without its ending, and of its folders."""
    *folders, last = name.split("/")
    return {*folders, last.partition(".")[0]}


def _number(name: str) -> int | None:
    """The number at the beginning of a name, of the file or else of its folder, after "img_"."""
    *folders, last = name.split("/")
    for part in [*folders[::-1][:1], last]:
        if match := re.match(r"(?:img_)?(\d{4,})(?=\D|$)", part):
            return int(match[1])
    return None
