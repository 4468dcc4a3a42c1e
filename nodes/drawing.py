"""Drawing the batch, and drawing copies again, inside one sampling run of the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor

from ..amg_core import hosts
from ..amg_core import report as reports
from ..amg_core.errors import AMGError
from ..amg_core.images import Box
from ..amg_core.messages import message
from ..amg_core.messages import words as in_words
from ..amg_core.retry import Outcome
from ..amg_core.run import Drawn, SamplingRun, Settings
from ..amg_core.similarity.verdict import CLOSE, Verdict, kept_box, with_kept
from . import guiders, judging, live
from .conditioning import OtherTexts, wording_of
from .wording import PromptText

ALIKE = 1e-3  # invisible difference of latents
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loop:
    """The settings for finished pictures that are copies.

    `retries` is the largest number of retries. `if_still_copied`, one of `reports.POLICIES`, says what
    happens to pictures that are still copies. `new_noise` says whether the last retry starts from other
    noise.
    """

    retries: int = 0
    if_still_copied: str = reports.SAY
    new_noise: bool = False


def noise_level(model_sampling, sigma: Tensor) -> tuple[Tensor, float]:
    """`hosts.noise_level` for a model_sampling of the host."""
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    return hosts.noise_level(sigma, None if flow else model_sampling.sigmas)


class Drawing:
    """The `Generation` of this host: draws the batch from the same noise each time."""

    def __init__(self, execute, guider, watch, known, clip, written, noise, seed, callback, loop,
                 on_step, on_event, steps, judging_by: judging.Judge | None):  # fmt: skip
        self.execute, self.guider, self.watch, self.known = execute, guider, watch, known
        self.clip, self.noise, self.seed, self.callback = clip, noise, seed, callback
        self.loop, self.on_step, self.on_event, self.steps = loop, on_step, on_event, steps
        self.judging_by, self.written = judging_by, written
        self.first: SamplingRun | None = None
        self.latest: SamplingRun | None = None
        self.seeds: list[int | None] = []  # of each drawing, for the noise that the sampler adds
        self.starts: list[list[int | None]] = []  # in each drawing, of the noise of each sample
        self.shown: list[tuple] = []  # the last arguments of the host's callback in each drawing
        self.hidden: list[int] = []  # samples whose preview was a copy and was blanked
        self.unseen = 0  # number of steps, in all drawings, at which the guider was not called
        self._kept: dict[int, Verdict | None] = {}
        self._conds = guider.conds
        self._random = _random_state(known.latent.device)

    def restarts(self) -> bool:
        """Only from pure noise: a given picture comes back from any noise."""
        given = bool(torch.count_nonzero(self.known.latent))
        return self.loop.new_noise and self.seed is not None and self._noisy() and not given

    def draw(self, settings: Settings, suspects: Tensor, anew: Tensor) -> Drawn:
        number = len(self.seeds)
        run = SamplingRun(self.watch, settings, self.steps, suspects if number else None)
        self.first, self.latest = self.first or run, run
        noise, seed, starts = self._start(number, suspects, anew)
        self.seeds.append(seed)
        self.starts.append(starts)
        self.shown.append(())
        # The host prepares prompts in each run, and would start from those of the last run.
        self.guider.conds = {k: [c.copy() for c in v] for k, v in self._conds.items()}
        wording = wording_of(self.clip, self._candidates)
        texts = partial(OtherTexts, self.clip, wording, self.known.kwargs(seed))
        step = step_of(run, self.known, texts, self._teller(number))
        suspicious = suspicious_of(run, self.known)
        with (
            guiders.listening(self.guider, step, suspicious) as heard,
            _random(self._random if number else None, self.known.latent.device),
        ):
            drawn = self.execute(noise, self._callback(heard), seed)
        if not heard.asked and self.steps > 0:
            raise AMGError(guiders.bypassed(self.guider))
        return run.drawn(drawn)

    def judge(self, latents: Tensor, named: Sequence, samples: list[int]) -> list[Verdict]:
        """Of the pictures, and of the parts of them that were given and kept."""
        pairs = zip(self.judging_by(latents, named), samples, strict=True)
        return [with_kept(verdict, self._of_kept(i)) for verdict, i in pairs]

    def stopped(self) -> bool:
        """Never: an interrupt is an exception here."""
        return False

    def _noisy(self) -> bool:
        return bool(torch.count_nonzero(self.noise))

    def _start(
        self, number: int, suspects: Tensor, anew: Tensor
    ) -> tuple[Tensor, int | None, list[int | None]]:
        """Noise and seed of a drawing, and the seed of the noise of each sample.

        Other noise is that of the seed plus `number`. It is for the samples `anew`, and in the last retry
        also for `suspects`. The seed of the drawing is then the other one, for whatever the sampler adds.
        """
        last = self.loop.new_noise and number == self.loop.retries > 0
        chosen = anew | suspects if last else anew
        if not chosen.any() or self.seed is None or not self._noisy():
            return self.noise, self.seed, [self.seed] * len(self.noise)
        seed = (self.seed + number) % 2**64
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(self.noise.shape, dtype=self.noise.dtype, generator=generator)
        starts = [seed if new else self.seed for new in chosen.tolist()]
        chosen = chosen.view(-1, *[1] * (self.noise.ndim - 1)).to(self.noise.device)
        return torch.where(chosen, other.to(self.noise), self.noise), seed, starts

    def _candidates(self) -> list[PromptText]:
        """The texts of the graph, and the captions of all pictures that the samples came near."""
        runs, everyone = (self.first, self.latest), range(len(self.noise))
        near = set().union(*(run.acted_on(i) for run in runs for i in everyone))
        captions = (self.watch.caption(i) for i in sorted(near))
        return [*self.written, *(PromptText((caption,)) for caption in captions if caption)]

    def _teller(self, number: int) -> Callable[[SamplingRun], None]:
        again = []
        if number:
            again = [message("drawing_again", number=number, count=self.loop.retries)]

        def tell(run: SamplingRun) -> None:
            if self.on_step is not None:
                self.on_step(in_words([*again, *reports.step(run)]))
            if self.on_event is not None:
                self.on_event(live.step(run, number, self.loop.retries))

        return tell

    def _callback(self, heard: guiders.Heard) -> Callable:
        """The host's callback, which every sampler calls once a step. Counts steps without the guard."""
        before = 0

        def show(*args):
            nonlocal before
            self.unseen += heard.asked == before
            before = heard.asked
            self.shown[-1] = args
            return None if self.callback is None else self.callback(*args)

        return show

    def settle(self, outcome: Outcome, report: dict) -> Tensor:
        """The latents of the result, with copies treated by `if_still_copied`.

        Pictures that are only close to a stored one come out, with a warning in the log. Too many that
        are no copies are close as well, see `limits.CLOSE`.
        """
        latents, copies = outcome.latents, outcome.copies
        if copies or any(verdict.reason == CLOSE for verdict in outcome.verdicts):
            log.warning("AMG: %s", reports.words(report))
        if copies and self.loop.if_still_copied == reports.STOP:
            raise AMGError(reports.refusal(report))
        if copies and self.loop.if_still_copied == reports.BLANK:
            latents = latents.clone()
            for i in copies:
                latents[i : i + 1] = self._out(torch.zeros_like(latents[:1]))
        return latents

    def clear_previews(self, outcome: Outcome | None = None) -> None:
        """Tell the host's callback, which saw the last drawing last, what really leaves.

        Its last argument is also a picture, which SamplerCustom returns as `denoised_output`: the model's
        last prediction, also in a run that another node finishes. If copies must not come out, it is
        checked too, unless it is the picture that was checked already.
        """
        if self.callback is None or not all(self.shown):
            return
        kept = [0] * len(self.noise) if outcome is None else outcome.kept
        rows = [self.shown[number][1][i] for i, number in enumerate(kept)]
        blanks = []
        if self.judging_by is not None and self.loop.if_still_copied != reports.SAY:
            blanks = [i for i, row in enumerate(rows) if self._copied(i, row[None], outcome)]
        for i in blanks:
            rows[i] = torch.zeros_like(rows[i])
        self.hidden = [i for i in blanks if outcome is None or not outcome.verdicts[i].copy]
        if blanks or any(kept):
            step, _, *rest = self.shown[-1]
            self.callback(step, torch.stack(rows), *rest)

    def _copied(self, i: int, shown: Tensor, outcome: Outcome | None) -> bool:
        """Whether what the callback saw of sample i (1, C, H, W) is a copy."""
        preview = self._out(shown)
        if outcome is not None and _alike(preview, outcome.latents[i : i + 1]):
            return outcome.verdicts[i].copy
        named = self.latest.acted_on(i) if outcome is None else outcome.named[i]
        (verdict,) = self.judging_by(preview, [named])
        return with_kept(verdict, self._of_kept(i)).copy

    def _of_kept(self, i: int) -> Verdict | None:
        """On the part of sample i that was given and is kept, where there is one: see `with_kept`."""
        if i not in self._kept:
            box = self.known.kept(i)
            given = self._out(self.known.latent[i : i + 1])
            self._kept[i] = None if box is None else self.judging_by.of_kept(given, box)
        return self._kept[i]

    def _out(self, latent: Tensor) -> Tensor:
        """A latent in the model's units -> in the units of the host's LATENT."""
        return self.guider.model_patcher.model.process_latent_out(latent)


def _alike(preview: Tensor, latent: Tensor) -> bool:
    """Whether both decode to one picture."""
    return torch.allclose(preview.float().cpu(), latent.float().cpu(), atol=ALIKE)


def _random_state(device) -> list[Tensor]:
    """The state of the global random generators that a sampler on `device` may use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _random(states: list[Tensor] | None, device) -> Iterator[None]:
    """A context with the generators in these states, or in their own for None. Resets them at the end."""
    if states is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield


class GivenPart:
    """For inpainting: the given part of the picture, which is put in before the guard compares."""

    def __init__(self, guider, noise, latent_image, denoise_mask, sigmas, device):
        self.guider, self.sigmas = guider, sigmas
        model = guider.model_patcher.model
        self.latent = latent_image.to(device)
        if torch.count_nonzero(self.latent) > 0:  # as in the host, an empty latent is not shifted
            self.latent = model.process_latent_in(self.latent)
        self.mask = None
        if denoise_mask is not None:
            self.mask = comfy.utils.reshape_mask(denoise_mask, noise.shape).to(device)

    def compositor(self, args: dict) -> Callable[[Tensor], Tensor]:
        """A function from a prediction to the whole latent: the prediction with the given part put in.

        Without a mask it returns the same tensor.
        """
        mask, change = self.mask, args["model_options"].get("denoise_mask_function")
        if mask is not None and change is not None:
            extra = {"model": self.guider, "sigmas": self.sigmas}
            mask = change(args["sigma"], mask, extra_options=extra)
        given = self.latent.to(args["denoised"])
        return hosts.composited(mask, None if mask is None else given * (1 - mask))

    def kept(self, i: int) -> Box | None:
        """The part of sample i that is also checked by itself, see `verdict.kept_box`."""
        return None if self.mask is None else kept_box(self.mask[i].amax(dim=0))

    def kwargs(self, seed) -> dict:
        """The arguments that the host passes to `encode_model_conds` in this run."""
        return {"latent_image": self.latent, "denoise_mask": self.mask, "seed": seed}


def step_of(run: SamplingRun, known: GivenPart, texts, tell) -> Callable[[dict], Tensor]:
    """The guard's function for every prediction of one run. `guiders.understood` has its argument."""

    def step(args: dict) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        denoised = args["denoised"]
        sigma, t = noise_level(args["model"].model_sampling, args["sigma"])
        # At cfg 1 the host has no unconditional prediction. Its uncond_denoised is zeros.
        guided = bool(args["uncond"]) and bool(args["cond"])
        out = run.step(
            denoised,
            cond=args["cond_denoised"],
            uncond=args["uncond_denoised"] if guided else None,
            cfg_scale=float(args["cond_scale"]),
            sigma=sigma,
            t=t,
            texts=texts(args),
            composite=known.compositor(args),
        )
        tell(run)
        return out

    return step


def suspicious_of(run: SamplingRun, known: GivenPart) -> Callable[[dict], Tensor]:
    """A function: prediction -> samples that the guard steers, see `SamplingRun.suspicious`."""

    def suspicious(args: dict) -> Tensor:
        sigma, t = noise_level(args["model"].model_sampling, args["sigma"])
        return run.suspicious(args["denoised"], sigma=sigma, t=t, composite=known.compositor(args))

    return suspicious
