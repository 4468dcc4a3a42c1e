"""The pictures that the `compact` descriptor learns from: drawings on made-up grounds, and made-up scenes.

Drawings are read from folders of RGBA files whose licences allow it (openclipart, CC0; Fluent and Noto
emoji, MIT and Apache-2.0; half of the tuxpaint stamps); grounds are procedural: fields of 1/f noise,
gradients, ridges and dead leaves, whose statistics are those of photographs [1]_. No photograph is used.

References
----------
.. [1] M. Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import harness

SIDE = 144  # px of the pool's pictures
FIELD, FIELDS = 256, 400  # px and number of the noise fields that grounds are cut from
SKIN_TONE = re.compile(r"1f3f[b-f]", re.IGNORECASE)  # five of nearly the same drawing


def parser(program: str, about: str, seed: int | None = None) -> argparse.ArgumentParser:
    """With --drawings and --halves, see `drawings`."""
    made = harness.parser(program, about, seed=seed)
    made.add_argument("--drawings", nargs="+", type=Path, required=True)
    made.add_argument("--halves", nargs="*", type=Path, default=[])
    return made


def trained_on(path: Path) -> bool:
    """Which half of a set is learnt from: by a hash of the name, so that a test can keep the other."""
    return zlib.crc32(path.name.encode()) % 2 == 0


def drawings(folders: list[Path], halves: list[Path]) -> list[np.ndarray]:
    """RGBA uint8 arrays, at most `SIDE` px, of every usable file in `folders`, of half in `halves`."""
    found = []
    for folder in [*folders, *halves]:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in (".png", ".webp") or SKIN_TONE.search(path.name):
                continue
            if folder in halves and not trained_on(path):
                continue
            try:
                with Image.open(path) as image:
                    if image.width * image.height > 16e6:
                        continue
                    image = image.convert("RGBA")
            except (OSError, ValueError, Image.DecompressionBombError):
                continue
            box = image.getchannel("A").getbbox()
            if box is None or min(box[2] - box[0], box[3] - box[1]) < 12:
                continue
            image = image.crop(box)
            image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
            found.append(np.asarray(image))
    return found


class Grounds:
    """Procedural pictures, (SIDE, SIDE, 3) float in [0, 1]."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.fields = np.stack([self._field() for _ in range(FIELDS)])

    def _field(self) -> np.ndarray:
        """1/f^p noise, p from 0.6 (rough) to 2 (clouds), some of it stretched; mean 0, deviation 1."""
        rng = self.rng
        fy, fx = np.meshgrid(np.fft.fftfreq(FIELD), np.fft.fftfreq(FIELD), indexing="ij")
        stretch, angle = rng.choice([1, 1, 1, 3, 6]), rng.uniform(0, np.pi)
        u = fx * np.cos(angle) + fy * np.sin(angle)
        v = (fy * np.cos(angle) - fx * np.sin(angle)) * stretch
        radius = np.hypot(u, v)
        radius[0, 0] = 1
        noise = np.fft.fft2(rng.standard_normal((FIELD, FIELD)))
        field = np.fft.ifft2(noise / radius ** rng.uniform(0.6, 2.0)).real
        return ((field - field.mean()) / field.std()).astype(np.float32)

    def field(self) -> np.ndarray:
        """A cut of one of the fields, at some zoom and in some orientation: (SIDE, SIDE)."""
        rng = self.rng
        one = self.fields[rng.integers(FIELDS)]
        side = int(rng.integers(48, FIELD + 1))
        y, x = rng.integers(0, FIELD - side + 1, 2)
        cut = Image.fromarray(one[y : y + side, x : x + side]).resize((SIDE, SIDE), 2)
        return np.rot90(np.asarray(cut), rng.integers(4))[:, :: rng.choice([-1, 1])]

    def colour(self) -> np.ndarray:
        """An RGB colour in [0, 1], often a muted one."""
        return self.rng.uniform(0, 1, 3) * self.rng.uniform(0.2, 1) ** 0.5

    def textured(self) -> np.ndarray:
        """A field through a palette of two to four colours, with a second field as shade."""
        rng = self.rng
        stops = np.stack([self.colour() for _ in range(rng.integers(2, 5))])
        x = np.clip(self.field() * rng.uniform(0.15, 0.4) + 0.5, 0, 0.999) * (len(stops) - 1)
        low = x.astype(int)
        share = (x - low)[..., None]
        picture = stops[low] * (1 - share) + stops[low + 1] * share
        return picture * (1 + rng.uniform(0, 0.35) * self.field()[..., None])

    def gradient(self) -> np.ndarray:
        """A smooth passage between colours, straight or round, with a little texture."""
        rng = self.rng
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - rng.uniform(0.2, 0.8, 2)[:, None, None]
        angle = rng.uniform(0, 2 * np.pi)
        way = np.hypot(x, y) if rng.random() < 0.4 else x * np.cos(angle) + y * np.sin(angle) + 0.5
        share = np.clip(way * rng.uniform(0.7, 1.6), 0, 1)[..., None] ** rng.uniform(0.5, 2)
        picture = self.colour() * (1 - share) + self.colour() * share
        return picture + rng.choice([0.01, 0.03, 0.08]) * self.field()[..., None]

    def ridges(self) -> np.ndarray:
        """Layers behind each other below a sky: hills, shores, roofs."""
        rng = self.rng
        picture = self.gradient() if rng.random() < 0.6 else self.textured()
        base = rng.uniform(0.2, 0.7)
        for _ in range(rng.integers(1, 5)):
            rough = self.field()[rng.integers(SIDE)] * rng.uniform(0.01, 0.12)
            line = (base + rough) * SIDE
            mask = np.arange(SIDE)[:, None] > line[None]
            picture = np.where(mask[..., None], self.textured(), picture)
            base += rng.uniform(0.05, 0.25)
        return np.rot90(picture) if rng.random() < 0.1 else picture

    def leaves(self) -> np.ndarray:
        """Dead leaves: shapes of all sizes that hide each other, textured and shaded, some blurred."""
        rng = self.rng
        picture = self.textured()
        y, x = np.mgrid[0:SIDE, 0:SIDE]
        for _ in range(rng.integers(3, 18)):
            r = SIDE * rng.uniform(0.03, 1) ** 2 * 0.5 + 3
            cy, cx, angle = *rng.uniform(0, SIDE, 2), rng.uniform(0, np.pi)
            u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / r
            v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / r * rng.uniform(1, 3)
            d = np.abs(u) + np.abs(v) if rng.random() < 0.2 else np.hypot(u, v)
            if rng.random() < 0.2:
                d = np.maximum(np.abs(u), np.abs(v))
            mask = np.clip((1 - d) * r / rng.choice([1, 1, 6, 16]), 0, 1)[..., None]
            fill = self.textured() if rng.random() < 0.3 else self.colour()
            shade = 1 + rng.uniform(-0.6, 0.6) * u[..., None]
            picture = picture * (1 - mask) + fill * shade * mask
        return picture

    def any(self) -> np.ndarray:
        makers = (self.textured, self.textured, self.ridges, self.ridges, self.leaves, self.leaves)
        if self.rng.random() < 0.05:
            return np.clip(self.gradient(), 0, 1)
        return np.clip(makers[self.rng.integers(len(makers))](), 0, 1)


def pictures(count: int, drawn: list[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` pictures (SIDE, SIDE, 3) uint8: a third scenes, a third drawings alone, a third grounds.

    Every drawing appears alone once before any does twice.
    """
    grounds, order = Grounds(rng), rng.permutation(len(drawn))
    alone = 0
    for number in range(count):
        kind = number % 3
        if kind == 0:
            picture = grounds.any() if rng.random() < 0.4 else _plain(grounds)
            picture = _paste(picture, drawn[order[alone % len(order)]], rng, rng.uniform(0.6, 1))
            alone += 1
        else:
            picture = grounds.any()
        if kind == 1:
            for _ in range(rng.integers(1, 7)):
                one = drawn[rng.integers(len(drawn))]
                picture = _paste(picture, one, rng, rng.uniform(0.15, 0.8))
        if rng.random() < 0.05:
            picture = _lettered(picture, rng)
        if kind and rng.random() < 0.5:  # light falls unevenly on most photographs
            picture = picture * np.clip(
                0.9 + 0.25 * grounds.gradient().mean(-1, keepdims=True), 0, 2
            )
        yield (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _plain(grounds: Grounds) -> np.ndarray:
    colour = np.ones(3) if grounds.rng.random() < 0.5 else grounds.colour()
    return np.broadcast_to(colour, (SIDE, SIDE, 3))


def _paste(picture: np.ndarray, drawing: np.ndarray, rng, share: float) -> np.ndarray:
    """`picture` with a drawing that takes `share` of its side, somewhere, at times turned or tinted."""
    image = Image.fromarray(drawing)
    ratio = share * SIDE / max(image.size)
    image = image.resize([max(8, round(n * ratio)) for n in image.size], Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        image = image.rotate(rng.uniform(-40, 40), Image.Resampling.BILINEAR, expand=True)
    image.thumbnail((SIDE, SIDE))
    own = np.asarray(image, dtype=np.float32) / 255
    h, w = own.shape[:2]
    y, x = rng.integers(0, SIDE - h + 1), rng.integers(0, SIDE - w + 1)
    out = np.array(picture, dtype=np.float32)
    alpha, colour = own[..., 3:], own[..., :3]
    if rng.random() < 0.3:
        colour = np.clip(colour * rng.uniform(0.4, 1.3, 3), 0, 1)
    out[y : y + h, x : x + w] = out[y : y + h, x : x + w] * (1 - alpha) + colour * alpha
    return out


def _lettered(picture: np.ndarray, rng) -> np.ndarray:
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    letters = "".join(chr(c) for c in rng.integers(65, 122, rng.integers(4, 14)))
    place = tuple(rng.integers(0, SIDE // 2, 2).tolist())
    ImageDraw.Draw(image).text(place, letters, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.asarray(image) / 255
