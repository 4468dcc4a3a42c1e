"""D_n, the prediction for the neighbour's caption, reused over evaluations to save work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import StepContext

LASTING = 2  # evaluations that use one prediction, as long as the caption stays the same


@dataclass(frozen=True)
class Held:
    """D_n − D_u of one sample, (C, H, W), and the number of the evaluation that computed it."""

    caption: str = ""
    beyond: Tensor | None = None
    since: int = 0


def neighbor_prediction(
    context: StepContext, rows: Tensor, held: tuple[Held, ...], lasting: int = LASTING
) -> tuple[Tensor, tuple[Held, ...]]:
    """D_n (B, C, H, W) for the matched captions of the samples `rows`, (B,) bool. Other samples get D_u.

    D_n − D_u changes slowly from step to step, and a prediction costs half a step, so each is used for
    `lasting` evaluations. Every sample keeps its own, so samples do not depend on each other.
    """
    uncond, texts = context.uncond_denoised, context.texts
    assert uncond is not None and texts is not None
    pairs = zip(context.match.ids.tolist(), rows.tolist(), strict=True)
    captions = [context.matcher.caption(i) if wanted else "" for i, wanted in pairs]
    due = [
        bool(text) and not (old.caption == text and context.number - old.since < lasting)
        for text, old in zip(captions, held, strict=True)
    ]
    if any(due):
        asked = [text if wanted else "" for text, wanted in zip(captions, due, strict=True)]
        beyond = texts.neighbor(asked) - uncond
        held = tuple(
            Held(text, beyond[i], context.number) if wanted else old
            for i, (text, wanted, old) in enumerate(zip(captions, due, held, strict=True))
        )
    drawn = [
        u if not text or old.beyond is None else u + old.beyond
        for text, u, old in zip(captions, uncond, held, strict=True)
    ]
    return torch.stack(drawn), held
