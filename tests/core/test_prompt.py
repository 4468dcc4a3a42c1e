"""The words of a prompt, and the prompt without some of them."""

from __future__ import annotations

import pytest

from amg_core.prompt import split, split_together


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


# ------------------------------------------------------------------ texts that are encoded together


def test_a_word_of_several_texts_is_one_part():
    """Also where it is spelled otherwise; a word of one text is a part of its own."""
    prompts = split_together(["a red fox, snow", "photo of a (Fox:1.2)"])
    assert prompts.words == ("a", "red", "fox", "snow", "photo", "of")
    kept = [word not in ("fox", "of", "snow") for word in prompts.words]
    assert prompts.keep(kept) == ("a red", "photo a")
    assert prompts.missing(kept) == "fox snow of"
    assert prompts.keep([True] * 6) == ("a red fox, snow", "photo of a (Fox:1.2)")


def test_words_that_come_twice_go_with_those_of_the_other_text():
    prompts = split_together(["red fox, red sky", "sky red"])
    assert prompts.words == ("red", "fox", "red", "sky")
    assert prompts.keep([True, True, False, True]) == ("red fox, sky", "sky red")
    assert prompts.keep([False, True, True, True]) == ("fox, red sky", "sky")
    assert prompts.keep([False, True, True, False]) == ("fox, red", "")


def test_the_order_of_the_words_may_differ():
    prompts = split_together(["a b c d", "d c b a"])
    assert prompts.keep([False, True, True, False]) == ("b c", "c b")


def test_groups_are_common_to_all_texts():
    first, second = " ".join(f"w{i}" for i in range(30)), "w0 w29 x y"
    prompts = split_together([first, second], 4)
    assert len(prompts.words) == 4 == len(prompts.each[0].parts) == len(prompts.each[1].parts)
    assert " ".join(prompts.words) == f"{first} x y"
    assert prompts.keep([False, True, True, True])[1] == "w29 x y"
    assert prompts.keep([True, True, True, False])[1] == "w0"


def test_a_text_may_be_empty():
    prompts = split_together(["", "a fox"])
    assert prompts.words == ("a", "fox") and prompts.keep([True, False]) == ("", "a")
    assert split_together(["", ""]).words == ()
