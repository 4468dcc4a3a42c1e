"""One sampling run under guard: compare, gate, steer, record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__
from .guidance import Guidance, PromptReduction, Repulsion, StepContext, only
from .hosts import Texts
from .schedule import Schedule
from .similarity import metrics
from .similarity.matcher import Match, Matcher

OVERSHOOT_UNTIL = 0.25  # t below which classifier-free guidance no longer overshoots much


@dataclass(frozen=True)
class Settings:
    """When the guard acts and how it steers. `presets.settings` makes the named ones.

    Attributes
    ----------
    schedule : Schedule
        λ_t on the scale of `metrics.score`, or in the descriptor's own units if `own_units`.
    as_published : bool
        Compare as the paper does: D at every t, by Eq. 8 or Eq. 9 as they stand
        (`Matcher.match_as_published`).
    guidance : tuple of Guidance
        The ways to steer, in the order in which they act. Those of strength 0 are off.
    release : float
        After a sample was active once, it is active again while its score is above this.
    start_percent, end_percent : float
        The part of sampling, 0 to 1, in which the guard compares and steers.
    """

    schedule: Schedule
    guidance: tuple[Guidance, ...] = ()
    release: float = 0.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    own_units: bool = False
    preset: str = "custom"
    as_published: bool = False

    @property
    def off(self) -> bool:
        """Whether the guard only compares and never changes anything."""
        return not any(way.strength for way in self.guidance)

    def tuned(self, kind: type[Guidance], **fields: Any) -> Settings:
        """The same settings with other values for these fields of all ways of class `kind`."""
        ways = (replace(w, **fields) if isinstance(w, kind) else w for w in self.guidance)
        return replace(self, guidance=tuple(ways))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"guidance": [way.to_json() for way in self.guidance]}


@dataclass
class StepRecord:
    """The record of one model evaluation. Lists have one entry for each sample.

    `moved` is ‖change‖/‖D‖ of each term. `threshold` is that of the closest sample, in the unit of
    `similarity`. `score_threshold` is the same in the unit of `score`.
    """

    t: float
    sigma: float
    scale: int
    threshold: float
    similarity: list[float]
    score: list[float]
    neighbor: list[int]
    active: list[bool]
    moved: dict[str, list[float]]
    score_threshold: float


class Drawn(NamedTuple):
    """One drawing of a batch.

    Attributes
    ----------
    latents : Tensor (B, C, H, W)
    report : dict
    acted_on : for each sample the rows of the index that it was too close to at any step
    repelled : for each sample whether it was pushed off a picture, see `SamplingRun.repelled`
    """

    latents: Tensor
    report: dict[str, Any]
    acted_on: Sequence[Collection[int]]
    repelled: Sequence[bool] = ()


class SamplingRun:
    """Compares and steers the predictions of one sampling run. Each run needs a new object.

    It compares D_c until t = 0.25, and D after that, because guidance overshoots early, and an overshot
    copy does not look like a copy. With `Settings.as_published` it compares D at every t, the prediction
    of the guided ε̂ (Eq. 12). Samples that are too close are steered in the ways of
    `Settings.guidance`, one after the other.
    """

    def __init__(
        self,
        matcher: Matcher,
        settings: Settings,
        expected_steps: int | None = None,
        suspects: Tensor | None = None,
    ):
        """`suspects` (B,) bool are samples with a memorised prompt, which are steered from the start."""
        self.matcher, self.settings, self.expected_steps = matcher, settings, expected_steps
        self.records: list[StepRecord] = []
        self._memorized: Tensor | None = None if suspects is None else suspects.cpu().clone()
        self._memory: list[Any] = []
        self._acted: list[set[int]] = []

    def step(
        self,
        denoised: Tensor,
        *,
        cond: Tensor | None,
        uncond: Tensor | None,
        cfg_scale: float,
        sigma: Tensor,
        t: float,
        texts: Texts | None = None,
        composite: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> Tensor:
        """Steer one prediction D (B, C, H, W). If nothing is too close, returns the same tensor.

        Parameters
        ----------
        denoised : Tensor (B, C, H, W)
            D.
        cond, uncond : Tensor (B, C, H, W) or None
            D_c and D_u. None if the host did not compute them (no guidance scale, cfg 1).
        cfg_scale : float
            s0, the guidance scale.
        sigma : Tensor (B,)
            Noise level in k-diffusion units (flow: σ/(1 − σ)).
        t : float
            Diffusion time in [0, 1], 1 = pure noise.
        texts : Texts, optional
            Predictions for other words. Without them neither prompt reduction nor deduplication acts.
        composite : callable, optional
            Maps a prediction to the latent that is compared, for instance with the given part of an
            inpainting put in.

        Raises
        ------
        ValueError
            There is D_u without D_c.
        """
        if uncond is not None and cond is None:
            raise ValueError("D_u came without D_c: give both, or neither")
        if not self._watches(t):
            return denoised
        memorized = self._begin(len(denoised))

        def compare(prediction: Tensor) -> Match:
            return self._match(composite(prediction), sigma)

        late = t < OVERSHOOT_UNTIL or self.settings.as_published
        watched = denoised if cond is None or late else cond
        match = compare(watched)
        active, threshold = self._gate(match, t)
        active |= memorized & (match.score > self.settings.release)
        memorized = self._memorized = memorized | active
        self._note(active, match)
        context = StepContext(
            matcher=self.matcher, denoised=denoised, cond_denoised=cond, uncond_denoised=uncond,
            cfg_scale=cfg_scale, sigma=sigma, t=t, number=len(self.records), watched=watched, match=match,
            threshold=threshold, active=active, memorized=memorized, trapped=active,
            spent=torch.zeros(len(denoised)), as_published=self.settings.as_published,
            texts=texts, compare=compare,
        )  # fmt: skip
        out, moved = self._steer(context)
        self.records.append(
            StepRecord(
                t, float(sigma[0]), match.scale, _of_closest(threshold, match), match.similarity.tolist(),
                match.score.tolist(), match.ids.tolist(), active.tolist(), moved,
                _of_closest(self._as_score(threshold, match), match),
            )
        )  # fmt: skip
        return out

    def suspicious(
        self,
        denoised: Tensor,
        *,
        sigma: Tensor,
        t: float,
        composite: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> Tensor:
        """Samples (B,) bool that were active before, or that are too close in this prediction.

        The parameters are those of `step`. Nothing is changed or recorded. It is for hosts with a
        prediction that no model evaluation made, to decide whether `step` needs a real one.
        """
        none = torch.zeros(len(denoised), dtype=torch.bool)
        if self.settings.off or not self._watches(t):
            return none
        memorized = none if self._memorized is None else self._memorized
        return memorized | self._gate(self._match(composite(denoised), sigma), t)[0]

    def acted_on(self, i: int) -> set[int]:
        """Rows of the index that sample i was too close to at any step."""
        return self._acted[i] if self._acted else set()

    def left_out(self, i: int) -> list[str]:
        """The words that each reduced prompt of sample i lacked at first, as far as they are known."""
        pairs = zip(self.settings.guidance, self._memory, strict=False)
        plans = [memory.plans[i] for way, memory in pairs if isinstance(way, PromptReduction)]
        return [words for plan in plans if plan for words in plan.words if words]

    def repelled(self, i: int) -> bool:
        """Whether repulsion moved sample i at any step: no words led away, and the picture shows it."""
        return any(
            record.moved.get(Repulsion.kind, [0.0] * (i + 1))[i] > 0 for record in self.records
        )

    def drawn(self, latents: Tensor) -> Drawn:
        """The finished run, which drew `latents` (B, C, H, W), as `retry.until_no_copy` needs it."""
        samples = range(len(latents))
        acted_on, repelled = (
            [self.acted_on(i) for i in samples],
            [self.repelled(i) for i in samples],
        )
        return Drawn(latents, self.report(), acted_on, repelled)

    def _match(self, prediction: Tensor, sigma: Tensor) -> Match:
        if self.settings.as_published:
            return self.matcher.match_as_published(prediction)
        return self.matcher.match(prediction, float(sigma[0]))

    def _watches(self, t: float) -> bool:
        return self.settings.start_percent <= 1 - t <= self.settings.end_percent

    def _begin(self, batch: int) -> Tensor:
        """Samples whose prompt has counted as memorised so far, (B,) bool."""
        if not self._acted:
            self._acted = [set() for _ in range(batch)]
            self._memory = [way.start(batch) for way in self.settings.guidance]
        none = torch.zeros(batch, dtype=torch.bool)
        return none if self._memorized is None else self._memorized

    def _gate(self, match: Match, t: float) -> tuple[Tensor, Tensor]:
        """Eq. 10's indicator (B,), and λ_t in the descriptor's units (B,)."""
        level = self.settings.schedule(t)
        if self.settings.own_units:
            return match.similarity > level, torch.full_like(match.similarity, level)
        return match.score > level, metrics.similarity_at(
            self.matcher.metric, level, match.typical, match.limit
        )

    def _as_score(self, threshold: Tensor, match: Match) -> Tensor:
        return metrics.score(self.matcher.metric, threshold, match.typical, match.limit)

    def _steer(self, context: StepContext) -> tuple[Tensor, dict[str, list[float]]]:
        """D with the changes of all ways, and ‖change‖/‖D‖ of each term."""
        before, moved = context.denoised, {}
        for number, way in enumerate(self.settings.guidance):
            if not way.strength:
                continue
            seen = context.match
            changes, context, self._memory[number] = way.step(context, self._memory[number])
            if context.match is not seen:
                self._note(context.trapped, context.match)
            for term, delta, rows in changes:
                delta = delta if way.share == 1 else way.share * delta
                out = context.denoised
                context = replace(context, denoised=only(rows, out + delta, out))
                moved[term] = _relative(delta, before, rows)
        return context.denoised, moved

    def _note(self, rows: Tensor, match: Match) -> None:
        """Remember which pictures the samples `rows` (B,) bool were too close to."""
        for i in rows.nonzero()[:, 0].tolist():
            self._acted[i].add(int(match.ids[i]))

    def report(self) -> dict[str, Any]:
        """All about the run, JSON-serialisable: version, index, settings, summary, and each step."""
        index = self.matcher.index
        active = [record.active for record in self.records]
        samples = range(len(active[0]) if active else 0)
        met = {i for record in self.records for i in record.neighbor}
        neighbors = sorted(met.union(*self._acted))
        return {
            "amg": __version__,
            "index": {"name": index.name, "hash": index.hash, "count": index.count},
            "descriptor": self.matcher.descriptor.spec.to_json(),
            "settings": self.settings.to_json(),
            "evaluations": len(self.records),
            "guarded_evaluations": [sum(row[i] for row in active) for i in samples],
            "largest_similarity": [max(r.similarity[i] for r in self.records) for i in samples],
            "acted_on": [sorted(ids) for ids in self._acted],
            "left_out_words": [self.left_out(i) for i in samples],
            "neighbors": {
                str(i): {"source": index.source(i), "caption": index.caption(i)} for i in neighbors
            },
            "steps": [asdict(record) for record in self.records],
        }


def _of_closest(threshold: Tensor, match: Match) -> float:
    """The threshold of the closest sample. `threshold` (B,) differs slightly from sample to sample."""
    return float(threshold[int(match.score.argmax())])


def _relative(delta: Tensor, denoised: Tensor, rows: Tensor) -> list[float]:
    """‖delta‖/‖D‖ of each sample, 0 if the term did not act on it."""
    size = delta.flatten(1).norm(dim=1) / denoised.flatten(1).norm(dim=1).clamp_min(1e-12)
    return torch.where(rows.to(size.device), size, 0.0).tolist()
