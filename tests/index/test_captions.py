"""Captions of duplicates: measures, changes, export."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from amg_core.errors import AMGError
from index_tools import captions
from index_tools.captions import Captioned

SHA = [f"{i:064x}" for i in range(50)]
WORDS = ["moon", "sea", "tree", "wind"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_unigram_overlap():
    assert captions.jaccard("A red fox", "a RED, fox.") == 1
    assert captions.jaccard("a red fox", "a blue fox") == pytest.approx(2 / 4)
    assert captions.jaccard("fox fox fox", "fox") == 1
    assert captions.jaccard("", "") == captions.jaccard("fox", "") == 0


def test_likeness_takes_medians_over_pairs():
    texts = ["red fox", "red bear", "red sea", ""]
    angles = {"red fox": 0.0, "red bear": 0.5, "red sea": 1.2}

    def encode(several):
        return np.array([(np.cos(angles[t]), np.sin(angles[t])) for t in several])

    found = captions.likeness(texts, encode)
    assert found.with_caption == 3 and found.words == "different"
    assert found.jaccard == pytest.approx(1 / 3)
    assert found.text == pytest.approx(np.cos(0.7))  # of the angles 0.5, 0.7 and 1.2
    assert found.product == pytest.approx(np.cos(0.7) / 3)


def test_most_pairs_decide():
    """Of 55 pairs of 11 captions the 28 pairs of 8 equal ones are the middle. Their mean would be .51."""
    texts = ["a red fox in snow"] * 8 + ["blue sea", "green tree", "old house"]
    found = captions.likeness(texts)
    assert found.jaccard == 1 and found.words == "alike"
    assert captions.likeness(texts[1:]).jaccard == 0  # of 45 pairs, 21


def test_without_an_encoder_nothing_stands_in_for_it():
    found = captions.likeness(["a red fox", "a red  FOX"])
    assert (found.text, found.product) == (None, None)
    assert (found.words, found.jaccard) == ("identical", 1)


def test_words_for_likeness():
    assert captions.likeness(["a red fox", "the red fox"]).words == "alike"
    assert captions.likeness(["fox", ""]).words == "missing"
    assert captions.likeness([]).jaccard is None
    many = captions.likeness(["red fox"] * 300 + ["sea"] * 300)
    assert many.with_caption == 600 and many.jaccard == 0  # 10,000 of 19,900 pairs differ


def test_absent_transformers_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AMGError, match="pip install transformers"):
        captions.text_encoder(tmp_path)


def test_a_model_with_missing_weights_is_refused(tmp_path):
    class Kind:
        missing = ()

        @classmethod
        def from_pretrained(cls, folder, **options):
            assert options["use_safetensors"] and options["local_files_only"]
            assert not options["trust_remote_code"]
            return cls(), {"missing_keys": set(cls.missing)}

    assert isinstance(captions.whole(Kind, tmp_path), Kind)
    Kind.missing = ("pooler.dense.weight",)  # not used
    assert isinstance(captions.whole(Kind, tmp_path), Kind)
    Kind.missing = ("text_projection.weight",)
    with pytest.raises(ValueError, match="1 weights are missing, such as text_projection"):
        captions.whole(Kind, tmp_path)


def test_random_numbers_belong_to_the_content():
    def first(*key):
        return captions.generator(*key).random()

    assert first(SHA[0], 1, 0) == first(SHA[0], 1, 0)
    assert len({first(SHA[i], s, d) for i in range(3) for s in range(3) for d in range(3)}) == 27


def test_probability_0_changes_nothing_and_1_everything():
    text = "a red fox"
    assert captions.random_tokens(text, rng(), WORDS, 0) == text
    assert captions.word_repetition(text, rng(), 0) == text
    assert captions.random_caption(text, rng(), WORDS, 0) == text
    assert captions.random_numbers(text, rng(), 0) == text
    counted = captions.random_numbers(text, rng(), 1).split()
    assert len(counted) == 7 and [w for w in counted if not w.isdigit()] == text.split()
    repeated = captions.word_repetition(text, rng(), 1, times=4).split()
    assert len(repeated) == 7 and set(repeated) == set(text.split())
    drawn = captions.random_caption(text, rng(), WORDS, 1, length=5).split()
    assert len(drawn) == 5 and set(drawn) <= set(WORDS)
    for seed in range(20):
        changed = captions.random_tokens(text, rng(seed), WORDS, 1, times=1).split()
        assert len(changed) in (3, 4) and len(set(changed) & set(WORDS)) == 1


def test_rates_are_those_of_the_paper():
    changed = {"rt": 0, "cwr": 0, "rc": 0, "rna": 0}
    draw, n = rng(5), 3000
    for _ in range(n):
        changed["rt"] += captions.random_tokens("a b c", draw, WORDS, times=1) != "a b c"
        changed["cwr"] += captions.word_repetition("a b c", draw, times=1) != "a b c"
        changed["rc"] += captions.random_caption("a b c", draw, WORDS) != "a b c"
        changed["rna"] += captions.random_numbers("a b c", draw, times=1) != "a b c"
    rates = {key: value / n for key, value in changed.items()}
    assert rates == pytest.approx({"rt": 0.1, "cwr": 0.4, "rc": 0.4, "rna": 0.4}, abs=0.03)


def test_numbers_are_the_papers():
    """Four chances of 0.4, and all numbers from 0 to 10⁶ alike: their mean within four deviations."""
    draw, n = rng(9), 3000
    numbers = [
        int(w) for _ in range(n) for w in captions.random_numbers("fox", draw).split() if w != "fox"
    ]
    assert len(numbers) == pytest.approx(1.6 * n, abs=4 * (4 * n * 0.24) ** 0.5)
    assert 0 <= min(numbers) < 10_000 and 990_000 < max(numbers) <= 10**6
    assert np.mean(numbers) == pytest.approx(5e5, abs=4 * 1e6 / (12 * len(numbers)) ** 0.5)


def test_empty_captions_are_no_trouble():
    assert captions.word_repetition("", rng(), 1) == ""
    assert captions.random_tokens("", rng(), WORDS, 1, times=1) in WORDS
    assert captions.multiple_captions("", rng(), ["", " "]) == ""


def test_several_captions_are_drawn_alike():
    counts = {"own": 0, "b": 0, "c": 0}
    draw = rng(1)
    for _ in range(3000):
        counts[captions.multiple_captions("own", draw, ["b", "c", "b", "own"])] += 1
    assert min(counts.values()) > 850


@pytest.mark.parametrize("method", captions.METHODS)
def test_the_order_of_the_pictures_does_not_matter(method):
    pictures = [Captioned(f"{i}.png", "a red fox at night", SHA[i], ("x", "y")) for i in range(30)]
    forth = captions.diversify(pictures, method, words=WORDS, variants=3, seed=4)
    back = captions.diversify(pictures[::-1], method, words=WORDS, variants=3, seed=4)
    assert forth == back[::-1]
    assert len({tuple(texts) for _, texts in forth}) > 5  # pictures differ from each other
    assert forth != captions.diversify(pictures, method, words=WORDS, variants=3, seed=5)


def test_random_words_need_words():
    with pytest.raises(AMGError, match="--words"):
        captions.diversify([Captioned("a", "", SHA[0])], "rt", words=[])
    assert captions.vocabulary(["A red fox", "red, sea"]) == ["a", "fox", "red", "sea"]


def test_export_as_jsonl(tmp_path):
    made = [("a/b.png", ["eins"]), ("c.png", ["größe", "zwei"])]
    (path,) = captions.export(tmp_path / "new", made)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == [
        {"file_name": "a/b.png", "text": "eins"},
        {"file_name": "c.png", "text": "größe", "texts": ["größe", "zwei"]},
    ]


def test_export_as_text_files(tmp_path):
    captions.export(tmp_path / "new", [("a/b.png", ["one", "two"]), ("../../c.png", ["x"])], "txt")
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.txt")}
    assert files == {"new/a/b.txt", "new/c.txt"}
    assert (tmp_path / "new/a/b.txt").read_text() == "one\ntwo\n"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    for form in ("txt", "jsonl"):
        with pytest.raises(AMGError, match="nothing is overwritten"):
            captions.export(tmp_path, [("a.png", ["new"])], form)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(AMGError, match="write jsonl"):
        captions.export(tmp_path / "new", [("a.png", ["x"]), ("a.jpg", ["y"])], "txt")
    with pytest.raises(AMGError, match="one index at a time"):
        captions.export(tmp_path / "new", [("a.png", ["x"]), ("./a.png", ["y"])])


def test_further_captions_of_the_user(tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text(
        '{"file_name": "a.png", "text": "one"}\n\n{"file_name": "a.png", "texts": ["two", " "]}\n'
    )
    assert captions.extra_captions(path) == {"a.png": ["one", "two"]}
    for line in ('{"file_name": "a.png"}', "[1]", "no", '{"file_name": 1, "text": "x"}'):
        path.write_text('{"file_name": "a.png", "text": "one"}\n' + line)
        with pytest.raises(AMGError, match="line 2"):
            captions.extra_captions(path)
