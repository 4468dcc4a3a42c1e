"""The index of pictures to stay away from: building, changing and opening its folder.

`search.Searcher` searches it. `sources` has the formats that can be indexed.
"""

from .reader import Alias, Index
from .shard import Record
from .writer import BuildReport, Entry, add, build, merge, mute, remove, unmute

__all__ = [
    "Alias", "BuildReport", "Entry", "Index", "Record",
    "add", "build", "merge", "mute", "remove", "unmute",
]  # fmt: skip
