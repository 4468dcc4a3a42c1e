"""Train the pixel-space model until it memorises: a few minutes on a CPU core.

It sees the demo's pictures at 32 px: each subject's duplicated picture `copies` times and `singles`
others once, mirrored half of the time. What is duplicated never varies, as in a crawl. The class is
dropped half of the time: asked without one, the same network is the unconditional model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from amg_core.images import low_pass
from amg_demo.__main__ import training_set
from amg_demo.model import PICTURES
from amg_demo.sheet import to_image

from . import models


@dataclass(frozen=True)
class TrainingRecipe:
    """What a checkpoint depends on; its hash is in the file's name."""

    steps: int = 1200
    batch: int = 32
    rate: float = 2e-3
    drop: float = 0.5
    width: int = 112
    deep: int = 160
    singles: int = 4
    copies: int = 20
    seed: int = 0

    @property
    def file(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"pixels-{digest[:10]}.safetensors"


@dataclass(frozen=True)
class TrainingSet:
    """A training set: pictures (N, 3, S, S) in [0, 1], captions, duplicates (N,), in index order."""

    pictures: Tensor
    captions: list[str]
    copies: Tensor

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.captions))

    @property
    def labels(self) -> Tensor:
        numbers = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([numbers[caption] for caption in self.captions])


def write_pictures(folder: Path, side: int = models.SIDE, singles: int = 4) -> None:
    """The small training set as a folder that `amg_core.index.build` reads; captions are the subjects."""
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pictures, captions, duplicates = training_set(PICTURES)
    small, rows, seen = low_pass(pictures, side), [], {}
    for i, (caption, copies) in enumerate(zip(captions, duplicates.tolist(), strict=True)):
        subject = caption.split(" on ")[0]
        if copies == 1:
            seen[subject] = seen.get(subject, 0) + 1
            if seen[subject] > singles:
                continue
        name = f"{'duplicated' if copies > 1 else 'once'}-{i:03d}.png"
        to_image(small[i]).save(folder / name)
        rows.append({"file_name": name, "text": subject, "duplicates": copies})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def read_pictures(folder: Path) -> TrainingSet:
    return TrainingSet(*training_set(folder))


def obtain(
    recipe: TrainingRecipe, folder: Path, data: TrainingSet, tell: Callable[[str], None] = print
):
    """The model of that recipe from `folder`; trained and kept there where there is none yet."""
    path, classes = folder / recipe.file, len(data.classes)
    if not path.is_file():
        models.save(train(recipe, data, tell), path)
    return models.load(path, classes, width=recipe.width, deep=recipe.deep)


def train(
    recipe: TrainingRecipe, data: TrainingSet, tell: Callable[[str], None] = print
) -> models.PixelModel:
    """Regression with averaged weights; the class is dropped now and then."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = models.PixelModel(len(data.classes), recipe.width, recipe.deep)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=1e-3)
    batches, started, losses = batches_of(recipe, data, model.sigmas, generator), time.time(), []
    half = faster_precision(lambda: loss_of(model, next(batches)).backward())
    for step in range(recipe.steps):
        warm, done = min(1.0, (step + 1) / 50), step / recipe.steps
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * warm * (1 - done) ** 0.5
        optimiser.zero_grad(set_to_none=True)
        with half():
            loss = loss_of(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        decay = min(0.998, (step + 1) / (step + 20))
        for key, value in model.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        if (step + 1) % 200 == 0:
            spent = time.time() - started
            mean = sum(losses[-200:]) / 200
            tell(f"training: step {step + 1}/{recipe.steps}, loss {mean:.4f}, {spent:.0f} s")
    model.load_state_dict(average)
    return model.eval().requires_grad_(False)


def batches_of(
    recipe: TrainingRecipe, data: TrainingSet, sigmas: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(x0, noise, σ, labels) without end."""
    weight = torch.where(data.copies > 1, recipe.copies, 1).float()
    space, labels, classes = models.to_space(data.pictures), data.labels, len(data.classes)
    while True:
        pick = torch.multinomial(weight, recipe.batch, replacement=True, generator=generator)
        chance = torch.rand(3, recipe.batch, generator=generator)
        x0 = space[pick]
        mirrored = (chance[0] < 0.5) & (data.copies[pick] == 1)
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sigmas[(chance[1] * len(sigmas)).long()]
        label = torch.where(chance[2] < recipe.drop, classes, labels[pick])
        yield x0, noise, sigma, label


def loss_of(model: models.PixelModel, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean square error of x0, weighted by min(1/σ², 5) as in Min-SNR (Hang et al. 2023), and 0.1."""
    x0, noise, sigma, label = batch
    s = sigma[:, None, None, None]
    predicted = model.denoise(x0 + s * noise, sigma, model.context(label))
    weight = (1 / s**2).clamp(max=5) + 0.1
    return (weight * (predicted.float() - x0) ** 2).mean()


def faster_precision(once: Callable[[], None]) -> Callable[[], AbstractContextManager]:
    """bfloat16 autocast where it makes `once` faster on this CPU, else nothing."""

    def half() -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16)

    def seconds(context: Callable[[], AbstractContextManager]) -> float:
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            with context():
                once()
            spent.append(time.perf_counter() - start)
        return min(spent)

    return half if seconds(half) < seconds(nullcontext) else nullcontext
