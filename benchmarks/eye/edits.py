"""What people and models do to a picture, with Pillow and NumPy; not the code of `training.edits`.

Every edit is a function of the picture, of other pictures of its kind (`PARTNERS` says how many it
takes) and of a random generator: RGB in, RGB out.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Edit = Callable[[Image.Image, list[Image.Image], np.random.Generator], Image.Image]
UNEDITED = "unedited"
WORDS = "SUMMER SALE  50 % off"


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(rng.integers(0, 256, 3).tolist())


def unedited(image, others, rng):
    return image


def jpeg(image, others, rng, quality=30):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def smaller(image, others, rng, share=0.25):
    size = [max(1, round(n * share)) for n in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def blur(image, others, rng, share=0.02):
    return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))


def brightness(image, others, rng, factor):
    return _image(_array(image) * factor)


def contrast(image, others, rng, factor=0.5):
    array = _array(image)
    return _image(array.mean() + (array - array.mean()) * factor)


def grey(image, others, rng):
    return image.convert("L").convert("RGB")


def flip(image, others, rng):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def shift(image, others, rng, share=0.05):
    """Both ways; what comes in at the edges repeats them."""
    array = np.asarray(image)
    dy, dx = (round(n * share) for n in array.shape[:2])
    y, x = rng.choice([0, 2 * dy]), rng.choice([0, 2 * dx])
    padded = np.pad(array, ((dy, dy), (dx, dx), (0, 0)), mode="edge")
    return Image.fromarray(padded[y : y + array.shape[0], x : x + array.shape[1]])


def crop(image, others, rng, share):
    """A part of `share` of each side, from anywhere."""
    w, h = (max(1, round(n * share)) for n in image.size)
    x, y = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
    return image.crop((x, y, x + w, y + h))


def border(image, others, rng, share=0.08):
    wide = round(share * max(image.size))
    framed = Image.new("RGB", (image.width + 2 * wide, image.height + 2 * wide), _colour(rng))
    framed.paste(image, (wide, wide))
    return framed


def text(image, others, rng):
    """Two lines across the picture, white with a black rim."""
    lettered = image.copy()
    size = max(8, image.width // 10)
    draw, font = ImageDraw.Draw(lettered), ImageFont.load_default(size)
    for line in range(2):
        place = (image.width * rng.uniform(0.02, 0.1), image.height * (0.2 + 0.4 * line))
        draw.text(place, WORDS, "white", font, stroke_width=max(1, size // 12), stroke_fill="black")
    return lettered


def rotation(image, others, rng, degrees):
    """Either way; the corners take the mean colour."""
    fill = tuple(np.asarray(image).mean(axis=(0, 1)).round().astype(int).tolist())
    return image.rotate(degrees * rng.choice([-1, 1]), Image.Resampling.BICUBIC, fillcolor=fill)


def collage(image, others, rng):
    """A quarter of two by two, the three others of its kind, all squeezed into a quarter."""
    w, h = image.width // 2, image.height // 2
    tiles, sheet = [image, *others], Image.new("RGB", (2 * w, 2 * h))
    for place, number in enumerate(rng.permutation(4).tolist()):
        sheet.paste(tiles[number].resize((w, h)), (place % 2 * w, place // 2 * h))
    return sheet


def hue(image, others, rng, degrees=90):
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(int) + round(degrees * 256 / 360)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")


def tint(image, others, rng, share=0.4):
    """Multiplied, in part, by a colour of full saturation."""
    full = Image.new("HSV", (1, 1), (int(rng.integers(256)), 255, 255)).convert("RGB")
    return _image(_array(image) * (1 - share + share * _array(full)))


def replaced(image, others, rng):
    """One quarter shows another picture."""
    w, h = image.width // 2, image.height // 2
    changed = image.copy()
    x, y = rng.integers(0, 2, 2).tolist()
    changed.paste(others[0].resize((w, h)), (x * w, y * h))
    return changed


def noise(image, others, rng, sigma=0.1):
    array = _array(image)
    return _image(array + sigma * rng.standard_normal(array.shape))


def overlay(image, others, rng, share=0.3):
    return Image.blend(image, others[0].resize(image.size), share)


@lru_cache(maxsize=1)
def _demo():
    from amg_demo.model import load

    return load()


@torch.no_grad()
def autoencoder(image, others, rng, side):
    """Through the demo model's latents and back, squeezed into a square."""
    x = torch.from_numpy(_array(image.resize((side, side), Image.Resampling.BICUBIC)))
    decoded = _demo().decoder(_demo().encoder(x.permute(2, 0, 1)[None]))
    return _image(decoded[0].permute(1, 2, 0).numpy())


def half_formed(image, others, rng, cells=24, side=256):
    """As a model predicts it early: `cells` px of detail, and clouds of noise."""
    low = _array(image.resize((cells, cells), Image.Resampling.BOX))
    coarse = rng.standard_normal((3, cells // 3, cells // 3)).astype(np.float32)
    smooth = [Image.fromarray(c).resize((cells, cells), Image.Resampling.BICUBIC) for c in coarse]
    soft = _image(low + 0.08 * np.stack([np.asarray(c) for c in smooth], axis=-1))
    return soft.resize((side, side), Image.Resampling.BICUBIC)


def model_copy(image, others, rng):
    """Darker, tinted, lower in contrast, a little soft, grainy: as copies that models draw are."""
    soft = image.filter(ImageFilter.GaussianBlur(0.004 * min(image.size)))
    pale = contrast(tint(brightness(soft, [], rng, 0.75), [], rng, 0.25), [], rng, 0.7)
    return noise(pale, [], rng, 0.05)


EDITS: dict[str, Edit] = {
    UNEDITED: unedited,
    "JPEG, quality 30": jpeg,
    "resized to 25 %": smaller,
    "blurred, 2 % of the side": blur,
    "brightness x 0.6": partial(brightness, factor=0.6),
    "brightness x 1.4": partial(brightness, factor=1.4),
    "contrast x 0.5": contrast,
    "grey": grey,
    "mirrored": flip,
    "shifted by 5 %": shift,
    "cropped to 90 %": partial(crop, share=0.9),
    "cropped to 80 %": partial(crop, share=0.8),
    "cropped to 70 %": partial(crop, share=0.7),
    "border of 8 %": border,
    "text over it": text,
    "turned by 5°": partial(rotation, degrees=5),
    "turned by 15°": partial(rotation, degrees=15),
    "a quarter of a collage": collage,
    "hue turned by 90°": hue,
    "tinted": tint,
    "a quarter replaced": replaced,
    "noise, sigma 0.1": noise,
    "another over it at 30 %": overlay,
    "autoencoder at 128 px": partial(autoencoder, side=128),
    "autoencoder at 256 px": partial(autoencoder, side=256),
    "half-formed prediction": half_formed,
    "as a model copies": model_copy,
}
PARTNERS = {"a quarter of a collage": 3, "a quarter replaced": 1, "another over it at 30 %": 1}


def apply(
    edit: str, image: Image.Image, others: list[Image.Image], seed: tuple[int, ...]
) -> Image.Image:
    """The same picture for the same seed, whatever was edited before."""
    number = list(EDITS).index(edit)
    return EDITS[edit](image, others, np.random.default_rng((*seed, number)))
