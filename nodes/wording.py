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
from typing import Any, NamedTuple

from torch import Tensor

from ..amg_core.hosts import SAME_TEXT, apart

CLIP = "clip"  # the input of nodes that encode texts
ENCODER = "TextEncode"  # in the names of nodes that only encode texts
MOST = 32  # texts that are tried
# Nodes of the host that encode a text for each encoder of the model: their inputs, and the encoders.
SEVERAL = {
    "CLIPTextEncodeSDXL": {"text_g": "g", "text_l": "l"},
    "CLIPTextEncodeSD3": {"clip_g": "g", "clip_l": "l", "t5xxl": "t5xxl"},
    "CLIPTextEncodeFlux": {"clip_l": "l", "t5xxl": "t5xxl"},
    "CLIPTextEncodeHunyuanDiT": {"bert": "hydit_clip", "mt5xl": "mt5xl"},
    "CLIPTextEncodeHiDream": {"clip_g": "g", "clip_l": "l", "t5xxl": "t5xxl", "llama": "llama"},
}  # fmt: skip
ALIKE = "CLIPTextEncodeSDXL", "CLIPTextEncodeSD3"  # give the texts for g and l the same length
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


class PromptText(NamedTuple):
    """What a node encodes: one text, or one for each encoder of the model.

    Attributes
    ----------
    texts : tuple of str
    node : str
        The kind of node that encodes several texts, one of SEVERAL, or "" for one text.
    bare : bool
        Whether an empty text has no tokens, in place of those of the empty prompt.
    """

    texts: tuple[str, ...]
    node: str = ""
    bare: bool = False

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders that the texts are for, () if one text is for all."""
        return tuple(SEVERAL.get(self.node, {}).values())


def tokens(tokenize: Callable[[str], dict], text: PromptText) -> dict:
    """The tokens of each encoder, as the node makes them with `tokenize` of its CLIP."""
    made = tokenize(text.texts[0])
    for name, each in zip(text.encoders, text.texts, strict=False):
        made[name] = [] if text.bare and not each else tokenize(each)[name]
    if text.node in ALIKE:
        empty, longest = tokenize(""), max(len(made["g"]), len(made["l"]))
        for name in ("g", "l"):
            while len(made[name]) < longest:
                made[name] += empty[name]
    return made


def written(graph: dict) -> list[PromptText]:
    """The texts that nodes with a CLIP may have encoded, at most `MOST`, each once.

    Those of nodes that only encode come first: in other nodes with a CLIP, texts are names and choices.
    """
    encoders = [node for node in graph.values() if CLIP in node.get("inputs", {})]
    encoders.sort(key=lambda node: ENCODER not in node["class_type"])
    known: dict[str, list] = {}
    texts = (text for node in encoders for text in _encoded(graph, node, known))
    return list(islice(dict.fromkeys(texts), MOST))


def _encoded(graph: dict, node: dict, known: dict[str, list]) -> list[PromptText]:
    """What a node with a CLIP may encode."""
    several = SEVERAL.get(node["class_type"])
    if several is None:
        return [PromptText((text,)) for text in _of_inputs(graph, node, known)]
    inputs = node["inputs"]
    chosen = product(*(_values(graph, inputs.get(name), known) for name in several))
    bare = inputs.get("empty_padding") == "none"
    return [
        PromptText(texts, node["class_type"], bare)
        for texts in islice(chosen, MOST)
        if all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts)
    ]


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
        A `PromptText` -> its conditioning, see `conditioning.encode`.
    """

    def __init__(
        self,
        candidates: Callable[[], Sequence[PromptText]],
        encode: Callable[[PromptText], dict],
    ):
        self.candidates, self.encode = candidates, encode
        self._found: dict[object, list[PromptText | None]] = {}

    def of(self, entry: dict) -> list[PromptText | None]:
        """The text of each row of a prompt's conditioning as the guider has it, None = not known."""
        name = entry.get("uuid")
        if name not in self._found:
            self._found[name] = self._search(entry)
        return self._found[name]

    def _search(self, entry: dict) -> list[PromptText | None]:
        """For each row the first candidate that is encoded to the same. The others are not encoded."""
        found: list[PromptText | None] = [None] * len(entry["cross_attn"])
        for text in self.candidates():
            if None not in found:
                break
            made = self.encode(text)
            for i, known in enumerate(found):
                if known is None and _same(entry, i, made):
                    found[i] = text
        return found


def _same(entry: dict, i: int, made: dict) -> bool:
    """Whether row i of a prompt's conditioning is what was made of a text, in all that both have.

    Some models see one of the texts only in `pooled_output`.
    """
    rows = len(entry["cross_attn"])
    pairs = ((entry.get(name), value) for name, value in made.items())
    return all(
        apart(own[i], other[0]) < SAME_TEXT
        for own, other in pairs
        if isinstance(own, Tensor) and isinstance(other, Tensor) and len(own) == rows
    )
