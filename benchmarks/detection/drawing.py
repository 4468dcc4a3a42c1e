"""Prompts, what the embedded model says of them, and what it draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amg_core.detection import predictions as of
from amg_core.detection import statistics
from amg_core.detection.predictions import Predictions
from amg_core.mitigation.transition import guidance_norm
from amg_demo import pictures as source
from amg_demo.model import DemoModel
from amg_demo.sample import noise_levels

BATCH = 32
HIGH = 999


@dataclass(frozen=True)
class Prompts:
    """memorised: captions whose picture was there often. once: there once. new: never there.
    calibration: as once and new, but others."""

    memorised: list[str]
    once: list[str]
    new: list[str]
    calibration: list[str]

    @property
    def negatives(self) -> list[str]:
        return self.once + self.new


def choose(captions: list[str], copies: Tensor, each: int, calibration: int) -> Prompts:
    """`each` captions that were seen once and as many new ones, and `calibration` further ones."""
    rng = np.random.default_rng(13)
    memorised = [text for text, n in zip(captions, copies.tolist(), strict=True) if n > 1]
    once = [text for text, n in zip(captions, copies.tolist(), strict=True) if n == 1]
    half = calibration // 2
    seen = [str(text) for text in rng.permutation(once)[: each + half]]
    new: list[str] = []
    parts = (source.SUBJECTS, list(source.COLOURS), source.PATTERNS)
    taken = set(captions)
    while len(new) < each + calibration - half:
        text = source.caption(*(str(rng.choice(part)) for part in parts))
        if text not in taken:
            taken.add(text)
            new.append(text)
    return Prompts(memorised, seen[:each], new[:each], seen[each:] + new[each:])


def noises(first: int, count: int) -> Tensor:
    """(count, 4, 16, 16), each of its own seed."""
    each = (torch.Generator().manual_seed(first + i) for i in range(count))
    return torch.stack([torch.randn(4, 16, 16, generator=generator) for generator in each])


def level(model: DemoModel, low: float) -> int:
    return round(low * (len(model.sigmas) - 1))


@torch.inference_mode()
def predictions(model: DemoModel, texts: Sequence[str], z: Tensor, t: int) -> list[Predictions]:
    """What the model says of the noises z (n, …) at step t, for each text; no prompt is asked once."""
    sigma = model.sigmas[t]
    x = of.unrescaled(z, float(1 / (1 + sigma**2) ** 0.5))
    contexts = model.encode(["", *texts])

    def ask(context: Tensor) -> Tensor:
        rows = context.repeat_interleave(len(z), dim=0)
        noisy = x.repeat(len(context), 1, 1, 1)
        said = model.denoise(noisy, sigma.expand(len(noisy)), rows)
        return said.unflatten(0, (len(context), len(z)))

    (nothing,) = ask(contexts[:1])
    each = max(1, BATCH // len(z))
    predicted = [d for part in contexts[1:].split(each) for d in ask(part)]
    return [Predictions(x, float(sigma), d, nothing, of.V) for d in predicted]


def measure(
    model: DemoModel, texts: Sequence[str], z: Tensor, low: float
) -> list[list[dict[str, float]]]:
    """`statistics.measure` of every text; and `toneless_norm`, to explain the norm."""
    high, near = predictions(model, texts, z, HIGH), predictions(model, texts, z, level(model, low))
    predicted = [statistics.measure(h, n) for h, n in zip(high, near, strict=True)]
    for rows, h in zip(predicted, high, strict=True):
        norms = toneless_norm(h)
        for i, row in enumerate(rows):
            row["toneless_norm"] = float(norms[: i + 1].mean())
    return predicted


def toneless_norm(p: Predictions) -> Tensor:
    """The norm without the mean of each latent channel, which is the overall colour (n,)."""
    difference = of.score_difference(p)
    return of.flat(difference - difference.mean(dim=(2, 3), keepdim=True)).norm(dim=1)


@torch.inference_mode()
def draw(
    model: DemoModel, texts: Sequence[str], z: Tensor, steps: int, cfg_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample every text from the noise z (1, …).

    Returns pictures; the norm at every step (B, steps); and, decoded, what the model predicts half-way
    without the prompt.
    """
    sigmas, _ = noise_levels(model, steps)
    drawn, norms, halfway = [], [], []
    for i in range(0, len(texts), BATCH):
        part = list(texts[i : i + BATCH])
        context = model.encode(part + [""] * len(part))
        x, steps_norms = z.expand(len(part), -1, -1, -1) * sigmas[0], []
        for j in range(steps):
            both = model.denoise(torch.cat([x, x]), sigmas[j].expand(2 * len(x)), context)
            cond, uncond = both.chunk(2)
            steps_norms.append(guidance_norm(cond, uncond, sigmas[j]))
            if j == steps // 2:
                halfway.append(model.decoder(uncond).clamp(0, 1))
            denoised = uncond + cfg_scale * (cond - uncond)
            x = x + (x - denoised) / sigmas[j] * (sigmas[j + 1] - sigmas[j])
        norms.append(torch.stack(steps_norms, dim=1))
        drawn.append(model.decoder(x).clamp(0, 1))
    return torch.cat(drawn), torch.cat(norms), torch.cat(halfway)


@torch.inference_mode()
def seconds(model: DemoModel, text: str, n: int, low: float, steps: int) -> dict[str, float]:
    """Median seconds of: both passes of a probe, the first alone, and a whole sampling run."""
    z = noises(0, n)
    context = model.encode([text] * n + [""] * n)

    def ask(sigma: Tensor) -> None:
        x = of.unrescaled(z, float(1 / (1 + sigma**2) ** 0.5)).repeat(2, 1, 1, 1)
        model.denoise(x, sigma.expand(2 * n), context)

    def timed(run, times: int) -> float:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return float(np.median(taken))

    high, near = model.sigmas[HIGH], model.sigmas[level(model, low)]
    ask(high)  # warm
    return {
        "one": timed(lambda: ask(high), 15),
        "two": timed(lambda: (ask(high), ask(near)), 15),
        "all": timed(lambda: [ask(high) for _ in range(steps)], 3),
    }
