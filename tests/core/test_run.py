"""The guard on an index of real files with a decoder that is the identity: promises and equations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image

from amg_core import images, presets
from amg_core.descriptors.pixel import PixelDescriptor
from amg_core.errors import AMGError
from amg_core.guidance import Projection, PromptReduction, reduction
from amg_core.guidance import base as ways
from amg_core.guidance.reference import reference_c3
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.index.sources import Pictures
from amg_core.run import SamplingRun, Settings
from amg_core.schedule import Schedule
from amg_core.similarity import metrics
from amg_core.similarity.matcher import Matcher

SIDE = 32


class Identity:
    """Three-channel latents are pictures."""

    name, channels = "identity", 3

    def __call__(self, latent, at_least=None):
        return latent

    def to(self, device):
        return self


def smooth(generator, count):
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pictures = smooth(torch.Generator().manual_seed(0), 64)
    for i, picture in enumerate(pictures):
        array = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(array).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"caption {i}")
    descriptor = PixelDescriptor()
    build(folder, folder / "index", descriptor)
    return Matcher(Searcher(Index.open(folder / "index")), descriptor, Identity())


@pytest.fixture(scope="module")
def scene(matcher):
    """D, D_c, D_u of four samples; the first two are copies of rows 3 and 10."""
    generator = torch.Generator().manual_seed(1)
    strangers = smooth(generator, 4)
    rows = matcher.searcher.rows(torch.tensor([3, 10]), 32).reshape(2, 3, SIDE, SIDE)
    cond = torch.cat([rows, strangers[2:]])
    uncond = strangers.flip(0)
    denoised = uncond + 3.0 * (cond - uncond)
    return {"denoised": denoised, "cond": cond, "uncond": uncond}


def run(sampling, scene, t=0.8, sigma=3.0, **more):
    batch = len(scene["denoised"])
    arguments = {"cfg_scale": 3.0, "sigma": torch.full((batch,), sigma), "t": t} | scene | more
    return sampling.step(**arguments)


def make(name="main", **overrides):
    return presets.settings(name, "nl2", **overrides)


def test_copies_are_found_and_strangers_left_alone(matcher, scene):
    sampling = SamplingRun(matcher, make())
    out = run(sampling, scene)
    record = sampling.records[0]
    assert record.active == [True, True, False, False]
    assert record.neighbor[:2] == [3, 10]
    assert not torch.equal(out[:2], scene["denoised"][:2])
    assert torch.equal(out[2:], scene["denoised"][2:])


@pytest.mark.parametrize("name", presets.PRESETS)
def test_dormant_returns_the_very_tensor(matcher, scene, name):
    settings = make(name, schedule=Schedule("constant", 2.0, 2.0))
    if name == "reference":
        scene = {k: v[2:] for k, v in scene.items()}  # G_spe is outside the gate in their code
        scene["cond"] = scene["uncond"] = torch.rand_like(scene["cond"])
    assert run(SamplingRun(matcher, settings), scene) is scene["denoised"]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_strength_zero_only_watches(matcher, scene, name):
    off = dict.fromkeys(("despecification", "deduplication", "dissimilarity"), 0.0)
    low = Schedule("constant", 0.1, 0.1)  # paper and reference compare D, which overshoots
    sampling = SamplingRun(matcher, make(name, schedule=low, **off))
    assert run(sampling, scene) is scene["denoised"]
    assert sampling.records[0].active[:2] == [True, True]


def in_a_trap(scene):
    """Both D_c and D_u near the stored pictures, none of them to the letter: every way has work to do."""
    stranger = smooth(torch.Generator().manual_seed(7), 4)
    cond, uncond = (part * scene["cond"] + (1 - part) * stranger for part in (0.9, 0.8))
    return {"denoised": uncond + 1.5 * (cond - uncond), "cond": cond, "uncond": uncond}


@pytest.mark.parametrize("slider", ["despecification", "deduplication", "dissimilarity"])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_strength_is_continuous(matcher, scene, name, slider):
    """Up to 1 a strength is the share of the preset's own move: .05 moves a twentieth as far."""
    trapped = in_a_trap(scene)
    prompt, _ = words(*[scene["cond"]] * 3)
    more = {"texts": replace(prompt, neighbor=lambda texts: torch.full_like(scene["cond"], 0.25))}
    off = dict.fromkeys(("despecification", "deduplication", "dissimilarity"), 0.0)

    def moved(strength):
        chosen = make(name, **off | {slider: strength}).tuned(Projection, cap=1e9, iterations=1)
        out = run(SamplingRun(matcher, chosen), trapped, **more)
        return (out - trapped["denoised"])[:2]

    whole = moved(1.0)
    if slider == "deduplication" and name in ("main", "strong", "gentle"):
        pytest.skip("acts only behind prompt reduction: see the next test")
    assert whole.abs().max() > 1e-3
    for share in (0.0, 0.05, 0.5, 0.95):
        assert torch.allclose(moved(share), share * whole, atol=1e-5)


@pytest.mark.parametrize("name", ["main", "strong", "gentle"])
def test_strengths_add_up_where_all_ways_act(matcher, scene, name):
    trapped = in_a_trap(scene)
    prompt, _ = words(*[scene["cond"]] * 3)
    more = {"texts": replace(prompt, neighbor=lambda texts: torch.full_like(scene["cond"], 0.25))}

    def moved(**strengths):
        out = run(SamplingRun(matcher, make(name, **strengths)), trapped, **more)
        return (out - trapped["denoised"])[:2]

    for slider in ("despecification", "deduplication", "dissimilarity"):
        none, half, whole = (moved(**{slider: share}) for share in (1e-6, 0.5, 1.0))
        assert torch.allclose(half, (none + whole) / 2, atol=1e-4)
        assert (whole - none).abs().max() > 1e-3


@pytest.mark.parametrize("name", presets.PRESETS)
def test_permuting_the_batch_permutes_the_result(matcher, scene, name):
    order = torch.tensor([2, 1, 3, 0])
    shuffled = {k: v[order] for k, v in scene.items()}
    first, second = SamplingRun(matcher, make(name)), SamplingRun(matcher, make(name))
    for t in (0.9, 0.6, 0.3, 0.1):
        a, b = run(first, scene, t=t), run(second, shuffled, t=t)
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch(matcher, scene, name):
    together = run(SamplingRun(matcher, make(name)), scene)
    alone = run(SamplingRun(matcher, make(name)), {k: v[:1] for k, v in scene.items()})
    assert torch.equal(together[:1], alone)


def test_who_is_suspicious_is_told_without_a_step(matcher, scene):
    """The copies while nothing was steered; afterwards the samples that leave, wherever they are."""
    sampling, level = SamplingRun(matcher, make()), {"sigma": torch.full((4,), 3.0), "t": 0.8}
    assert sampling.suspicious(scene["cond"], **level).tolist() == [True, True, False, False]
    run(sampling, scene)
    strangers = smooth(torch.Generator().manual_seed(9), 4)
    assert sampling.suspicious(strangers, **level).tolist() == [True, True, False, False]
    assert len(sampling.records) == 1
    off = SamplingRun(matcher, make(despecification=0.0, deduplication=0.0, dissimilarity=0.0))
    late = SamplingRun(matcher, make(start_percent=0.5))
    for quiet in (off, late):
        assert not quiet.suspicious(scene["cond"], **level).any()


def words(*drawn):
    """A prompt of as many tokens as there are predictions after the first, which is for none."""
    asked = []

    def reduced(kept):
        asked.append(kept.sum(dim=1).tolist())
        assert all(row == sorted(row, reverse=True) for row in kept.tolist())  # the first ones
        return torch.stack([drawn[k][i] for i, k in enumerate(asked[-1])])

    return Texts(torch.full((4,), len(drawn) - 1), reduced), asked


def kept_words(sampling):
    return [plan and int(plan.kept[0].sum()) for plan in sampling._memory[0].plans]


@dataclass
class Texts:
    """What a host would give."""

    words: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.long))
    reduced: Callable | None = None
    neighbor: Callable | None = None
    separable: bool = False

    def left_out(self, kept):
        return [f"{int((~row).sum())} words" if self.separable else "" for row in kept]

    @property
    def captions(self):
        return self.neighbor is not None


def test_the_exit_by_hand(matcher, scene):
    """D' = D + s0(D_s − D_c) − r(D_c − D_s)° for active rows, D_s for as many words as are no copy."""
    settings = make(dissimilarity=0, deduplication=0)
    generator = torch.Generator().manual_seed(7)
    none, one, two = (smooth(generator, 4) for _ in range(3))
    d_c, d_u = scene["cond"], scene["uncond"]
    reduced, asked = words(none, one, two, d_c, d_c)
    sampling = SamplingRun(matcher, settings)
    out = run(sampling, scene, texts=reduced)
    assert kept_words(sampling) == [2, 2, None, None]
    assert [row[:2] for row in asked] == [[2, 2], [3, 3], [2, 2]]  # bisection, then the step itself
    pull = d_c - two
    pull = pull - pull.mean(dim=(2, 3), keepdim=True)
    way = settings.guidance[0]
    expected = d_u + 3.0 * (two - d_u) - way.first * pull
    assert torch.allclose(out[:2], expected[:2], atol=1e-5)
    assert torch.equal(out[2:], scene["denoised"][2:])
    run(sampling, scene, sigma=3.0 * math.exp(-0.25), texts=reduced)  # one stride
    assert sampling._memory[0].away[:2].tolist() == pytest.approx([way.first * way.growth] * 2)
    run(sampling, scene, sigma=1.0, texts=reduced)
    assert sampling._memory[0].away[:2].tolist() == [way.most] * 2
    assert sampling._memory[0].away[2:].tolist() == [way.first] * 2
    assert sampling.acted_on(0) == {3} and sampling.acted_on(2) == set()


def test_at_cfg_1_the_reduced_prompt_is_drawn(matcher, scene):
    """There is no D_u: D' = D_s − r(D_c − D_s)°, and where all words draw it, D_s is for no words."""
    settings = make(dissimilarity=0, deduplication=0)
    generator = torch.Generator().manual_seed(7)
    none, one, two = (smooth(generator, 4) for _ in range(3))
    d_c, r = scene["cond"], settings.guidance[0].first
    alone = scene | {"uncond": None, "denoised": d_c, "cfg_scale": 1.0}
    for drawn, base in (((none, one, two, d_c, d_c), two), ((none, d_c, d_c), none)):
        out = run(SamplingRun(matcher, settings), alone, texts=words(*drawn)[0])
        pull = d_c - base
        expected = base - r * (pull - pull.mean(dim=(2, 3), keepdim=True))
        assert torch.allclose(out[:2], expected[:2], atol=1e-5)
        assert torch.equal(out[2:], d_c[2:])
    still = run(SamplingRun(matcher, settings), alone)
    assert still is d_c  # without other words there is nothing to do


def test_where_the_words_lead_back_one_more_is_left_out(matcher, scene):
    sampling = SamplingRun(matcher, make(dissimilarity=0, deduplication=0))
    generator = torch.Generator().manual_seed(7)
    none, one, two = (smooth(generator, 4) for _ in range(3))
    run(sampling, scene, texts=words(none, one, two, scene["cond"])[0])
    assert kept_words(sampling)[:2] == [2, 2]
    back = words(none, one, scene["cond"], scene["cond"])[0]
    out = run(sampling, scene, sigma=3.0 * math.exp(-0.25), texts=back)
    assert kept_words(sampling)[:2] == [1, 1]
    pull = scene["cond"] - one
    pull = (pull - pull.mean(dim=(2, 3), keepdim=True)) * 1.5
    expected = scene["uncond"] + 3.0 * (one - scene["uncond"]) - pull
    assert torch.allclose(out[:2], expected[:2], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_strengths_grow_with_the_noise_level_and_not_with_the_steps(steps):
    """Ten strides, in however many steps, while the picture is too close; nothing is made up for calm."""
    strength, before = torch.tensor([1.0, 1.0]), ways.never(2)
    levels = torch.linspace(0, -2.5, steps + 1).exp() * 14.6
    for level in levels:
        sigma = level.expand(2)
        strength = ways.grown(strength, 1.1, 100.0, before, sigma)
        before = ways.acted_at(torch.tensor([True, False]), sigma)
    assert strength.tolist() == pytest.approx([1.1**10, 1.0], rel=1e-4)
    assert ways.grown(strength, 10.0, 2.0, before, sigma * 0.1).tolist()[0] == 2.0


def test_the_report_has_the_words_that_were_left_out(matcher, scene):
    """Two of three words are the key: each is left out in turn, and only of samples that are steered."""
    other = smooth(torch.Generator().manual_seed(7), 4)

    def reduced(kept):
        return torch.where(kept[:, :2].all(dim=1)[:, None, None, None], scene["cond"], other)

    texts = Texts(torch.full((4,), 3), reduced, separable=True)
    sampling = SamplingRun(matcher, make(dissimilarity=0, deduplication=0))
    run(sampling, scene, texts=texts)
    assert sampling.report()["left_out_words"] == [["1 words", "1 words"]] * 2 + [[], []]
    unknown = SamplingRun(matcher, make(dissimilarity=0, deduplication=0))
    run(unknown, scene, texts=replace(texts, separable=False))
    assert unknown.report()["left_out_words"] == [[]] * 4


def test_where_every_word_is_the_key_no_prompt_stands_in(matcher, scene):
    settings = make(dissimilarity=0, deduplication=0)
    out = run(SamplingRun(matcher, settings), scene, texts=words(*[scene["cond"]] * 3)[0])
    d_u, d_c = scene["uncond"], scene["cond"]
    away = reduction.away(d_c, d_u, torch.full((4,), settings.guidance[0].first))
    assert torch.allclose(out[:2], (d_u + away)[:2], atol=1e-5)


def test_where_no_prompt_is_a_copy_too_it_leaves_the_picture_and_its_caption(matcher, scene):
    asked = []

    def neighbor(texts):
        asked.append(texts)
        return torch.full_like(scene["cond"], 0.25)

    trapped = scene | {"uncond": scene["cond"] * 0.9 + 0.05}
    reduced, _ = words(*[scene["cond"]] * 3)
    sampling = SamplingRun(matcher, make())
    run(sampling, trapped, texts=replace(reduced, neighbor=neighbor))
    assert asked == [["caption 3", "caption 10", "", ""]]
    moved = sampling.records[0].moved
    assert set(moved) == {"despecification", "away", "deduplication", "repulsion"}
    assert all(v > 0 for v in moved["repulsion"][:2]) and moved["repulsion"][2:] == [0, 0]
    assert [sampling.repelled(i) for i in range(4)] == [True, True, False, False]
    assert sampling.drawn(scene["cond"]).repelled == [True, True, False, False]


def test_a_memorised_prompt_stays_reduced_as_long_as_set(matcher, scene):
    settings = make(dissimilarity=0, deduplication=0).tuned(PromptReduction, until=0.3)
    settings = replace(settings, release=0.2)
    sampling = SamplingRun(matcher, settings)
    reduced, _ = words(*[scene["cond"]] * 2)  # not even one word: D_u stands in
    run(sampling, scene, texts=reduced)
    calm = scene | {
        "cond": smooth(torch.Generator().manual_seed(9), 4)
    }  # nothing is close any more
    calm["denoised"] = calm["uncond"] + 3.0 * (calm["cond"] - calm["uncond"])
    early = run(sampling, calm, t=0.7, texts=reduced)
    assert torch.allclose(early[:2], calm["uncond"][:2], atol=1e-5)  # no prompt, no push
    assert torch.equal(early[2:], calm["denoised"][2:])
    late = run(sampling, calm, t=0.28, texts=reduced)
    assert late is calm["denoised"]  # plain guidance under watch


def test_towards_is_the_neighbour_without_its_colour(matcher, scene):
    """The decoder is the identity: the direction is the low-passed picture itself."""
    match = matcher.match(scene["cond"], 3.0)
    row = matcher.searcher.rows(torch.tensor([3]), 32).reshape(1, 3, SIDE, SIDE)
    small = torch.nn.functional.adaptive_avg_pool2d(row, match.scale)
    small = small - small.mean(dim=(2, 3), keepdim=True)
    expected = small.repeat_interleave(SIDE // match.scale, 2)
    expected = expected.repeat_interleave(SIDE // match.scale, 3)
    direction, share = matcher.towards(scene["cond"][:1], match[0])
    assert float(direction.norm()) == pytest.approx(1)
    assert float((direction * expected).sum() / expected.norm()) > 0.99  # thumbnails are lossy
    assert share == pytest.approx(1, abs=0.03)
    half = scene["cond"][:1] * 0.5 + 0.2
    assert matcher.towards(half, match[0])[1] == pytest.approx(0.5, abs=0.03)


def test_the_repulsion_by_hand(matcher, scene):
    """−r·a·‖D°‖·n, doubling with every stride of log σ, and nothing near the end."""
    sampling = SamplingRun(matcher, make(deduplication=0))
    near = {"denoised": scene["cond"], "cond": scene["cond"], "uncond": None}
    match = matcher.match(scene["cond"], 3.0)
    direction, share = matcher.towards(scene["cond"][:1], match[0])
    d = scene["cond"][:1]
    length = (d - d.mean(dim=(2, 3), keepdim=True)).norm() * share
    for stride, strength in enumerate((3.0, 6.0, 9.0, 9.0)):
        out = run(sampling, near, sigma=3.0 * math.exp(-0.25 * stride), cfg_scale=1.0)
        assert torch.allclose(out[:1], d - strength * length * direction, atol=1e-4)
        assert torch.equal(out[2:], scene["cond"][2:])
    assert run(sampling, near, cfg_scale=1.0, t=0.05) is near["denoised"]


def test_the_papers_terms_by_hand(matcher, scene):
    settings = make("paper", dissimilarity=0)
    captions = []

    def neighbor(texts):
        captions.extend(texts)
        return torch.full_like(scene["cond"], 0.25)

    sampling = SamplingRun(matcher, settings)
    out = run(sampling, scene, texts=Texts(neighbor=neighbor))
    close = 1 + torch.tensor(sampling.records[0].similarity)[:2] / 2  # 1 − nL2/2
    s1 = (1.5 * close).clamp(0, 2)
    s2 = torch.minimum(5.0 * close, 2 - s1)
    d, d_c, d_u = (scene[k][:2] for k in ("denoised", "cond", "uncond"))
    w = [s[:, None, None, None] for s in (s1, s2)]
    expected = d - w[0] * (d_c - d_u) - w[1] * (0.25 - d_u)
    assert torch.allclose(out[:2], expected, atol=1e-5)
    assert captions == ["caption 3", "caption 10", "", ""]


def test_without_unconditional_prediction_only_dissimilarity_acts(matcher, scene):
    alone = {"denoised": scene["cond"], "cond": scene["cond"], "uncond": None}
    sampling = SamplingRun(matcher, make())
    out = run(sampling, alone, cfg_scale=1.0, t=0.5)
    assert set(sampling.records[0].moved) == {"repulsion"}
    assert matcher.match(out, 3.0).score[:2].max() < 0.2
    assert torch.equal(out[2:], scene["cond"][2:])


def test_the_projection_by_itself(matcher, scene):
    near = (
        0.9 * scene["cond"] + 0.1 * scene["uncond"]
    )  # a copy to the letter has no direction to go
    sampling = SamplingRun(matcher, make(form="projection"))
    out = run(
        sampling, {"denoised": near, "cond": near, "uncond": None}, cfg_scale=1.0, t=0.5, sigma=0.1
    )
    assert set(sampling.records[0].moved) == {"dissimilarity"}
    before, after = (matcher.match(x, 0.1).similarity for x in (near, out))
    assert (after[:2] < before[:2] - 0.05).all() and torch.equal(out[2:], near[2:])


def test_gradient_against_finite_differences(matcher):
    generator = torch.Generator().manual_seed(3)
    base = matcher.searcher.rows(torch.tensor([5]), 32).reshape(1, 3, SIDE, SIDE)
    latent = (0.7 * base + 0.3 * smooth(generator, 1)).clamp(0.05, 0.95)
    match = matcher.match(latent, 0.1)
    assert match.ids.item() == 5 and match.scale == 32
    gradient, _ = matcher.gradient(latent, match)
    assert gradient.mean(dim=(2, 3)).abs().max() < 1e-6
    direction = images.without_brightness_and_contrast(torch.randn_like(latent), latent)

    def value(x):
        query = matcher.descriptor.embed(x, 32).double()
        row = matcher.searcher.rows(torch.tensor([5]), 32).double()
        return metrics.similarity("nl2", query, row, match.spread.double()).item()

    step = 1e-4
    numeric = (value(latent + step * direction) - value(latent - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=0.03)


def test_a_darker_flatter_copy_is_still_a_copy(matcher):
    picture = matcher.searcher.rows(torch.tensor([20]), 32).reshape(1, 3, SIDE, SIDE)
    match = matcher.match_pictures((picture - 0.5) * 0.6 + 0.4)
    assert match.ids.item() == 20 and match.score.item() > 0.9


def test_a_mirrored_copy_is_found(matcher):
    picture = matcher.searcher.rows(torch.tensor([20]), 32).reshape(1, 3, SIDE, SIDE)
    match = matcher.match_pictures(picture.flip(-1))
    assert match.ids.item() == 20 and match.mirrored.item() and match.score.item() > 0.99


def test_similarity_of_pixels_against_brute_force(matcher):
    """−nL2 after the best gain and offset, in units of the neighbour's own structure."""
    picture = smooth(torch.Generator().manual_seed(21), 1)
    match = matcher.match_pictures(picture)
    best = -2.0
    for view in (picture, picture.flip(-1)):
        for i in range(64):
            row = matcher.searcher.rows(torch.tensor([i]), 32).reshape(3, -1)
            query = view.reshape(3, -1)
            error = 0.0
            for q, n in zip(query, row, strict=True):
                gain = ((q - q.mean()) @ (n - n.mean()) / (q - q.mean()).square().sum()).clamp(
                    0.5, 2
                )
                shift = (n.mean() - q.mean()).clamp(-0.25, 0.25)
                error += (((q - q.mean()) * gain + q.mean() + shift - n) ** 2).sum()
            structure = (row - row.mean(dim=1, keepdim=True)).norm()
            best = max(best, float(-(error.sqrt()) / (0.5 * structure)))
    assert match.similarity.item() == pytest.approx(best, abs=1e-4)


def test_nothing_that_an_index_holds_moves_a_limit(matcher, tmp_path):
    """Near-duplicates in an index change neither what counts as a copy nor how close a picture is."""
    rows = matcher.searcher.rows(torch.arange(64), 32).reshape(64, 3, SIDE, SIDE)
    twins = (rows[:32] + 0.01).clamp(0, 1)
    build(
        Pictures(torch.cat([rows, twins]).movedim(1, -1), "", ""),
        tmp_path / "i",
        matcher.descriptor,
    )
    crowded = Matcher(Searcher(Index.open(tmp_path / "i")), matcher.descriptor)
    assert crowded.levels(32) == matcher.levels(32)
    picture = smooth(torch.Generator().manual_seed(22), 2)
    before, after = (each.match_pictures(picture) for each in (matcher, crowded))
    assert torch.equal(before.limit, after.limit)
    assert torch.allclose(before.score, after.score, atol=0.02)


def test_reference_constants():
    """field.md §5: K = 100(σ − .3)e^((1000−t)/170) σ_e² is 12 at t = 1, σ = .5, and 1099 at 601."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    for step, expected in ((601, 1099), (301, 853), (1, 12)):
        sigma2 = ((1 - alphas[step]) / alphas[step]).item()
        c3 = reference_c3(torch.tensor(0.5), step / 1000).item()
        assert c3 * sigma2 == pytest.approx(expected, rel=0.05 if step > 1 else 0.2)


def test_the_window_is_kept(matcher, scene):
    sampling = SamplingRun(matcher, make(start_percent=0.5))
    assert run(sampling, scene, t=0.8) is scene["denoised"] and sampling.records == []
    run(sampling, scene, t=0.4)
    assert len(sampling.records) == 1


def test_no_draw_from_the_global_generator(matcher, scene):
    before = torch.random.get_rng_state()
    run(SamplingRun(matcher, make()), scene)
    assert torch.equal(before, torch.random.get_rng_state())


def test_works_under_inference_mode(matcher, scene):
    expected = run(SamplingRun(matcher, make()), scene)
    with torch.inference_mode():
        inside = {k: v.clone() for k, v in scene.items()}
        out = run(SamplingRun(matcher, make()), inside)
    assert torch.allclose(out, expected, atol=1e-6)


def test_the_report_is_json_and_complete(matcher, scene):
    import json

    from amg_core.messages import words
    from amg_core.plot import curve
    from amg_core.report import step

    sampling = SamplingRun(matcher, make(), expected_steps=2)
    assert words(step(sampling)) == "comparing…"
    for t in (0.9, 0.5):
        run(sampling, scene, t=t)
    report = json.loads(json.dumps(sampling.report()))
    assert report["index"]["hash"] == matcher.searcher.index.hash
    assert report["guarded_evaluations"][2:] == [0, 0]
    assert report["neighbors"]["3"]["caption"] == "caption 3"
    assert len(report["steps"]) == report["evaluations"] == 2
    closest = max(0.0, *sampling.records[-1].score)
    assert words(step(sampling)) == f"step 2/2 · likeness {closest:.2f} · guard active for 2 of 4"
    assert curve(report).size == (640, 360)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"despecification": float("nan")}, "despecification"),
        ({"dissimilarity": -1.0}, "dissimilarity"),
        ({"exit": float("inf")}, "exit"),
        ({"start_percent": 1.5}, "start_percent"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start_percent"),
        ({"form": "cubic"}, "form"),
    ],
)
def test_bad_settings_name_the_widget(arguments, named):
    with pytest.raises(AMGError, match=named):
        make(**arguments)


def test_unknown_preset():
    with pytest.raises(AMGError, match="main"):
        make("mild")


def test_settings_of_a_small_index(tmp_path):
    """Three pictures: a copy is still told from a stranger."""
    pictures = smooth(torch.Generator().manual_seed(5), 3)
    for i, picture in enumerate(pictures):
        array = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    build(tmp_path, tmp_path / "index", PixelDescriptor())
    small = Matcher(Searcher(Index.open(tmp_path / "index")), PixelDescriptor(), Identity())
    stranger = smooth(torch.Generator().manual_seed(6), 1)
    match = small.match_pictures(torch.cat([pictures[1:2], stranger]))
    assert match.score[0] > 0.95 and match.score[1] < 0.2


def test_other_tokens_are_those_of_no_prompt():
    prompt, nothing = torch.ones(2, 4, 2), torch.zeros(2, 4, 2)
    kept = torch.tensor([[False] * 4, [True, False, True, True]])
    assert reduction.without(prompt, nothing, kept)[..., 0].tolist() == [[0] * 4, [1, 0, 1, 1]]


def memorized_by(*keys):
    """A score of prompts of letters: 1 where all letters of a key are kept, else 0."""
    asked = []

    def scored(kept):
        texts = [
            "".join(c for c, k in zip(LETTERS, row, strict=False) if k) for row in kept.tolist()
        ]
        asked.append(texts)
        return torch.tensor([float(any(set(key) <= set(text) for key in keys)) for text in texts])

    return scored, asked


LETTERS = "abcdefgh"


def reduced_prompts(plans):
    return [
        plan
        and ["".join(c for c, k in zip(LETTERS, kept, strict=False) if k) for kept in plan.kept]
        for plan in plans
    ]


def search(scored, count=6, separable=True):
    new = torch.tensor([True, False])
    return reduced_prompts(
        reduction.plans(scored, torch.tensor([count, count]), new, 0.3, separable)
    )


@pytest.mark.parametrize("key", ["af", "bc", "ab", "ef"])
def test_of_two_words_that_make_a_copy_together_each_is_left_out_in_turn(key):
    """Wherever they stand in the prompt, every word is in one of the two reduced prompts."""
    scored, asked = memorized_by(key)
    first, other = search(scored)
    assert other is None
    assert len(first) == 2 and set("".join(first)) == set("abcdef")
    assert {frozenset("abcdef") - set(text) for text in first} == {frozenset(c) for c in key}
    assert len(asked) == 7  # one for each word, and the word that the first one lacks


def test_a_word_that_makes_a_copy_by_itself_is_left_out_of_both():
    scored, _ = memorized_by("d")
    assert search(scored)[0] == ["abcef"]


def test_where_single_words_are_not_enough_more_are_left_out():
    scored, asked = memorized_by("ab", "cd", "ef")
    first, _ = search(scored)
    assert all(scored_one(text) == 0 for text in first)
    assert set("".join(first)) == set("abcdef")
    assert len(asked) <= 4 * 6

    many, _ = memorized_by("a", "b", "c", "d", "e", "f")
    assert search(many)[0] == [""]  # not even one word: no prompt


def scored_one(text):
    return any(set(key) <= set(text) for key in ("ab", "cd", "ef"))


def test_samples_have_prompts_of_their_own_length():
    scored, _ = memorized_by("ab")
    found = reduction.plans(scored, torch.tensor([2, 4]), torch.tensor([True, True]), 0.3, True)
    assert sorted(map(sorted, reduced_prompts(found))) == [["a", "b"], ["acd", "bcd"]]


def test_without_the_text_the_last_words_are_left_out():
    scored, asked = memorized_by("ad")
    first, _ = search(scored, separable=False)
    assert first == ["abc"] and len(asked) <= 3


def test_the_reduced_prompts_are_drawn_in_turn_and_shrink_by_themselves():
    both = (torch.tensor([True, True, False]), torch.tensor([False, True, True]))
    plan = reduction.Plan(both, (2, 0, 1))
    assert plan.now(0) is both[0] and plan.now(1) is both[1] and plan.now(2) is both[0]
    fewer = plan.fewer(1)
    assert [kept.tolist() for kept in fewer.kept] == [[True, True, False], [False, True, False]]
    assert fewer.fewer(1).fewer(1).kept[1].tolist() == [False] * 3
    nothing = reduction.Plan((torch.zeros(3, dtype=torch.bool),), (2, 1, 0))
    assert nothing.fewer(0) is nothing


def test_no_strength_is_off():
    assert Settings(Schedule("constant", 0, 0)).off


def test_the_neighbours_caption_is_voted_for_by_its_duplicates(tmp_path):
    """Files with the same bytes and the same picture in other bytes vote; of a tie its own wins."""
    pictures = smooth(torch.Generator().manual_seed(11), 12)

    def save(name, picture, caption):
        array = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)

    for i, picture in enumerate(pictures):
        save(f"{i:02d}", picture, f"caption {i}")
    save("other-bytes", (pictures[3] + 0.004).clamp(0, 1), "sunset")
    for name in ("same-bytes", "same-bytes-too"):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "03.png").read_bytes())
        (tmp_path / f"{name}.txt").write_text("sunset")
    (tmp_path / "same-again.png").write_bytes((tmp_path / "05.png").read_bytes())
    (tmp_path / "same-again.txt").write_text("other")
    build(tmp_path, tmp_path / "index", PixelDescriptor())
    matcher = Matcher(Searcher(Index.open(tmp_path / "index")), PixelDescriptor(), Identity())
    found = {matcher.searcher.index.source(i): i for i in range(matcher.searcher.index.count)}
    assert sorted(matcher.searcher.index.captions(found["03.png"])) == [
        "caption 3", "sunset", "sunset",
    ]  # fmt: skip
    assert matcher._same_picture(found["03.png"]) == [found["other-bytes.png"]]
    assert matcher.caption(found["03.png"]) == matcher.caption(found["other-bytes.png"]) == "sunset"
    assert matcher.caption(found["05.png"]) == "caption 5"
    assert matcher.caption(found["07.png"]) == "caption 7"


def test_a_neighbours_prediction_serves_two_steps_for_each_sample_by_itself(matcher, scene):
    """While the caption stays; a batch mate that comes later has its own count."""
    asked = []

    def neighbor(texts):
        asked.append(texts)
        return scene["uncond"] + 0.01 * len(asked)

    trapped, new = in_a_trap(scene), smooth(torch.Generator().manual_seed(9), 4)
    late = {name: torch.cat([part[:1], new[1:]]) for name, part in trapped.items()}
    prompt, _ = words(*[scene["cond"]] * 3)
    texts = replace(prompt, neighbor=neighbor)
    sampling = SamplingRun(matcher, make(dissimilarity=0))
    run(sampling, late, texts=texts)
    for _ in range(3):
        run(sampling, trapped, texts=texts)
    first, second = "caption 3", "caption 10"
    assert asked == [
        [first, "", "", ""], ["", second, "", ""], [first, "", "", ""], ["", second, "", ""],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["paper", "reference"])
def test_as_published_it_asks_at_every_step(matcher, scene, name):
    asked = []

    def neighbor(texts):
        asked.append(texts)
        return scene["uncond"]

    sampling = SamplingRun(matcher, make(name, despecification=0))
    for _ in range(3):
        run(sampling, scene | {"denoised": scene["cond"]}, texts=Texts(neighbor=neighbor))
    assert len(asked) == 3
