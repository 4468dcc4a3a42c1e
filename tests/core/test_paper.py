"""Preset paper against Eqs. 8 to 17 of AMG written in ε space, and reference against its authors' formulas.

`the_papers_epsilon` is written from the paper alone: x_t, the three noise predictions, ᾱ_t and the training
set go in, ε̂ comes out. It uses nothing of the guard but two constants that the paper does not have: the
bound of Eq. 17, and what takes the place of σ_t = −nL2, which is never positive, in Eqs. 13 and 15.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from amg_core import presets
from amg_core.decoders import ModuleDecoder
from amg_core.descriptors import registry
from amg_core.descriptors.base import DescriptorSpec
from amg_core.descriptors.pixel import PixelDescriptor
from amg_core.descriptors.registry import Kind
from amg_core.guidance import Deduplication, Despecification, Dissimilarity
from amg_core.guidance.paper import FARTHEST, FARTHEST_ALONE
from amg_core.hosts import noise_level
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.run import SamplingRun
from amg_core.schedule import Schedule
from amg_core.similarity.matcher import Matcher

SIDE, CELLS, PICTURES = 32, 8, 64
KINDS = ("eps", "v", "flow")
TIMES = (0.995, 0.9, 0.75, 0.6, 0.45, 0.3, 0.24, 0.1, 0.02)


class Embedder:
    """A random network for the cosine of Eq. 9: (B, 3, H, W) -> (B, 96) of norm 1."""

    space = "picture"

    def __init__(self):
        self.spec = DescriptorSpec(
            id="random", metric="cosine", preprocessing="none/1", scales=(SIDE,)
        )
        generator = torch.Generator().manual_seed(4)
        self.inner = torch.randn(3 * 64, 192, generator=generator)
        self.outer = torch.randn(192, 96, generator=generator)

    def embed(self, pictures, scale):
        small = torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 8)
        small = (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1)
        rows = torch.tanh(small @ self.inner) @ self.outer
        return rows / rows.norm(dim=1, keepdim=True)

    def to(self, device):
        return self


@pytest.fixture(scope="module")
def network():
    """A small random decoder: (B, 4, 8, 8) -> (B, 3, 32, 32) in (0, 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return torch.nn.Sequential(
            torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Upsample(scale_factor=4),
            torch.nn.Conv2d(16, 3, 3, padding=1), torch.nn.Sigmoid(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def stored():
    """The latents of the training pictures."""
    return 2 * torch.randn(PICTURES, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def matchers(tmp_path_factory, network, stored):
    folder = tmp_path_factory.mktemp("training")
    with torch.no_grad():
        pictures = network(stored).permute(0, 2, 3, 1)
    for i, picture in enumerate(pictures):
        pixels = (picture.numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(str(i))
    made = {}
    known = registry.Kind("random", "of a test.", Embedder, {SIDE: ((0.3, 0.6),) * 5}, guards=False)
    before = registry._known
    registry._known = lambda: before() | {"random": known}
    for metric, descriptor in (("nl2", PixelDescriptor()), ("cosine", Embedder())):
        build(folder, folder / metric, descriptor)
        decoder = ModuleDecoder("random", network, 4, factor=4)
        made[metric] = Matcher(Searcher(Index.open(folder / metric)), descriptor, decoder)
    yield made
    registry._known = before


# ------------------------------------------------------------------ the paper, in ε space


def the_papers_epsilon(x_t, e_u, e_c, captioned, alpha, s0, threshold, rows, embed, metric):
    """ε̂ of Eq. 10 for one sample, σ_t, the row of n0, and the three terms. All in float64.

    x_t, e_u, e_c (1, C, H, W); captioned: row -> ε(x_t, y_N); alpha: ᾱ_t; rows (N, D): E of the training
    set, or its pictures; embed: x̂0 -> its row (1, D).
    """
    c1, c2, c3 = 1.5, 5.0, 100.0
    eps = e_u + s0 * (e_c - e_u)
    x = x_t.clone().requires_grad_()
    x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)  # Eq. 12
    query = embed(x0)
    if metric == "nl2":  # Eq. 8
        distances = (query - rows).norm(dim=1)
        near = distances.detach().sort().values[:50]
        n0 = int(distances.argmin())
        similarity = -distances[n0] / (0.5 * near.mean())
        positive = 1 + similarity.item() / 2
    else:  # Eq. 9
        products = rows @ query[0]
        n0 = int(products.argmax())
        similarity = products[n0]
        positive = similarity.item()
    (gradient,) = torch.autograd.grad(similarity, x)
    value = float(similarity.detach())
    if not value > threshold:
        return eps, value, n0, None
    s1 = max(min(c1 * positive, s0 - 1), 0)  # Eq. 13
    spe = -s1 * (e_c - e_u)  # Eq. 14
    s2 = max(min(c2 * positive, s0 - s1 - 1), 0)  # Eq. 15
    dup = -s2 * (captioned(n0) - e_u)  # Eq. 16
    sim = c3 * math.sqrt(1 - alpha) * gradient  # Eq. 17
    sim = sim * min(1.0, float(FARTHEST * (e_c - e_u).norm() / sim.norm().clamp_min(1e-300)))
    return eps + spe + dup + sim, value, n0, (spe, dup, sim)  # Eq. 10


class Scene:
    """Predictions of three samples by a model of one kind: a copy, something like one, something new.

    `parts` are what the model predicts (ε, v or the flow's velocity), x what it was given.
    """

    def __init__(self, kind, t, stored, s0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.kind, self.t, self.s0 = kind, t, s0
        new = 2 * noise(3, 4, CELLS, CELLS)
        share = torch.tensor([0.95, 0.7, 0.0], dtype=torch.float64)[:, None, None, None]
        denoised = share * stored[[5, 9, 11]].double() + (1 - share**2).sqrt() * new
        apart = 0.3 * noise(3, 4, CELLS, CELLS)
        uncond = denoised - s0 * apart
        self.captions = uncond[:, None] + 0.5 * noise(3, PICTURES, 4, CELLS, CELLS)
        clean = {"u": uncond, "c": uncond + apart}
        if kind == "flow":
            level = torch.tensor(t, dtype=torch.float64)
            self.a, self.b = 1 - level, level  # x = a·x0 + b·noise
        else:
            angle = torch.tensor(t * math.pi / 2, dtype=torch.float64)
            self.a, self.b = angle.cos(), angle.sin()
        self.x = self.a * denoised + self.b * noise(*denoised.shape)
        self.parts = {name: self.output(value) for name, value in clean.items()}

    def output(self, clean):
        """What the model says when it means the clean latent `clean`."""
        eps = (self.x - self.a * clean) / self.b
        return {"eps": eps, "v": self.a * eps - self.b * clean, "flow": eps - clean}[self.kind]

    def denoised_of(self, output):
        """As a host does it: the model's output -> the clean latent."""
        if self.kind == "eps":
            return (self.x - self.b * output) / self.a
        return self.a * self.x - self.b * output if self.kind == "v" else self.x - self.b * output

    def eps_of(self, output):
        if self.kind == "eps":
            return output
        return self.b * self.x + self.a * output if self.kind == "v" else self.x + self.a * output

    def captioned(self, i, row):
        """ε(x_t, y_N) of sample i for the caption of `row`."""
        return ((self.x - self.a * self.captions[:, row]) / self.b)[i : i + 1]

    @property
    def alpha(self):
        """ᾱ_t of the process whose x_t has variance ᾱ + (1 − ᾱ) = 1."""
        return float(self.a**2 / (self.a**2 + self.b**2))

    def for_the_guard(self):
        """Arguments of `SamplingRun.step`, and the captions that were asked for."""
        asked = []

        def neighbor(captions):
            asked.append(captions)
            return torch.stack(
                [self.captions[i, int(text or 0)] for i, text in enumerate(captions)]
            ).float()

        uncond, cond = (self.denoised_of(self.parts[name]) for name in "uc")
        sigma = torch.full((3,), float(self.b / self.a), dtype=torch.float64)
        texts = SimpleNamespace(captions=True, neighbor=neighbor, words=0, reduced=None)
        return {
            "denoised": (uncond + self.s0 * (cond - uncond)).float(), "cond": cond.float(),
            "uncond": uncond.float(), "cfg_scale": self.s0, "sigma": sigma.float(), "t": self.t,
            "texts": texts,
        }, asked  # fmt: skip


def embedding(network, metric):
    """x̂0 -> its row, (1, D), written anew and in float64."""
    own = copy.deepcopy(network).double()
    model = Embedder()

    def embed(latent):
        picture = own(latent)
        if metric == "nl2":
            return picture.flatten(1)
        small = torch.nn.functional.avg_pool2d(picture, SIDE // 8)
        small = (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1)
        rows = torch.tanh(small @ model.inner.double()) @ model.outer.double()
        return rows / rows.norm()

    return embed


def ends(metric, matcher):
    """λ_t at t = 1 and t = 0, in the unit of σ_t: half way to the limit of a copy, and the limit."""
    usual, limit = (-2.0, -1.4) if metric == "nl2" else matcher.levels(SIDE)
    return (usual + limit) / 2, limit


@pytest.mark.parametrize("s0", [7.5, 4.0])
@pytest.mark.parametrize("metric", ["nl2", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_papers_epsilon(matchers, network, stored, kind, metric, s0):
    matcher, embed = matchers[metric], embedding(network, metric)
    rows = matcher.searcher.rows(torch.arange(PICTURES), SIDE).double()
    first, last = ends(metric, matcher)
    order = [int(matcher.index.caption(i)) for i in range(PICTURES)]
    gates, longest = [], {"spe": 0.0, "dup": 0.0, "sim": 0.0}
    for number, t in enumerate(TIMES):
        scene = Scene(kind, t, stored, s0, seed=number)
        given, asked = scene.for_the_guard()
        run = SamplingRun(matcher, presets.settings("paper", metric))
        out = run.step(**given)
        record = run.records[0]
        threshold = last - (last - first) * t * t  # a parabola
        x, alpha = scene.x / (scene.a**2 + scene.b**2).sqrt(), scene.alpha
        e_u, e_c = (scene.eps_of(scene.parts[name]) for name in "uc")
        for i in range(3):
            one = slice(i, i + 1)
            eps, value, n0, terms = the_papers_epsilon(
                x[one], e_u[one], e_c[one], lambda row, i=i, scene=scene: scene.captioned(i, order[row]),
                alpha, s0, threshold, rows, embed, metric,
            )  # fmt: skip
            expected = (x[one] - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
            assert record.similarity[i] == pytest.approx(value, abs=2e-5)
            assert record.neighbor[i] == n0
            assert record.active[i] == (terms is not None) == bool(asked and asked[0][i])
            gates.append(record.active[i])
            if terms is None:
                assert torch.equal(out[i], given["denoised"][i])
                continue
            moved = (out[one] - given["denoised"][one]).double()
            change = expected - given["denoised"][one]
            assert (moved - change).norm() < 1e-3 * change.norm()
            for name, term in zip(longest, terms, strict=True):
                longest[name] = max(longest[name], float(term.norm() / eps.norm()))
    assert any(gates) and not all(gates)
    assert min(longest.values()) > 1e-3  # every term acts


def test_a_step_is_one_evaluation_of_the_paper(matchers, stored):
    """D_n is that of this step, and no sample counts as active because it was so before."""
    settings = presets.settings("paper", "nl2", dissimilarity=0)
    run = SamplingRun(matchers["nl2"], settings)
    for seed in range(3):
        given, asked = Scene("eps", 0.5, stored, 7.5, seed).for_the_guard()
        alone = SamplingRun(matchers["nl2"], settings).step(**given)
        asked.clear()
        assert torch.equal(run.step(**given), alone) and len(asked) == 1


def test_the_constants_leave_room_for_the_caption():
    """s2 is above 0 for every σ_t, and at least half of the budget at cfg 4."""
    ways = presets.settings("paper", "cosine").guidance
    spe = next(way for way in ways if isinstance(way, Despecification))
    dup = next(way for way in ways if isinstance(way, Deduplication))
    assert spe.c1 + dup.c2 == 7.5 - 1 and spe.c1 == (4 - 1) / 2


# ------------------------------------------------------------------ bounds


def length(delta):
    return delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("name", "form"), [("paper", None), ("reference", None), ("main", "gradient")]
)
def test_eq_17_is_bounded_at_every_time(matchers, stored, name, form):
    """On flow models, σ = t: the change is at most FARTHEST·‖D_c − D_u‖, at t = 1 too."""
    matcher = matchers["nl2"]
    settings = presets.settings(
        name, "nl2", form=form, exit=0, despecification=0, deduplication=0,
        schedule=Schedule("constant", -9.0, -9.0),
    )  # fmt: skip
    reached = []
    for t in (1.0, 0.9999, *TIMES, 0.0):
        given, _ = Scene("flow", min(max(t, 1e-3), 0.9), stored, 7.5).for_the_guard()
        sigma, time = noise_level(torch.full((3,), t), None)
        given |= {"sigma": sigma, "t": time}
        most = FARTHEST * length(given["cond"] - given["uncond"])
        moved = length(SamplingRun(matcher, settings).step(**given) - given["denoised"])
        assert (moved <= 1.001 * most).all() and torch.isfinite(moved).all()
        reached.append(float((moved / most).max()))
        flat = given["denoised"] - given["denoised"].mean(dim=(2, 3), keepdim=True)
        for other in ({"uncond": None}, {"uncond": given["cond"]}):  # cfg 1, and no prompt
            alone = SamplingRun(matcher, settings).step(**given | other) - given["denoised"]
            assert (length(alone) <= 1.001 * FARTHEST_ALONE * length(flat)).all()
            assert time < 0.5 or (length(alone) > 0).any()
    assert max(reached) == pytest.approx(1, abs=1e-3) and min(reached) < 0.5


@pytest.mark.parametrize("metric", ["nl2", "cosine"])
def test_guidance_is_bounded_by_the_scale(matchers, stored, metric):
    given, _ = Scene("eps", 0.5, stored, 7.5).for_the_guard()
    for name in ("paper", "reference"):
        for strength in (1.0, 3.0):
            settings = presets.settings(
                name, metric, despecification=strength, deduplication=0, dissimilarity=0
            )
            moved = SamplingRun(matchers[metric], settings).step(**given) - given["denoised"]
            most = 6.5 * length(given["cond"] - given["uncond"])
            assert (length(moved) <= 1.001 * most).all() and length(moved).max() > 0


# ------------------------------------------------------------------ the neighbour's caption


def test_a_model_call_is_saved_where_s2_is_0(matchers, stored):
    """At cfg 1.5 despecification spends the whole budget of a copy, so no caption is drawn."""
    given, asked = Scene("eps", 0.5, stored, 1.5).for_the_guard()
    run = SamplingRun(matchers["nl2"], presets.settings("paper", "nl2"))
    run.step(**given)
    assert run.records[0].active[0] and "despecification" in run.records[0].moved
    assert asked == [] and "deduplication" not in run.records[0].moved
    off = presets.settings("paper", "nl2", despecification=0)
    SamplingRun(matchers["nl2"], off).step(**given)
    assert len(asked) == 1


def test_only_samples_with_s2_above_0_are_asked_for(matchers, stored):
    """reference: s2 is 0 where 13·σ_t is above s0 − 1. There is none for the copy, one for the other."""
    matcher = matchers["cosine"]
    settings = presets.settings("reference", "cosine", schedule=Schedule("constant", -9, -9))
    given, asked = Scene("eps", 0.5, stored, 7.5).for_the_guard()
    run = SamplingRun(matcher, settings)
    run.step(**given)
    spent = [13 * value >= 6.5 for value in run.records[0].similarity]
    assert spent[0] and not all(spent)
    assert [not text for text in asked[0]] == spent


# ------------------------------------------------------------------ the authors' code


def test_reference_by_hand(matchers, stored):
    """Despecification wherever the cosine is above 0; c2 = (6.5 − s1)/.3; Eq. 17 with K at the new D."""
    matcher = matchers["cosine"]
    settings = presets.settings("reference", "cosine")
    assert settings.own_units and settings.as_published
    inactive = presets.settings("reference", "cosine", dissimilarity=0)
    seen = set()
    for number, t in enumerate(TIMES):
        given, _ = Scene("eps", t, stored, 7.5, seed=number).for_the_guard()
        run = SamplingRun(matcher, inactive)
        out = run.step(**given)
        limit = 0.3 + 0.1 * math.exp(-5 * t)
        for i, value in enumerate(run.records[0].similarity):
            s1 = min(max(13 * value, 0), 6.5)
            s2 = min(max((6.5 - s1) / 0.3 * value, 0), 6.5 - s1) if value > limit else 0.0
            d, c, u = (given[name][i].double() for name in ("denoised", "cond", "uncond"))
            expected = d - s1 * (c - u)
            if s2:
                row = run.records[0].neighbor[i]
                n = given["texts"].neighbor([matcher.index.caption(row)] * 3)[i].double()
                expected = expected - s2 * (n - u)
            assert torch.allclose(out[i].double(), expected, atol=2e-4)
            seen.add((value > limit, s2 > 0))
        whole = SamplingRun(matcher, settings)
        full = whole.step(**given)
        again = matcher.match_as_published(out)
        for i, active in enumerate(run.records[0].active):
            value = float(again.similarity[i])
            if not active or value <= limit:
                assert torch.equal(full[i], out[i])
                continue
            with torch.enable_grad():
                gradient, _ = matcher.gradient_as_published(out[i : i + 1], again[i])
            k = 100 * (value - 0.3) * math.exp((1 - t) / 0.17) * float(given["sigma"][0]) ** 2
            most = FARTHEST * length(given["cond"] - given["uncond"])[i]
            move = -gradient[0] * min(k, float(most / gradient.norm()))
            assert torch.allclose(full[i] - out[i], move, atol=2e-3 * float(move.norm()))
            seen.add("moved")
    assert {(True, False), (False, False), "moved"} <= seen


def test_the_authors_deduplication_goes_on_for_ten_steps(matchers, stored):
    matcher = matchers["cosine"]
    run = SamplingRun(matcher, presets.settings("reference", "cosine", despecification=0))
    near, _ = Scene("eps", 0.02, stored, 7.5).for_the_guard()
    run.step(**near)
    given, asked = dict(near), []
    for name in ("denoised", "cond", "uncond"):
        given[name] = near[name][[2, 2, 2]]  # something new
    given["texts"] = SimpleNamespace(
        captions=True, neighbor=lambda texts: asked.append(texts) or given["uncond"]
    )
    for _ in range(12):
        run.step(**given)
    assert run.records[0].active[0] and not any(r.active[0] for r in run.records[1:])
    assert len(asked) == 10 and all(texts[0] for texts in asked)


def test_custom_thresholds_are_likenesses(stored, matchers):
    """Also with reference, whose own thresholds are cosines."""
    custom = presets.settings("reference", "cosine", schedule=Schedule("constant", 0.4, 0.4))
    assert not custom.own_units


@pytest.mark.parametrize("metric", ["nl2", "cosine"])
def test_eq_17_lowers_the_papers_similarity(matchers, stored, metric):
    """A small step along it does, by as much as the gradient says."""
    matcher = matchers[metric]
    given, _ = Scene("eps", 0.3, stored, 7.5).for_the_guard()
    settings = presets.settings(metric=metric, preset="paper", despecification=0, deduplication=0)
    run = SamplingRun(matcher, settings.tuned(Dissimilarity, c3=0.05))
    out = run.step(**given)
    before = matcher.match_as_published(given["denoised"]).similarity
    after = matcher.match_as_published(out).similarity
    for i, active in enumerate(run.records[0].active):
        if active:
            match = matcher.match_as_published(given["denoised"])[i]
            with torch.enable_grad():
                gradient, _ = matcher.gradient_as_published(given["denoised"][i : i + 1], match)
            moved = out[i : i + 1] - given["denoised"][i : i + 1]
            foreseen = float((gradient * moved).sum())
            assert foreseen < 0 and float(after[i] - before[i]) == pytest.approx(
                foreseen, rel=0.25, abs=1e-4
            )


def test_one_kind_is_known_while_these_tests_run(matchers):
    assert isinstance(registry.of(Embedder().spec), Kind)
