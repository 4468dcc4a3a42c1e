"""Where the pictures of an index come from. See docs/sources.md."""

from __future__ import annotations

import os

from .base import Item, Source
from .folder import FolderSource

__all__ = ["FolderSource", "Item", "Source", "open_source"]


def open_source(path: str | os.PathLike) -> Source:
    """The pictures at `path`, whatever lies there.

    Raises
    ------
    AMGError
        Nothing there that holds pictures.
    """
    return FolderSource(path)
