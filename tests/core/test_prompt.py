"""The words of a prompt, and the prompt without some of them."""

from __future__ import annotations

import pytest

from amg_core.prompt import split


def words(text, limit=16):
    prompt = split(text, limit)
    return [prompt.words(i) for i in range(len(prompt.parts))]


def without(text, word):
    prompt = split(text)
    assert word in words(text)
    return prompt.keep([prompt.words(i) != word for i in range(len(prompt.parts))])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("frog face on red stripes", ["frog", "face", "on", "red", "stripes"]),
        ("masterpiece, best quality,1girl", ["masterpiece", "best", "quality", "1girl"]),
        ("a (red fox:1.2) in ((snow))", ["a", "red", "fox", "in", "snow"]),
        ("fox <lora:some name:0.8>", ["fox"]),
        (r"pony \(toy\)", ["pony", r"\(toy\)"]),
        ("embedding:easyneg cat", ["embedding:easyneg", "cat"]),
        ("{red|dark blue} [cat:dog:0.5] [a|b]", ["{red|dark blue}", "[cat:dog:0.5]", "[a|b]"]),
        ("[less] cat AND dog BREAK sky", ["less", "cat", "dog", "sky"]),
        ("fox、雪，空", ["fox", "雪", "空"]),
        ("", []),
        (" , ()", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_weights_tags_and_brackets_stay_whole():
    text = "a (red fox:1.2) in ((snow)), <lora:x:0.8>, {a|b}"
    assert without(text, "red") == "a ( fox:1.2) in ((snow)), <lora:x:0.8>, {a|b}"
    assert without(text, "snow") == "a (red fox:1.2) in, <lora:x:0.8>, {a|b}"
    assert without(text, "{a|b}") == "a (red fox:1.2) in ((snow)), <lora:x:0.8>"
    assert without("(fox:1.3), (b)", "fox") == "(b)"
    assert split(text).keep([False] * 6) == "<lora:x:0.8>"


def test_all_kept_is_the_very_text():
    text = " odd ,,  spacing ( kept:1.1 ) ,"
    prompt = split(text)
    assert prompt.keep([True] * len(prompt.parts)) is text


def test_long_prompts_have_groups_of_neighbours():
    text = " ".join(f"w{i}" for i in range(40))
    found = words(text, 16)
    assert len(found) == 16 and " ".join(found) == text
    assert {len(group.split()) for group in found} == {2, 3}
    prompt = split(text)
    assert prompt.keep([False, *[True] * 15]) == text[len(found[0]) + 1 :]


def test_the_words_that_are_missing():
    assert split("a (red fox:1.2), snow").missing([True, False, True, False]) == "red snow"


def test_more_entries_than_parts_are_ignored():
    assert split("a b").keep([True, False, False]) == "a"
