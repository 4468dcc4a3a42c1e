"""Draws with a guarded pipeline, and draws copies again: `retry.until_no_copy` for diffusers.

The pipeline is called as a whole for each drawing, with its generators as they were before the first. So a
drawing is what the pipeline itself makes of these settings, and samples that passed are kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amg_core.run import Drawn, Settings
from amg_core.similarity.verdict import Verdict

OTHER_NOISE = 500_000  # added to the seeds once for each retry that starts from other noise


@dataclass(frozen=True)
class Finished:
    """One drawing.

    Attributes
    ----------
    output : what the pipeline returned
    drawn : Drawn
        Its `latents` are the finished pictures (B, 3, H, W) in [0, 1].
    mask : Tensor (B, 1, h, w) or None
        That of an inpainting.
    seeds : list
        The seeds of the samples' noise. Empty if they are not known.
    """

    output: Any
    drawn: Drawn
    mask: Tensor | None
    seeds: list[int | None]


Once = Callable[
    [tuple[Settings, Tensor], Tensor, int], Finished
]  # (settings, suspects), anew, number


@dataclass
class Drawings:
    """`hosts.Generation` for a pipeline.

    Attributes
    ----------
    first : Finished
        The drawing before any retry, which tells how many samples there are.
    once : callable
        Draws the batch again.
    check : callable
        Pictures, the rows of the index that are compared in any case, and a mask -> verdicts.
    moves : bool
        Whether samples can start from other noise.
    finished : list of Finished
        All drawings.
    """

    first: Finished
    once: Once
    check: Callable[[Tensor, Sequence[Collection[int]], Tensor | None], list[Verdict]]
    moves: bool
    finished: list[Finished] = field(default_factory=list)

    def restarts(self) -> bool:
        return self.moves

    def draw(self, settings: Settings, suspects: Tensor, anew: Tensor) -> Drawn:
        number = len(self.finished)
        made = self.first if number == 0 else self.once((settings, suspects), anew, number)
        self.finished.append(made)
        return made.drawn

    def judge(
        self, latents: Tensor, named: Sequence[Collection[int]], samples: list[int]
    ) -> Sequence[Verdict]:
        mask = self.finished[-1].mask
        return self.check(latents, named, None if mask is None else mask[samples])

    def stopped(self) -> bool:
        return False


def states(generators: Any) -> list[Tensor]:
    """The states of a pipeline's `generator`: one, several, or for None the global ones."""
    if generators is None:
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch gives it no type
        cuda = torch.cuda.get_rng_state_all() if used else []
        return [torch.get_rng_state(), *cuda]
    return [each.get_state() for each in _listed(generators)]


@contextmanager
def replayed(generators: Any, before: Sequence[Tensor]) -> Iterator[None]:
    """In this context the generators draw from the states `before`. Afterwards they are as they were."""
    now = states(generators)
    _restore(generators, before)
    try:
        yield
    finally:
        _restore(generators, now)


def _restore(generators: Any, states: Sequence[Tensor]) -> None:
    if generators is None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state_all(list(states[1:]))
        return
    for each, state in zip(_listed(generators), states, strict=True):
        each.set_state(state)


def _listed(generators: Any) -> list[torch.Generator]:
    return list(generators) if isinstance(generators, list | tuple) else [generators]


def merged(outputs: Sequence[Any], kept: Sequence[int], blank: Collection[int] = ()) -> Any:
    """The pipeline's output in which sample i is that of drawing ``kept[i]``.

    Fields that have no entry for each sample are those of the first drawing. Pictures of the samples
    `blank` become black.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        parts = [_rows([out[i] for out in outputs], kept) for i in range(len(first))]
        return (_blanked(parts[0], blank), *parts[1:])
    names = [each.name for each in fields(first)]
    made = {name: _rows([getattr(out, name) for out in outputs], kept) for name in names}
    made[names[0]] = _blanked(made[names[0]], blank)
    return type(first)(**made)


def _rows(values: Sequence[Any], kept: Sequence[int]) -> Any:
    first = values[0]
    if not any(kept) or not hasattr(first, "__len__") or len(first) != len(kept):
        return first
    rows = [values[k][i] for i, k in enumerate(kept)]
    if isinstance(first, Tensor):
        return torch.stack(rows)
    return np.stack(rows) if isinstance(first, np.ndarray) else rows


def _blanked(pictures: Any, samples: Collection[int]) -> Any:
    if not samples:
        return pictures
    if isinstance(pictures, list):
        return [
            Image.new(one.mode, one.size) if i in samples else one for i, one in enumerate(pictures)
        ]
    out = pictures.clone() if isinstance(pictures, Tensor) else pictures.copy()
    out[list(samples)] = 0
    return out
