"""The interface of the ways to steer.

A sampling run composes ways to steer (`run.Settings.guidance`). Each is a frozen dataclass of its settings
with one pure method, `step`, which maps one model evaluation to changes of the prediction.

Hosts give the prediction of every kind of model (ε, v, flow) as the clean latent x̂0, so the papers'
ε-updates are written in terms of it. D is the prediction after classifier-free guidance. D_c, D_u, D_n
and D_s are the predictions for the prompt, no prompt, the neighbour's caption and the reduced prompt. All
are (B, C, H, W). Strengths are (B,). No operation mixes samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..similarity import metrics

if TYPE_CHECKING:
    from ..hosts import Texts
    from ..similarity.matcher import Match, Matcher


@dataclass(frozen=True)
class StepContext:
    """The input of a way to steer: one model evaluation of B samples.

    Attributes
    ----------
    denoised : Tensor (B, C, H, W)
        D, with the changes of the previous ways.
    cond_denoised, uncond_denoised : Tensor (B, C, H, W) or None
        D_c and D_u.
    cfg_scale, sigma, t : float, Tensor (B,), float
        s0, σ and the diffusion time, as `SamplingRun.step` is given them.
    number : int
        The number of earlier evaluations in this run.
    watched, match, threshold : Tensor (B, C, H, W), Match, Tensor (B,)
        The prediction that was compared, its nearest pictures, and λ_t in the descriptor's unit.
    active : Tensor (B,) bool
        Eq. 10's indicator.
    memorized : Tensor (B,) bool
        Samples that were active at this step or before, so their prompt counts as memorised.
    trapped : Tensor (B,) bool
        Samples that no way has steered away yet, at first all active ones. `watched` and `match` are
        those of the prediction that is still too close.
    spent : Tensor (B,)
        s1, the part of the guidance scale that despecification has removed.
    as_published : bool
        Whether predictions are compared by Eq. 8 or Eq. 9 as they stand, see `run.Settings`.
    texts : Texts or None
        Predictions for other words, if the host has them.
    compare : callable
        A prediction (B, C, H, W) -> its `Match` at this noise level.
    """

    matcher: Matcher
    denoised: Tensor
    cond_denoised: Tensor | None
    uncond_denoised: Tensor | None
    cfg_scale: float
    sigma: Tensor
    t: float
    number: int
    watched: Tensor
    match: Match
    threshold: Tensor
    active: Tensor
    memorized: Tensor
    trapped: Tensor
    spent: Tensor
    as_published: bool
    texts: Texts | None
    compare: Callable[[Tensor], Match]

    @property
    def captions(self) -> bool:
        """Whether the neighbour's caption can be drawn."""
        return self.texts is not None and self.texts.captions

    @property
    def similarity(self) -> Tensor:
        """σ_t of Eqs. 13 and 15, (B,): `metrics.in_common` if `as_published`, or else the score."""
        if self.as_published:
            return metrics.in_common(self.matcher.metric, self.match.similarity)
        return self.match.score

    def gradient(self, latent: Tensor, match: Match) -> tuple[Tensor, Tensor]:
        """∇_D of the similarity (1, C, H, W), and the similarity (1,), at the prediction `latent`."""
        if self.as_published:
            return self.matcher.gradient_as_published(latent, match)
        return self.matcher.gradient(latent, match)


class Change(NamedTuple):
    """A change of D, (B, C, H, W), for the samples `rows`, (B,) bool. `term` is its name in reports."""

    term: str
    delta: Tensor
    rows: Tensor


class Step(NamedTuple):
    """The result of one way: its changes, the context for the next ways, and its new memory."""

    changes: Sequence[Change]
    context: StepContext
    memory: Any


@dataclass(frozen=True)
class Guidance:
    """A way to steer.

    Attributes
    ----------
    strength : float
        0 = off, 1 = as in the preset. Up to 1 it is the share of each change that is made. Above 1 it
        multiplies the constants of the way (`factor`).
    """

    strength: float = 1.0
    kind: ClassVar[str] = ""  # its name in reports

    @property
    def share(self) -> float:
        """The share of a change that is made, in [0, 1]."""
        return min(1.0, self.strength)

    @property
    def factor(self) -> float:
        """The factor for constants, at least 1."""
        return max(1.0, self.strength)

    def start(self, batch: int) -> Any:
        """The memory for the first `step` of a run."""
        return None

    def step(self, context: StepContext, memory: Any) -> Step:
        """Changes of `context.denoised` for the samples that this way acts on. Pure."""
        raise NotImplementedError

    def retried(self, number: int) -> Guidance:
        """The same way with the settings for retry `number`, 1, 2, …, of a picture that was a copy."""
        return self

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}


STRIDE = 0.25  # of log σ: about one of 20 steps evenly spaced in time


def grown(strength: Tensor, growth: float, most: float, before: Tensor, sigma: Tensor) -> Tensor:
    """A strength (B,) that grows by the factor `growth` for every `STRIDE` by which log σ has fallen.

    So it depends on the noise level, and not on the number of steps or evaluations. `before` (B,) is log σ
    when the strength last acted, NaN if it did not act at the last evaluation. It grows to at most `most`.
    """
    strides = ((before - sigma.to(before).log()) / STRIDE).nan_to_num(0.0).clamp_min(0.0)
    return (strength * growth**strides).clamp(max=most)


def acted_at(rows: Tensor, sigma: Tensor) -> Tensor:
    """`before` of the next `grown`: log σ (B,) of the samples `rows`, (B,) bool, and NaN for the others."""
    return torch.where(rows, sigma.to("cpu", torch.float32).log(), torch.nan)


def never(batch: int) -> Tensor:
    """`before` of the first `grown`."""
    return torch.full((batch,), torch.nan)


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, …), with the device and dtype of `like`."""
    return per_sample.to(like).reshape(-1, *[1] * (like.ndim - 1))


def only(rows: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`chosen` (B, …) for the samples in `rows`, (B,) bool, and `other` for the rest."""
    return chosen.where(expand(rows, chosen) > 0, other)
