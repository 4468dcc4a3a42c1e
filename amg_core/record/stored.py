"""Where records are: beside a picture, in its metadata, or in its signed Content Credentials."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import AMGError
from ..files import brief, read_bounded
from .checked import Record, readable

ENDING = ".amg.json"  # added to the whole name, so that a.png and a.jpg have different ones
KEY = "amg_record"  # the entry in a picture's metadata
MOST = 1 << 24  # bytes of such a file
BESIDE, INSIDE, SIGNED = "beside the picture", "in the picture", "in the Content Credentials"


def beside(picture: Path) -> Path:
    """The file for the record that lies beside a picture."""
    return picture.with_name(picture.name + ENDING)


def write_beside(picture: Path, record: Mapping[str, Any]) -> Path:
    """Write the record beside a picture. The picture itself is not touched. Returns the file.

    AMGError if it cannot be written, or if another kind of file has that name.
    """
    path = beside(picture)
    if path.exists():
        read_beside(picture)  # nothing is overwritten that is not a record
    write_json(path, record)
    return path


def read_beside(picture: Path) -> Record | None:
    """The record beside a picture, or None. AMGError if it is damaged."""
    path = beside(picture)
    return readable(read_json(path)) if os.path.lexists(path) else None


def read_inside(data: bytes, name: str) -> Record | None:
    """The record in the metadata of a picture file, or None. AMGError if it is damaged."""
    text = next((value for key, value in texts(data) if key == KEY), None)
    if text is None:
        return None
    try:
        return readable(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise AMGError(f"The record in {name} is damaged ({brief(error)}).") from None


def texts(data: bytes) -> Iterator[tuple[str, str]]:
    """The entries of a picture's metadata, as ComfyUI writes them: texts of a PNG, "key:value" in EXIF.

    Nothing if the picture cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            found = [(str(key), value) for key, value in image.info.items()]
            found += [value.partition(":")[::2] for value in _exif_texts(image)]
    except Exception:  # decoders raise nearly everything on damaged files
        return
    yield from ((key, value) for key, value in found if isinstance(value, str))


def _exif_texts(image: Any) -> list[str]:
    return [value for value in image.getexif().values() if isinstance(value, str)]


def read_json(path: Path) -> object:
    """The content of a JSON file. AMGError if it cannot be read."""
    try:
        return json.loads(read_bounded(path, MOST).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise AMGError(f"{path} cannot be read ({brief(error)}): restore or delete it.") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, the old one or the whole new one. AMGError if it cannot be written."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, the old one or the whole new one. AMGError if it cannot be written."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(new, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise AMGError(f"Cannot write {path} ({brief(error)}): check folder and disk.") from None
