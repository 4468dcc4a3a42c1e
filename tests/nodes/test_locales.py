"""locales/ says what the nodes say, in every language. To bring it up to date: python -m locales_tool."""

from __future__ import annotations

import ast
import json
import re

import pytest

import locales_tool as locales
from amg_core import messages

OPTIONS_SAID = ("preset", "descriptor", "if_still_copied", "mode", "decoder", "form", "method")


@pytest.fixture(scope="module")
def schemas(pack):
    return [node.define_schema() for node in pack.nodes.values()]


def load(code: str, name: str) -> dict:
    return json.loads((locales.LOCALES / code / f"{name}.json").read_text(encoding="utf-8"))


def test_english_is_what_the_nodes_say(schemas):
    assert load("en", "nodeDefs") == locales.english(schemas)


@pytest.mark.parametrize("code", locales.CODES)
def test_catalogue_is_complete(schemas, code):
    """Nothing missing, nothing stale, no number or folder lost on the way."""
    source = list(locales.texts(locales.english(schemas)))
    assert locales.faults(source, locales.catalogue(code)) == []


@pytest.mark.parametrize("code", locales.CODES)
def test_files_are_those_of_the_catalogues(schemas, code):
    """As the front end looks them up: by node, input and number of the output."""
    report = load(code, "nodeDefs")
    assert report == locales.translated(locales.english(schemas), locales.catalogue(code))
    for schema in schemas:
        node = report[schema.node_id]
        assert list(node["inputs"]) == [each.id for each in schema.inputs]
        assert list(node["outputs"]) == [str(i) for i in range(len(schema.outputs))]
        for each in schema.inputs:
            entry = node["inputs"][each.id]
            assert entry["name"] and entry["tooltip"]
            if each.id in OPTIONS_SAID and getattr(each, "options", None):
                # The choices themselves are not translated: a tooltip must name them as they are.
                said = [option for option in each.options if f"{option}:" in each.tooltip]
                assert all(option in entry["tooltip"] for option in said), (code, each.id)


@pytest.mark.parametrize("code", ("en", *locales.CODES))
def test_names_of_a_node_are_told_apart(code):
    """Two sockets of one node never get the same label."""
    for node_id, node in load(code, "nodeDefs").items():
        names = [entry["name"] for entry in node["inputs"].values()]
        assert len(set(names)) == len(names), node_id


def test_the_other_texts():
    keys = load("en", "main")
    for code in locales.CODES:
        report = load(code, "main")
        assert {group: list(report[group]) for group in report} == {
            group: list(keys[group]) for group in keys
        }
    assert sorted(path.name for path in locales.LOCALES.iterdir()) == sorted(("en", *locales.CODES))


def test_faults_are_found():
    source = ["Up to 2.5 in models/amg.", "Two.", "Three."]
    known = {"Up to 2.5 in models/amg.": "Bis 25 in amg.", "Two.": "a | b", "Four.": "Vier."}
    assert locales.faults(source, known) == [
        "missing: Three.",
        "left over: Four.",
        "2.5 lost in: Up to 2.5 in models/amg.",
        "models/amg lost in: Up to 2.5 in models/amg.",
        "one of {}@|: Two.",
    ]
    assert locales.faults(["A."], {"A.": " "}) == ["empty: A."]


def page_texts() -> set[str]:
    """What the page says: the first argument of every t(…) in web/."""
    found = set()
    for path in (locales.ROOT / "web").glob("*.js"):
        calls = re.finditer(r'\bt\(\s*((?:"(?:[^"\\]|\\.)*"\s*\+?\s*)+)', path.read_text())
        found |= {"".join(re.findall(r'"((?:[^"\\]|\\.)*)"', call.group(1))) for call in calls}
    return found


def calls() -> list[tuple[str, set[str], set[str]]]:
    """(file, codes it may be, names of its values) of each call of message(…) in the sources."""
    found = []
    for folder in ("amg_core", "nodes", "amg_webui", "index_tools"):
        for path in (locales.ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "message":
                    inside = [
                        each for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)
                    ]
                    codes = {each.value for each in inside if isinstance(each.value, str)}
                    found.append((path.name, codes, {each.arg for each in node.keywords}))
    return found


def test_every_message_has_its_sentence_and_every_sentence_is_told(pack):
    english = locales.sentences("en")
    report: set[str] = set()
    for file, codes, names in calls():
        for code in codes & set(english):
            assert {name for name, _ in messages.PLACE.findall(english[code])} == names, (
                file,
                code,
            )
        report |= codes
    # What is a variable there: why nothing was judged, and why the checks cannot tell.
    report |= {
        *pack.module("amg_core.report").NOT_JUDGED,
        *pack.module("amg_core.similarity.verdict").REASONS,
    }
    report -= {"reason"}  # the key of a verdict, in such a call
    assert report == set(english)


@pytest.mark.parametrize("code", ("en", *locales.CODES))
def test_every_message_can_be_told_in_every_language(code):
    here = load(code, "main")[messages.GROUP]
    assert here == messages.catalogue(code)
    assert locales.lost_places(locales.sentences("en"), here) == []
    for text in here.values():
        assert text.strip() and not locales.SPECIAL.search(text) and not text.endswith((".", "。"))


def test_lost_places_are_found():
    source = {"a": "<x>", "b": "<x:2>", "c": "one", "d": "two"}
    assert locales.lost_places(source, {"a": "<x>", "b": "<x>", "d": "<y>"}) == ["b", "c", "d"]


@pytest.mark.parametrize("code", ("en", *locales.CODES))
def test_the_page_speaks_it(code):
    """Every text of the page, no other, and what is put into it."""
    report = load(code, "main")["amg"]
    assert set(report) == page_texts()
    for text, other in report.items():
        assert other.strip()
        assert not locales.SPECIAL.search(other)
        for kind in (re.compile(r"<\w+>"), locales.NUMBER):
            assert sorted(kind.findall(other)) == sorted(kind.findall(text)), text
    assert list(load(code, "commands")) == ["AMG_BrowseIndex", "AMG_CheckWeights"]


@pytest.mark.parametrize("code", ("en", *locales.CODES))
def test_choices_in_words(schemas, code):
    """Each list of them whole. A choice that tooltips and pages name is named as it is."""
    said = load(code, "main")["amg_choices"]
    lists = {
        each.id: list(getattr(each, "options", None) or (True, False))
        for schema in schemas
        for each in schema.inputs
        if each.id in said
    }
    assert lists.keys() == said.keys()
    for widget, choices in lists.items():
        words = said[widget]
        assert set(words) == {
            str(each).lower() if each in (True, False) else each for each in choices
        }
        assert len(set(words.values())) == len(words)
        if widget not in ("new_noise", "strength_of"):
            assert all(words[each].startswith(f"{each}: ") for each in choices)


def test_the_page_says_nothing_else():
    """Words in its code are in a t(…): labels, titles and texts of elements."""
    given = re.compile(
        r'(?:\btext|placeholder|title|alt|"aria-label"|"aria-valuetext"|textContent|tooltip)'
        r'\s*[:=]\s*[`"]([^`"]*[A-Za-z]{3}[^`"]*)[`"]'
    )
    for path in (locales.ROOT / "web").glob("*.js"):
        found = given.findall(path.read_text())
        assert not [text for text in found if not text.startswith("${")], path.name
