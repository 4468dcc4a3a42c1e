"""The three models, each with all that a table needs: what it knows, what it is asked, who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from amg_core.decoders import LinearDecoder, ModuleDecoder
from amg_core.descriptors import create
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
        1: the model has no prompt, nothing but D is known.
    data : TrainingSet
        What it was trained on, in the order of the index.
    probes : dict
        "pixel" and "latent": the guards' eyes, and each other's judges.
    memorised, others : list of str
        Captions that were duplicated with their picture, and captions that were not.
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

    @property
    def conditional(self) -> bool:
        return self.cfg_scale != 1

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
        return torch.tensor([self.subjects.index(text.split(" on ")[0]) for text in captions])


def text_world(folder: Path) -> Domain:
    """The embedded latent model; 32 captions it memorised, 16 seen once and 16 never seen."""
    model = demo.load()
    data = TrainingSet(*training_set(demo.PICTURES))
    memorised, others = choose_prompts(data.captions, data.copies)

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        return torch.cat([model.decoder(part) for part in latents.split(16)]).clamp(0, 1)

    return Domain(
        "text-conditional, latent", model.denoise,
        model.encode,
        model.sigmas, (4, 16, 16), decode, 4.0, data,
        _probes(demo.PICTURES, folder / "text", model, ModuleDecoder("demo", model.decoder, 4)),
        model.scorer, model.labels["subject"], memorised, others,
    )  # fmt: skip


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
        pixels.subjects, [""] * 64,
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
    """The picture itself, and latents of the demo's autoencoder: two families of descriptors."""
    made = {}
    encoder = model.encoder.eval()
    latent = LatentDescriptor(
        encoder, "demo", tensors_sha256(encoder.state_dict()), 4, side=SCORER_SIDE, scales=(8, 16)
    )
    for name, descriptor in {"pixel": create("pixel"), "latent": latent}.items():
        through = decoder if name == "pixel" else None
        made[name] = harness.matcher(pictures, out / name, descriptor, through)
    return made
