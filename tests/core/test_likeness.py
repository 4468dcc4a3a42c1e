"""The one scale on which people read every check, and what is shown of a finished picture on it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amg_core import limits
from amg_core.descriptors import create, registry
from amg_core.images import PARTS, parts, thumbnail
from amg_core.index import Index, build
from amg_core.index.search import Searcher
from amg_core.messages import words
from amg_core.similarity.matcher import COLUMNS, Matcher
from amg_core.similarity.metrics import COPY, likeness
from amg_core.similarity.verdict import BEST, Near, Verdict, message_of, verdict
from tests.index.helpers import demo_pictures

LIMITS = (COPY, limits.REGISTERED, limits.ONE_PICTURE)


@pytest.mark.parametrize("limit", LIMITS)
def test_the_limit_is_always_at_the_same_place(limit):
    assert likeness(limit, limit) == pytest.approx(COPY)
    assert likeness(0.0, limit) == 0
    assert likeness(1.0, limit) == 1
    assert likeness(-3.0, limit) == 0
    assert likeness(limit / 2, limit) == pytest.approx(COPY / 2)


@given(st.floats(-2, 2), st.floats(-2, 2), st.sampled_from(LIMITS))
def test_it_keeps_the_order_and_the_side_of_the_limit(one, other, limit):
    low, high = sorted((one, other))
    assert 0 <= likeness(low, limit) <= likeness(high, limit) <= 1
    if abs(one - limit) > 1e-9:
        assert (one > limit) == (likeness(one, limit) > COPY)


def test_a_score_is_on_it_already():
    assert likeness(0.123) == 0.123


def near(likeness_of: float, zncc: float, **more) -> Verdict:
    made = {
        "similarity": 0.0, "threshold": 0.0, "score": likeness_of, "zncc": zncc,
        "zncc_threshold": limits.REGISTERED, "neighbor": 4, "source": "fox.png", "caption": "",
        "outcome": "no_copy",
    }  # fmt: skip
    return Verdict(**made | more)


@pytest.mark.parametrize(
    ("found", "close"),
    [
        (near(0.1, 0.1), False),
        (near(limits.NEAR, 0.1), False),
        (near(0.39, 0.1), True),
        (near(0.1, 0.6), True),
        (near(0.1, 0.45), False),
        (near(0.39, 0.1, outcome="copy", checks=("first",)), False),
        (near(0.39, 0.1, outcome="cannot_tell", reason="close"), False),
    ],
)
def test_near_either_limit(found, close):
    written = found.to_json()
    assert found.near == written["near"] == close
    assert ("Look yourself" in written["words"]) == close
    json.dumps(written)


def test_near_in_a_report_without_names():
    found = near(0.39, 0.1).to_json() | {"source": ""}
    assert words(message_of(found)).endswith("comes close to 4. Look yourself")


@pytest.fixture(scope="module", params=["pixel", "compact"])
def matcher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("likeness")
    (folder / "pictures").mkdir()
    build(demo_pictures(folder / "pictures", 12), folder / "index", create(request.param))
    with Index.open(folder / "index") as index:
        yield Matcher(Searcher(index, torch.device("cpu")), create(request.param))


def test_the_nearest_are_ranked_by_both(matcher):
    stored = thumbnail(matcher.index, 5)[None]
    (found,) = verdict(matcher, stored)
    assert len(found.nearest) == BEST
    assert found.nearest[0].row == found.neighbor == 5
    places = [each.place for each in found.nearest]
    assert places == sorted(places, reverse=True)
    first = found.nearest[0]
    assert first.score == pytest.approx(found.score, abs=1e-3)
    assert first.zncc == pytest.approx(found.zncc, abs=1e-3)
    assert found.to_json()["nearest"][0]["composition"] == found.composition


def test_scores_of_given_rows(matcher):
    """Those of the mirror image too, and of the right row whatever their order."""
    stored = thumbnail(matcher.index, 7)[None].flip(-1)
    scores = matcher.scores(matcher.finished(stored), [2, 7, 9])
    assert scores.shape == (3,)
    assert int(scores.argmax()) == 1
    found = matcher.match_pictures(stored)
    assert float(scores[1]) == pytest.approx(float(found.score[0]), abs=1e-3)


def test_a_picture_is_embedded_once_and_matched_as_before(matcher, monkeypatch):
    stored = thumbnail(matcher.index, 7)[None].flip(-1)
    embedded, embed = [], matcher.descriptor.embed
    monkeypatch.setattr(
        matcher.descriptor, "embed", lambda seen, scale: embedded.append(seen) or embed(seen, scale)
    )
    seen = matcher.finished(stored)
    whole, part = matcher.match_whole(seen), matcher.match_parts(seen)
    ids = matcher.candidates(seen, 4)
    matcher.scores(seen, ids)
    assert len(embedded) == 1 + PARTS  # each with its mirror image
    before = matcher.match_pictures(stored)
    assert all(torch.equal(getattr(whole, name), getattr(before, name)) for name in COLUMNS)
    assert int(whole.ids) in ids
    quarter = parts(stored)[1]
    alone = matcher.match_pictures(quarter, seen.scale)
    assert part.similarity[int(seen.shown[0])] == pytest.approx(float(alone.similarity), abs=1e-6)


def test_near_is_the_better_of_both():
    assert Near(0, "a", 0.3, 0.62).place == pytest.approx(COPY)
    assert Near(0, "a", 0.9, 0.0).place == pytest.approx(0.9)


@pytest.mark.parametrize("name", registry.MODULES)
def test_each_descriptor_says_what_it_overlooks(name):
    sentence = words(registry.named(name).misses)
    assert sentence.startswith(f"What {name} overlooks: ")
