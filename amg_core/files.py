"""Files that somebody else may have put there: a pipe is never waited for, a long file not read."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from .errors import AMGError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
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


def there(path: str | os.PathLike[str]) -> bool:
    """Whether anything is at `path`. AMGError where the system does not let this user look."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise AMGError(
            f"{path} is in a folder that you may not look into ({error.strerror}): ask whoever owns "
            f"it for the right to read it, or give one that you may read."
        ) from error
    except (OSError, ValueError):
        return False
    return True


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """All of a file of at most `most` bytes, in the memory that these take.

    OSError for a longer one, for one that grows meanwhile, and as `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            limit = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most} bytes"
            raise OSError(errno.EFBIG, f"file larger than {limit}", str(path))
        data = file.read(size + 1)  # Python takes the memory for all that is asked for
    if len(data) > size:
        raise OSError(errno.EBUSY, "file is being written: wait until that has ended", str(path))
    return data


def brief(found: object, most: int = 200) -> str:
    """An error, or what was found in a file, as one line of a message: it may be as long as the file."""
    words = " ".join(str(found)[: 4 * most].split()) or type(found).__name__
    return words if len(words) <= most else words[: most - 1] + "…"
