"""Files that somebody else may have put there: a pipe is never waited for, a long file not read."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file, open for reading. OSError where there is none, or a folder, pipe or device instead."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "not a file", str(path))
    raise OSError(errno.EINVAL, "not a file", str(path))


def read_bounded(path: str | os.PathLike, most: int) -> bytes:
    """All of a file of at most `most` bytes. OSError for a longer one, and as `open_regular`."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        limit = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most} bytes"
        raise OSError(errno.EFBIG, f"file larger than {limit}", str(path))
    return data


def brief(error: BaseException, most: int = 200) -> str:
    """The words of an error as one line of a message: some hold whatever a file held."""
    words = " ".join(str(error)[: 4 * most].split()) or type(error).__name__
    return words if len(words) <= most else words[: most - 1] + "…"
