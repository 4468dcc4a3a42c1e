"""The latent descriptor: the encoder's identity, the closed-form gradient, a guarded run of the demo."""

from dataclasses import replace

import pytest
import torch

from amg_core import presets
from amg_core.descriptors import create, embed_scales, for_spec
from amg_core.descriptors.latent import (
    LatentDescriptor,
    TAESDEncoder,
    load_taesd_encoder,
    low_pass_adjoint,
)
from amg_core.errors import AMGError
from amg_core.images import low_pass, without_brightness_and_contrast
from amg_core.index.search import Searcher
from amg_core.run import SamplingRun
from amg_core.similarity import metrics
from amg_core.similarity.matcher import Matcher
from amg_demo import model as demo
from amg_demo.__main__ import training_set
from amg_demo.sample import sample


class Rows:
    """An index in memory: what `Searcher` asks of one."""

    def __init__(self, descriptor, rows, captions):
        self.spec, self._rows, self._captions = descriptor.spec, rows, captions
        self.name, self.hash, self.count = "memory", "0" * 64, len(captions)
        self.members, self.muted, self.cache = (self,), {}, None

    def rows(self, scale):
        return self._rows[scale].half().numpy()

    def caption(self, i):
        return self._captions[i]

    def source(self, i):
        return f"{i}.png"


@pytest.fixture(scope="module")
def domain():
    model = demo.load()
    pictures, captions, copies = training_set(demo.PICTURES)
    keep = torch.cat([(copies > 1).nonzero()[:, 0], (copies == 1).nonzero()[::5, 0]])
    pictures, captions = pictures[keep], [captions[i] for i in keep]
    descriptor = LatentDescriptor(
        model.encoder, "demo", "0" * 64, 4, kind="vae", side=128, scales=(8, 16)
    )
    with torch.inference_mode():
        parts = [embed_scales(descriptor, p) for p in pictures.split(32)]
    rows = {s: torch.cat([part[s] for part in parts]) for s in (8, 16)}
    matcher = Matcher(Searcher(Rows(descriptor, rows, captions)), descriptor)
    return model, pictures, captions, matcher


# ---------------------------------------------------------------- identity


def test_spec_and_its_way_back():
    made = LatentDescriptor(lambda p: p, "sdxl", "ab" * 32, 4, side=1024, scales=(16, 8))
    assert made.spec.id == "latent_sdxl" and made.spec.metric == "nl2"
    assert made.spec.preprocessing == "vae-1024px-c4-square-area/1"
    assert made.spec.scales == (8, 16) and made.spec.weights_sha256 == "ab" * 32
    without = for_spec(made.spec)
    assert without.spec == made.spec and without.channels == 4 and without.side == 1024
    with pytest.raises(AMGError, match=r"without the encoder.*connect vae and model"):
        without.embed(torch.rand(1, 3, 8, 8), 8)
    with pytest.raises(AMGError, match=r"4 channels.*one kind of model"):
        without.embed_latents(torch.zeros(1, 16, 8, 8), 8)
    with pytest.raises(ValueError, match="no scale"):
        without.embed_latents(torch.zeros(1, 4, 8, 8), 32)
    with pytest.raises(ValueError):
        LatentDescriptor(None, "SD 1.5", "", 4)


def random_taesd(channels=4):
    torch.manual_seed(3)
    return TAESDEncoder(channels)


@pytest.mark.parametrize(
    ("name", "family", "channels"),
    [("taesd_encoder", "sd15", 4), ("taesdxl_encoder", "sdxl", 4), ("taef1_encoder", "flux", 16)],
)
def test_taesd_files(tmp_path, name, family, channels):
    from safetensors.torch import save_file

    network = random_taesd(channels)
    path = tmp_path / f"{name}.safetensors"
    save_file(network.state_dict(), path)
    descriptor = create("latent", path, side=64, scales=(8,))
    assert descriptor.spec.id == f"latent_{family}" and descriptor.channels == channels
    assert descriptor.spec.preprocessing == f"taesd-64px-c{channels}-square-area/1"
    pictures = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(pictures).flatten(1)  # 8 x 8 cells
        assert torch.equal(descriptor.embed(pictures, 8), expected)
    torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    assert for_spec(descriptor.spec, tmp_path / f"{name}.pth").spec == descriptor.spec
    diffusers = {f"encoder.layers.{k}": v for k, v in network.state_dict().items()}
    save_file(diffusers | {"decoder.layers.1.weight": torch.ones(1)}, path)
    assert create("latent", path, side=64, scales=(8,)).spec == descriptor.spec


def test_wrong_taesd_files_are_named(tmp_path):
    from safetensors.torch import save_file

    network = random_taesd()
    odd = tmp_path / "small.safetensors"
    save_file(network.state_dict(), odd)
    with pytest.raises(AMGError, match=r"small\.safetensors does not show"):
        create("latent", odd)
    assert create("latent", odd, family="sd15").spec.id == "latent_sd15"
    bad = tmp_path / "taesd_encoder.pth"
    for data in (b"no weights", b""):
        bad.write_bytes(data)
        with pytest.raises(AMGError, match=r"taesd_encoder\.pth is not a readable"):
            create("latent", bad)
    save_file({"1.weight": torch.ones(1)}, tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(AMGError, match="not a readable TAESD encoder"):
        create("latent", tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(AMGError, match="needs an encoder"):
        create("latent")
    changed = {k: v + 1e-3 for k, v in network.state_dict().items()}
    save_file(changed, tmp_path / "taesd_encoder.safetensors")
    spec = create("latent", odd, family="sd15").spec
    with pytest.raises(AMGError, match="other weights"):
        for_spec(spec, tmp_path / "taesd_encoder.safetensors")


@pytest.mark.parametrize("half", [False, True])
def test_our_taesd_has_a_gradient_even_if_loaded_in_inference_mode(tmp_path, half):
    path = tmp_path / "taesd_encoder.pth"
    network = random_taesd()
    torch.save((network.half() if half else network).state_dict(), path)
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        network, _ = load_taesd_encoder(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    picture = torch.rand(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(picture).sum(), picture)
    assert gradient.any() and not any(p.requires_grad for p in network.parameters())


# ---------------------------------------------------------------- the measure


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_matching_for_any_number_of_channels(channels):
    neighbor = torch.randn(1, channels * 64)
    gain = (0.6 + torch.rand(channels)).repeat_interleave(64)
    tint = (torch.rand(channels) - 0.5).repeat_interleave(64)
    query = neighbor[0] * gain + tint
    left = metrics.matched(query, neighbor, channels, metrics.LATENT_OFFSET) - neighbor
    assert left.norm() < 1e-3 < (query - neighbor).norm()
    far = neighbor[0] + 3
    assert (metrics.matched(far, neighbor, channels, 1.0) - neighbor).mean() > 1.9


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (19, 33), (5, 9), (8, 8)])
def test_adjoint_of_the_low_pass(size):
    latent = torch.randn(1, 4, *size, dtype=torch.float32, requires_grad=True)
    gradient = torch.randn(1, 4, 8, 8)
    (expected,) = torch.autograd.grad(low_pass(latent, 8), latent, gradient)
    torch.testing.assert_close(low_pass_adjoint(gradient, size), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [0.05, 1.0])  # clamped, and not
def test_closed_form_gradient_is_autograds(offset):
    query, neighbor = torch.randn(1, 4 * 64), torch.randn(1, 4 * 64) + 0.3
    spread = torch.tensor([7.0])
    q = query.clone().requires_grad_()
    value = metrics.similarity("nl2", q, neighbor, spread, 4, offset)
    (expected,) = torch.autograd.grad(value.sum(), q)
    gradient, closed = metrics.nl2_gradient(query, neighbor, spread, 4, offset)
    torch.testing.assert_close(closed, value.detach())
    torch.testing.assert_close(gradient, expected)
    flat = torch.zeros(1, 256)
    nowhere, zero = metrics.nl2_gradient(flat, flat, spread, 4, offset)
    assert not nowhere.any() and zero.item() == 0


# ---------------------------------------------------------------- looking


def test_latents_of_the_pictures_are_found_without_a_decoder(domain):
    model, pictures, _, matcher = domain
    with torch.inference_mode():
        latents = model.encoder(pictures[[0, 7, 50]])
        match = matcher.match(latents, 0.01)
        mirrored = matcher.match(latents.flip(-1), 0.01)
        noisy = matcher.match(latents + 0.5 * torch.randn(latents.shape), 0.01)
    for found in (match, mirrored, noisy):
        assert found.ids.tolist() == [0, 7, 50] and found.scale == 16
    assert match.score.min() > 0.98 and not match.mirrored.any() and mirrored.mirrored.all()
    for view in (pictures[:2], pictures[:2].flip(-1)):
        finished = matcher.match_pictures(view)
        assert finished.score.min() > 0.98 and finished.ids.tolist() == [0, 1]
    assert matcher.scale_at(14.0, 16) == 8 and matcher.scale_at(0.01, 8) == 8


def test_brightness_and_contrast_make_no_new_picture(domain):
    model, pictures, _, matcher = domain
    with torch.inference_mode():
        changed = matcher.match(1.4 * model.encoder(pictures[:8]) + 0.3, 0.01)
    assert changed.ids.tolist() == list(range(8)) and changed.score.min() > 0.9


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (20, 14)])
def test_gradient_of_the_probe_is_the_pixel_paths(domain, mirrored, size):
    """The same chain as the pixel path, by autograd: low-pass, view, similarity, projection."""
    *_, matcher = domain
    latent = torch.randn(1, 4, *size)
    match = matcher.match(latent, 0.6)
    match = replace(match, mirrored=torch.tensor([mirrored]), scale=8)
    gradient, value = matcher.gradient(latent, match)
    z = latent.clone().requires_grad_()
    low = low_pass(z, 8)
    seen = low.detach().clone().requires_grad_()
    query = (seen.flip(-1) if mirrored else seen).flatten(1)
    neighbor = matcher.searcher.rows(match.ids, 8)
    similarity = metrics.similarity("nl2", query, neighbor, match.spread, 4, metrics.LATENT_OFFSET)
    (push,) = torch.autograd.grad(similarity.sum(), seen)
    (expected,) = torch.autograd.grad(low, z, without_brightness_and_contrast(push, seen.detach()))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(value, similarity.detach())
    assert gradient.mean(dim=(2, 3)).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(16, 16), (20, 14)])
def test_as_published_latents_are_compared_by_eq_8(domain, size):
    """Without a decoder, by brute force, and the gradient with a constant denominator by autograd."""
    *_, matcher = domain
    latent = torch.randn(1, 4, *size)
    match = matcher.match_as_published(latent)
    z = latent.clone().requires_grad_()
    rows = matcher.searcher.rows(torch.arange(matcher.index.count), match.scale)
    distances = (low_pass(z, match.scale).flatten(1) - rows).norm(dim=1)
    nearest = distances.sort().values[:50]
    value = -nearest[0] / (0.5 * nearest.detach().mean())
    assert match.ids.item() == int(distances.argmin())
    assert match.scale == matcher.scale_at(0.0, min(size)) and not match.mirrored.any()
    (expected,) = torch.autograd.grad(value, z)
    gradient, similarity = matcher.gradient_as_published(latent, match)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(similarity, value.detach()[None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(similarity, match.similarity)


def test_a_picture_descriptor_needs_a_decoder(domain):
    *_, matcher = domain
    with pytest.raises(AMGError, match="pixel compares pictures"):
        Matcher(matcher.searcher, create("pixel")).decode(torch.zeros(1, 4, 16, 16))


def test_an_index_on_disk_guards_without_its_encoder(domain, tmp_path):
    model, *_ = domain
    from amg_core.index import Index, build

    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(demo.PICTURES.glob("memorised-00*.webp")):
        (folder / path.name).write_bytes(path.read_bytes())
    made = LatentDescriptor(model.encoder, "demo", "0" * 64, 4, side=128, scales=(8, 16))
    assert build(folder, tmp_path / "index", made).count == 10
    with Index.open(tmp_path / "index") as index:
        descriptor = for_spec(index.spec)
        matcher = Matcher(Searcher(index), descriptor)
        pictures = training_set(demo.PICTURES)[0][:10]
        with torch.inference_mode():
            match = matcher.match(model.encoder(pictures), 0.01)
        assert match.ids.tolist() == list(range(10)) and match.score.min() > 0.95
        with pytest.raises(AMGError, match="without the encoder"):
            matcher.match_pictures(pictures[:1])
        with pytest.raises(AMGError, match="one kind of model"):
            matcher.match(torch.zeros(1, 16, 16, 16), 0.01)


def test_half_precision_holds_every_row(domain):
    *_, matcher = domain
    rows = matcher.searcher.index.rows(16)
    assert abs(rows).max() < 20 and torch.from_numpy(rows).isfinite().all()


def test_the_guard_acts_on_a_memorised_prompt_and_sleeps_elsewhere(domain):
    model, _, captions, matcher = domain
    prompts, seeds = [captions[0], captions[3], "robot face on teal checks"], [1000, 1003, 7]
    options = {"steps": 12, "cfg_scale": 4.0}
    plain = sample(model, prompts, seeds, **options)
    run = SamplingRun(matcher, presets.settings("main", "nl2"))
    guarded = sample(model, prompts, seeds, guide=run.step, **options)
    acted = run.report()["guarded_evaluations"]
    assert acted[0] > 0 and acted[1] > 0 and acted[2] == 0
    assert torch.equal(guarded[2], plain[2])
    before = matcher.match_pictures(plain).score
    after = matcher.match_pictures(guarded).score
    assert (after[:2] < before[:2] - 0.2).all()
