"""The figures of `python -m benchmarks.detection` are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amg_demo import model as demo
from amg_demo.__main__ import training_set
from benchmarks.detection import drawing, roc


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 150).round(1)  # rounded: with ties


def test_auc_by_counting(scores):
    positives, negatives = scores
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert roc.auc(positives, negatives) == pytest.approx(wins / 40 / 150)


def test_tpr_never_claims_fewer_alarms_than_there_are(scores):
    positives, negatives = scores
    for allowed in (0.01, 0.05, 0.3):
        best = 0.0
        for threshold in [*positives, *negatives]:
            if (negatives >= threshold).mean() <= allowed:
                best = max(best, (positives >= threshold).mean())
        assert roc.tpr_at(positives, negatives, allowed) == best
    assert roc.tpr_at(np.zeros(3), np.ones(3)) == 0.0


def test_interval_holds_the_figure(scores):
    low, high = roc.interval(roc.auc, *scores)
    assert low < roc.auc(*scores) < high
    assert high - low < 0.25


def test_no_prompt_chooses_for_itself():
    """γ comes from the other half: other values in one half leave the weights of its scores alone."""
    rng = np.random.default_rng(1)
    labels = np.arange(100) < 30
    norm, cosine = rng.normal(size=100) + labels, rng.normal(size=100) + 2 * labels
    first, second = roc.halves(labels)
    assert sorted([*first, *second]) == list(range(100))
    assert labels[first].sum() == labels[second].sum() == 15
    scores, _ = roc.crossed(norm, cosine, labels)
    changed = norm.copy()
    changed[first] = rng.normal(size=len(first))  # what `first` is judged by comes from `second`
    again, _ = roc.crossed(changed, cosine, labels)
    spread = scores[first] - again[first]
    moved = norm[first] - changed[first]
    assert np.corrcoef(spread, moved)[0, 1] > 0.999999  # linear in its own statistic: same weights


def test_explained_variance():
    values = np.array([0.0, 0.0, 4.0, 4.0])
    assert roc.explained(values, ["a", "a", "b", "b"]) == 1.0
    assert roc.explained(values, ["a", "b", "a", "b"]) == 0.0


def test_prompts_do_not_overlap():
    _, captions, copies = training_set(demo.PICTURES)
    prompts = drawing.choose(captions, copies, 40, 30)
    groups = [prompts.memorised, prompts.once, prompts.new, prompts.calibration]
    assert [len(group) for group in groups] == [32, 40, 40, 30]
    assert len(set().union(*map(set, groups))) == sum(map(len, groups))
    assert not set(prompts.new) & set(captions)
    assert set(prompts.once) <= set(captions)


def test_batched_looks_equal_single_ones():
    model = demo.load()
    z = drawing.noises(5, 2)
    texts = [f"penguin on {colour} dots" for colour in ("red", "blue", "green")]
    together = drawing.measure(model, texts, z, 0.041)
    alone = drawing.measure(model, texts[1:2], z, 0.041)[0]
    for one, two in zip(together[1], alone, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    pictures, norms, halfway = drawing.draw(model, texts, z[:1], 3, 4.0)
    assert pictures.shape == halfway.shape == (3, 3, 128, 128)
    assert norms.shape == (3, 3)
    first = drawing.predictions(model, texts, z[:1], drawing.HIGH)
    # The sampler starts at σ·z, a probe looks at z itself: nearly the same at the highest level.
    wanted = torch.stack([(p.cond - p.uncond).flatten().norm() / p.sigma for p in first])
    assert torch.allclose(norms[:, 0], wanted, rtol=0.02)
