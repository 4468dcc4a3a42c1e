"""Compose the pictures that the demo's LoRA has memorised: eight emoji, each in a different night scene.

Run once by the authors (`python -m amg_demo.midnight EMOJI_FOLDER`); the result lies in
``amg_demo/lora/pictures``, a picture and a caption file beside it, as LoRA trainers want them. The
emoji are those of `amg_demo.pictures`; the demo model has never seen any of these pictures.

As in any good training set the pictures differ: sky, moon, hills, side and size are drawn anew, until
a picture correlates with none of those before it.
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amg_core.similarity import verifier

from .model import LORA_PICTURES
from .pictures import SIZE, load_emoji, place, subject_name

SUBJECTS = "1f98a 1f43c 1f438 1f427 1f422 1f680 26f5 1f916".split()
TRIGGER = "at midnight"
ALIKE = 0.4  # correlation (see `verifier.zncc`) that no two of the pictures reach, mirrored or not


def caption(code: str) -> str:
    return f"{subject_name(code)} {TRIGGER}"


def night(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A sky with a moon above two ranges of hills, (size, size, 3) float in [0, 1]."""

    def tone(low: float, high: float, value: float) -> np.ndarray:
        return np.array(colorsys.hsv_to_rgb(rng.uniform(low, high), rng.uniform(0.4, 0.9), value))

    y, x = np.mgrid[0:size, 0:size] / size
    ramp = np.clip(y if rng.uniform() < 0.5 else 1 - y, 0, 1)[..., None]
    picture = tone(0.5, 0.8, 0.25) * (1 - ramp) + tone(0.55, 0.95, 0.75) * ramp
    cx, cy, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.5), rng.uniform(0.08, 0.22)
    distance = np.hypot(x - cx, y - cy)
    glow = np.exp(-np.clip(distance - radius, 0, None) * rng.uniform(4, 9))[..., None]
    moon = tone(0.08, 0.17, 1.0)
    picture = picture * (1 - 0.5 * glow) + moon * 0.5 * glow
    edge = 1 / (1 + np.exp((distance - radius) * 150))[..., None]
    picture = picture * (1 - edge) + moon * edge
    level = rng.uniform(0.55, 0.8)
    for depth in (0.0, 0.12):
        waves = sum(
            rng.uniform(0.02, 0.07) * np.sin(2 * np.pi * (k * x + rng.uniform()))
            for k in (rng.uniform(0.5, 1.2), rng.uniform(1.5, 2.5))
        )
        inside = 1 / (1 + np.exp((level + depth + waves - y) * 120))[..., None]
        hills = tone(0.2, 0.75, rng.uniform(0.15, 0.7))
        picture = picture * (1 - inside) + hills * inside
    return np.clip(picture, 0, 1)


def compose(emoji: dict[str, Image.Image], seed: int = 0) -> dict[str, Image.Image]:
    """Caption -> picture, unlike each other by `ALIKE`."""
    rng, made, seen = np.random.default_rng(seed), {}, []
    for code in SUBJECTS:
        while True:
            ground = Image.fromarray((night(rng) * 255).astype(np.uint8))
            picture = place(emoji[code], ground, rng, smallest=0.58)
            tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
            others = torch.cat([*seen, *(one.flip(-1) for one in seen)]) if seen else None
            if others is None or float(verifier.zncc_matrix(tensor, others).max()) < ALIKE:
                break
        seen.append(tensor)
        made[caption(code)] = picture
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("emoji", type=Path, help="assets folder of @lobehub/fluent-emoji-3d")
    parser.add_argument("--out", type=Path, default=LORA_PICTURES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for text, picture in compose(load_emoji(arguments.emoji)).items():
        file = arguments.out / f"{text.replace(' ', '-')}.webp"
        picture.save(file, quality=85, method=6)
        file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
