"""The guard around a pipeline of diffusers, as a context manager.

It listens to the pipeline, and removes itself from all of its parts at the end:

- the denoiser, by a forward hook that only records,
- `scheduler.step`, where the guided prediction goes,
- `encode_prompt`, for the texts of the prompts,
- `prepare_latents` and `prepare_mask_latents`, for seeds and inpainting,
- `vae.decode`, for the finished pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amg_core import hosts
from amg_core import report as reports
from amg_core.decoders import Decoder
from amg_core.errors import AMGError
from amg_core.index import Index
from amg_core.retry import until_no_copy
from amg_core.run import Settings
from amg_core.similarity.matcher import Matcher

from .evaluations import Encoded, Evaluation, parts
from .guarding import Runs, chosen
from .opening import as_picture, into_vae, open_matcher
from .retrying import OTHER_NOISE, Drawings, Finished, merged, replayed, states
from .texts import Encoder, Words

REMEMBERED = 4  # calls of encode_prompt, of which a pipeline makes one or two
RETRIES = 2


@contextmanager
def guard(
    pipe: Any,
    index: str | Path | Index | Matcher,
    settings: str | Settings = "main",
    *,
    decoder: str | Path | Decoder | nn.Module | None = None,
    weights: str | Path | None = None,
    if_still_copied: str = reports.SAY,
    **options: Any,
) -> Iterator[Guard]:
    """Guard every drawing of a pipeline in this context. Afterwards it is as it was.

    Parameters
    ----------
    pipe : DiffusionPipeline
        With a `unet` or `transformer` that draws still latents (B, C, H, W): Stable Diffusion 1, 2, 3 and
        XL, also img2img, inpainting and ControlNet, with any scheduler for ε, v, x̂0 or flow.
    index : path, Index or Matcher
        The pictures to stay away from.
    settings : one of `presets.PRESETS`, or Settings
    decoder, weights : optional
        See `opening.open_matcher`.
    if_still_copied : one of `report.POLICIES`
        "stop" raises AMGError when a copy is decoded. "blank" makes it black, which is possible only for
        pictures that the pipeline decodes, and not for latents.
    options
        Those of `presets.settings`, such as ``despecification=0.5``.

    Yields
    ------
    Guard
        Its `report` is about the latest drawing, its `reports` are about all.

    Raises
    ------
    AMGError
        The pipeline is guarded already or has no such parts, or there is no such index. In a drawing: the
        pipeline's guidance or the scheduler's noise is of an unknown kind, a part of the pipeline was
        exchanged, or a copy was drawn and `if_still_copied` is "stop".
    """
    if getattr(pipe, "guider", None) is not None:
        raise AMGError(
            "This is a modular pipeline, which takes a guider: use AMGGuidance (docs/diffusers.md)."
        )
    name, missing = type(pipe).__name__, [p for p in ("scheduler", "vae") if not hasattr(pipe, p)]
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if missing or denoiser is None:
        raise AMGError(
            f"{name} cannot be guarded: it has no {' or '.join(missing or ['unet or transformer'])}."
        )
    if hasattr(pipe.scheduler.step, "amg"):
        raise AMGError(
            f"This {name} is guarded already. To guard against several indexes, combine them into one."
        )
    matcher = open_matcher(index, pipe.vae, decoder=decoder, weights=weights)
    guarded = Guard(
        pipe, denoiser, matcher, chosen(settings, matcher.metric, options), if_still_copied
    )
    with guarded.listening():
        yield guarded


class Guard:
    """A guarded pipeline. `guard` makes it.

    Attributes
    ----------
    reports : list of dict
        One for each drawing, see `amg_core.report`.
    """

    def __init__(
        self,
        pipe: Any,
        denoiser: nn.Module,
        matcher: Matcher,
        settings: Settings,
        if_still_copied: str,
    ):
        self.pipe, self.denoiser = pipe, denoiser
        self.runs = Runs(matcher, settings, if_still_copied)
        self.encoder: Encoder | None = None
        self._calls: list[Evaluation] = []
        self._latents: Tensor | None = None  # those of the latest step, which was made at _timestep
        self._timestep: Any = None
        self._mask: Tensor | None = None  # of an inpainting, with the latents of the given picture
        self._given: Tensor | None = None
        self._scheduler, self._vae = pipe.scheduler, pipe.vae
        self._decode: Callable[..., Any] = pipe.vae.decode
        self._asks = False  # whether the guard itself calls the model or the text encoders
        self._drawing = False  # whether `draw` calls the pipeline: it checks the pictures itself
        self._pictures: Tensor | None = None  # those that the pipeline decoded for it
        self._anew: tuple[Tensor, int] | None = (
            None  # samples that start from other noise, and the retry
        )

    @property
    def reports(self) -> list[dict[str, Any]]:
        return self.runs.reports

    @property
    def report(self) -> dict[str, Any]:
        """The report of the latest drawing. AMGError if there is none."""
        if not self.reports:
            raise AMGError("Nothing has been drawn under guard yet.")
        return self.reports[-1]

    def __str__(self) -> str:
        """The result of the latest drawing in a line."""
        return reports.words(self.report)

    def draw(self, *args: Any, retries: int = RETRIES, **kwargs: Any) -> Any:
        """Draw as the pipeline does, check the pictures, and draw copies again with stronger settings.

        Parameters
        ----------
        args, kwargs
            Those of the pipeline.
        retries : int
            Largest number of further drawings of the batch. 0 is a call of the pipeline.

        Returns
        -------
        What the pipeline returns. Samples that are no copies in the first drawing are the same, bit for
        bit, and generators are left as after one drawing. `report` says what was drawn again.

        Raises
        ------
        AMGError
            As in `guard`.
        """
        if retries < 0:
            raise AMGError(f"retries: {retries} is not usable. Give a number of 0 or more.")
        self._finish()
        generators = kwargs.get("generator")
        before = states(generators)

        def once(again: tuple[Settings, Tensor], anew: Tensor, number: int) -> Finished:
            self.runs.again, self._anew = again, (anew, number)
            with replayed(generators, before):
                return self._once(args, kwargs)

        self._drawing = True
        try:
            drawings = Drawings(
                self._once(args, kwargs), once, self.runs.found, kwargs.get("latents") is None
            )
            batch = len(drawings.first.drawn.latents)
            outcome = until_no_copy(drawings, self.runs.settings, batch, retries)
        finally:
            self._drawing, self.runs.again, self._anew, self._latents = False, None, None, None
            self._pictures = self._mask = self._given = None
        seeds = [each.seeds for each in drawings.finished]
        self.runs.seeds = seeds[0]
        self.runs.finish(outcome, retries, seeds if all(seeds) else None)
        blank = outcome.copies if self.runs.if_still_copied == reports.BLANK else ()
        return merged([each.output for each in drawings.finished], outcome.kept, blank)

    def _once(self, args: Any, kwargs: Any) -> Finished:
        """One drawing. Its pictures are decoded by the pipeline, or here if it returns latents."""
        self._pictures = self._latents = None
        output = self.pipe(*args, **kwargs)
        if self._latents is None:
            raise AMGError(f"{type(self.pipe).__name__} made no step that the guard knows.")
        if self._pictures is None and not self._ended():
            raise AMGError(
                "The drawing stopped early. Call the pipeline itself, which has no retries."
            )
        pictures = self._picture(self._latents) if self._pictures is None else self._pictures
        run = self.runs.of_now(len(pictures))
        made = Finished(
            output, run.drawn(pictures), self._masks(len(pictures)), list(self.runs.seeds)
        )
        self.runs.rest()
        return made

    @contextmanager
    def listening(self) -> Iterator[None]:
        pipe = self.pipe
        replaced = [
            (pipe.scheduler, "step", self._step),
            (pipe.scheduler, "set_timesteps", self._set_timesteps),
            (pipe.vae, "decode", self._decoded),
            (pipe, "encode_prompt", self._encode_prompt),
            (pipe, "prepare_latents", self._prepare_latents),
            (pipe, "prepare_mask_latents", self._prepare_mask_latents),
        ]
        hook = self.denoiser.register_forward_hook(self._called, with_kwargs=True)
        undo = [_replace(*each) for each in replaced if hasattr(each[0], each[1])]
        try:
            yield
            self._finish()
        finally:
            hook.remove()
            for restore in reversed(undo):
                restore()
            self.runs.unjudged(reports.NOT_ENDED)

    # --- what the pipeline calls

    def _called(self, denoiser: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if self._asks:
            return
        if self.pipe.scheduler is not self._scheduler or self.pipe.vae is not self._vae:
            raise AMGError(
                "The pipeline got another scheduler or VAE while it was guarded. Set them before `guard`."
            )
        self._calls.append(Evaluation.of(denoiser, args, kwargs, out))

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            calls, self._calls = self._calls, []
            if not calls:
                raise AMGError(
                    "The scheduler made a step without the guarded model: the pipeline got another one. "
                    "Set the model before `guard`."
                )
            made = parts(
                calls, model_output, self._scales(), self._rescaled(), type(self.pipe).__name__
            )
            self._asks = True
            try:
                steered = self.runs.step(
                    made, model_output, timestep, self._scheduler, self.encoder,
                    self._composite(len(model_output)),
                )  # fmt: skip
            finally:
                self._asks = False
            out = step(steered, timestep, sample, *args, **kwargs)
            self._latents = out[0] if isinstance(out, tuple) else out.prev_sample
            self._timestep = timestep
            return out

        return guarded

    def _set_timesteps(self, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._finish()
            return set_timesteps(*args, **kwargs)

        return guarded

    def _decoded(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = decode(z, *args, **kwargs)
            if self.runs.batch != len(z):
                return out
            picture = out[0] if isinstance(out, tuple) else out.sample
            if self._drawing:
                self._pictures = as_picture(picture.detach()).clamp(0, 1)
                return out
            found = self.runs.judge(as_picture(picture.detach()).clamp(0, 1), self._masks(len(z)))
            copies = [i for i, each in enumerate(found) if each.copy]
            if copies and self.runs.if_still_copied == reports.BLANK:
                picture[copies] = -1.0
            return out

        return guarded

    def _encode_prompt(self, encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(encode_prompt)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            out = encode_prompt(*args, **kwargs)
            if not self._asks:
                given = signature.bind(*args, **kwargs).arguments
                known = [] if self.encoder is None else self.encoder.known
                words = texts_of(given)
                known = known if words is None else [*known, words][-REMEMBERED:]
                self.encoder = Encoder(lambda texts: encode(encode_prompt, given, texts), known)
            return out

        return guarded

    def _prepare_latents(self, prepare_latents: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(prepare_latents)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            out = prepare_latents(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            latents = out[0] if isinstance(out, tuple) else out
            self.runs.seeds = _seeds(given.get("generator"), len(latents))
            if self._anew is not None and self._anew[0].any():
                out = self._moved(prepare_latents, given, out)
            if given.get("return_image_latents"):
                self._given = out[-1]
            return out

        return guarded

    def _moved(self, prepare_latents: Callable[..., Any], given: dict[str, Any], out: Any) -> Any:
        """`out`, with the rows of the samples that start from other noise from further calls."""
        assert self._anew is not None
        rows, number = self._anew
        generator, other = given.get("generator"), out
        if self.runs.seeds:
            shifted = _shifted(generator, OTHER_NOISE * number)
            other = prepare_latents(**(given | {"generator": shifted}))
        else:  # the global generator goes on
            for _ in range(number):
                other = prepare_latents(**given)
        seeds = _seeds(shifted, len(rows)) if self.runs.seeds else []
        pairs = zip(self.runs.seeds, seeds, rows.tolist(), strict=False)
        self.runs.seeds = [new if moved else old for old, new, moved in pairs]
        if isinstance(out, tuple):
            return tuple(_of_rows(*each, rows) for each in zip(out, other, strict=True))
        return _of_rows(out, other, rows)

    def _prepare_mask_latents(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            out = prepare(*args, **kwargs)
            self._mask = out[0]
            return out

        return guarded

    # --- inpainting

    def _masks(self, batch: int) -> Tensor | None:
        """The mask of each picture (B, 1, h, w). With guidance the pipeline has it twice."""
        return None if self._mask is None else self._mask[:batch].float().cpu()

    def _composite(self, batch: int) -> Callable[[Tensor], Tensor]:
        """For `SamplingRun.step`: puts in the part that the pipeline will put in."""
        if self._mask is None or self._given is None:
            return hosts.composited(None, None)
        mask = self._mask[:batch].float()
        return hosts.composited(mask, self._given.float() * (1 - mask))

    # --- the end of a drawing

    def _finish(self) -> None:
        """Check a drawing that left as latents."""
        latents, self._latents, self._calls = self._latents, None, []
        if self.runs.waiting and latents is not None:
            if not self._ended():
                self.runs.unjudged(reports.NOT_FINISHED)
            else:
                self.runs.judge(self._picture(latents), self._masks(len(latents)))
        self.runs.begin()
        self._mask = self._given = None

    def _ended(self) -> bool:
        """Whether the latest step was the last one of the scheduler."""
        return float(self._timestep) == float(self._scheduler.timesteps[-1])

    def _picture(self, latents: Tensor) -> Tensor:
        vae = self._vae
        with torch.no_grad():
            decoded = self._decode(into_vae(vae)(latents.to(vae.dtype)), return_dict=False)[0]
        return as_picture(decoded).clamp(0, 1)

    # --- how the pipeline guides

    def _scales(self) -> list[float]:
        names = ("guidance_scale", "true_cfg_scale", "_guidance_scale", "_true_cfg_scale")
        found = (getattr(self.pipe, name, None) for name in names)
        return list(
            dict.fromkeys(float(scale) for scale in found if isinstance(scale, int | float))
        )

    def _rescaled(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        share = getattr(self.pipe, "guidance_rescale", None) or 0.0
        if not share:
            return None
        from diffusers.guiders.guider_utils import rescale_noise_cfg

        return lambda guided, cond: rescale_noise_cfg(guided, cond, guidance_rescale=share)


def _replace(
    owner: Any, name: str, made_of: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Put a function in the place of a method, for this object alone. Returns how to undo it."""
    before, own = getattr(owner, name), name in vars(owner)
    function = wraps(before)(made_of(before))
    function.amg = True  # type: ignore[attr-defined]  # a mark on a plain function
    object.__setattr__(owner, name, function)

    def undo() -> None:
        if own:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)

    return undo


def texts_of(given: dict[str, Any]) -> list[Words] | None:
    """The prompts among the arguments of `encode_prompt`.

    None if it was given encoded ones. A prompt that only some encoders get is "prompt_2", "prompt_3".
    """
    names = [name for name in ("prompt", "prompt_2", "prompt_3") if given.get(name) is not None]
    if "prompt" not in names or given.get("prompt_embeds") is not None:
        return None
    each = [[given[name]] if isinstance(given[name], str) else given[name] for name in names]
    copies = int(given.get("num_images_per_prompt") or 1)
    return [words for words in zip(*each, strict=True) for _ in range(copies)]


def encode(encode_prompt: Callable[..., Any], given: dict[str, Any], texts: list[Words]) -> Encoded:
    """Encode other texts by the pipeline's own encoders, as it encoded the prompts `given`."""
    changed = {name: value for name, value in given.items() if not _of_prompt(name)}
    for i, name in enumerate(("prompt", "prompt_2", "prompt_3")):
        if name == "prompt" or name in given:
            changed[name] = [words[i] if i < len(words) else words[0] for words in texts]
    changed |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    accepted = inspect.signature(encode_prompt).parameters
    return encoded_of(
        encode_prompt(**{name: value for name, value in changed.items() if name in accepted})
    )


def _of_prompt(name: str) -> bool:
    return name.startswith(("prompt", "negative", "pooled"))


def encoded_of(out: Any) -> Encoded:
    """What the prompt became. `out` is what `encode_prompt` returns: (tokens, negative, pooled, …).

    Flux returns (tokens, pooled, ids). Pooled texts are (B, P), all others (B, T, C).
    """
    tokens, *rest = out if isinstance(out, tuple) else (out,)
    pooled = [each for each in rest if isinstance(each, Tensor) and each.ndim == 2]
    return Encoded(tokens, pooled[0] if pooled and len(pooled[0]) == len(tokens) else None)


def _of_rows(first: Any, other: Any, rows: Tensor) -> Any:
    """`first` (B, …) with the `rows` (B,) bool of `other`. What is no batch stays."""
    if not isinstance(first, Tensor) or len(first) != len(rows):
        return first
    return torch.where(rows.to(first.device).view(-1, *[1] * (first.ndim - 1)), other, first)


def _shifted(generator: Any, by: int) -> Any:
    """One generator, or a list, with seeds that are larger by so much."""
    if isinstance(generator, list | tuple):
        return [_shifted(one, by) for one in generator]
    return torch.Generator(generator.device).manual_seed((generator.initial_seed() + by) % 2**64)


def _seeds(generator: Any, batch: int) -> list[int | None]:
    """The seeds of the pictures' noise, as far as the scheduler was given the generators."""
    if isinstance(generator, torch.Generator):
        return [generator.initial_seed()] * batch
    if isinstance(generator, list | tuple) and len(generator) == batch:
        return [each.initial_seed() for each in generator]
    return []
