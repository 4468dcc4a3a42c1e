"""What is compared: plain sampling, the prompt baselines of Somepalli et al. 2023, and the guard."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from amg_core import presets
from amg_core.run import SamplingRun, Settings
from amg_core.schedule import Schedule
from amg_core.similarity.verdict import verdict
from amg_demo.sample import Guide, closed_loop, euler

from .domains import Domain

BATCH = 16
RETRIES = 2  # as the node has it
REPEATS = 4  # words added, as in Somepalli et al.'s code
GNI = 0.1  # noise on the caption's embedding, relative to its own deviation (CLIP's is about 1)
ALWAYS = Schedule("constant", -1e3, -1e3)  # no gate: everything is too close

SettingsOf = Callable[[str], Settings]  # of a descriptor's metric
Words = Callable[[list[str], list[str], np.random.Generator], list[str]]


@dataclass(frozen=True)
class Method:
    """One row of a table.

    `settings` None: no guard. `words` changes the words of a prompt, `noise` its embedding. `eye`:
    which descriptor guards, "" for the product's. `retries` > 0: the closed loop. `others`: also drawn for
    prompts that are not memorised. `after`: without a guard, from the prompts that the method of this name
    reduced.
    """

    name: str
    settings: SettingsOf | None = None
    words: Words | None = None
    noise: float = 0.0
    eye: str = ""
    retries: int = 0
    others: bool = True
    after: str = ""
    tables: tuple[int, ...] = ()


@dataclass
class Drawings:
    """Pictures (B, 3, H, W) in [0, 1], a report a batch, whether the guard acted (B,), seconds."""

    pictures: Tensor
    reports: list[dict] = field(default_factory=list)
    acted: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    redrawn: int = 0


def guard(name: str, preset: str, tables: tuple[int, ...], **options) -> Method:
    keep = {k: options.pop(k) for k in ("eye", "retries", "others") if k in options}
    return Method(name, partial(_settings, preset, options), tables=tables, **keep)


def _settings(preset: str, options: dict, metric: str) -> Settings:
    chosen = {k: v(metric) if callable(v) else v for k, v in options.items()}
    return presets.settings(preset, metric, **chosen)


def constant(metric: str) -> Schedule:
    """The threshold of *main* without its slope."""
    return replace(presets.settings("main", metric).schedule, kind="constant")


PROJECTION = {"form": "projection", "despecification": 0, "deduplication": 0}


def text_methods() -> list[Method]:
    """Tables 1, 4 and 5, on the text-conditional model. The ablations are of one drawing each."""
    paper = {"despecification": "Gspe", "deduplication": "Gdup", "dissimilarity": "Gsim"}
    return [
        Method("plain", tables=(1, 4, 5)),
        Method("GNI", noise=GNI, tables=(1,)),
        Method("RT", words=random_token, tables=(1,)),
        Method("CWR", words=repeated_word, tables=(1,)),
        Method("RNA", words=random_number, tables=(1,)),
        guard("AMG main", "main", (1,), retries=RETRIES),
        Method("reduced prompts, no guard", after="AMG main", others=False, tables=(1,)),
        guard("AMG strong", "strong", (1,), retries=RETRIES),
        guard("AMG gentle", "gentle", (1,), retries=RETRIES),
        guard("AMG main, eye latent", "main", (1,), eye="latent", retries=RETRIES, others=False),
        guard("AMG main, one drawing", "main", (1, 4, 5)),
        guard("paper", "paper", (1, 4, 5)),
        guard("reference", "reference", (1,)),
        guard("projection alone", "main", (1,), others=False, **PROJECTION),
        guard("main, no words", "main", (4,), despecification=0, others=False),
        guard("main, paper's Gspe for words", "main", (4,), exit=0.0, others=False),
        guard("main without Gdup", "main", (4,), deduplication=0, others=False),
        guard("main without Gsim", "main", (4,), dissimilarity=0, others=False),
        *(
            guard(f"paper without {label}", "paper", (4,), others=False, **{k: 0})
            for k, label in paper.items()
        ),
        guard("main, no gate", "main", (5,), schedule=ALWAYS),
        guard("main, constant", "main", (5,), schedule=constant),
        guard("paper, no gate", "paper", (5,), schedule=ALWAYS, others=False),
        guard("paper, constant", "paper", (5,), schedule=constant, others=False),
    ]


def class_methods() -> list[Method]:
    return [
        Method("plain", tables=(3,)),
        guard("AMG main", "main", (3,), retries=RETRIES),
        guard("AMG strong", "strong", (3,), retries=RETRIES),
        guard("AMG gentle", "gentle", (3,), retries=RETRIES),
        guard("AMG main, one drawing", "main", (3,)),
        guard("paper", "paper", (3,)),
        guard("reference", "reference", (3,)),
    ]


def unconditional_methods() -> list[Method]:
    """No prompt, no guidance scale: the dissimilarity term is all there is."""
    return [
        Method("plain", tables=(2,)),
        guard("AMG main", "main", (2,), retries=RETRIES),
        guard("AMG strong", "strong", (2,), retries=RETRIES),
        guard("AMG gentle", "gentle", (2,), retries=RETRIES),
        guard("AMG main, one drawing", "main", (2,)),
        guard("projection alone", "main", (2,), **PROJECTION),
        guard("reference", "reference", (2,)),
    ]


# ---------------------------------------------------------------- prompt baselines


def _insert(captions: list[str], word: Callable[[list[str]], str], rng) -> list[str]:
    """REPEATS times a word at a random place."""
    out = []
    for caption in captions:
        words = caption.split()
        for _ in range(REPEATS):
            words.insert(int(rng.integers(len(words) + 1)), word(words))
        out.append(" ".join(words))
    return out


def random_token(captions: list[str], vocabulary: list[str], rng: np.random.Generator):
    """RT: random words of the vocabulary."""
    return _insert(captions, lambda _: str(rng.choice(vocabulary)), rng)


def repeated_word(captions: list[str], vocabulary: list[str], rng: np.random.Generator):
    """CWR: words of the caption once more."""
    return _insert(captions, lambda words: str(rng.choice(words)), rng)


def random_number(captions: list[str], vocabulary: list[str], rng: np.random.Generator):
    """RNA: numbers from 0 to 99,999."""
    return _insert(captions, lambda _: str(rng.integers(100_000)), rng)


def reduced(captions: list[str], seeds: list[int], drawn: Drawings) -> list[str]:
    """The prompts without the words that a guard left out; of two ways, every other seed has the second."""
    lacking = [ways for report in drawn.reports for ways in report["left_out_words"]]
    texts = []
    for caption, seed, ways in zip(captions, seeds, lacking, strict=False):
        words = caption.split()
        for word in ways[seed % len(ways)].split() if ways else ():
            words.remove(word)
        texts.append(" ".join(words))
    return texts


def contexts(domain: Domain, method: Method, captions: list[str], seeds: list[int]) -> Tensor:
    """What the model is asked, one row a caption; each from a generator of its own seed."""
    if method.words is not None:
        vocabulary = sorted({w for text in domain.data.captions for w in text.split()})
        captions = [
            method.words([text], vocabulary, np.random.default_rng(seed))[0]
            for text, seed in zip(captions, seeds, strict=True)
        ]
    context = domain.encode(captions)
    if method.noise:
        noise = [
            torch.randn(context.shape[1:], generator=torch.Generator().manual_seed(seed + 1))
            for seed in seeds
        ]
        context = context + method.noise * context.std() * torch.stack(noise)
    return context


# ---------------------------------------------------------------- drawing


def sample(
    domain: Domain, context: Tensor, captions: list[str], seeds: list[int], steps: int,
    guide: Guide | None,
) -> Tensor:  # fmt: skip
    """Latents (B, C, H, W)."""
    if guide is not None and domain.flow:
        guide = in_flow(guide)
    return euler(
        domain, context, seeds, domain.shape, steps=steps, cfg_scale=domain.cfg_scale,
        conditional=domain.conditional, guide=guide,
        prompts=captions if context.shape[1] > 1 else None,  # a class is no text
    )  # fmt: skip


def in_flow(guide: Guide) -> Guide:
    """The guide of a flow, whose own σ is both its time and, as σ/(1 − σ), its noise level."""

    def step(denoised: Tensor, *, sigma: Tensor, **known) -> Tensor:
        known["t"] = float(sigma[0])
        return guide(denoised, sigma=sigma / (1 - sigma), **known)

    return step


def draw(
    domain: Domain, method: Method, captions: list[str], seeds: list[int], steps: int
) -> Drawings:
    """The same seeds and the same batches whatever the method: rows pair picture by picture."""
    drawn, pictures, start = Drawings(torch.empty(0)), [], time.perf_counter()
    for i in range(0, len(captions), BATCH):
        part = slice(i, i + BATCH)
        with torch.inference_mode():
            context = contexts(domain, method, captions[part], seeds[part])
        latents, report, redrawn = _draw_batch(
            domain, method, context, captions[part], seeds[part], steps
        )
        pictures.append(domain.decode(latents))
        drawn.redrawn += redrawn
        if report is not None:
            drawn.reports.append(report)
            drawn.acted += [n > 0 for n in report["guarded_evaluations"]]
        else:
            drawn.acted += [False] * len(seeds[part])
    drawn.pictures, drawn.seconds = torch.cat(pictures), time.perf_counter() - start
    return drawn


def _draw_batch(
    domain: Domain,
    method: Method,
    context: Tensor,
    captions: list[str],
    seeds: list[int],
    steps: int,
):
    """Latents, the (first) report and how many samples were drawn again.

    With retries, as the node does it: the last one starts from other noise.
    """
    if method.settings is None:
        return sample(domain, context, captions, seeds, steps, None), None, 0
    matcher = domain.matchers[method.eye or domain.eye]
    settings = method.settings(matcher.metric)
    if not method.retries:
        run = SamplingRun(matcher, settings, steps)
        drawn = run.drawn(sample(domain, context, captions, seeds, steps, run.step))
        return drawn.latents, drawn.report, 0
    outcome = closed_loop(
        lambda chosen, guide: sample(domain, context, captions, chosen, steps, guide),
        lambda latents, named: verdict(matcher, domain.decode(latents), named),
        matcher, settings, seeds, retries=method.retries, steps=steps,
    )  # fmt: skip
    again = {i for attempt in outcome.attempts[1:] for i in attempt.samples}
    return outcome.latents, outcome.attempts[0].report, len(again)


def watch(domain: Domain, captions: list[str], seeds: list[int], steps: int) -> dict:
    """The report of plain sampling with a guard that only looks."""
    matcher = domain.matchers[domain.eye]
    off = {"despecification": 0, "deduplication": 0, "dissimilarity": 0}
    with torch.inference_mode():
        context = domain.encode(captions)
    run = SamplingRun(matcher, presets.settings("main", matcher.metric, **off), steps)
    sample(domain, context, captions, seeds, steps, run.step)
    return run.report()
