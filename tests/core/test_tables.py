"""The paper's tables: grades against brute force, intervals, prompt baselines, a training step."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from amg_core import presets
from amg_core.decoders import LinearDecoder
from amg_core.descriptors import create
from amg_core.descriptors.latent import LatentDescriptor
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.limits import COPY
from amg_core.similarity.matcher import Matcher
from amg_demo import model as demo
from amg_demo.sample import sample as demo_sample
from amg_demo.sheet import to_image
from benchmarks.tables import grade, methods, models, report, train
from benchmarks.tables.domains import Domain

N = 60


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Domain:
    """A "model" that always answers with the training picture of its caption."""
    folder = tmp_path_factory.mktemp("tables")
    generator = torch.Generator().manual_seed(3)
    pictures = F.interpolate(torch.rand(N, 3, 6, 6, generator=generator), size=32, mode="bicubic")
    pictures = (pictures.clamp(0, 1) * 255).byte().float() / 255
    (folder / "pictures").mkdir()
    for i, picture in enumerate(pictures):
        to_image(picture).save(folder / "pictures" / f"{i:02d}.png")
    decoder = LinearDecoder(torch.eye(3) * 2 / models.SPREAD)
    latent = LatentDescriptor(
        lambda p: F.avg_pool2d(p, 2), "toy", "0" * 64, 3, side=32, scales=(8, 16)
    )
    matchers = {}
    for name, descriptor in {"pixel": create("pixel"), "latent": latent}.items():
        build(folder / "pictures", folder / name, descriptor)
        searcher = Searcher(Index.open(folder / name))
        matchers[name] = Matcher(searcher, descriptor, decoder if name == "pixel" else None)
    captions = [f"s{i}" for i in range(N)]

    def encode(texts):
        return torch.tensor([float(t[1:]) if t[1:].isdigit() else -1.0 for t in texts])[:, None]

    def denoise(x, sigma, context):
        known = context[:, 0].round().long().clamp(-1, N - 1)
        return torch.where(
            (known >= 0)[:, None, None, None], models.to_space(pictures)[known], 0 * x
        )

    return Domain(
        "toy", denoise, encode, models.noise_sigmas(), (3, 32, 32),
        lambda x: models.to_pictures(x).clamp(0, 1), 1.01,
        train.TrainingSet(pictures, captions, torch.ones(N, dtype=torch.long)), matchers,
        lambda p: {"features": F.adaptive_avg_pool2d(p, 4).flatten(1), "subject": p.mean((2, 3))},
        captions[:3], captions[:3], captions[3:5], eye="pixel",
    )  # fmt: skip


def graded(domain, pictures, sscd=None):
    judges = grade.Judges(domain, sscd)
    captions = ["s0", "s1", "s2"]
    own = grade.Own(torch.tensor([0, 1, 2]), torch.tensor([True, True, False]))
    return judges, judges.grade(pictures, captions, own, pictures)


def test_nl2_and_correlation_against_brute_force(domain):
    pictures = (domain.data.pictures[:3] * 0.8 + 0.2 * torch.rand(3, 3, 32, 32)).clamp(0, 1)
    judges, grades = graded(domain, pictures)
    distances = torch.cdist(pictures.flatten(1), judges.training.flatten(1)).sort(dim=1).values
    wanted = distances[:, 0] / (0.5 * distances[:, :50].mean(dim=1))
    assert torch.allclose(grades.nl2, wanted, atol=2e-3)
    for i in range(3):
        grey = (pictures[i] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        other = (judges.training[i] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        small = [F.avg_pool2d(p[None, None], 2).flatten().numpy() for p in (grey, other)]
        assert abs(float(grades.zncc_own[i]) - np.corrcoef(*small)[0, 1]) < 1e-3


def test_sscd_columns_are_the_largest_cosine_or_not_measured(domain):
    def embed(pictures):
        return F.normalize(F.adaptive_avg_pool2d(pictures, 4).flatten(1) - 0.5, dim=1)

    pictures = domain.data.pictures[[5, 1, 7]]
    judges, grades = graded(domain, pictures, embed)
    cosine = embed(pictures) @ embed(judges.training).T
    assert torch.allclose(grades.sscd, cosine.amax(dim=1)) and grades.sscd.min() > 0.999
    assert torch.allclose(grades.sscd_own, cosine[range(3), [0, 1, 2]])
    row = report.Row(methods.Method("x"), methods.Drawings(pictures), grades, torch.zeros(3))
    cells = report.paper_columns(row, row.group == 0, judges.real)
    assert cells["SSCD % > 0.5"][0] == 100
    grades = graded(domain, pictures)[1]
    row = report.Row(methods.Method("x"), methods.Drawings(pictures), grades, torch.zeros(3))
    cells = report.paper_columns(row, row.group == 0, judges.real)
    assert "not measured" in report.markdown({"x": cells})


def test_every_view_of_a_copy_is_a_copy_and_noise_is_none(domain):
    copies = domain.data.pictures[:3]
    assert grade.on_views(domain.matchers["pixel"], copies).min() > COPY
    for name, view in grade.views(copies).items():
        assert view.shape[:2] == copies.shape[:2] and view.min() >= 0 and view.max() <= 1, name
    assert grade.on_views(domain.matchers["pixel"], torch.rand(3, 3, 32, 32)).max() < COPY


def test_fooled_is_clean_to_the_guard_and_a_copy_to_another():
    values = torch.tensor([0.1, 0.1, 0.1, 0.9])
    correlation = torch.tensor([0.9, 0.1, 0.1, 0.9])
    other = torch.tensor([0.0, 0.9, 0.0, 0.9])
    none = torch.zeros(4)
    grades = grade.Grades(
        none, values, none, other, none, correlation, none + 0.8, None, None, none, none, none
    )
    assert grade.fooled(grades).tolist() == [True, True, False, False]
    assert grade.unseen(grades).tolist() == [True, True, False, True]


def test_a_likeness_counts_as_of_a_pair_only_where_the_twin_copied_that_picture(domain):
    judges = grade.Judges(domain)
    own = judges.own(torch.cat([domain.data.pictures[4:5], torch.rand(1, 3, 32, 32)]), ["", ""])
    assert own.ids[0] == 4 and own.known.tolist() == [True, False]
    pictures = domain.data.pictures[:2]
    grades = judges.grade(pictures, ["s0", "s1"], own, pictures)
    assert grades.zncc_limit.tolist() == pytest.approx([judges.own_limit, judges.limit])


def test_the_limit_for_one_given_picture_is_that_of_pairs():
    pictures = torch.rand(12, 3, 16, 16)
    limit = grade.pair_limit(pictures, 0.9)
    grey = (pictures * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    values = [
        max(
            np.corrcoef(grey[i].flatten(), grey[j].flatten())[0, 1],
            np.corrcoef(grey[i].flatten(), grey[j].flip(-1).flatten())[0, 1],
        )
        for i in range(12) for j in range(12) if i != j
    ]  # fmt: skip
    assert abs(limit - np.quantile(values, 0.9)) < 1e-4


def test_paired_intervals_hold_the_truth_and_repeat():
    rng = np.random.default_rng(0)
    common = rng.normal(size=200) * 10
    a, b = common + 1 + rng.normal(size=200) * 0.1, common + rng.normal(size=200) * 0.1
    value, low, high = grade.paired_difference(a, b)
    assert low < 1 < high and high - low < 0.1 and low < value < high
    assert grade.paired_difference(a, b) == (value, low, high)
    assert grade.paired_difference(b, a)[0] == -value


def test_kid_interval_holds_zero_for_one_distribution_only():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 8, generator=generator), torch.randn(300, 8, generator=generator)
    _, low, high = grade.kid_interval(a, b)
    assert low < 0 < high
    assert grade.kid_interval(a + 1, b)[1] > 0


def test_prompt_baselines_add_four_words_and_keep_the_others():
    rng = np.random.default_rng(0)
    for change in (methods.random_token, methods.repeated_word, methods.random_number):
        (text,) = change(["fox face on red dots"], ["owl", "on"], rng)
        words = text.split()
        assert len(words) == 9 and set("fox face on red dots".split()) <= set(words)
    assert set(methods.repeated_word(["a b"], [], rng)[0].split()) == {"a", "b"}


def test_a_methods_draw_depends_on_its_seed_only(domain):
    noisy = methods.Method("GNI", noise=0.1)
    both = methods.contexts(domain, noisy, ["s0", "s1"], [5, 6])
    assert not torch.equal(both, domain.encode(["s0", "s1"]))
    assert torch.equal(methods.contexts(domain, noisy, ["s0", "s1"], [5, 6]), both)
    worded = methods.Method("RT", words=methods.random_number)
    alone = methods.contexts(domain, worded, ["s1"], [6])
    assert torch.equal(methods.contexts(domain, worded, ["s0", "s1"], [5, 6])[1:], alone)


def test_plain_drawing_copies_and_the_guard_acts_only_there(domain):
    captions, seeds = ["s0", "s1", "nothing"], [1, 2, 3]
    plain = methods.draw(domain, methods.Method("plain"), captions, seeds, 4)
    assert torch.allclose(plain.pictures[:2], domain.data.pictures[:2], atol=0.2)
    main = methods.Method("main", partial(presets.settings, "main"))
    guarded = methods.draw(domain, main, captions, seeds, 4)
    assert guarded.acted == [True, True, False]
    assert torch.equal(guarded.pictures[2], plain.pictures[2])


def test_the_sampler_is_the_demos_bit_for_bit():
    model = demo.load()
    prompts, seeds = ["fox face on red dots", "crab on blue rays"], [11, 12]
    stand_in = Domain(
        "demo", model.denoise, lambda c: model.text(model.text.tokenize(c)), model.sigmas,
        (4, 16, 16), lambda x: model.decoder(x).clamp(0, 1), 4.0, None, {}, None, [], [],
    )  # fmt: skip
    context = stand_in.encode(prompts)
    latents = methods.sample(stand_in, context, prompts, seeds, 3, None)
    wanted = demo_sample(model, prompts, seeds, steps=3)
    with torch.inference_mode():
        assert torch.equal(stand_in.decode(latents), wanted)


def test_training_learns_and_a_saved_model_answers_the_same(domain, tmp_path):
    recipe = train.TrainingRecipe(steps=8, batch=4, width=16, deep=16)
    data = train.TrainingSet(domain.data.pictures[:8], ["a", "b"] * 4, torch.tensor([2] + [1] * 7))
    model = train.obtain(recipe, tmp_path, data, lambda _: None)
    again = train.obtain(recipe, tmp_path, data, lambda _: pytest.fail("trained twice"))
    x, sigma = torch.randn(2, 3, 32, 32), torch.tensor([1.0, 3.0])
    context = model.context(torch.tensor([0, 0]))
    assert torch.equal(model.denoise(x, sigma, context), again.denoise(x, sigma, context))
    batches = train.batches_of(recipe, data, model.sigmas, torch.Generator().manual_seed(1))
    fresh = models.PixelModel(model.classes, 16, 16)
    batch = next(batches)
    with torch.no_grad():
        assert train.loss_of(model, batch) < train.loss_of(fresh, batch)
    assert recipe.file != train.TrainingRecipe(steps=9, batch=4, width=16, deep=16).file
