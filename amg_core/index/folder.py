"""The former home of `picture` and `sources`: names that older modules still import from here."""

from __future__ import annotations

from pathlib import Path

from . import picture
from .picture import EXTENSIONS, MAX_PIXELS, Picture, Unreadable
from .sources.base import storable
from .sources.captions import Captions as _Captions
from .sources.folder import FolderTree, list_pictures

__all__ = ["EXTENSIONS", "Captions", "Picture", "Unreadable", "list_pictures", "load_picture"]
__all__ += ["storable"]


def Captions(folder: Path) -> _Captions:
    return _Captions(FolderTree(folder))


def load_picture(path: Path, source: str = "") -> Picture:
    return picture._decode_file(picture.read_file(path), source or path.name, MAX_PIXELS)
