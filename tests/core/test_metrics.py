"""nL2, ZNCC and decoys against brute force; the decoders' gradients."""

import pytest
import torch

from amg_core import decoders
from amg_core.similarity import metrics, verifier


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


def test_score_is_zero_typically_and_the_limit_is_in_one_place():
    typical, limit = torch.tensor([-1.4]), torch.tensor([-0.7])
    close = metrics.score("nl2", torch.tensor([0.0, -0.7, -1.4]), typical, limit)
    assert close.tolist() == pytest.approx([1, 0.4, 0])
    typical, limit = torch.tensor([0.1]), torch.tensor([0.4])
    values = torch.tensor([1.0, 0.7, 0.4, 0.25, 0.1])
    close = metrics.score("cosine", values, typical, limit)
    assert close.tolist() == pytest.approx([1.0, 0.7, 0.4, 0.2, 0.0])
    for level, value in zip(close.tolist(), values.tolist(), strict=True):
        back = metrics.similarity_at("cosine", level, typical, limit)
        assert back.item() == pytest.approx(value)


def test_a_flat_row_has_no_structure():
    rows = torch.stack([torch.full((48,), 0.5), torch.rand(48)])
    assert metrics.is_flat(rows).tolist() == [True, False]
    assert metrics.structure(rows)[0] == 0


def test_zncc_is_blind_to_brightness_contrast_and_grain():
    a = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    b = 0.3 * a + 0.5 + 0.02 * torch.randn(1, 3, 128, 128)
    assert verifier.zncc(a, b).item() > 0.97
    assert verifier.zncc(a, 1 - a).item() < -0.97
    other = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert abs(verifier.zncc(a, other).item()) < 0.4


def test_zncc_matches_numpys_corrcoef():
    import numpy as np

    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for i in range(2):
        pair = [(x[i] * weights).sum(0).flatten().numpy() for x in (a, b)]
        assert verifier.zncc(a, b)[i].item() == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-4)


def test_a_flat_picture_correlates_with_nothing():
    assert (
        verifier.zncc(torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32)).abs().item() < 1e-3
    )


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
