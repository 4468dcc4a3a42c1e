"""Finds the texts of prompts: a CONDITIONING has only their encoding.

The texts that may have been encoded are written in the graph, or they are the captions of pictures that the
run came near. Each is encoded again, and one with the same result is the prompt. Otherwise its text is not
known: other nodes made it, or another CLIP encoded it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ..amg_core.hosts import SAME_TEXT, apart

CLIP = "clip"  # the input of nodes that encode texts
MOST = 32  # texts that are tried


def running() -> dict:
    """The graph that the server executes now, in the form of the API, or {} without a server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    queue = getattr(server, "prompt_queue", None)
    if queue is None:
        return {}
    now, _ = queue.get_current_queue_volatile()
    return now[0][2] if now else {}


def written(graph: dict) -> list[str]:
    """The texts of nodes with a CLIP, and of the nodes that these take texts from.

    Texts of the first kind come first. At most `MOST`, each once.
    """
    encoders = [name for name, node in graph.items() if CLIP in node.get("inputs", {})]
    texts: dict[str, None] = {}
    seen, waiting = set(encoders), list(encoders)
    while waiting:
        inputs = graph[waiting.pop(0)].get("inputs", {})
        for name, value in inputs.items():
            if isinstance(value, str) and value.strip():
                texts[value] = None
            source = value[0] if isinstance(value, list) and value and name != CLIP else None
            if isinstance(source, str) and source in graph and source not in seen:
                seen.add(source)
                waiting.append(source)
    return list(texts)[:MOST]


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
            self._found[name] = list(self._search(entry["cross_attn"]))
        return self._found[name]

    def _search(self, encoded: Tensor) -> Iterator[str | None]:
        made = [(text, self.encode(text)[0]) for text in self.candidates()]
        for row in encoded:
            found = min(((apart(row, other), text) for text, other in made), default=(1.0, None))
            yield found[1] if found[0] < SAME_TEXT else None
