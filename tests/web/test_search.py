"""The node search finds the pack by what an artist types, in any of its languages."""

from __future__ import annotations

import json

import pytest

from tests.web.front import EMPTY

WORDS = ("copyright", "copy", "duplicate", "plagiarism", "training", "overfit", "lora", "guard")


def results(front, text: str) -> str:
    """What the search box lists for it."""
    front.load(EMPTY)
    front.js("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    front.until("document.querySelector('[role=dialog] input')")
    front.rest()
    front.js("document.querySelector('[role=dialog] input').focus()")
    front.page.command("Input.insertText", text=text)
    front.until(
        f"document.querySelector('[role=dialog] input').value == {json.dumps(text)} &&"
        "document.querySelector('[role=option]')",
        20,
    )
    front.rest()
    found = front.js(
        "return [...document.querySelectorAll('[role=option]')].map((e) => e.innerText).join('|')"
    )
    front.page.key("Escape", 27)
    front.until("!document.querySelector('[role=dialog] input')", 20)
    return found


@pytest.mark.parametrize("word", WORDS)
def test_the_search_box_finds_it(front, word):
    assert "AMG" in results(front, word)


@pytest.mark.parametrize("word", ["版权", "Plagiat", "표절", "著作権"])
def test_in_other_languages(front, word):
    assert "AMG" in results(front, word)


def test_other_searches_are_left_alone(front):
    assert "AMG" not in results(front, "VAE Decode").split("|")[0]
