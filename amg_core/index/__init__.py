"""The pictures that a generation must not copy: build an index folder, open it, search it.

Searching is `search.Searcher`.
"""

from .reader import Index
from .writer import BuildReport, build

__all__ = ["BuildReport", "Index", "build"]
