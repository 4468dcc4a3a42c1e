"""One shard of an index. It is written once, in the order of its rows, and then only read."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

import numpy as np

from ..descriptors.base import DescriptorSpec
from ..errors import AMGError
from ..files import brief
from . import format as fmt

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

STEPS = 10_000  # steps of SQLite's virtual machine between two checks of its budget
MOST_VALUE = 1 << 24  # largest text or thumbnail that is read from SQLite, in bytes
MOST_THUMBNAIL = 1 << 22
MEND = "rebuild the index, or restore the folder from a backup"


@dataclass(frozen=True)
class Record:
    """The data of a picture besides its rows.

    `source` is its name in its source, `sha256` (hex) the hash of its file, and `width` and `height` are
    in pixels.
    """

    source: str
    caption: str
    sha256: str
    width: int
    height: int


class ShardWriter:
    """Writes a shard into an empty folder. The bytes depend only on the content."""

    def __init__(self, folder: Path, spec: DescriptorSpec) -> None:
        self.folder, self.spec, self.count = folder, spec, 0
        self.dims: dict[int, int] = {}
        self._rows: dict[int, BinaryIO] = {}
        folder.mkdir(parents=True)
        self._hashes = open(folder / fmt.HASHES, "wb")  # noqa: SIM115 (closed by close)
        self._hashes.write(fmt.npy_header("|u1", 0, 32))
        self._meta = sqlite3.connect(folder / fmt.META, isolation_level=None)
        # No journal, because an unfinished shard is deleted. One transaction, because the file counts them.
        self._meta.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
        self._meta.executescript(f"BEGIN; {fmt.SCHEMA}")

    def add(self, record: Record, rows: dict[int, np.ndarray], thumbnail: bytes | None) -> None:
        """Append a picture with its rows, scale -> (D,) float16, and an encoded thumbnail or None."""
        for scale in self.spec.scales:
            row = np.ascontiguousarray(rows[scale], "<f2")
            self._file(scale, row.shape[0]).write(row.data)
        self._hashes.write(bytes.fromhex(record.sha256))
        self._meta.execute(
            "INSERT INTO pictures VALUES (?, ?, ?, ?, ?)",
            (self.count, record.source, record.caption, record.width, record.height),
        )
        if thumbnail is not None:
            self._meta.execute("INSERT INTO thumbnails VALUES (?, ?)", (self.count, thumbnail))
        self.count += 1

    def alias(self, sha256: str, source: str, caption: str) -> None:
        """Record a further file with the bytes of a picture of this or another shard."""
        self._meta.execute("INSERT INTO aliases VALUES (?, ?, ?)", (sha256, source, caption))

    def _file(self, scale: int, dim: int) -> BinaryIO:
        if scale not in self._rows:
            self._rows[scale] = open(self.folder / fmt.rows_name(scale), "wb")  # noqa: SIM115
            self._rows[scale].write(fmt.npy_header("<f2", 0, dim))
            self.dims[scale] = dim
        if self.dims[scale] != dim:
            raise ValueError(f"{self.spec.id} gave {self.dims[scale]}, then {dim} dimensions")
        return self._rows[scale]

    def finish(self, path: str = "") -> fmt.ShardEntry:
        """Write the count into the headers, flush to the disk, and hash. Raises OSError, sqlite3.Error."""
        for scale, file in self._rows.items():
            file.seek(0)
            file.write(fmt.npy_header("<f2", self.count, self.dims[scale]))
        self._hashes.seek(0)
        self._hashes.write(fmt.npy_header("|u1", self.count, 32))
        self._meta.execute("COMMIT")
        for file in (*self._rows.values(), self._hashes):
            file.flush()  # here, where an error is reported
        self.close()
        names = [fmt.META, fmt.HASHES, *map(fmt.rows_name, self.spec.scales)]
        for name in names:
            flush(self.folder / name)
        files = {name: fmt.digest(self.folder / name) for name in names}
        flush(self.folder)
        return fmt.ShardEntry(path or f"{fmt.SHARDS}/{fmt.shard_name(files)}", self.count, files)

    def close(self) -> None:
        """Close the files, even after an error. May be called twice."""
        for file in (*self._rows.values(), self._hashes):
            with suppress(OSError):  # on a full disk buffered data cannot be written
                file.close()
        with suppress(sqlite3.Error):
            self._meta.close()


class Shard:
    """An open shard. It may be used from several threads.

    Its files are mapped at once, so it stays usable after they are removed. (Windows does not remove open
    files.)

    Raises
    ------
    AMGError
        A file is missing, or has not the size and header in `entry`. `check` hashes the content.
    """

    def __init__(self, folder: Path, entry: fmt.ShardEntry, dims: dict[int, int]) -> None:
        self.folder, self.count, self.entry = folder, entry.count, entry
        self._lock = threading.Lock()
        for name, file in entry.files.items():
            _check_size(folder / name, file)
        self._rows = {
            scale: _mapped(folder / fmt.rows_name(scale), "<f2", entry.count, dim)
            for scale, dim in dims.items()
        }
        self._left = 0
        self._meta = self._open_meta()
        self._hashes: np.memmap | None = _mapped(folder / fmt.HASHES, "|u1", entry.count, 32)

    @property
    def hashes(self) -> np.ndarray:
        """(n, 32) uint8, SHA-256 of each picture's file."""
        if self._hashes is None:
            raise ValueError("the index is closed")
        check_mapped(self._hashes)
        return self._hashes

    def rows(self, scale: int) -> np.memmap:
        """(n, D) float16, read-only. AMGError if the file was truncated after it was opened."""
        check_mapped(self._rows[scale])
        return self._rows[scale]

    def record(self, row: int) -> Record:
        query = "SELECT source, caption, width, height FROM pictures WHERE id = ?"
        found = self._all(query, row)
        self._need(len(found) == 1, row)
        return self._record(row, found[0])

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records in row order, from row `start` on. A few thousand at a time are in memory."""
        query = (
            "SELECT source, caption, width, height FROM pictures "
            "WHERE id >= ? AND id < ? ORDER BY id"
        )
        for first in range(start, self.count, 4096):
            some = self._all(query, first, first + 4096)
            self._need(len(some) == min(4096, self.count - first), first)
            for row, found in enumerate(some, first):
                yield self._record(row, found)

    def _record(self, row: int, found: tuple[Any, ...]) -> Record:
        source, caption, width, height = found
        self._need(isinstance(source, str) and isinstance(caption, str), row)
        self._need(all(type(n) is int and 0 <= n < 1 << 31 for n in (width, height)), row)
        return Record(source, caption, self.hashes[row].tobytes().hex(), width, height)

    def _need(self, right: bool, row: int) -> None:
        """AMGError unless `right`. In SQLite a column can hold values of any type."""
        if not right:
            path = self.folder / fmt.META
            raise AMGError(f"{path} lacks row {row}, or holds no such values in it: {MEND}.")

    def aliases(self) -> Sequence[tuple[str, str, str]]:
        """(sha256, source, caption) of further files, in the order in which they were added."""
        found = self._all("SELECT sha256, source, caption FROM aliases ORDER BY rowid")
        for row, texts in enumerate(found):
            self._need(all(isinstance(text, str) for text in texts), row)
            self._need(fmt.is_digest(texts[0]), row)
        return found

    def aliases_of(self, sha256: str) -> list[str]:
        """Captions of the further files of one picture, "" for a file without one."""
        found = self._all("SELECT caption FROM aliases WHERE sha256 = ? ORDER BY rowid", sha256)
        for row, (caption,) in enumerate(found):
            self._need(isinstance(caption, str), row)
        return [caption for (caption,) in found]

    def thumbnail(self, row: int) -> bytes | None:
        """The encoded thumbnail, or None if the index was made without pictures."""
        found = self._all("SELECT data FROM thumbnails WHERE id = ?", row)
        if not found:
            return None
        data = found[0][0]
        right = isinstance(data, bytes) and len(data) <= MOST_THUMBNAIL
        self._need(right, row)
        return bytes(data)

    def check(self) -> None:
        """Read and hash every byte. Raises AMGError with the name of the first file that was altered."""
        for name, file in self.entry.files.items():
            check_file(self.folder / name, file)
        for scale, rows in self._rows.items():
            step = max(1, (1 << 22) // rows.shape[1])
            for start in range(0, self.count, step):
                bits = rows[start : start + step].view(np.uint16)
                if ((bits & 0x7C00) == 0x7C00).any():
                    path = self.folder / fmt.rows_name(scale)
                    raise AMGError(f"{path} holds values that are not finite: {MEND}.")
        path = self.folder / fmt.META
        if self._all("PRAGMA quick_check(1)") != [
            ("ok",)
        ]:  # finds pages that are used twice, among other damage
            raise AMGError(f"{path} is not a sound database: {MEND}.")
        query = "SELECT count(*), min(id), max(id) FROM pictures"
        if self._all(query) != [(self.count, 0, self.count - 1)]:
            raise AMGError(f"{path} has not the {self.count} pictures of the manifest: {MEND}.")

    def _all(self, query: str, *values: int | str) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                self._left = self._budget
                return self._meta.execute(query, values).fetchall()
        except sqlite3.ProgrammingError:
            raise ValueError("the index is closed") from None
        except (sqlite3.Error, UnicodeDecodeError) as error:
            path = self.folder / fmt.META
            raise AMGError(f"{path} cannot be read ({brief(error)}): {MEND}.") from error

    @property
    def _budget(self) -> int:
        """A limit of SQLite's steps for one query. Queries of a valid file take less than four a byte."""
        return 10_000_000 + 4 * self.entry.files[fmt.META].size

    def _tick(self) -> bool:
        """Called by SQLite every STEPS steps of a query. True ends the query."""
        self._left -= STEPS
        return self._left < 0

    def _open_meta(self) -> sqlite3.Connection:
        """A read-only connection for all threads. The shard serialises its use.

        The database must have exactly the tables of an index, because a view or a computed column is a
        program, which may never end.
        """
        path = self.folder / fmt.META
        try:
            meta = sqlite3.connect(_uri(path), uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise AMGError(f"{path} cannot be opened ({error}): {MEND}.") from error
        try:
            self._left = self._budget
            meta.set_progress_handler(self._tick, STEPS)
            if sys.version_info >= (3, 11):
                meta.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_VALUE)
            for setting in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
                meta.execute(f"PRAGMA {setting}")
            found = meta.execute("SELECT type, sql FROM sqlite_master").fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the name of a column may be no text
            meta.close()
            raise AMGError(f"{path} cannot be read ({brief(error)}): {MEND}.") from error
        if {(kind, _plain(str(sql))) for kind, sql in found} != {
            ("table", _plain(sql)) for sql in fmt.SCHEMA.split(";") if sql.strip()
        } or len(found) != fmt.SCHEMA.count(";"):
            meta.close()
            raise AMGError(f"{path} has other tables than those of an index: {MEND}.")
        return meta

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._rows, self._hashes = {}, None
        with self._lock:
            self._meta.close()


class Rows:
    """Rows of one scale over all shards, on the disk: (N, D) float16.

    ``rows[i]``, ``rows[a:b]`` and ``rows[ids]`` (an int array) read only these rows, as arrays. AMGError if
    a file was truncated after it was opened.
    """

    dtype = np.dtype("<f2")

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (int(self._starts[-1]), int(parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(key, (int, np.integer)):
            return np.asarray(self[np.array([key])][0])
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise ValueError("rows are sliced in steps of 1")
            return self._slice(start, max(start, stop))
        ids = np.asarray(key)
        if ids.ndim != 1:
            raise ValueError(f"ids must be (n,), not {ids.shape}")
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"ids must be in 0 .. {len(self) - 1}")
        for part in self._parts:
            check_mapped(part)
        if len(self._parts) == 1:
            return np.asarray(self._parts[0][ids])
        found = np.empty((len(ids), self.shape[1]), self.dtype)
        order = np.argsort(ids, kind="stable")  # so that each part is read once, from front to back
        ends = np.searchsorted(ids[order], self._starts)
        for part, start, begin, end in zip(self._parts, self._starts, ends, ends[1:], strict=False):
            if begin < end:
                places = order[begin:end]
                found[places] = part[ids[places] - start]
        return found

    def _slice(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for part, begin in zip(self._parts[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            check_mapped(part)
            pieces.append(part[max(start - begin, 0) : stop - begin])
        if not pieces:
            return np.empty((0, self.shape[1]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def check_mapped(values: np.ndarray) -> None:
    """AMGError if the file of a mapped array is now shorter.

    Reading beyond its end would kill the process (SIGBUS), so this is called before every read.
    """
    held = getattr(values, "_mmap", None)
    if not isinstance(values, np.memmap) or held is None:
        return
    if held.size() < values.offset + values.nbytes:
        raise AMGError(f"{values.filename} was cut while it was open: {MEND}.")


def check_file(path: Path, entry: fmt.FileEntry) -> None:
    """Check the size, then the hash of a file. Raises AMGError with its name."""
    _check_size(path, entry)
    try:
        if fmt.digest(path) != entry:
            raise AMGError(f"{path} was altered after the index was built: {MEND}.")
    except OSError as error:
        raise AMGError(f"{path} cannot be read ({error.strerror or error}): {MEND}.") from error


def flush(path: Path) -> None:
    """fsync a file, or a folder if the system supports it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_new(folder: Path) -> None:
    """fsync a folder and its parent, so that the folder itself survives a power failure."""
    flush(folder)
    with suppress(PermissionError):  # one may write into a folder that one may not read
        flush(folder.parent)


def _check_size(path: Path, entry: fmt.FileEntry) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise AMGError(f"{path} is missing: {MEND}.") from None
    except OSError as error:
        raise AMGError(f"{path} cannot be read ({error.strerror or error}): {MEND}.") from error
    if size != entry.size:
        word = "truncated" if size < entry.size else "too long"
        raise AMGError(f"{path} is {word} ({size} of {entry.size} bytes): {MEND}.")


def _mapped(path: Path, dtype: str, count: int, dim: int) -> np.memmap:
    """Map (count, dim) values. The header must be, byte for byte, that of `npy_header`."""
    try:
        with open(path, "rb") as file:
            header = file.read(fmt.HEADER_BYTES)
        size = path.stat().st_size
        itemsize = np.dtype(dtype).itemsize
        if header != fmt.npy_header(dtype, count, dim):
            raise AMGError(f"{path} does not hold {count} x {dim} {np.dtype(dtype)}: {MEND}.")
        if size != fmt.HEADER_BYTES + itemsize * count * dim:
            raise AMGError(f"{path} has not the size of {count} x {dim} values: {MEND}.")
        return np.memmap(path, dtype, "r", fmt.HEADER_BYTES, (count, dim))
    except (OSError, ValueError) as error:
        raise AMGError(f"{path} cannot be read ({error}): {MEND}.") from error


def _plain(sql: str) -> str:
    """An SQL statement without insignificant blanks."""
    return re.sub(r"\s*([(),])\s*", r"\1", " ".join(sql.split()))


def _uri(path: Path) -> str:
    """SQLite URI of a file that nobody writes to, without lock or journal. The path may be any."""
    name = path.absolute().as_posix()
    raw = os.fsencode(name if name.startswith("/") else "/" + name)
    return f"file://{quote(raw, safe='/:')}?mode=ro&immutable=1"
