"""What is compared: plain sampling, prompt baselines of Somepalli et al. 2023, and the guard's presets.

Each method draws the pictures of one prompt, one for each seed. All start from the same noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg_core import limits, presets
from amg_core.descriptors import DEFAULT, create
from amg_core.errors import AMGError
from amg_core.index.sources import Pictures
from amg_core.mitigation import embeddings
from amg_core.mitigation.prompts import CODE, PAPER, Recipe, below, randomise
from amg_diffusers import guard
from benchmarks import harness

from . import detectors, remedies
from .model import TEXTS, Model, pictures_of

RETRIES = 2  # as the nodes have it
OTHER_SEEDS, LED = 1_000_003, 2  # as the node AMG Copy Guard has them
# The most rows of the denoiser that a guard asks for besides (`amg_core.guidance.reduction`): two reduced
# prompts and a caption at a step, and once for a prompt of at most 16 parts four times as many.
AT_A_STEP, SEARCH = 3, 4 * 16


@dataclass
class Drawn:
    """Pictures (B, 3, H, W) in [0, 1] of one prompt, whether the guard acted on each, and its report."""

    pictures: Tensor
    acted: list[bool]
    attempts: list[int] = field(default_factory=list)
    left_out: list[list[str]] = field(default_factory=list)


Draw = Callable[[Model, str, Sequence[int]], Drawn]
Check = Callable[[Model], object]


# ---------------------------------------------------------------- what a model must have


def needs_nothing(model: Model) -> None:
    """Every model will do."""


def needs_tokens(model: Model) -> None:
    model.encode([""])


def needs_clip(model: Model) -> None:
    model.encode([""])
    if getattr(model.pipe.tokenizer, "eos_token_id", None) is None:
        raise AMGError("padding: this model has no CLIP tokenizer. Leave it out with --methods.")


def needs_guidance(model: Model) -> None:
    if model.cfg_scale <= 1:
        raise AMGError(
            "delayed, dynamic, opposite: they need a guidance scale above 1. Leave them out with --methods."
        )


def needs_noise(model: Model) -> None:
    model.encode([""])
    detectors.kind(model)


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes
    ----------
    draw : callable
        Model, prompt, seeds -> Drawn.
    about : str
        What it is, for the list.
    drawings : (int, int)
        The least and the most drawings of a picture.
    once : int
        Further drawings for each prompt, however many pictures it gets.
    extra : int
        Further rows of the denoiser for each picture, at most.
    check : callable
        Raises AMGError if a model lacks what the method needs.
    acts : bool
        Whether a drawing may need more rows of the denoiser than plain sampling: see `rows`.
    """

    name: str
    draw: Draw
    about: str
    drawings: tuple[int, int] = (1, 1)
    once: int = 0
    extra: int = 0
    check: Check = needs_nothing
    acts: bool = False

    def rows(self, steps: int, per_step: int, seeds: int) -> tuple[int, int]:
        """The least and the most rows of the denoiser for one picture of a batch of `seeds`.

        `per_step` is 2 with classifier-free guidance. A guard that acts asks for more (`AT_A_STEP`), and
        searches for words of each sample of a batch when it becomes active, with the whole batch.
        """
        least, most = (count * per_step * steps for count in self.drawings)
        extra = self.drawings[1] * (AT_A_STEP * steps + SEARCH * seeds) if self.acts else 0
        return least, most + extra + self.extra


# ---------------------------------------------------------------- the text


def plain(model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    return _untouched(model.draw(seeds, prompt=[text] * len(seeds)))


def randomised(method: str, recipe: Recipe, model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """RT, CWR, RNA: the words of each picture from a generator of its own seed."""
    draw = vocabulary(model.pipe.tokenizer) if method == "RT" else None
    changed = [
        randomise(text, method, recipe, torch.Generator().manual_seed(seed + 1), draw)
        for seed in seeds
    ]
    return _untouched(model.draw(seeds, prompt=changed))


def vocabulary(tokenizer: Any) -> Callable[[torch.Generator], str]:
    """A random token of a tokenizer as text."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return lambda generator: str(tokenizer.decode([ids[below(len(ids), generator)]])).strip()


# ---------------------------------------------------------------- the encoded text


def noisy(model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """GNI on the caption's embedding, at the paper's absolute scale."""
    tokens, empty = model.encode([text] * len(seeds))
    generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    changed = embeddings.gaussian_noise(tokens, embeddings.NOISE, generators)
    return _untouched(model.draw(seeds, **dict(zip(TEXTS, (changed, empty), strict=True))))


def unpadded(model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """70 % of CLIP's padding set to zero."""
    tokenizer = model.pipe.tokenizer
    end = tokenizer.eos_token_id
    tokens, empty = model.encode([text] * len(seeds))
    ids = tokenizer(
        text, padding="max_length", max_length=tokens.shape[1], truncation=True
    ).input_ids
    padding = torch.tensor([embeddings.padding_after(ids, end)])
    generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    changed = embeddings.zero_padding(tokens, padding, embeddings.MASKED, generators)
    return _untouched(model.draw(seeds, **dict(zip(TEXTS, (changed, empty), strict=True))))


def adapted(model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """Wen et al.'s prompt adaptation."""
    texts = remedies.adapted(model, text, seeds, remedies.WEN_TARGET)
    return _untouched(model.draw(seeds, **dict(zip(TEXTS, texts, strict=True))))


# ---------------------------------------------------------------- when guidance begins


def late(scale: float, dynamic: bool, model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """Jain et al.: the guidance scale is `scale` until the transition."""
    with remedies.delayed(model, scale, dynamic):
        return plain(model, text, seeds)


def _untouched(pictures: Tensor) -> Drawn:
    return Drawn(pictures, [False] * len(pictures))


# ---------------------------------------------------------------- the guard


def guarded(preset: str, retries: int, model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """With an index of the training pictures."""
    return _under(model, model.guarded_by, preset, retries, text, seeds)


def _under(
    model: Model, matcher: Any, preset: str, retries: int, text: str, seeds: Sequence[int]
) -> Drawn:
    given = model.asked(seeds, prompt=[text] * len(seeds))
    with guard(model.pipe, matcher, preset, decoder=matcher.decoder) as listening:
        pictures = pictures_of(listening.draw(**given, retries=retries))
    report = listening.report
    attempts = [verdict["attempt"] for verdict in report["verdicts"]]
    acted = [n > 0 for n in report["guarded_evaluations"]] or [False] * len(seeds)
    again = {i for attempt in report["attempts"][1:] for i in attempt["samples"]}
    return Drawn(
        pictures,
        [one or i in again for i, one in enumerate(acted)],
        attempts,
        report["left_out_words"],
    )


def without_index(model: Model, text: str, seeds: Sequence[int]) -> Drawn:
    """As the node AMG Copy Guard with *draw twice*: the index is what the prompt itself draws.

    The two drawings are made once for a prompt, from the first seed.
    """
    first = seeds[0]
    stored = model.draw([first + OTHER_SEEDS * k for k in (1, 2)], prompt=[text] * 2)
    if likeness(stored) < limits.ONE_PICTURE:
        return plain(model, text, seeds)
    each = [_led_away(model, text, seed, stored) for seed in seeds]
    return Drawn(
        torch.cat([one.pictures for one in each]),
        *([value for one in each for value in getattr(one, name)]
          for name in ("acted", "attempts", "left_out")),
    )  # fmt: skip


def _led_away(model: Model, text: str, seed: int, stored: Tensor) -> Drawn:
    """One picture that is kept off `stored` (N, 3, H, W), and off where the prompt leads then."""
    decoder = model.guarded_by.decoder
    for number in range(LED + 1):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            matcher = harness.matcher(
                Pictures(stored.movedim(1, -1)), Path(folder) / "stored", create(DEFAULT), decoder
            )
            made = _under(model, matcher, presets.PRESETS[0], RETRIES, text, [seed])
            if number == LED:
                break
            other = _under(
                model, matcher, presets.PRESETS[0], 0, text, [seed + OTHER_SEEDS * (3 + number)]
            )
        two = torch.cat([made.pictures, other.pictures])
        if likeness(two) < limits.ONE_PICTURE:
            break
        stored = torch.cat([stored, two])
    return made


def likeness(two: Tensor) -> float:
    """Of two drawings (2, 3, H, W). From `limits.ONE_PICTURE` on they are one picture."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        one = harness.matcher(
            Pictures(two[:1].movedim(1, -1)), Path(folder) / "one", create(DEFAULT)
        )
        return float(one.match_pictures(two[1:]).score[0])


# ---------------------------------------------------------------- all of them

_BASELINES = {
    "RT": "random tokens, replaced or added",
    "CWR": "words of the caption once more",
    "RNA": "random numbers",
}
_GUARDS = {
    "main": "the recommended preset",
    "strong": "the strong preset",
    "gentle": "the gentle preset",
    "paper": "Equations 8 to 17",
    "reference": "the constants of the authors' code",
}
METHODS = {
    one.name: one
    for one in (
        Method("plain", plain, "nothing is changed"),
        Method("GNI", noisy, "Gaussian noise of 0.1 on the caption's embedding", check=needs_tokens),
        *(
            Method(
                f"{name}{ending}", partial(randomised, name, recipes[name]), f"{about} ({whose})"
            )
            for name, about in _BASELINES.items()
            for ending, recipes, whose in (
                ("", PAPER, "the paper's probabilities"),
                (" code", CODE, "as in the authors' code"),
            )
        ),
        Method("padding", unpadded, "70 % of CLIP's padding zeroed", check=needs_clip),
        Method("delayed", partial(late, 0.0, False), "no guidance in the first third (Jain et al.)",
               check=needs_guidance),
        Method("dynamic", partial(late, 0.0, True), "none until the norm's first minimum, at most so long",
               check=needs_guidance),
        Method("opposite", partial(late, -2.0, False), "opposite guidance in the first third",
               check=needs_guidance),
        Method("Wen", adapted, "the prompt adapted to a norm of 3", extra=remedies.ADAPTED_ROWS,
               check=needs_noise),
        *(
            Method(name, partial(guarded, name, RETRIES), f"AMG, {about}, {RETRIES} retries",
                   (1, 1 + RETRIES), acts=True)
            for name, about in _GUARDS.items()
        ),
        Method("guard", without_index, "AMG Copy Guard, without an index of training pictures",
               (1, (LED + 1) * (1 + RETRIES) + LED), once=2, acts=True),
    )
}  # fmt: skip
USUAL = tuple(name for name in METHODS if not name.endswith(" code"))


def chosen(names: Sequence[str]) -> list[Method]:
    """The methods of these names, plain first. AMGError for an unknown one."""
    if unknown := [name for name in names if name not in METHODS]:
        raise AMGError(
            f"--methods: {', '.join(unknown)} is unknown. There are: {', '.join(METHODS)}."
        )
    return [METHODS[name] for name in METHODS if name == "plain" or name in names]
