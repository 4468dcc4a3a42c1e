"""The pictures that a generation must not copy: build an index folder, change it, open it.

Searching is `search.Searcher`, what can be indexed is in `sources`.
"""

from .reader import Alias, Index
from .shard import Record
from .writer import BuildReport, Entry, add, build, merge, mute, remove, unmute

__all__ = [
    "Alias", "BuildReport", "Entry", "Index", "Record",
    "add", "build", "merge", "mute", "remove", "unmute",
]  # fmt: skip
