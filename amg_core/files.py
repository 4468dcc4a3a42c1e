"""Safe reading of files from unknown sources, without waiting for a pipe or reading too long a file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import AMGError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. OSError if it is missing, or if it is a folder, pipe or device."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "not a file", str(path))
    raise OSError(errno.EINVAL, "not a file", str(path))


def there(path: str | os.PathLike[str]) -> bool:
    """Whether `path` exists. AMGError if this user may not read its folder."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise AMGError(
            f"{path} is in a folder that you may not read ({error.strerror}): ask its owner for the "
            f"right to read it, or give a folder that you may read."
        ) from error
    except (OSError, ValueError):
        return False
    return True


def named_folder(parent: Path, name: str) -> Path:
    """The folder for an index `name` in `parent`. AMGError if it is no plain name."""
    name = name.strip()
    if not name or name.startswith(".") or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name):
        raise AMGError(
            f"name: {name!r} cannot be the name of an index. Use letters, digits, spaces, '-' and "
            f"'_'. The index becomes a folder of that name in {parent}."
        )
    return parent / name


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a whole file of at most `most` bytes, with no more memory than its size.

    OSError if it is longer or grows while it is read, and as for `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            limit = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most} bytes"
            raise OSError(errno.EFBIG, f"file larger than {limit}", str(path))
        data = file.read(size + 1)  # Python allocates as many bytes as are requested
    if len(data) > size:
        raise OSError(errno.EBUSY, "file is being written: wait until it is complete", str(path))
    return data


def brief(found: object, most: int = 200) -> str:
    """An error, or a value from a file, as one line of at most `most` characters for a message."""
    words = " ".join(str(found)[: 4 * most].split()) or type(found).__name__
    return words if len(words) <= most else words[: most - 1] + "…"
