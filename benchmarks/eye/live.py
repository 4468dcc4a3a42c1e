"""Table 1: does the gate open on a copy, through an autoencoder, at the sizes artists draw?

Photographs are encoded and handed to a run as its predictions, D and D_c, at every noise level: perfect
copies of pictures that the index holds, imperfect ones (darker, tinted, of lower contrast, with grain in
the latent, as models draw them), and pictures that the index does not hold. What counts is the gate of the
preset main at strength 0: whether it was open at every step, whether the neighbour was the right one,
and whether it opened at any step for a picture that is not in the index.

Autoencoders: the demo's, and FLUX.2's tiny one (taef2_encoder and taef2_decoder) where its weights are
given. A third way to look is the host's preview, a colour a cell: `preview` is such a map, fitted to the
latents of other photographs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from amg_core import presets
from amg_core.decoders import Decoder, LinearDecoder, ModuleDecoder, load_taesd
from amg_core.descriptors import create
from amg_core.descriptors.latent import load_taesd_encoder
from amg_core.run import SamplingRun
from amg_core.similarity.matcher import Matcher
from amg_demo import model as demo

from .. import harness
from ..harness import Table, Watch, between, markdown
from .eyes import NumberedRows, whole
from .pictures import PHOTOGRAPH, Library
from .setting import Setting

SIZES = ((256, 256), (512, 512), (768, 1152), (1024, 1024))  # width, height
LEVELS = ((1.0, 13.0), (0.8, 4.0), (0.6, 1.6), (0.4, 0.7), (0.2, 0.25), (0.05, 0.05))  # t, sigma
COPIES, STRANGERS, ROWS = 16, 24, 255
LARGE, FEWER = 600_000, 8  # from so many pixels on, so many strangers: the demo's decoder is slow
GRAIN = 0.15  # of an imperfect copy's latent, whose deviation is about 1
PERFECT, IMPERFECT, STRANGER = "perfect copy", "imperfect copy", "not in the index"


@dataclass(frozen=True)
class Autoencoder:
    """encode : pictures (1, 3, H, W) in [0, 1] -> latents as a model sees them."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decoder: Decoder


@dataclass
class Passage:
    """One latent's way through the gate."""

    opened: list[bool]
    right: list[bool]
    score: list[float]


class _Once:
    """A decoder that remembers its latest pictures: several noise levels compare one latent."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.latest, self.made = decoder, None, {}
        self.always_full = isinstance(decoder, ModuleDecoder | LinearDecoder)
        self.name, self.channels, self.factor = decoder.name, decoder.channels, decoder.factor

    def __call__(self, latent: Tensor, at_least: int | None = None) -> Tensor:
        if self.latest != latent.data_ptr():  # the latents of a table all stay in memory
            self.latest, self.made = latent.data_ptr(), {}
        key = None if self.always_full else at_least
        if key not in self.made:
            self.made[key] = self.decoder(latent, at_least)
        return self.made[key]

    def to(self, device) -> _Once:
        return self


def run(setting: Setting) -> Table:
    library, watch = setting.collection, Watch()
    photographs = [r for r in library.sources if library.rows[r].kind == PHOTOGRAPH]
    sources, strangers = photographs[:COPIES], photographs[COPIES : COPIES + STRANGERS]
    rows = _index_rows(library, sources, strangers, setting.seed)
    figures: dict = {}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        matchers = {}
        for eye in whole(setting.eyes):
            descriptor = create(eye.kind, eye.weights)
            shown = NumberedRows([library.rows[row] for row in rows])
            matcher = harness.matcher(shown, Path(folder) / eye.name, descriptor)
            names = [rows[int(record.source)] for record in matcher.index.records()]
            matchers[eye.name] = matcher, names
        for auto in autoencoders(setting.autoencoder):
            others = [photograph(library.rows[r].load(), (256, 256)) for r in photographs[-12:]]
            ways = {auto.name: auto.decoder, f"{auto.name}, preview": preview(auto, others)}
            for size in SIZES if setting.full else SIZES[:2]:
                few = strangers[:FEWER] if size[0] * size[1] > LARGE else strangers
                latents = _latents(setting, auto, size, sources, few)
                for way, decoder in ways.items():
                    for name, (matcher, names) in matchers.items():
                        looking = Matcher(matcher.searcher, matcher.descriptor, _Once(decoder))
                        found = _through(library, looking, names, latents)
                        key = f"{way}, {size[0]}x{size[1]}, {name}"
                        figures[key] = found
                        lines.append(_line(key, found))
                watch.tell(f"{auto.name} {size}")
    heading = ["through, size, descriptor"]
    for kind in (PERFECT, IMPERFECT):
        heading += [f"{kind}: at every step", "right", "likeness mean / least"]
    heading.append(f"{STRANGER}: opened at any step")
    note = (
        f"{COPIES} photographs that the index holds, {STRANGERS} or {FEWER} that it does not; preset "
        f"main; noise levels {', '.join(str(s) for _, s in LEVELS)}. In brackets 95 % intervals.\n\n"
    )
    return Table("### Table 1: the live gate\n\n" + note + markdown(heading, lines), figures)


def autoencoders(folder: Path | None) -> list[Autoencoder]:
    network = demo.load()
    made = []
    if folder is not None:
        encoder, _ = load_taesd_encoder(folder / "taef2_encoder.pth")
        made.append(Autoencoder("taef2", encoder, load_taesd(folder / "taef2_decoder.pth")))
    demos = ModuleDecoder("demo", network.decoder, 4)
    return [*made, Autoencoder("demo", network.encoder, demos)]


def preview(auto: Autoencoder, pictures: list[Tensor]) -> LinearDecoder:
    """The least-squares map from one cell to its mean colour, as the hosts' previews are made."""
    with torch.no_grad():
        latents = [auto.encode(p) for p in pictures]
        colours = [
            F.adaptive_avg_pool2d(p, x.shape[-2:]) for p, x in zip(pictures, latents, strict=True)
        ]
    cells = torch.cat([x.flatten(2)[0].T for x in latents])
    target = torch.cat([c.flatten(2)[0].T for c in colours]) * 2 - 1
    ones = torch.ones(len(cells), 1)
    solved = torch.linalg.lstsq(torch.cat([cells, ones], 1), target).solution
    return LinearDecoder(solved[:-1], solved[-1])


def photograph(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [0, 1]: all of a photograph, stretched to that size; a part of it is an edit."""
    return harness.to_tensor(image.resize(size, Image.Resampling.BICUBIC))


def spoiled(picture: Tensor) -> Tensor:
    """Darker, tinted, of lower contrast."""
    tint = torch.tensor([1.0, 0.85, 0.8])[:, None, None]
    return ((picture * 0.55 + 0.08) * tint).clamp(0, 1)


@torch.no_grad()
def _latents(setting, auto: Autoencoder, size, sources: list[int], strangers: list[int]) -> list:
    """(kind, row, latent) of everything that is looked at."""
    made, noise = [], torch.Generator().manual_seed(setting.seed)
    for row in sources + strangers:
        picture = photograph(setting.collection.rows[row].load(), size)
        latent = auto.encode(picture)
        if row in strangers:
            made.append((STRANGER, row, latent))
            continue
        made.append((PERFECT, row, latent))
        worse = auto.encode(spoiled(picture))
        grain = torch.randn(worse.shape, generator=noise) * GRAIN
        made.append((IMPERFECT, row, worse + grain))
    return made


def _index_rows(library: Library, sources: list[int], strangers: list[int], seed: int) -> list[int]:
    """ROWS rows: the sources, all that is held out besides the strangers' families, and drawings."""
    hidden = frozenset().union(*(library.families[row] for row in strangers))
    held = [row for row in library.families if row not in hidden and row not in sources]
    rest = [row for row in range(len(library.rows)) if row not in library.families]
    more = np.random.default_rng(seed).permutation(held + rest).tolist()
    return [*sources, *more[: ROWS - len(sources)]]


@torch.no_grad()
def _through(library: Library, matcher: Matcher, names: list[int], latents: list) -> dict:
    """What became of each kind."""
    off = {"despecification": 0.0, "deduplication": 0.0, "dissimilarity": 0.0}
    found: dict[str, list[Passage]] = {PERFECT: [], IMPERFECT: [], STRANGER: []}
    for kind, row, latent in latents:
        sampling = SamplingRun(matcher, presets.settings("main", matcher.metric, **off))
        for t, sigma in LEVELS:
            level = torch.tensor([sigma])
            sampling.step(latent, cond=latent, uncond=latent, cfg_scale=4.0, sigma=level, t=t)
        seen = Passage([], [], [])
        for record in sampling.records:
            seen.opened.append(record.active[0])
            seen.right.append(names[record.neighbor[0]] in library.families[row])
            seen.score.append(record.score[0])
        found[kind].append(seen)
    return {kind: _summary(seen) for kind, seen in found.items()}


def _summary(seen: list[Passage]) -> dict:
    return {
        "count": len(seen),
        "every": sum(all(s.opened) for s in seen),
        "any": sum(any(s.opened) for s in seen),
        "right": sum(all(s.right) for s in seen),
        "mean": float(np.mean([s.score for s in seen])),
        "least": float(np.min([s.score for s in seen])),
        "most": float(np.max([s.score for s in seen])),
        "each": [s.score for s in seen],
    }


def _line(key: str, found: dict) -> list[str]:
    cells = [key]
    for kind in (PERFECT, IMPERFECT):
        one = found[kind]
        cells += [
            f"{one['every']} of {one['count']}",
            f"{one['right']}",
            f"{one['mean']:.2f} / {one['least']:.2f}",
        ]
    hits, count = found[STRANGER]["any"], found[STRANGER]["count"]
    return [*cells, f"{hits} of {count} ({between(hits, count)} %)"]
