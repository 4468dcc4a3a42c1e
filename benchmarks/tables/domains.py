"""The models, each with all that a table needs: what it knows, what it is asked, who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from amg_core.decoders import LinearDecoder, ModuleDecoder
from amg_core.descriptors import DEFAULT, create
from amg_core.descriptors.latent import LatentDescriptor
from amg_core.descriptors.tensors import tensors_sha256
from amg_core.images import resize
from amg_core.similarity.matcher import Matcher
from amg_demo import model as demo
from amg_demo.__main__ import choose_prompts, training_set

from .. import harness
from . import models
from .train import TrainingRecipe, TrainingSet, obtain, read_pictures, write_pictures

SCORER_SIDE = 128  # what the demo's scorer was trained on


@dataclass(frozen=True)
class Domain:
    """One model that memorises.

    Attributes
    ----------
    denoise : callable
        (x, σ (B,), context) -> x̂0.
    encode : callable
        Captions -> context (B, …); "" is no prompt.
    shape : (C, H, W) of a latent
    decode : callable
        Latents -> pictures in [0, 1].
    cfg_scale : float
        1: there is no unconditional prediction.
    data : TrainingSet
        What it was trained on, in the order of the index.
    matchers : dict
        Name of a descriptor -> Matcher: one guards (`eye`), and the others judge.
    memorised, others : list of str
        Captions that were duplicated with their picture, and captions that were not.
    conditional : bool
        False: the model has no prompt, nothing but D is known.
    own : dict
        Prompt -> row of the training picture that it belongs to, where it belongs to one.
    kinds : dict
        Kind of prompt -> which of `memorised` are of it.
    flow : bool
        The model's σ is that of rectified flow, x_t = (1 − σ) x0 + σ noise.
    eye : str
        The descriptor that guards.
    """

    name: str
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    encode: Callable[[list[str]], Tensor]
    sigmas: Tensor
    shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor]
    cfg_scale: float
    data: TrainingSet
    matchers: dict[str, Matcher]
    scorer: Callable[[Tensor], dict[str, Tensor]]
    subjects: list[str]
    memorised: list[str]
    others: list[str] = field(default_factory=list)
    conditional: bool = True
    own: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    flow: bool = False
    eye: str = DEFAULT

    def prompts(self, rounds: int, first: int) -> Iterator[tuple[str, int, int]]:
        """(caption, seed, group) of each picture; group 0 = memorised, 1 = others.

        Round r starts at seed first + 1000·r, so that no two pictures share one.
        """
        for group, captions in enumerate((self.memorised, self.others)):
            for r in range(rounds):
                for i, caption in enumerate(captions):
                    yield caption, first + 1000 * r + group * len(self.memorised) + i, group

    def subject(self, captions: list[str]) -> Tensor:
        """The scorer's label of each caption's subject (B,)."""
        names = [
            max((name for name in self.subjects if f" {name} " in f" {text} "), key=len)
            for text in captions
        ]
        return torch.tensor([self.subjects.index(name) for name in names])


ORDERS = {  # of the words of a caption
    "subject first": "{subject} on {colour} {pattern}",
    "subject in the middle": "{colour} {subject} on {pattern}",
    "subject last": "on {colour} {pattern} {subject}",
}


def reordered(caption: str, order: str) -> str:
    """A caption of the demo in one of `ORDERS`."""
    subject, ground = caption.split(" on ")
    colour, pattern = ground.split()
    return ORDERS[order].format(subject=subject, colour=colour, pattern=pattern)


def text_world(folder: Path, cfg_scale: float = 4.0, flow: bool = False) -> Domain:
    """The embedded latent model; 32 captions it memorised in three orders, 16 seen once, 16 never.

    With `flow` it is drawn along straight lines from noise to picture, as a rectified flow.
    """
    model = demo.load()
    data = TrainingSet(*training_set(demo.PICTURES))
    memorised, others = choose_prompts(data.captions, data.copies)
    kinds = {order: [reordered(text, order) for text in memorised] for order in ORDERS}
    rows = [data.captions.index(text) for text in memorised]

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        return torch.cat([model.decoder(part) for part in latents.split(16)]).clamp(0, 1)

    def denoise_flow(x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        rest = 1 - sigma
        return model.denoise(x / rest[:, None, None, None], sigma / rest, context)

    decoder = ModuleDecoder("demo", model.decoder, 4)
    largest = float(model.sigmas[-1])
    return Domain(
        name=f"text-conditional, {'flow, ' if flow else ''}cfg {cfg_scale:g}",
        denoise=denoise_flow if flow else model.denoise,
        encode=model.encode,
        sigmas=torch.linspace(0, largest / (1 + largest), 1000) if flow else model.sigmas,
        shape=(4, 16, 16),
        decode=decode,
        cfg_scale=cfg_scale,
        data=data,
        matchers=_probes(demo.PICTURES, folder / "text", model, decoder),
        scorer=model.scorer,
        subjects=model.labels["subject"],
        memorised=[text for texts in kinds.values() for text in texts],
        others=others,
        own={text: row for texts in kinds.values() for text, row in zip(texts, rows, strict=True)},
        kinds=kinds,
        flow=flow,
    )


def class_world(
    folder: Path, recipe: TrainingRecipe, tell: Callable[[str], None] = print
) -> Domain:
    """Class-conditional in pixel space; asked for every class that has a duplicated picture, and others."""
    data, net, pixels = _pixel_model(folder, recipe, tell)
    classes = data.classes
    duplicated = [c for c, n in zip(data.captions, data.copies.tolist(), strict=True) if n > 1]

    def encode(captions: list[str]) -> Tensor:
        labels = [classes.index(c) if c else len(classes) for c in captions]
        return net.context(torch.tensor(labels))

    return Domain(
        "class-conditional, pixels", net.denoise, encode, net.sigmas, (3, models.SIDE, models.SIDE),
        _pixels, 2.0, data, pixels.matchers, pixels.scorer, pixels.subjects, sorted(set(duplicated)),
        sorted(set(classes) - set(duplicated)),
    )  # fmt: skip


def unconditional_world(
    folder: Path, recipe: TrainingRecipe, tell: Callable[[str], None] = print
) -> Domain:
    """Unconditional in pixel space: 64 draws a round."""
    data, net, pixels = _pixel_model(folder, recipe, tell)
    return Domain(
        "unconditional, pixels", net.denoise,
        lambda captions: net.context(torch.full((len(captions),), net.classes)),
        net.sigmas, (3, models.SIDE, models.SIDE), _pixels, 1.0, data, pixels.matchers, pixels.scorer,
        pixels.subjects, [""] * 64, conditional=False,
    )  # fmt: skip


@dataclass(frozen=True)
class _PixelParts:
    matchers: dict[str, Matcher]
    scorer: Callable[[Tensor], dict[str, Tensor]]
    subjects: list[str]


def _pixel_model(folder: Path, recipe: TrainingRecipe, tell):
    pictures = folder / f"pictures-{recipe.singles}"
    write_pictures(pictures, singles=recipe.singles)
    data = read_pictures(pictures)
    net, judge = obtain(recipe, folder, data, tell), demo.load()
    decoder = LinearDecoder(torch.eye(3) * 2 / models.SPREAD)
    matchers = _probes(pictures, folder / f"index-{recipe.singles}", judge, decoder)

    def scorer(small: Tensor) -> dict[str, Tensor]:
        return judge.scorer(resize(small, SCORER_SIDE))

    return data, net, _PixelParts(matchers, scorer, judge.labels["subject"])


def _pixels(x: Tensor) -> Tensor:
    return models.to_pictures(x).clamp(0, 1)


def _probes(pictures: Path, out: Path, model: demo.DemoModel, decoder) -> dict[str, Matcher]:
    """The product's descriptor, the picture itself, and latents of the demo's autoencoder."""
    made = {}
    encoder = model.encoder.eval()
    latent = LatentDescriptor(
        encoder, "demo", tensors_sha256(encoder.state_dict()), 4, side=SCORER_SIDE, scales=(8, 16)
    )
    for name, descriptor in {
        DEFAULT: create(DEFAULT),
        "pixel": create("pixel"),
        "latent": latent,
    }.items():
        through = None if name == "latent" else decoder
        made[name] = harness.matcher(pictures, out / name, descriptor, through)
    return made
