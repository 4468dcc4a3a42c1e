"""One guarded generation in either host: settings, drawing, verdicts, infotext and report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from amg_core.errors import AMGError

from . import lookup
from .options import BLANK, HASH, LARGEST, VERDICT, Options
from .texts import Text

NOT_JUDGED = "not judged"  # in an infotext, beside the outcomes of a report
WORST_FIRST = ("copy", "blanked", NOT_JUDGED, "cannot tell", "no copy")
log = logging.getLogger(__name__)


class Label(str):
    """A word in a picture's infotext. The host calls it, for a grid with `use_main_prompt`."""

    def __new__(cls, of_this, of_all=""):
        label = super().__new__(cls, of_this)
        label.of_all = str(of_all)
        return label

    def __call__(self, use_main_prompt: bool = False, **_) -> str:
        return self.of_all if use_main_prompt else str(self)


class Host(Protocol):
    """The differences between the hosts. There is one object for each generation."""

    def check(self) -> None:
        """Raise AMGError, with the name, for models and settings that cannot be guarded here."""

    def decoder(self):
        """The guard's own decoder for the current model."""

    def encode(self, words: str) -> Text:
        """Encode one text by the host's encoder. May be called at any time in a run."""

    def attach(self) -> None:
        """Called when a drawing begins."""

    def detach(self) -> None:
        """Called when a drawing has ended or failed."""

    def stash(self) -> object:
        """The state that drawing will change, saved before the first drawing."""

    def rewind(self, stashed: object) -> None:
        """Restore the state, so that the next drawing has the same noise."""


class Batch:
    """The `Generation` of these hosts: one call of the host's `p.sample`, made anew for a retry."""

    def __init__(self, guard: Guard, draw: Callable[[], Any]):
        self.guard, self._draw, self.stashed = guard, draw, guard.host.stash()
        self.kind: type = Tensor  # Hires. fix hands over a list of decoded pictures, not latents

    def restarts(self) -> bool:
        """Never: these hosts give every retry the same noise."""
        return False

    def draw(self, settings, suspects: Tensor, anew: Tensor):
        from amg_core.run import Drawn

        guard = self.guard
        if guard.drawings:
            guard.host.rewind(self.stashed)
        samples = guard.draw_once(self._draw, settings, suspects if guard.drawings else None)
        self.kind = type(samples)
        latents = samples if isinstance(samples, Tensor) else torch.stack(list(samples))
        report = joined([run.report() for run in guard.runs])
        return Drawn(latents, report, [guard.acted_on(i) for i in range(len(suspects))])

    def judge(self, latents: Tensor, named, samples: list[int]) -> list:
        of_latents = issubclass(self.kind, Tensor)
        pictures = decoded(self.guard.p, latents) if of_latents else as_pictures(latents)
        return self.guard.verdicts(pictures, named)

    def stopped(self) -> bool:
        return interrupted()

    def as_host(self, drawn: Tensor) -> Any:
        """What the host expects of its own call."""
        return drawn if issubclass(self.kind, Tensor) else self.kind(drawn)


class Guard:
    """One guarded generation (`p` of the host) with all its batches, passes and pictures."""

    def __init__(self, p, options: Options, host: Callable[[Guard], Host]):
        self.p, self.options = p, options
        self.matcher = lookup.open_matcher(options.index)
        if self.matcher.latent:
            raise AMGError(
                f"index: {options.index} is an index of latents, which only the ComfyUI nodes can "
                "use. Build one with the descriptor compact, pixel or sscd."
            )
        self.settings = options.settings(self.matcher.metric)
        self.host = host(self)
        self.host.check()
        self.error: BaseException | None = None
        self._watch, self._watched = None, None  # the matcher, and the model that it decodes for
        self._placed: tuple | None = None
        self._texts: dict[tuple, Text] = {}
        self._now, self._suspects = self.settings, None
        self.runs: list = []
        self.drawings: list[list] = []  # the sampling runs of each drawing of this batch
        self.outcome = None
        self.reports: list[dict] = []
        self.outcomes: list[str] = []  # of all pictures
        self.judged = None  # the latest picture that has a report
        index = self.matcher.index
        p.extra_generation_params |= options.infotext() | {HASH: index.hash[:10]}

    # --- drawing

    def sample(self, draw: Callable[[], Any]) -> Any:
        """Replaces the host's `p.sample`: draws one batch, and copies again if retries are set.

        Raises
        ------
        AMGError
            The guard failed or was never called, so the picture would be unguarded.
        """
        self.drawings, self.outcome = [], None
        self.forget()
        again = self.options.retries > 0
        try:
            return self._until_no_copy(draw) if again else self.draw_once(draw, self.settings, None)
        finally:
            self._watch = None

    def draw_once(self, draw: Callable[[], Any], settings, suspects: Tensor | None) -> Any:
        self._now, self._suspects, self.error = settings, suspects, None
        self.runs = []
        self.drawings.append(self.runs)
        try:
            self.host.attach()
            samples = draw()
        finally:
            self.host.detach()
            self._rest()
        if self.error is not None:
            raise self.error
        asked = any(run.records for run in self.runs)
        if not (asked or interrupted() or getattr(self.p, "denoising_strength", None) == 0):
            raise AMGError(
                f"Sampler {getattr(self.p, 'sampler_name', '?')} did not ask the guard in any "
                "step: it calls the model in its own way. Choose another sampler, or turn "
                "Anti-Memorization Guidance off."
            )
        return samples

    def _until_no_copy(self, draw: Callable[[], Any]) -> Any:
        from amg_core.retry import until_no_copy

        batch = Batch(self, draw)
        self.outcome = until_no_copy(batch, self.settings, len(self.p.seeds), self.options.retries)
        return batch.as_host(self.outcome.latents)

    def open(self):
        """A `SamplingRun` for one sampling pass. It replaces one without any step."""
        from amg_core.run import SamplingRun

        if self.runs and not self.runs[-1].records:
            self.runs.pop()
        model = which_model(self.p)
        if self._watch is None or self._watched != model:  # Hires. fix may change checkpoints
            self._watch, self._watched = self.matcher.through(self.host.decoder()), model
        self.runs.append(SamplingRun(self._watch, self._now, suspects=self._suspects))
        return self.runs[-1]

    def on_device(self, run, device: torch.device) -> None:
        """Move index, descriptor and decoder to the model's device before a step."""
        if self._placed != (run.matcher, device):
            run.matcher.to(device)
            self._placed = run.matcher, device

    def _rest(self) -> None:
        """Free the memory of the accelerator for the host's VAE."""
        self._placed = None
        if self._watch is not None:
            self._watch.rest()

    def text(self, words: str) -> Text:
        """An encoded text, cached for each model and generation."""
        key = (*which_model(self.p), words)
        if key not in self._texts:
            self._texts[key] = self.host.encode(words)
        return self._texts[key]

    def tell(self, run) -> None:
        """Show the latest step of the run in the host's progress bar."""
        from modules import shared

        from amg_core import report as reports

        shared.state.textinfo = "AMG: " + said(reports.step(run))

    # --- checking

    def acted_on(self, i: int) -> set[int]:
        """Rows of the index that sample i of the batch was too close to in any pass or drawing."""
        return set().union(*(s.acted_on(i) for drawing in self.drawings for s in drawing))

    def verdicts(self, pictures: Tensor, named: list[set[int]], pasted: bool = False) -> list:
        """Check pictures (B, 3, H, W) in [0, 1] on the CPU. Returns a `Verdict` for each.

        `pasted` says whether the host has put the drawn part into a larger picture.
        """
        from amg_core.images import cut
        from amg_core.similarity.verdict import kept_box, verdict, with_kept

        drawn = getattr(self.p, "nmask", None)  # mask in latent size: 1 = drawn, 0 = kept
        kept = None
        if isinstance(drawn, Tensor) and not pasted:
            kept = kept_box(drawn.reshape(-1, *drawn.shape[-2:]).amax(dim=0))
        found = []
        for picture, rows in zip(pictures.split(1), named, strict=True):
            (whole,) = verdict(self.matcher, picture, [rows])
            part = None
            if kept is not None and not whole.copy:
                (part,) = verdict(self.matcher, cut(picture, kept), [rows])
            found.append(with_kept(whole, part))
        return found

    def judge(self, pp) -> None:
        """Check a finished picture of the host, after all passes, pasting and corrections."""
        from amg_core import report as reports
        from amg_core.messages import message
        from amg_core.similarity.verdict import CLOSE

        i = int(getattr(self.p, "batch_index", 0))
        written = self.p.extra_generation_params
        try:
            picture = as_tensor(pp.image)
            with full_precision(picture):
                pasted = getattr(self.p, "paste_to", None) is not None
                (found,) = self.verdicts(picture, [self.acted_on(i)], pasted)
            report = self._report(i, found)
        except Exception as error:  # the host would ignore it
            log.exception("AMG")
            self.forget()
            why = [message("not_judged"), message("as_written", words=str(error))]
            self.p.comment("AMG: " + said(why))
            written[VERDICT] = self._outcome(NOT_JUDGED)
            if self.options.if_still_copied == BLANK:
                pp.image = blank(pp.image)
            return
        self.reports.append(report)
        closest = max(map(nearest, self.reports))
        written[LARGEST] = Label(round(nearest(report), 4), of_all=round(closest, 4))
        written[VERDICT] = self._outcome(report["verdicts"][0]["outcome"].replace("_", " "))
        batch = int(getattr(self.p, "batch_size", len(self.p.seeds)))
        number = int(getattr(self.p, "iteration", 0)) * batch + i + 1
        messages = [message("picture", picture=number), *reports.story_of_one(report)]
        if found.copy or found.reason == CLOSE:
            log.warning("AMG: %s", said(messages, "en"))
        if found.copy:
            if sum(each["verdicts"][0]["copy"] for each in self.reports) == 1:
                messages.append(message("advice"))  # once a generation
            if self.options.if_still_copied == BLANK:
                pp.image = blank(pp.image)
        self.p.comment("AMG: " + said(messages))
        self.judged = pp.image

    def _outcome(self, of_this: str) -> Label:
        self.outcomes.append(of_this)
        return Label(of_this, of_all=min(self.outcomes, key=WORST_FIRST.index))

    def forget(self) -> None:
        """Forget the results of the previous picture, so that they are not written below the next."""
        for label in (LARGEST, VERDICT):
            self.p.extra_generation_params.pop(label, None)

    def _report(self, i: int, found) -> dict:
        """The report of only picture i of the batch, which is saved in that picture."""
        from amg_core import report as reports
        from amg_core.retry import Attempt, Outcome

        first = only(joined([run.report() for run in self.drawings[0]]), i)
        attempts, kept = [Attempt([0], first, [found])], 0
        if self.outcome is not None:
            attempts = []
            for number, attempt in enumerate(self.outcome.attempts):
                if i in attempt.samples:
                    place = attempt.samples.index(i)
                    if number == self.outcome.kept[i]:
                        kept = len(attempts)
                    attempts.append(
                        Attempt([0], only(attempt.report, i), [attempt.verdicts[place]])
                    )
        return reports.compose(
            first,
            Outcome(torch.empty(0), [found], [kept], attempts),
            judged_by="vae",
            if_still_copied=self.options.if_still_copied,
            seed=self.p.seeds[i],
            host={"name": type(self.host).__name__, "captions": "encoded"},
        )

    def travelling(self) -> str:
        """The latest picture's report for its file."""
        from amg_core import report as reports

        return json.dumps(
            {"webui": reports.travelling(self.reports[-1], self.options.report_in_picture)}
        )


def which_model(p) -> tuple:
    """An identifier of the checkpoint. The host may load another one into the same module."""
    model = p.sd_model
    return id(model), getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)


def nearest(report: dict) -> float:
    """The largest likeness of a picture at any step or at the end. 1 = the same as one in the index."""
    from amg_core.similarity.metrics import likeness

    on_the_way = [step["score"][0] for step in report["steps"]]
    return likeness(max(report["verdicts"][0]["score"], *on_the_way))


def said(messages: list, language: str = "") -> str:
    """Messages in a language, by default that of the host's localization, a file such as zh_CN."""
    from modules import shared

    from amg_core.messages import words

    chosen = str(getattr(shared.opts, "localization", ""))[:2].lower()
    return words(messages, language or chosen)


def joined(passes: list[dict]) -> dict:
    """The reports of one drawing's passes (first, hires) as one report with joined curves."""
    merged = dict(passes[0])
    for more in passes[1:]:
        merged["steps"] = merged["steps"] + more["steps"]
        merged["evaluations"] += more["evaluations"]
        merged["neighbors"] = merged["neighbors"] | more["neighbors"]
        for key, how in {"guarded_evaluations": sum, "largest_similarity": max}.items():
            pairs = zip(merged[key], more[key], strict=True)
            merged[key] = [how(pair) for pair in pairs] if more[key] and merged[key] else more[key]
        pairs = zip(merged["acted_on"], more["acted_on"], strict=True)
        merged["acted_on"] = [sorted({*a, *b}) for a, b in pairs]
        pairs = zip(merged["left_out_words"], more["left_out_words"], strict=True)
        merged["left_out_words"] = [a or b for a, b in pairs]
    return merged


def only(report: dict, i: int) -> dict:
    """The report of a batch -> that of its sample i."""
    merged = dict(report)
    for key in ("guarded_evaluations", "largest_similarity", "acted_on", "left_out_words"):
        merged[key] = merged[key][i : i + 1]
    rows = ("similarity", "score", "neighbor", "active")
    merged["steps"] = [
        step
        | {key: step[key][i : i + 1] for key in rows}
        | {"moved": {name: sizes[i : i + 1] for name, sizes in step["moved"].items()}}
        for step in report["steps"]
    ]
    seen = {str(n) for step in merged["steps"] for n in step["neighbor"]}
    merged["neighbors"] = {k: v for k, v in merged["neighbors"].items() if k in seen}
    return merged


def full_precision(like: Tensor) -> AbstractContextManager:
    """A context without the host's autocast, for the guard's float32 networks."""
    if like.device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", enabled=False)


def as_host(like: Tensor) -> Callable[[], AbstractContextManager]:
    """A function that makes a context with the current autocast. To be called where the model is called."""
    if like.device.type != "cuda" or not torch.is_autocast_enabled():
        return nullcontext
    kind = torch.get_autocast_gpu_dtype()
    return lambda: torch.autocast("cuda", dtype=kind)


def interrupted() -> bool:
    """Whether this batch was ended by Interrupt or Skip. «Stop after this image» does not count, because
    a retry belongs to this image."""
    from modules import shared

    return bool(shared.state.interrupted or shared.state.skipped)


def stop_if_interrupted() -> None:
    """Called before each further evaluation of the model. Raises the host's own exception."""
    from modules import sd_samplers_common

    if interrupted():
        raise sd_samplers_common.InterruptedException


def prompts(p) -> list[str] | None:
    """The prompts of the batch that is drawn now, as the host has them without network tags."""
    return getattr(p, "hr_prompts" if getattr(p, "is_hr_pass", False) else "prompts", None)


def encode(sd_model, words: str, p) -> Text:
    """Encode one text by the model's own encoder, as both hosts do."""
    from modules import prompt_parser

    size = {"width": getattr(p, "width", None), "height": getattr(p, "height", None)}
    with torch.no_grad():
        return Text.of(
            sd_model.get_learned_conditioning(prompt_parser.SdConditioning([words], **size))
        )


def decoded(p, latents: Tensor) -> Tensor:
    """Finished latents -> pictures (B, 3, H, W) in [0, 1] on the CPU, by the host's VAE."""
    from modules import devices, processing

    pictures = processing.decode_latent_batch(p.sd_model, latents, target_device=devices.cpu)
    return as_pictures(torch.stack(list(pictures)))


def as_pictures(decoded: Tensor) -> Tensor:
    """The output of a host's VAE, about ±1 -> [0, 1] on the CPU."""
    return ((decoded.float().cpu() + 1) / 2).clamp(0, 1)


def same_noise(p, old=None) -> None:
    """Reset a host's noise generator to its state before the first drawing.

    `old` is the generator of that drawing, if Hires. fix has replaced it.
    """
    from modules import rng

    old = old or p.rng
    p.rng = rng.ImageRNG(
        old.shape, old.seeds, subseeds=old.subseeds, subseed_strength=old.subseed_strength,
        seed_resize_from_h=old.seed_resize_from_h, seed_resize_from_w=old.seed_resize_from_w,
    )  # fmt: skip


def as_tensor(image) -> Tensor:
    """A Pillow picture -> (1, 3, H, W) in [0, 1]."""
    from amg_core.images import to_tensor

    return to_tensor(image.convert("RGB"))


def blank(image):
    """An empty picture of the same size."""
    from PIL import Image

    return Image.new("RGB", image.size)
