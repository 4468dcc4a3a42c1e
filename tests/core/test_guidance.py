"""Equations of AMG against numbers worked by hand, brute force and finite differences."""

import pytest
import torch

from amg_core import guidance, images
from amg_core.guidance import paper
from amg_core.schedule import Schedule


def tensors(*shape, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_strengths_by_hand():
    """s0 = 7.5, σ = .5, .3: c1 = 13 gives 6.5, 3.9 (the authors' table); c2 = 5 gets what is left."""
    close = torch.tensor([0.5, 0.3, 0.9, 0.0])
    s1 = paper.despecification_strength(close, 13.0, 7.5)
    assert torch.allclose(s1, torch.tensor([6.5, 3.9, 6.5, 0.0]))
    s2 = paper.deduplication_strength(close, s1, 5.0, 7.5)
    assert torch.allclose(s2, torch.tensor([0.0, 1.5, 0.0, 0.0]))  # room 0, 2.6, 0, 6.5
    assert paper.deduplication_strength(close[1:2], s1[1:2], 20.0, 7.5).item() == pytest.approx(2.6)


def test_strengths_vanish_at_cfg_1():
    close = torch.tensor([0.9])
    s1 = paper.despecification_strength(close, 13.0, 1.0)
    assert s1.item() == 0
    assert paper.deduplication_strength(close, s1, 5.0, 1.0).item() == 0


def test_denoised_space_is_the_papers_epsilon_space():
    """Eq. 10 in ε, turned into x̂0, is the sum of our three changes of D (k-diffusion σ, √ᾱ = 1/√(1+σ²))."""
    x, e_c, e_u = tensors(2, 4, 3, 3)
    e_n, gradient, _ = tensors(2, 4, 3, 3, seed=1)
    s0, s1, s2, c3 = 7.5, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]), 0.7
    sigma = torch.tensor([2.0, 0.5], dtype=torch.float64)
    alpha = (1 / (1 + sigma**2))[:, None, None, None]
    wide = [guidance.expand(s, x) for s in (s1, s2)]
    # paper: G_spe = -s1 (ε_c − ε_u), G_dup = -s2 (ε_n − ε_u), G_sim = c3 √(1−ᾱ) ∇_{x_t} σ_t
    x_t = alpha.sqrt() * x
    grad_xt = gradient / alpha.sqrt()  # ∂x̂0/∂x_t = 1/√ᾱ with ε constant
    eps = e_u + s0 * (e_c - e_u) - wide[0] * (e_c - e_u) - wide[1] * (e_n - e_u)
    eps = eps + c3 * (1 - alpha).sqrt() * grad_xt

    def x0(e):
        return (x_t - (1 - alpha).sqrt() * e) / alpha.sqrt()

    d_c, d_u, d_n = x0(e_c), x0(e_u), x0(e_n)
    ours = d_u + s0 * (d_c - d_u)
    ours = ours + paper.despecification(d_c, d_u, s1) + paper.deduplication(d_n, d_u, s2)
    ours = ours + paper.dissimilarity(gradient, sigma, c3)
    assert torch.allclose(x0(eps), ours, atol=1e-12)


def test_projection_reaches_the_boundary_of_a_linear_measure():
    direction, point, _ = tensors(2, 4, 5, 5)
    target = torch.tensor([0.3, -1.0], dtype=torch.float64)
    value = (direction * point).sum(dim=(1, 2, 3))
    moved = point + paper.projection(direction, value - target, point, cap=1e9)
    reached = (direction * moved).sum(dim=(1, 2, 3))
    assert torch.allclose(reached, torch.minimum(value, target), atol=1e-10)  # never towards


def test_projection_is_capped_per_sample():
    direction, point, _ = tensors(3, 4, 5, 5)
    move = paper.projection(direction, torch.full((3,), 1e6), point, cap=0.1)
    ratio = move.flatten(1).norm(dim=1) / point.flatten(1).norm(dim=1)
    assert torch.allclose(ratio, torch.full((3,), 0.1, dtype=torch.float64))


def test_projection_survives_a_zero_gradient():
    point = torch.ones(1, 4, 2, 2)
    assert torch.isfinite(
        paper.projection(torch.zeros(1, 4, 2, 2), torch.ones(1), point, 0.1)
    ).all()


def test_pushes_neither_brighten_nor_flatten():
    gradient, picture, _ = tensors(2, 3, 8, 8)
    push = images.without_brightness_and_contrast(gradient, picture)
    assert push.mean(dim=(2, 3)).abs().max() < 1e-12  # brightness and tint
    deviation = picture - picture.mean(dim=(2, 3), keepdim=True)
    assert (push * deviation).sum(dim=(1, 2, 3)).abs().max() < 1e-10  # contrast
    again = images.without_brightness_and_contrast(push, picture)
    assert torch.allclose(again, push, atol=1e-12)  # a projection


@pytest.mark.parametrize("name", ["despecification", "deduplication"])
def test_terms_are_per_sample(name):
    a, b, _ = tensors(4, 4, 3, 3)
    strength = torch.arange(4.0)
    order = torch.tensor([2, 0, 3, 1])
    term = getattr(paper, name)
    assert torch.equal(term(a, b, strength)[order], term(a[order], b[order], strength[order]))


def test_resolved_side_falls_with_noise():
    sides = [images.resolved_side(s, 64) for s in (14.6, 5.0, 1.0, 0.2)]
    assert sides == sorted(sides) and sides[0] < 4 and sides[-1] > 64


@pytest.mark.parametrize(
    ("kind", "t", "value"),
    [
        ("parabolic", 1.0, 0.3), ("parabolic", 0.0, 0.5), ("parabolic", 0.5, 0.45),
        ("constant", 1.0, 0.5), ("constant", 0.0, 0.5),
        ("exponential", 0.0, 0.5), ("exponential", 1.0, 0.3 + 0.2 * 0.006737947),
    ],
)  # fmt: skip
def test_schedule_by_hand(kind, t, value):
    assert Schedule(kind, 0.3, 0.5)(t) == pytest.approx(value)


def test_schedule_is_the_authors_exponential():
    """0.3 + 0.1·e^(−0.005 T): T = 981 .3007, 301 .322, 1 .3995 (facts of their code)."""
    schedule = Schedule("exponential", 0.3, 0.4)
    for steps, value in ((981, 0.3007), (301, 0.3222), (1, 0.3995)):
        assert schedule(steps / 1000) == pytest.approx(value, abs=1e-4)


def test_schedule_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="parabolic"):
        Schedule("cubic", 0.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        Schedule("constant", float("nan"), 1.0)
