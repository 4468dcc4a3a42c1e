"""The node search finds the pack by what an artist types, in any of its languages."""

from __future__ import annotations

import json

import pytest

from tests.web.front import EMPTY

WORDS = ("copyright", "copy", "duplicate", "plagiarism", "training", "overfit", "lora", "guard")


BOX = "document.querySelector('[id^=comfy-vue-node-search-box-input], [role=dialog] input')"
OPTIONS = "[...document.querySelectorAll('[role=option]')]"


def results(front, text: str) -> str:
    """What the search box lists for it."""
    front.load(EMPTY)
    front.js("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    front.until(BOX, 30)
    front.rest()
    before = front.js(f"{BOX}.focus(); return {OPTIONS}.map((e) => e.innerText).join('|')")
    front.page.command("Input.insertText", text=text)
    listed = f"{OPTIONS}.map((e) => e.innerText).join('|')"
    front.until(f"{BOX}.value == {json.dumps(text)} && {listed} != {json.dumps(before)}", 30)
    front.rest()
    found = front.js(f"return {listed}")
    front.page.key("Escape", 27)
    front.until(f"!{BOX}", 30)
    return found


@pytest.mark.parametrize("word", WORDS)
def test_the_search_box_finds_it(front, word):
    assert "AMG" in results(front, word)


@pytest.mark.parametrize("word", ["版权", "Plagiat", "표절", "著作権"])
def test_in_other_languages(front, word):
    assert "AMG" in results(front, word)


def test_other_searches_are_left_alone(front):
    assert "AMG" not in results(front, "VAE Decode").split("|")[0]
