"""The nodes' texts in other languages, as ComfyUI reads them from `locales/`.

`locales/en/nodeDefs.json` is what the nodes themselves say. A language is a catalogue, English ->
translation, in `catalogues/<code>.json`: a sentence that changes in a node is missing there, so no
translation can go stale unnoticed. `locales/<code>/nodeDefs.json` is the English file read through
the catalogue. `python -m locales_tool` writes all files and names what is missing.

What is told by a code (`amg_core.messages`) has its translations in `locales/<code>/main.json`, under
`GROUP`; the English there, for the page, is that of `amg_core/messages.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from amg_core.messages import ENGLISH, GROUP, PLACE
from amg_core.messages import catalogue as sentences

ROOT = Path(__file__).parent.parent
LOCALES = ROOT / "locales"
CATALOGUES = Path(__file__).parent / "catalogues"
CODES = ("zh", "ja", "ko", "de", "fr", "es")  # beside English, as ComfyUI names them
SPECIAL = re.compile(r"[{}@|]")  # the front end's message format would interpret these
NUMBER = re.compile(r"\d+(?:\.\d+)?")
PATHS = re.compile(
    r"models/[a-z_]+|\.[a-z]{3,7}(?![a-z])"
)  # folders and file endings: never translated


def english(schemas) -> dict:
    """Schemas of the nodes -> the content of nodeDefs.json in English."""
    return {schema.node_id: _node(schema) for schema in schemas}


def _node(schema) -> dict:
    inputs = {
        each.id: {"name": getattr(each, "display_name", None) or each.id, "tooltip": each.tooltip}
        for each in schema.inputs
    }
    outputs = {
        str(i): {"name": each.display_name or each.id, "tooltip": each.tooltip}
        for i, each in enumerate(schema.outputs)
    }
    report = {"display_name": schema.display_name, "description": schema.description}
    return report | {"inputs": inputs, "outputs": outputs}


def texts(tree: dict) -> Iterator[str]:
    """All texts of a nodeDefs.json, in its order, each once."""
    seen: dict[str, None] = {}

    def collect(text: str) -> str:
        seen[text] = None
        return text

    _mapped(tree, collect)
    return iter(seen)


def translated(tree: dict, catalogue: dict[str, str]) -> dict:
    """The same tree in another language. KeyError where the catalogue lacks a text."""
    return _mapped(tree, catalogue.__getitem__)


def _mapped(tree: dict, change: Callable[[str], str]) -> dict:
    return {
        key: _mapped(value, change) if isinstance(value, dict) else change(value)
        for key, value in tree.items()
    }


def catalogue(code: str) -> dict[str, str]:
    return json.loads((CATALOGUES / f"{code}.json").read_text(encoding="utf-8"))


def faults(source: list[str], known: dict[str, str]) -> list[str]:
    """What is wrong with a catalogue for these English texts, one line each.

    Missing and left-over texts; empty ones; numbers, folders or file endings that got lost; signs
    that the front end would interpret.
    """
    found = [f"missing: {text}" for text in source if text not in known]
    found += [f"left over: {text}" for text in known if text not in set(source)]
    for text in (text for text in source if text in known):
        other = known[text]
        if not other.strip():
            found.append(f"empty: {text}")
        if SPECIAL.search(other) or SPECIAL.search(text):
            found.append(f"one of {{}}@|: {text}")
        for kind in (NUMBER, PATHS):
            lost = set(kind.findall(text)) - set(kind.findall(other))
            found += [f"{', '.join(sorted(lost))} lost in: {text}"] if lost else []
    return found


def english_main() -> dict:
    """The content of main.json in English: as it is, with the sentences of the core."""
    report = json.loads((LOCALES / ENGLISH / "main.json").read_text(encoding="utf-8"))
    return report | {GROUP: sentences(ENGLISH)}


def lost_places(source: dict[str, str], other: dict[str, str]) -> list[str]:
    """Codes that only one of them has, and those in whose sentences not the same values are put in."""
    different = source.keys() ^ other.keys()
    both = source.keys() & other.keys()
    return sorted(
        different | {code for code in both if _places(source[code]) != _places(other[code])}
    )


def _places(sentence: str) -> set[tuple[str, str]]:
    return set(PLACE.findall(sentence))


def as_text(tree: dict) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=2) + "\n"
