"""What the guard sees at the sizes artists draw: copies through autoencoders, edits, and strangers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from torch.nn import functional as F

from amg_core import limits, presets
from amg_core.decoders import ModuleDecoder, load_taesd
from amg_core.descriptors import DEFAULT, create
from amg_core.descriptors.compact import SCALES, CompactDescriptor
from amg_core.descriptors.latent import load_taesd_encoder
from amg_core.descriptors.registry import kinds, named
from amg_core.errors import AMGError
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.index.sources import Pictures
from amg_core.run import SamplingRun
from amg_core.similarity import background, metrics
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import CANNOT_TELL, FIRST, FLAT, NO_PICTURES, verdict
from amg_demo import model as demo
from training.pool import Grounds

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"
LEVELS = ((1.0, 13.0), (0.6, 1.6), (0.3, 0.4), (0.02, 0.05))  # t, sigma
COUNT = 24  # pictures of the index


def made_up(count: int, side: int, seed: int) -> torch.Tensor:
    """Scenes with the statistics of photographs, (count, 3, side, side): none is in any index."""
    grounds = Grounds(np.random.default_rng(seed))
    stack = np.stack([(grounds.ridges() + grounds.leaves()) / 2 for _ in range(count)])
    pictures = torch.from_numpy(stack).permute(0, 3, 1, 2).float().clamp(0, 1)
    return F.interpolate(pictures, (side, side), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def pictures():
    return made_up(COUNT, 512, 1)


@pytest.fixture(scope="module", params=["compact", "pixel"])
def matcher(request, pictures, tmp_path_factory):
    return _probe(create(request.param), pictures, tmp_path_factory.mktemp("eye"))


@pytest.fixture(scope="module")
def compact(pictures, tmp_path_factory):
    return _probe(create(DEFAULT), pictures, tmp_path_factory.mktemp("compact"))


def _probe(descriptor, pictures, folder) -> Matcher:
    build(Pictures(pictures.movedim(1, -1)), folder / "index", descriptor)
    return Matcher(Searcher(Index.open(folder / "index")), descriptor)


def autoencoder(name: str):
    if name == "demo":
        network = demo.load()
        return network.encoder, ModuleDecoder("demo", network.decoder, 4)
    if not (WEIGHTS / "taef2_encoder.pth").is_file():
        pytest.skip("needs taef2_encoder.pth and taef2_decoder.pth in ../shared/weights")
    encoder, _ = load_taesd_encoder(WEIGHTS / "taef2_encoder.pth")
    return encoder, load_taesd(WEIGHTS / "taef2_decoder.pth")


def opened(matcher: Matcher, latent: torch.Tensor) -> tuple[list[bool], list[int]]:
    """The gate of main, at each noise level, for a run whose predictions are this latent."""
    off = {"despecification": 0, "deduplication": 0, "dissimilarity": 0}
    run = SamplingRun(matcher, presets.settings("main", matcher.metric, **off))
    for t, sigma in LEVELS:
        level = torch.tensor([sigma])
        run.step(latent, cond=latent, uncond=latent, cfg_scale=4.0, sigma=level, t=t)
    return [r.active[0] for r in run.records], [r.neighbor[0] for r in run.records]


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (384, 640)])
@pytest.mark.parametrize("name", ["demo", "taef2"])
def test_the_gate_opens_on_a_copy_at_every_size(matcher, pictures, name, size):
    """At 512 px this failed while latents were averaged before they were decoded."""
    encoder, decoder = autoencoder(name)
    watch = Matcher(matcher.searcher, matcher.descriptor, decoder)
    rows = {matcher.searcher.index.record(i).source: i for i in range(COUNT)}
    assert len(rows) == COUNT
    with torch.inference_mode(False), torch.no_grad():
        for picture in pictures[:2].split(1):
            latent = encoder(F.interpolate(picture, size, mode="bilinear", antialias=True))
            active, neighbors = opened(watch, latent)
            assert all(active)
            (own,) = set(matcher.match_pictures(picture).ids.tolist())
            assert set(neighbors) == {own}


@pytest.mark.parametrize("name", ["demo", "taef2"])
def test_the_gate_stays_shut_on_a_stranger(matcher, name):
    encoder, decoder = autoencoder(name)
    watch = Matcher(matcher.searcher, matcher.descriptor, decoder)
    with torch.no_grad():
        latents = [encoder(picture) for picture in made_up(3, 256, 2).split(1)]
    assert not any(any(opened(watch, latent)[0]) for latent in latents)


def _crop(image: Image.Image) -> Image.Image:
    side = image.width
    return image.crop((side // 20, side // 20, side * 19 // 20, side * 19 // 20))


def _text(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text((40, 200), "SALE, ONLY TODAY", fill="white", font_size=40)
    return image


EDITS = {
    "resized": lambda image: image.resize((96, 96)),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(6)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "flat": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": _crop,
    "turned": lambda image: image.rotate(4, Image.Resampling.BILINEAR),
    "lettered": _text,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_is_a_copy(compact, pictures, edit):
    """By either check; none of these are of the test set that the tables are made of."""
    found = 0
    for picture in pictures[:4]:
        image = Image.fromarray((picture.movedim(0, -1) * 255).byte().numpy())
        changed = torch.from_numpy(np.array(EDITS[edit](image))).movedim(-1, 0)[None] / 255
        (one,) = verdict(compact, changed.float())
        found += one.copy and one.neighbor == int(compact.match_pictures(picture[None]).ids)
    assert found == 4


def test_strangers_are_no_copies(compact):
    verdicts = verdict(compact, made_up(16, 256, 3))
    assert sum(v.copy for v in verdicts) <= 1
    assert all(v.outcome != CANNOT_TELL for v in verdicts)


def test_a_flat_picture_cannot_be_told(compact):
    (report,) = verdict(compact, torch.full((1, 3, 64, 64), 0.5))
    assert report.reason == FLAT and report.outcome == CANNOT_TELL and report.checks == ()


def test_without_pictures_the_second_check_cannot_tell(compact, pictures, monkeypatch):
    def none(self, i):
        raise AMGError("This index holds no pictures.")

    monkeypatch.setattr(Index, "thumbnail", none)
    (stranger,) = verdict(compact, made_up(1, 256, 4))
    assert stranger.reason == NO_PICTURES and stranger.outcome == CANNOT_TELL
    (copy,) = verdict(compact, pictures[:1])
    assert copy.copy and copy.checks == (FIRST,) and copy.reason == ""


# ---------------------------------------------------------------- the descriptor


def test_rows_are_unit_and_do_not_depend_on_the_batch(pictures):
    descriptor = create(DEFAULT)
    for scale in SCALES:
        together = descriptor.embed(pictures[:3], scale)
        assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
        alone = torch.cat([descriptor.embed(one, scale) for one in pictures[:3].split(1)])
        assert torch.allclose(together, alone, atol=1e-5)
        small = descriptor.shrink(pictures[:3], scale)
        assert torch.allclose(descriptor.embed(small, scale), together, atol=1e-6)


def test_brightness_contrast_and_tint_are_taken_out(pictures):
    descriptor = create(DEFAULT)
    tint = torch.tensor([0.05, -0.02, 0.03])[:, None, None]
    changed = pictures[:4] * 0.5 + 0.2 + tint
    rows, others = (descriptor.embed(each, 96) for each in (pictures[:4], changed))
    assert (rows * others).sum(dim=1).min() > 0.98


def test_gradients_reach_the_picture_under_inference_mode(pictures):
    with torch.inference_mode():
        descriptor = create(DEFAULT)
    picture = pictures[:1].clone().requires_grad_()
    descriptor.embed(picture, 48)[0, 0].backward()
    assert picture.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in descriptor.network.parameters())


def test_another_network_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AMGError, match="compact"):
        CompactDescriptor.from_file(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- the limits


def test_every_descriptor_that_guards_has_limits():
    for kind in kinds():
        perfect = 0.0 if kind.name in ("pixel", "latent") else 1.0
        for levels in kind.levels.values():
            assert len(levels) == len(limits.ROWS)
            assert all(typical < limit < perfect for typical, limit in levels)
            assert list(levels) == sorted(levels)  # more rows, nearer strangers


def test_sscd_calls_a_copy_at_half_at_most():
    """The threshold of the literature (Eq. 9's own unit), whatever the size of the index."""
    spec = CompactDescriptor.from_file().spec.__class__("sscd_disc_mixup", "cosine", "", (288,))
    assert all(limits.levels(spec, 288, rows)[1] <= 0.5 for rows in (10, 10**5, 10**9))


def test_the_background_set_is_of_the_descriptor_in_the_box():
    spec = create(DEFAULT).spec
    for scale in SCALES:
        rows = background.rows(spec, scale)
        assert rows is not None and rows.shape[1] == 256
        assert scale in named(DEFAULT).usual


def test_what_is_alike_to_everything_is_judged_by_higher_limits(compact):
    usual = named(DEFAULT).usual[96]
    assert limits.shift(compact.descriptor.spec, 96, usual) == 0
    assert limits.shift(compact.descriptor.spec, 96, usual + 0.1) > 0


def test_score_of_a_limit_is_the_copy_threshold(compact, pictures):
    match = compact.match_pictures(pictures[:2])
    close = metrics.score("cosine", match.limit, match.typical, match.limit)
    assert close.tolist() == pytest.approx([metrics.COPY] * 2)
