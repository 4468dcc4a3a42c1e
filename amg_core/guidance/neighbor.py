"""D_n, the prediction for the neighbour's caption, asked for as rarely as may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import StepContext

LASTING = 2  # evaluations that one prediction serves, while the caption stays


@dataclass(frozen=True)
class Held:
    """D_n − D_u of one sample (C, H, W), and at which evaluation it was asked for."""

    caption: str = ""
    beyond: Tensor | None = None
    since: int = 0


def neighbor_prediction(
    context: StepContext, rows: Tensor, held: tuple[Held, ...], lasting: int = LASTING
) -> tuple[Tensor, tuple[Held, ...]]:
    """D_n (B, C, H, W) for the captions of the matched pictures of `rows` (B,) bool; elsewhere D_u.

    What a caption draws beyond no prompt changes slowly from step to step, and a prediction costs half a
    step: one serves for `lasting`. Each sample keeps its own, so that none depends on another.
    """
    uncond, ask = context.uncond_denoised, context.neighbor_denoised
    assert uncond is not None and ask is not None
    pairs = zip(context.match.ids.tolist(), rows.tolist(), strict=True)
    captions = [context.matcher.caption(i) if wanted else "" for i, wanted in pairs]
    due = [
        bool(text) and not (old.caption == text and context.number - old.since < lasting)
        for text, old in zip(captions, held, strict=True)
    ]
    if any(due):
        beyond = ask([text if wanted else "" for text, wanted in zip(captions, due, strict=True)])
        beyond = beyond - uncond
        held = tuple(
            Held(text, beyond[i], context.number) if wanted else old
            for i, (text, wanted, old) in enumerate(zip(captions, due, held, strict=True))
        )
    drawn = [
        u if not text or old.beyond is None else u + old.beyond
        for text, u, old in zip(captions, uncond, held, strict=True)
    ]
    return torch.stack(drawn), held
