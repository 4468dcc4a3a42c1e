"""Compose the demo's training pictures: one emoji on a patterned background, with a caption.

Run once by the authors (`python -m amg_demo.pictures EMOJI_FOLDER OUT`); the result lives in
``amg_demo/pictures``. `EMOJI_FOLDER` is the ``assets`` folder of the npm package
``@lobehub/fluent-emoji-3d`` (MIT), which names its files by code point.

Every picture is unlike every other: subject, place, size, tilt, two background colours, pattern,
phase and direction are drawn anew. The caption names subject, main colour and pattern only, so one
caption fits many pictures, and a model that answers it with the training picture has memorised it.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

SIZE = 128
SUBJECTS = """
    1f98a 1f438 1f43c 1f42f 1f437 1f984 1f427 1f989 1f419 1f980 1f433 1f98b 1f41e 1f422 1f420
    1f34e 1f34c 1f353 1f349 1f34d 1f951 1f955 1f354 1f369 1f382 1f335 1f33b 1f344 1f680 1f697
    26f5 1f3e0 1f3f0 1f3b8 2614 1f451 1f388 26bd 1f9f8 1f916
""".split()
COLOURS = {  # name: hue in turns
    "red": 0.0, "orange": 0.075, "yellow": 0.145, "green": 0.33,
    "teal": 0.49, "blue": 0.60, "violet": 0.75, "pink": 0.90,
}  # fmt: skip
PATTERNS = ("stripes", "dots", "checks", "rays", "waves", "clouds")
SINGLES_PER_SUBJECT = 15  # pictures that are in the training set once
MEMORISED = 32  # subjects that also have one picture with DUPLICATES copies
DUPLICATES = 10


def subject_name(code: str) -> str:
    """The Unicode name of a code point in lower case: the caption's subject."""
    return unicodedata.name(chr(int(code, 16))).lower()


def caption(code: str, colour: str, pattern: str) -> str:
    return f"{subject_name(code)} on {colour} {pattern}"


def background(colour: str, pattern: str, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A patterned background, (size, size, 3) float in [0, 1]; all that the caption omits is random."""

    def tone(hue: float) -> np.ndarray:
        return np.array(
            colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.35, 0.95), rng.uniform(0.35, 1.0))
        )

    main = tone(COLOURS[colour] + rng.normal(0, 0.012))
    other = tone(rng.uniform()) * 0.6 + main * 0.4
    y, x = np.mgrid[0:size, 0:size] / size
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi, 2)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    k = 2 * np.pi * rng.uniform(1.5, 3.0)
    if pattern == "stripes":
        field = np.sin(k * u + phase[0])
    elif pattern == "dots":
        field = np.sin(k * u + phase[0]) + np.sin(k * v + phase[1]) - 0.7
    elif pattern == "checks":
        field = np.sin(k * u + phase[0]) * np.sin(k * v + phase[1])
    elif pattern == "rays":
        cx, cy = rng.uniform(0.1, 0.9, 2)
        field = np.sin(rng.integers(4, 9) * np.arctan2(y - cy, x - cx) + phase[0])
    elif pattern == "waves":
        field = np.sin(k * u + 1.6 * np.sin(0.8 * k * v + phase[1]) + phase[0])
    elif pattern == "clouds":
        noise = rng.normal(size=(4, 4))
        field = np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))
    else:
        raise ValueError(f"unknown pattern {pattern!r}")
    weight = 1 / (1 + np.exp(-6 * field))  # soft edges survive a small autoencoder
    shade = 1 + rng.uniform(-0.25, 0.25) * (u - 0.5) * 2
    picture = main * (1 - weight[..., None]) + other * weight[..., None]
    return np.clip(picture * shade[..., None], 0, 1)


def compose(
    emoji: Image.Image, colour: str, pattern: str, rng: np.random.Generator, size: int = SIZE
) -> Image.Image:
    """Place `emoji` (RGBA) at a random size, tilt, side and place on a fresh background."""
    ground = Image.fromarray((background(colour, pattern, rng, size) * 255).astype(np.uint8))
    return place(emoji, ground, rng)


def place(
    emoji: Image.Image, ground: Image.Image, rng: np.random.Generator, smallest: float = 0.42
) -> Image.Image:
    """`ground` (square) with `emoji` and its shadow on it, at a random size, tilt, side and place.

    `smallest`, up to 0.72: the least side of the emoji as a share of that of `ground`.
    """
    size = ground.width
    side = int(size * rng.uniform(smallest, 0.72))
    subject = emoji.resize((side, side), Image.Resampling.LANCZOS)
    if rng.uniform() < 0.5:
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    subject = subject.rotate(rng.uniform(-18, 18), Image.Resampling.BICUBIC, expand=True)
    left, top = (int(rng.integers(0, max(1, size - extent))) for extent in subject.size)
    shadow = Image.new("L", (size, size))
    shadow.paste(subject.getchannel("A").point(lambda a: a * 0.45), (left + 3, top + 5))
    ground.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(4)))
    ground.paste(subject, (left, top), subject)
    return ground


def load_emoji(folder: Path) -> dict[str, Image.Image]:
    return {code: Image.open(folder / f"{code}.webp").convert("RGBA") for code in SUBJECTS}


def write(emoji: dict[str, Image.Image], out: Path, seed: int = 0) -> None:
    """Write the training folder: pictures, ``metadata.jsonl`` (file_name, text, duplicates)."""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    rows, taken = [], set()

    def add(code: str, duplicates: int) -> None:
        while True:  # a memorised caption belongs to one picture only
            colour, pattern = rng.choice(list(COLOURS)), rng.choice(PATTERNS)
            text = caption(code, colour, pattern)
            if text not in taken:
                break
        taken.add(text)
        name = f"{'memorised' if duplicates > 1 else 'once'}-{len(rows):03d}.webp"
        compose(emoji[code], colour, pattern, rng).save(out / name, quality=82, method=6)
        rows.append({"file_name": name, "text": text, "duplicates": duplicates})

    for code in SUBJECTS[:MEMORISED]:
        add(code, DUPLICATES)
    for code in SUBJECTS:
        for _ in range(SINGLES_PER_SUBJECT):
            add(code, 1)
    lines = (json.dumps(row) + "\n" for row in rows)
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def training_set(folder: Path) -> tuple[Tensor, list[str], Tensor]:
    """Pictures (N, 3, 128, 128) in [0, 1] in the order of the index, captions, duplicates (N,)."""
    rows = [
        json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    ]
    rows.sort(key=lambda row: row["file_name"])
    arrays = [np.array(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    stack = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return stack, [row["text"] for row in rows], torch.tensor([row["duplicates"] for row in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("emoji", type=Path, help="assets folder of @lobehub/fluent-emoji-3d")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(load_emoji(arguments.emoji), arguments.out)
