"""nL2, ZNCC and decoys against brute force; the decoders' gradients."""

import pytest
import torch

from amg_core import decoders, judge, metrics


def test_nl2_by_hand():
    query, neighbor = torch.zeros(1, 4), torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    assert metrics.nl2(query, neighbor, torch.tensor([20.0])).item() == pytest.approx(0.5)


def test_matching_takes_away_brightness_contrast_and_tint_only():
    neighbor = torch.rand(1, 3 * 64)
    tint = torch.tensor([0.1, -0.05, 0.0]).repeat_interleave(64)
    gain = torch.tensor([0.7, 1.0, 1.3]).repeat_interleave(64)
    changed = (neighbor[0] - 0.5) * gain + 0.5 + tint
    assert (metrics.matched(changed, neighbor) - neighbor).norm() < 1e-4
    other = torch.rand(1, 3 * 64)
    left = (metrics.matched(other[0], neighbor) - neighbor).norm()
    assert left > 0.5 * (other - neighbor).norm()


def test_matching_is_bounded():
    """A flat picture does not become anything, nor black white."""
    neighbor = torch.rand(1, 3 * 64)
    faint = 0.5 + 0.01 * (neighbor[0] - 0.5)
    assert (metrics.matched(faint, neighbor) - neighbor).norm() > 0.9 * (neighbor - 0.5).norm()
    dark = neighbor[0] * 0
    assert metrics.matched(dark, neighbor).max() <= metrics.OFFSET + 1e-6


def test_similarity_of_a_copy_is_perfect():
    row = torch.nn.functional.normalize(torch.rand(1, 48), dim=1)
    for metric in ("nl2", "cosine"):
        value = metrics.similarity(metric, row, row, torch.ones(1)).item()
        assert value == pytest.approx(metrics.PERFECT[metric], abs=1e-5)


def test_closeness_is_zero_for_unrelated_and_one_for_the_same():
    assert metrics.closeness("nl2", torch.tensor([0.0, -0.7, -1.4]), -0.7).tolist() == [1, 0, -1]
    close = metrics.closeness("cosine", torch.tensor([1.0, 0.3, 0.65]), 0.3)
    assert close.tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_decoys_are_the_pictures_turned_and_recoloured():
    rows = torch.rand(2, 3 * 4 * 4)
    made = metrics.decoys(rows, 4)
    assert made.shape == (36, 48)
    assert torch.equal(made[0].reshape(3, 4, 4), torch.rot90(rows[0].reshape(3, 4, 4), 1, (1, 2)))
    assert not any(torch.equal(made[i], rows[0]) for i in range(36))


def test_zncc_is_blind_to_brightness_contrast_and_grain():
    a = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    b = 0.3 * a + 0.5 + 0.02 * torch.randn(1, 3, 128, 128)
    assert judge.zncc(a, b).item() > 0.97
    assert judge.zncc(a, 1 - a).item() < -0.97
    other = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert abs(judge.zncc(a, other).item()) < 0.4


def test_zncc_matches_numpys_corrcoef():
    import numpy as np

    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for i in range(2):
        pair = [(x[i] * weights).sum(0).flatten().numpy() for x in (a, b)]
        assert judge.zncc(a, b)[i].item() == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-4)


def test_a_flat_picture_correlates_with_nothing():
    assert judge.zncc(torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32)).abs().item() < 1e-3


def test_a_mirrored_copy_is_seen():
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = judge.over_index(pictures[:1].flip(-1), [2, 0], lambda i: pictures[i])
    assert found[1] > 0.999 > 0.5 > found[0]


def test_linear_decoder_is_the_hosts_preview():
    factors, latent = torch.randn(4, 3), torch.randn(2, 4, 5, 6)
    picture = decoders.LinearDecoder(factors)(latent)
    expected = ((latent.movedim(1, -1) @ factors) + 1) / 2
    assert torch.allclose(picture, expected.movedim(-1, 1), atol=1e-6)


@pytest.mark.parametrize("inference", [True, False])
def test_owned_decoders_have_gradients_even_if_built_in_inference_mode(inference):
    with torch.inference_mode(inference):
        network = decoders.TAESDDecoder(4)
        decoder = decoders.ModuleDecoder("taesd", network, 4).to("cpu")
        latent = torch.randn(1, 4, 4, 4)
    with torch.inference_mode(False), torch.enable_grad():
        z = latent.clone().requires_grad_()
        picture = decoder(z)
        assert picture.shape == (1, 3, 32, 32)
        (gradient,) = torch.autograd.grad(picture.sum(), z)
    assert gradient.abs().sum() > 0
    assert not any(p.requires_grad for p in decoder.network.parameters())


def test_taesd_files_load_and_bad_ones_are_named(tmp_path):
    from safetensors.torch import save_file

    from amg_core.errors import AMGError

    network = decoders.TAESDDecoder(4)
    good = tmp_path / "taesd_decoder.safetensors"
    save_file(network.state_dict(), good)
    latent = torch.randn(1, 4, 2, 2)
    assert torch.equal(decoders.load_taesd(good)(latent), network(latent))
    bad = tmp_path / "taesd_decoder.pth"
    bad.write_bytes(b"no weights")
    with pytest.raises(AMGError, match=r"taesd_decoder\.pth"):
        decoders.load_taesd(bad)


def test_shrink_keeps_the_aspect_and_the_mean():
    latent = torch.randn(1, 4, 64, 96)
    small = decoders.shrink(latent, 48)
    assert small.shape == (1, 4, 32, 48)
    assert torch.allclose(small.mean(), latent.mean(), atol=1e-6)
    assert decoders.shrink(latent, 96) is latent and decoders.shrink(latent, None) is latent


@pytest.mark.parametrize(
    "size, scale, side",
    [((64, 64), 16, 16), ((64, 64), 64, 16), ((64, 64), 288, 36), ((96, 64), 288, 54),
     ((64, 128), 16, 32), ((16, 16), 288, 36)],
)  # fmt: skip
def test_no_more_is_decoded_than_is_compared(size, scale, side):
    """The shorter side has `scale` pixels, and the latent no fewer than 16 cells a side."""
    network = decoders.ModuleDecoder("none", torch.nn.Upsample(scale_factor=8), 4)
    latent = torch.rand(1, 4, *size)
    assert decoders.side_for(network, latent, scale) == side
    small = decoders.shrink(latent, side)
    assert min(small.shape[-2:]) >= min(16, *size)
    assert min(network(small).shape[-2:]) >= min(scale, 8 * min(size))
    linear = decoders.LinearDecoder(torch.rand(4, 3))
    assert decoders.side_for(linear, latent, scale) is None
