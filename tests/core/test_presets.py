"""The named settings and the one strength that multiplies them."""

from __future__ import annotations

import math

import pytest

from amg_core import presets
from amg_core.errors import AMGError

TERMS = ("despecification", "deduplication", "dissimilarity")
EVERY = [(preset, metric) for preset in presets.PRESETS for metric in ("nl2", "cosine")]


@pytest.mark.parametrize(("preset", "metric"), EVERY)
def test_strength_1_is_the_preset_and_0_is_off(preset, metric):
    given = dict(zip(TERMS, (0.3, 1.7, 0.1), strict=True))
    assert presets.settings(preset, metric, strength=1.0, **given) == presets.settings(
        preset, metric, **given
    )
    assert presets.settings(preset, metric, strength=0.0).off
    assert not presets.settings(preset, metric, strength=0.05).off


@pytest.mark.parametrize(("preset", "metric"), EVERY)
def test_strength_multiplies_the_three(preset, metric):
    by_hand = presets.settings(preset, metric, despecification=1.5, dissimilarity=0.75)
    assert presets.settings(
        preset, metric, strength=1.5, deduplication=1 / 1.5, dissimilarity=0.5
    ) == presets.settings(preset, metric, despecification=1.5, dissimilarity=0.75)
    assert [way.strength for way in by_hand.guidance] == [1.5, 1.0, 0.75]


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_strength_that_is_none(value):
    with pytest.raises(AMGError, match=r"^strength: "):
        presets.settings("main", "nl2", strength=value)
