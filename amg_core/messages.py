"""Messages to users as data: a code and its values. They become sentences only where they are shown.

`messages.json` has the English sentence of every code. `locales/<language>/main.json` has those of the
other languages, and the front end reads it too. In a sentence ``<name>`` stands for a value, and
``<name:2>`` for a number with two decimals. A value may be a message or a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ENGLISH = "en"
GROUP = "amg_messages"  # of a main.json
BETWEEN = " · "
LOCALES = Path(__file__).parents[1] / "locales"  # missing if only the core is installed
PLACE = re.compile(r"<(\w+)(?::(\d))?>")


@dataclass(frozen=True)
class Message:
    """A code and its values. ValueError if the code has no sentence or the values do not fit it."""

    code: str
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        sentence = catalogue(ENGLISH).get(self.code)
        if sentence is None or {name for name, _ in PLACE.findall(sentence)} != set(self.values):
            raise ValueError(f"{self.code!r} with {sorted(self.values)} is in no catalogue")

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code} | {name: _plain(value) for name, value in self.values.items()}


def message(code: str, **values: Any) -> Message:
    """A `Message`. The values are str, int, float, Message, or a list of these."""
    return Message(code, values)


def words(messages: Message | Iterable[Message], language: str = ENGLISH) -> str:
    """One message, or several joined to one line, in `language`. Missing sentences are in English."""
    if not isinstance(messages, Message):
        return BETWEEN.join(words(each, language) for each in messages)
    sentences = catalogue(ENGLISH) | catalogue(language)
    return PLACE.sub(
        lambda place: _said(messages.values[place[1]], place[2], language), sentences[messages.code]
    )


def to_json(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [each.to_json() for each in messages]


@cache
def catalogue(language: str) -> dict[str, str]:
    """Code -> sentence. {} for an unknown language."""
    if language == ENGLISH:
        english: dict[str, str] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
        return english
    path = LOCALES / language / "main.json"
    if not language.isalpha() or not path.is_file():
        return {}
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))[GROUP]
    return found


def _said(value: Any, decimals: str | None, language: str) -> str:
    if isinstance(value, Message):
        return words(value, language)
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(each, decimals, language) for each in value)
    text = str(value) if decimals is None else f"{value:.{decimals}f}"
    return text if isinstance(value, str) else text.replace("-", "−")


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return value.to_json()
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
