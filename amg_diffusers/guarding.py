"""A guarded model of diffusers: its runs, their reports, and the verdicts on what was drawn.

`pipeline.py` and `guider.py` connect it to the two kinds of pipelines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from amg_core import presets
from amg_core import report as reports
from amg_core.errors import AMGError
from amg_core.images import cut
from amg_core.retry import Attempt, Outcome
from amg_core.run import SamplingRun, Settings
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import CLOSE, Verdict, kept_box, verdict, with_kept

from .evaluations import Parts
from .noise import level
from .texts import Encoder, OtherTexts

log = logging.getLogger(__name__)


def chosen(settings: str | Settings, metric: str, options: dict[str, Any]) -> Settings:
    """The settings of a preset's name and the `options` of `presets.settings`, or given ones."""
    if isinstance(settings, Settings):
        if options:
            raise AMGError(f"{', '.join(options)}: give these, or ready settings, but not both.")
        return settings
    return presets.settings(settings, metric, **options)


class Runs:
    """The sampling runs of one model, one after the other.

    Attributes
    ----------
    reports : list of dict
        One for each run whose pictures were checked, see `amg_core.report`.
    """

    def __init__(self, matcher: Matcher, settings: Settings, if_still_copied: str = reports.SAY):
        if if_still_copied not in reports.POLICIES:
            raise AMGError(f"if_still_copied: choose one of {', '.join(reports.POLICIES)}.")
        self.matcher, self.settings, self.if_still_copied = matcher, settings, if_still_copied
        self.reports: list[dict[str, Any]] = []
        self.run: SamplingRun | None = None
        self.seeds: Sequence[int | None] = ()
        self.batch = 0  # pictures of the run
        self.again: tuple[Settings, Tensor] | None = None  # settings and suspects of a retry
        self._placed: torch.device | None = None
        self._written = False

    def begin(self) -> None:
        """The next step belongs to another drawing."""
        self.run, self.batch, self._written = None, 0, False

    def step(
        self,
        parts: Parts,
        output: Tensor,
        timestep: Any,
        scheduler: Any,
        encoder: Encoder | None,
        composite: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> Tensor:
        """Steer one output of the model after guidance (B, C, H, W). Often it returns the same tensor.

        `composite` is that of `SamplingRun.step`.
        """
        if output.ndim != 4:
            raise AMGError(
                f"This model draws latents of shape {tuple(output.shape)}, and the guard reads only those "
                "of still pictures, (B, C, H, W). Draw without the guard."
            )
        if self.run is None:
            settings, suspects = self.again or (self.settings, None)
            self.run = SamplingRun(self.matcher, settings, suspects=suspects)
            self.batch = len(output)
        self._place(output.device)
        at, x, batch = level(scheduler, timestep), parts.cond.x, len(output)

        def denoised(prediction: Tensor) -> Tensor:
            return at.denoised(x, prediction)

        with torch.autocast(output.device.type, enabled=False):
            before = denoised(output)
            uncond = None if parts.uncond is None else denoised(parts.uncond)
            text = parts.cond.text
            texts = None
            if encoder is not None and text is not None:
                texts = OtherTexts(parts.cond, text, uncond, denoised, encoder)
            after = self.run.step(
                before,
                cond=before if uncond is None else denoised(parts.cond.output),
                uncond=uncond,
                cfg_scale=parts.scale,
                sigma=torch.full((batch,), at.sigma, device=output.device),
                t=at.t,
                texts=texts,
                composite=composite,
            )
        return output if after is before else at.output(output, after - before)

    def judge(self, pictures: Tensor, mask: Tensor | None = None) -> list[Verdict]:
        """Check the finished pictures (B, 3, H, W) in [0, 1] of this run, and write its report.

        What is checked last in a run is in its report. `mask` (B, 1, h, w) is that of an inpainting, 1 for
        drawn cells. A part that was kept is checked by itself, too.

        Raises
        ------
        AMGError
            A picture is a copy, and `if_still_copied` says stop.
        """
        run = self.of_now(len(pictures))
        acted_on = [run.acted_on(i) for i in range(len(pictures))]
        found = self.found(pictures, acted_on, mask)
        everyone = list(range(len(pictures)))
        report = run.report()
        self.finish(
            Outcome(
                pictures,
                found,
                [0] * len(found),
                [Attempt(everyone, report, found)],
                acted_on,
            )
        )
        return found

    def found(
        self, pictures: Tensor, named: Sequence[Collection[int]], mask: Tensor | None = None
    ) -> list[Verdict]:
        """The verdicts on pictures, as of `judge`. `named` is that of `verdict`. Nothing is written."""
        self._place(pictures.device)
        with torch.autocast(pictures.device.type, enabled=False):
            found = verdict(self.matcher, pictures.float(), named)
            if mask is not None:
                each = zip(found, pictures, mask, named, strict=True)
                found = [self._with_kept(*one) for one in each]
        self.rest()
        return found

    def finish(
        self, outcome: Outcome, retries: int = 0, starts: list[list[int | None]] | None = None
    ) -> None:
        """Write the report of the finished pictures. AMGError as of `judge`.

        `starts` has the seeds of each attempt's samples, where they are not those of `seeds`.
        """
        found = outcome.verdicts
        self._write(
            self._composed(outcome.attempts[0].report, outcome, retries=retries, starts=starts)
        )
        if any(each.copy or each.reason == CLOSE for each in found):
            log.warning("AMG: %s", reports.words(self.reports[-1]))
        copies = [i + 1 for i in outcome.copies]
        if copies and self.if_still_copied == reports.STOP:
            raise AMGError(
                f"Stopped: picture {', '.join(map(str, copies))} of {len(found)} is too close to "
                f"{found[copies[0] - 1].source} in index {self.matcher.index.name}. Choose the preset "
                f"strong, or change prompt or seed. To get the picture all the same, set "
                f"if_still_copied to '{reports.SAY}'."
            )

    def _with_kept(
        self, whole: Verdict, picture: Tensor, mask: Tensor, named: Collection[int]
    ) -> Verdict:
        box = kept_box(mask.amax(dim=0))
        if box is None or whole.copy:
            return whole
        (part,) = verdict(self.matcher, cut(picture[None].float(), box), [named])
        return with_kept(whole, part)

    def unjudged(self, reason: str) -> None:
        """Write the report of a run whose pictures were not checked, for one of `reports.NOT_JUDGED`."""
        if self.run is not None and not self._written:
            self._write(self._composed(self.run.report(), None, reason))
        self.rest()

    def rest(self) -> None:
        """Free the memory of the accelerator."""
        self._placed = None
        self.matcher.rest()

    @property
    def waiting(self) -> bool:
        """Whether there is a run whose pictures have not been checked."""
        return self.run is not None and not self._written

    def of_now(self, batch: int) -> SamplingRun:
        """The run that drew a batch. AMGError if there is none of that size."""
        if self.run is None:
            raise AMGError(
                "There is nothing to check: nothing was drawn under guard since the last check."
            )
        if self.batch != batch:
            raise AMGError(f"{batch} pictures were given to check, but {self.batch} were drawn.")
        return self.run

    def _place(self, device: torch.device) -> None:
        if self._placed != device:
            self.matcher.to(device)
            self._placed = device

    def _composed(
        self, run: dict[str, Any], outcome: Outcome | None, not_judged: str = "", retries: int = 0,
        starts: list[list[int | None]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        seeds = list(self.seeds)
        known = outcome is not None and len(seeds) == len(outcome.verdicts)
        return reports.compose(
            run, outcome, judged_by="vae" if outcome is not None else "",
            not_judged=not_judged, if_still_copied=self.if_still_copied, retries=retries,
            seed=seeds[0] if seeds else None, starts=starts or ([seeds] if known else None),
            versions={"diffusers": str(getattr(sys.modules.get("diffusers"), "__version__", ""))},
            host={"name": "diffusers", "decoder": getattr(self.matcher.decoder, "name", "none")},
        )  # fmt: skip

    def _write(self, report: dict[str, Any]) -> None:
        if self._written:
            self.reports.pop()
        self.reports.append(report)
        self._written = True
