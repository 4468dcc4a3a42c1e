"""Runs a piece of a test in a process of its own, whose end and whose memory are then known."""

from __future__ import annotations

import json

from tests.index.helpers import run

_REPORT = """
import json, resource, sys
kilo = 1 if sys.platform == "darwin" else 1024
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
told = []
def tell(call, *given):
    "What a call came to: its value, or the name and the words of its error."
    try:
        told.append(call(*given))
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
"""


def apart(code: str, *arguments: object) -> tuple[list, int]:
    """What `code` has told with `tell(call, …)`, and the bytes by which its memory rose from `before`.

    `code` sets ``before = peak()`` once it has imported what it needs; its arguments are in sys.argv.
    AssertionError where the process crashes or hangs.
    """
    script = f"{_REPORT}\n{code}\nprint(json.dumps([told, peak() - before]))"
    told, grown = json.loads(run(script, *arguments).splitlines()[-1])
    return told, grown
