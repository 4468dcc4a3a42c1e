"""Names and captions that are markup: the host's page reads some of the texts it is sent as HTML."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
MARKUP = (
    "<img src=x onerror=alert(1)>.png",
    "fox <svg/onload=alert(1)>",
    "</span><script>alert(1)</script>",
    "<!-- hidden -->",
    "<a href='javascript:alert(1)'>look</a>",
    "nearest <<b>img src=x onerror=alert(1)>",
    "[[the picture|https://example.org/stolen]]",
    "[[[the picture|https://example.org/stolen]]]",
)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)

    handle_endtag = handle_comment = handle_decl = lambda self, tag: self.found.append(tag)


@pytest.fixture
def sent(monkeypatch):
    """(text, node) of all that goes to the page as a text."""
    found = []
    module = ModuleType("server")
    server = SimpleNamespace(send_progress_text=lambda *args: found.append(args))
    module.PromptServer = SimpleNamespace(instance=server)
    monkeypatch.setitem(sys.modules, "server", module)
    return found


@pytest.mark.parametrize("text", MARKUP)
def test_a_text_on_a_node_is_no_markup(pack, sent, text):
    pack.module("nodes.show").text_on("7")(text)
    ((report, node),) = sent
    assert node == "7"
    assert Tags(report).found == []
    assert not re.search(r"\[\[[^|\]]+\|[^\]]+\]\]", report)  # newer front ends make a link of it
    words = re.findall(r"\w+", text)
    assert re.findall(r"\w+", report) == words  # nothing is lost of what a person reads


def test_an_ordinary_text_stays_as_it_is(pack, sent):
    text = "step 3/20 · similarity −0.13 · [a|b] 100 % & 'more' …\nsecond line"
    show = pack.module("nodes.show")
    show.text_on("7")(text)
    assert sent == [(text + show.MARK, "7")]
    assert show.is_live(sent[0][0]) and not show.is_live("say so")


def test_texts_go_to_the_page_by_one_door():
    """`send_progress_text` is called in one place, behind which the markup is taken out."""
    files = [path for path in (ROOT / "nodes").rglob("*.py") if path.name != "show.py"]
    assert [path.name for path in files if "send_progress_text" in path.read_text()] == []


def test_an_index_whose_name_is_markup_is_not_offered(pack, caplog):
    """The host's menus draw the options of a list as HTML."""
    paths = pack.module("nodes.paths")
    folder = Path(pack.folders[paths.INDEXES][0][0])
    for name in ("fair", "<img src=x onerror=alert(1)>"):
        (folder / name).mkdir()
        (folder / name / paths.MANIFEST).write_text("{}")
    assert paths.index_names() == ["fair"]
    assert "<img src=x onerror=alert(1)>" in caplog.text and "rename" in caplog.text
