"""What every way to steer is given, and what it gives back.

A run composes ways to steer (`run.Settings.guidance`). Each is a frozen dataclass of its settings with
one pure method, `step`: what is known of one model evaluation -> changes of the prediction. Hosts hand
every kind of model (ε, v, flow) as the predicted clean latent x̂0, so the papers' ε-updates are written
there: D, D_c, D_u, D_n, D_s are the prediction that leaves classifier-free guidance and those for the
prompt, no prompt, the neighbour's caption and the reduced prompt. All are (B, C, H, W); strengths are
(B,). Nothing is ever reduced across the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..similarity.matcher import Match, Matcher
    from .reduction import ReducedPrompt


@dataclass(frozen=True)
class StepContext:
    """One model evaluation of B samples, as a way to steer sees it.

    Attributes
    ----------
    denoised : Tensor (B, C, H, W)
        D, with the changes that the ways before have made.
    cond_denoised, uncond_denoised : Tensor (B, C, H, W) or None
        D_c and D_u; None where the host did not compute them (no guidance scale, cfg 1).
    cfg_scale : float
        s0.
    sigma : Tensor (B,)
        Noise level in k-diffusion units (flow: σ/(1 − σ)).
    t : float
        Diffusion time in [0, 1], 1 = pure noise.
    number : int
        How many evaluations of this run were before it.
    watched, match, threshold : Tensor (B, C, H, W), Match, Tensor (B,)
        The prediction that was compared, its nearest pictures, and λ_t in the descriptor's unit.
    active : Tensor (B,) bool
        Eq. 10's indicator.
    memorized : Tensor (B,) bool
        Samples that were active at this step or before: their prompt is one that draws a stored picture.
    trapped : Tensor (B,) bool
        Samples that nothing has yet led away: at first those that are active. `watched` and `match` are
        then of the prediction that they are trapped in.
    spent : Tensor (B,)
        s1, the part of the guidance scale that despecification has taken off.
    own_units : bool
        Whether strengths are taken from the descriptor's own unit, not from the calibrated similarity.
    neighbor_denoised : callable or None
        B captions -> D_n.
    reduced : ReducedPrompt or None
        The prompt with fewer words.
    look : callable
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
    own_units: bool
    neighbor_denoised: Callable[[list[str]], Tensor] | None
    reduced: ReducedPrompt | None
    compare: Callable[[Tensor], Match]

    def score(self, match: Match) -> Tensor:
        """σ_t of the strengths' equations, (B,): calibrated, or in the descriptor's own unit."""
        return match.similarity if self.own_units else match.score


class Change(NamedTuple):
    """A change of D (B, C, H, W) for the samples `rows` (B,) bool; `term` is its name in reports."""

    term: str
    delta: Tensor
    rows: Tensor


class Step(NamedTuple):
    """What one way did: its changes, what the ways after it are given, and what it wants to remember."""

    changes: Sequence[Change]
    context: StepContext
    memory: Any


@dataclass(frozen=True)
class Guidance:
    """A way to steer.

    Attributes
    ----------
    strength : float
        0 = off, 1 = as the preset means it. Up to 1 it is the share of each change that is made; above 1
        it multiplies the way's own constants (`factor`).
    """

    strength: float = 1.0
    kind: ClassVar[str] = ""  # its name in reports

    @property
    def share(self) -> float:
        """What share of a change is made, in [0, 1]."""
        return min(1.0, self.strength)

    @property
    def factor(self) -> float:
        """By how much constants are multiplied, at least 1."""
        return max(1.0, self.strength)

    def start(self, batch: int) -> Any:
        """What the first `step` of a run is given as its memory."""
        return None

    def step(self, context: StepContext, memory: Any) -> Step:
        """Changes of `context.denoised`, for those samples that this way acts on."""
        raise NotImplementedError

    def retried(self, number: int) -> Guidance:
        """The same way in retry `number`, 1, 2, …, of a picture that came out a copy."""
        return self

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, …), on the device and in the type of `like`."""
    return per_sample.to(like).reshape(-1, *[1] * (like.ndim - 1))


def only(rows: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`chosen` where `rows` (B,) bool, else `other`: (B, …)."""
    return chosen.where(expand(rows, chosen) > 0, other)
