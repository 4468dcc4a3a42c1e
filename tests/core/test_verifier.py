"""The second judge: what is done to a picture does not hide that it is a copy; others are none."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from amg_core import limits
from amg_core.images import to_tensor
from amg_core.similarity import verifier
from benchmarks.eye import edits

PICTURES = sorted((Path(__file__).parents[2] / "amg_demo" / "pictures").glob("*.webp"))
SOURCES = PICTURES[5:600:50]  # twelve subjects on twelve grounds


def _opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _at_once(image, others, rng):
    darker = edits.brightness(edits.crop(image, others, rng, share=0.8), others, rng, factor=0.7)
    return edits.jpeg(darker, others, rng)


EDITS = {
    "same": edits.unedited,
    "shift": partial(edits.shift, share=0.12),
    "crop": partial(edits.crop, share=0.7),
    "border": partial(edits.border, share=0.2),
    "collage": edits.collage,
    "flip": edits.flip,
    "turn": partial(edits.rotation, degrees=5),
    "quarter replaced": edits.replaced,
    "darker": partial(edits.brightness, factor=0.5),
    "brighter": partial(edits.brightness, factor=1.3),
    "tint": partial(edits.tint, share=0.3),
    "low contrast": partial(edits.contrast, factor=0.3),
    "hue": partial(edits.hue, degrees=42),
    "grey": edits.grey,
    "blur": partial(edits.blur, share=0.012),
    "noise": partial(edits.noise, sigma=0.08),
    "jpeg": partial(edits.jpeg, quality=20),
    "soft": edits.smaller,
    "squeezed": lambda image, others, rng: image.resize((128, 80)),
    "crop, darker, jpeg": _at_once,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_passes(edit):
    rng, others = np.random.default_rng(0), [_opened(path) for path in PICTURES[3:300:100]]
    scores = [
        float(
            verifier.registered(
                to_tensor(EDITS[edit](image, others, rng)), [to_tensor(image)]
            ).score
        )
        for image in map(_opened, SOURCES)
    ]
    missed = sum(score <= limits.REGISTERED for score in scores)
    # soft grounds and hues of one grey have few edges
    hard = {"quarter replaced": 12, "hue": 4, "border": 3, "crop": 2, "collage": 1}
    assert missed <= hard.get(edit, 0), scores


def test_other_pictures_do_not():
    rng = random.Random(0)
    scores = []
    for path in rng.sample(PICTURES, 10):
        others = [_opened(p) for p in rng.sample(PICTURES, 31) if p != path][:30]
        batch = torch.cat([to_tensor(other) for other in others])
        scores.append(verifier.registered(to_tensor(_opened(path)), batch).score)
    scores = torch.cat(scores)
    assert len(scores) == 300
    assert (scores > limits.REGISTERED).sum() <= 3


def test_it_says_where():
    image = _opened(SOURCES[0])
    found = verifier.registered(to_tensor(image.crop((32, 0, 128, 96))), [to_tensor(image)])
    assert not found.mirrored[0]
    centre = found.place[0] @ torch.tensor([0.25, -0.25, 1.0])  # of the part, in the whole
    assert centre.abs().max() < 0.05
    assert float(found.overlap) > 0.9
    assert float(found.correlation) > 0.9
    mirrored = verifier.registered(to_tensor(image).flip(-1), [to_tensor(image)])
    assert mirrored.mirrored[0]
    assert float(mirrored.score) == pytest.approx(
        float(verifier.registered(to_tensor(image), [to_tensor(image)]).score), abs=1e-3
    )


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (96, 300), (257, 191)])
def test_sizes_do_not_matter(size):
    picture = to_tensor(_opened(SOURCES[1]))
    resized = F.interpolate(picture, size=size, mode="bilinear", antialias=True)
    for a, b in ((resized, picture), (picture, resized)):
        assert float(verifier.registered(a, [b]).score) > limits.REGISTERED


def test_others_may_be_a_list_or_a_batch_and_do_not_change_each_other():
    pictures = [to_tensor(_opened(path)) for path in SOURCES[:3]]
    as_list = verifier.registered(pictures[0], [p[0] for p in pictures])
    as_batch = verifier.registered(pictures[0], torch.cat(pictures))
    assert all(torch.equal(a, b) for a, b in zip(as_list, as_batch, strict=True))
    alone = verifier.registered(pictures[0], [pictures[2]])
    assert float(alone.score) == pytest.approx(float(as_batch.score[2]), abs=1e-3)
    assert (as_batch.score >= 0).all() and (as_batch.score <= 1).all()
    assert as_batch.score.shape == (3,)
    assert as_batch.place.shape == (3, 2, 3)


def test_a_flat_picture_agrees_with_nothing():
    picture = to_tensor(_opened(SOURCES[0]))
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
    assert not any(verifier.flat(to_tensor(_opened(path))) for path in SOURCES)


def test_blurs_are_convolutions_of_a_continued_picture():
    x = torch.rand(2, 1, 20, 31, generator=torch.Generator().manual_seed(0))
    kernel = torch.softmax(-(torch.arange(-4, 5) ** 2) / (2 * verifier.SMOOTH**2), 0)
    padded = F.pad(x, (4, 4, 4, 4), mode="replicate")
    expected = F.conv2d(padded, kernel[:, None] * kernel[None] * torch.ones(1, 1, 1, 1))
    assert torch.allclose(
        verifier._blurred(x, verifier.SMOOTH, continued=False), expected, atol=1e-6
    )
    ramp = torch.linspace(0, 1, 31).expand(1, 1, 20, 31)
    assert torch.allclose(verifier._blurred(ramp, verifier.SMOOTH), ramp, atol=1e-6)
    along, down = verifier._slopes(ramp)
    assert torch.allclose(along, torch.full_like(ramp, 1 / 30), atol=1e-6)
    assert down.abs().max() < 1e-6


def test_no_gradient_is_kept():
    picture = to_tensor(_opened(SOURCES[0])).requires_grad_()
    assert not verifier.registered(picture, [picture]).score.requires_grad
