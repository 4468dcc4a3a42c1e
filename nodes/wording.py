"""Finds the texts of prompts: a CONDITIONING has only their encoding.

The texts that may have been encoded are written in the graph, or they are the captions of pictures that the
run came near. Each is encoded again, and one with the same result is the prompt. Otherwise its text is not
known: a node made it in a way that is not in MAKERS, or another CLIP encoded it.

The host keeps what its nodes have made out of reach of other nodes. So texts are made again from the graph,
by pure functions and without running a node: a language model or a draw of lots would answer otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice, product
from typing import Any

from torch import Tensor

from ..amg_core.hosts import SAME_TEXT, apart

CLIP = "clip"  # the input of nodes that encode texts
ENCODER = "TextEncode"  # in the names of nodes that only encode texts
MOST = 32  # texts that are tried
TRIMS = {"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}
CASES = {
    "UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize,
    "Title Case": str.title,
}  # fmt: skip
# Nodes of the host that make a text of others: the same from the same inputs.
MAKERS: dict[str, Callable[..., str]] = {
    "StringConcatenate": lambda string_a, string_b, delimiter: delimiter.join((string_a, string_b)),
    "StringReplace": lambda string, find, replace: string.replace(find, replace),
    "StringSubstring": lambda string, start, end: string[start:end],
    "StringTrim": lambda string, mode: TRIMS[mode](string),
    "CaseConverter": lambda string, mode: CASES[mode](string),
}


def running() -> dict:
    """The graph that the server executes now, in the form of the API, or {} without a server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    queue = getattr(server, "prompt_queue", None)
    if queue is None:
        return {}
    now, _ = queue.get_current_queue_volatile()
    return now[0][2] if now else {}


def written(graph: dict) -> list[str]:
    """The texts that nodes with a CLIP may have encoded, at most `MOST`, each once.

    Those of nodes that only encode come first: in other nodes with a CLIP, texts are names and choices.
    """
    encoders = [node for node in graph.values() if CLIP in node.get("inputs", {})]
    encoders.sort(key=lambda node: ENCODER not in node["class_type"])
    known: dict[str, list] = {}
    texts = (text for node in encoders for text in _of_inputs(graph, node, known))
    return list(islice(dict.fromkeys(texts), MOST))


def _of_inputs(graph: dict, node: dict, known: dict[str, list]) -> list[str]:
    """The texts that the inputs of a node may have, but for its CLIP."""
    inputs = node.get("inputs", {}).items()
    values = [v for name, value in inputs if name != CLIP for v in _values(graph, value, known)]
    return [value for value in values if isinstance(value, str) and value.strip()]


def _values(graph: dict, value: Any, known: dict[str, list]) -> list:
    """What an input may be: its widget's value, or what the node may make that it is linked to.

    `known` has the values of nodes that were visited before, so that a loop ends.
    """
    if not isinstance(value, list):
        return [value]
    source = value[0] if value else None
    if not isinstance(source, str) or source not in graph:
        return []
    if source not in known:
        known[source] = []
        known[source] = _made(graph, graph[source], known)
    return known[source]


def _made(graph: dict, node: dict, known: dict[str, list]) -> list[str]:
    """The texts that a node may make. A node that is not in MAKERS may hand on any text that it has."""
    make = MAKERS.get(node.get("class_type", ""))
    if make is None:
        return _of_inputs(graph, node, known)
    inputs = node.get("inputs", {})
    chosen = product(*(_values(graph, value, known) for value in inputs.values()))
    try:
        return [make(**dict(zip(inputs, each, strict=True))) for each in islice(chosen, MOST)]
    except (AttributeError, KeyError, TypeError):  # another pack's node of that name
        return []


class Wording:
    """The texts of one run's prompts, each looked up once, when it is first needed.

    Parameters
    ----------
    candidates : callable
        The texts that may have been encoded.
    encode : callable
        A text -> its encoding (1, T, C).
    """

    def __init__(self, candidates: Callable[[], Sequence[str]], encode: Callable[[str], Tensor]):
        self.candidates, self.encode = candidates, encode
        self._found: dict[object, list[str | None]] = {}

    def of(self, entry: dict) -> list[str | None]:
        """The text of each row of a prompt's conditioning as the guider has it, None = not known."""
        name = entry.get("uuid")
        if name not in self._found:
            self._found[name] = self._search(entry["cross_attn"])
        return self._found[name]

    def _search(self, encoded: Tensor) -> list[str | None]:
        """For each row the first candidate that is encoded to the same. The others are not encoded."""
        found: list[str | None] = [None] * len(encoded)
        for text in self.candidates():
            if None not in found:
                break
            made = self.encode(text)[0]
            for i, row in enumerate(encoded):
                if found[i] is None and apart(row, made) < SAME_TEXT:
                    found[i] = text
        return found
