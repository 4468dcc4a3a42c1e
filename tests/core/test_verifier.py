"""The second judge: what is done to a picture does not hide that it is a copy; others are none."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from amg_core import limits
from amg_core.similarity import verifier

PICTURES = sorted((Path(__file__).parents[2] / "amg_demo" / "pictures").glob("*.webp"))
SOURCES = PICTURES[20:600:150]  # four subjects on four grounds


def _opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def _shifted(image):
    moved = Image.new("RGB", image.size, (90, 140, 60))
    moved.paste(image, (16, -9))
    return moved


def _bordered(image):
    moved = Image.new("RGB", image.size, (200, 60, 40))
    moved.paste(image.resize((92, 92)), (14, 22))
    return moved


def _collage(image):
    sheet = Image.new("RGB", image.size)
    for i, path in enumerate(PICTURES[3:400:100]):
        other = image if i == 2 else _opened(path)
        sheet.paste(other.resize((64, 64)), (64 * (i % 2), 64 * (i // 2)))
    return sheet


def _replaced(image):
    changed = image.copy()
    changed.paste(_opened(PICTURES[7]).resize((64, 64)), (64, 0))
    return changed


def _hue(image):
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += 30
    return Image.fromarray(hsv, "HSV").convert("RGB")


def _noisy(image):
    noise = np.random.default_rng(0).normal(0, 0.08, (image.height, image.width, 3))
    return _image(_pixels(image) + noise)


def _jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file).convert("RGB")


EDITS = {
    "same": lambda image: image,
    "shift": _shifted,
    "crop": lambda image: image.crop((20, 10, 110, 100)),
    "border": _bordered,
    "collage": _collage,
    "flip": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turn": lambda image: image.rotate(5, Image.Resampling.BICUBIC),
    "quarter replaced": _replaced,
    "darker": lambda image: _image(_pixels(image) * 0.5),
    "brighter": lambda image: _image(_pixels(image) * 1.2 + 0.05),
    "tint": lambda image: Image.blend(image, Image.new("RGB", image.size, (220, 120, 40)), 0.3),
    "low contrast": lambda image: _image(0.5 + (_pixels(image) - 0.5) * 0.3),
    "hue": _hue,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
    "noise": _noisy,
    "jpeg": _jpeg,
    "soft": lambda image: image.resize((32, 32), Image.Resampling.BOX).resize((128, 128)),
    "squeezed": lambda image: image.resize((128, 80)),
    "crop, darker, jpeg": lambda image: _jpeg(
        _image(_pixels(image.crop((14, 20, 116, 122))) * 0.7)
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_passes(edit):
    scores = [
        float(verifier.registered(_tensor(EDITS[edit](image)), [_tensor(image)]).score)
        for image in map(_opened, SOURCES)
    ]
    missed = sum(score <= limits.REGISTERED for score in scores)
    hard = {"quarter replaced": 4, "turn": 2, "hue": 1}  # hues of one grey lose edges
    assert missed <= hard.get(edit, 0), scores


def test_other_pictures_do_not():
    rng = random.Random(0)
    scores = []
    for path in rng.sample(PICTURES, 10):
        others = [_opened(p) for p in rng.sample(PICTURES, 31) if p != path][:30]
        batch = torch.cat([_tensor(other) for other in others])
        scores.append(verifier.registered(_tensor(_opened(path)), batch).score)
    scores = torch.cat(scores)
    assert len(scores) == 300
    assert (scores > limits.REGISTERED).sum() <= 3


def test_it_says_where():
    image = _opened(SOURCES[0])
    found = verifier.registered(_tensor(image.crop((32, 0, 128, 96))), [_tensor(image)])
    assert not found.mirrored[0]
    centre = found.place[0] @ torch.tensor([0.25, -0.25, 1.0])  # of the part, in the whole
    assert centre.abs().max() < 0.05
    assert float(found.overlap) > 0.9
    assert float(found.correlation) > 0.9
    mirrored = verifier.registered(_tensor(image).flip(-1), [_tensor(image)])
    assert mirrored.mirrored[0]
    assert float(mirrored.score) == pytest.approx(
        float(verifier.registered(_tensor(image), [_tensor(image)]).score), abs=1e-3
    )


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (96, 300), (257, 191)])
def test_sizes_do_not_matter(size):
    picture = _tensor(_opened(SOURCES[1]))
    resized = F.interpolate(picture, size=size, mode="bilinear", antialias=True)
    for a, b in ((resized, picture), (picture, resized)):
        assert float(verifier.registered(a, [b]).score) > limits.REGISTERED


def test_others_may_be_a_list_or_a_batch_and_do_not_change_each_other():
    pictures = [_tensor(_opened(path)) for path in SOURCES[:3]]
    as_list = verifier.registered(pictures[0], [p[0] for p in pictures])
    as_batch = verifier.registered(pictures[0], torch.cat(pictures))
    assert all(torch.equal(a, b) for a, b in zip(as_list, as_batch, strict=True))
    alone = verifier.registered(pictures[0], [pictures[2]])
    assert float(alone.score) == pytest.approx(float(as_batch.score[2]), abs=1e-3)
    assert (as_batch.score >= 0).all() and (as_batch.score <= 1).all()
    assert as_batch.score.shape == (3,)
    assert as_batch.place.shape == (3, 2, 3)


def test_a_flat_picture_agrees_with_nothing():
    picture = _tensor(_opened(SOURCES[0]))
    ramp = torch.linspace(0, 1, 128).expand(1, 3, 128, 128)
    other_ramp = torch.linspace(0.2, 0.7, 128).square().expand(1, 3, 128, 128)
    noise = 0.5 + 0.02 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    for nothing in (torch.full((1, 3, 128, 128), 0.5), torch.zeros(1, 3, 64, 80), ramp, noise):
        assert verifier.flat(nothing)
        score = verifier.registered(nothing, torch.cat([picture, picture])).score
        assert score.isfinite().all() and (score < 0.3).all()
        assert float(verifier.registered(picture, [nothing]).score) < 0.3
    assert float(verifier.registered(ramp, [other_ramp]).score) < 0.1  # a sky is no copy of a sky
    grey = torch.full((1, 3, 128, 128), 0.5)
    assert float(verifier.registered(grey, [grey]).score) == 0
    assert not any(verifier.flat(_tensor(_opened(path))) for path in SOURCES)


def test_no_gradient_is_kept():
    picture = _tensor(_opened(SOURCES[0])).requires_grad_()
    assert not verifier.registered(picture, [picture]).score.requires_grad
