"""Open an index folder: everything is checked first, then rows, captions and pictures by id."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from ..descriptors.base import DescriptorSpec
from ..errors import AMGError
from . import format as fmt

if TYPE_CHECKING:
    from PIL import Image

MEND = "rebuild the index, or restore the folder from a backup"


class Index:
    """An open, verified index. Use `Index.open`; may be used from several threads at once.

    Attributes
    ----------
    path : Path
        The folder as it was asked for, absolute.
    name : str
        Its last part.
    count : int
        Rows N; ids are 0 .. N-1.
    spec : DescriptorSpec
        The descriptor that made the rows.
    hash : str
        SHA-256 (hex) of the manifest: names this very content.
    """

    def __init__(
        self,
        path: Path,
        manifest: fmt.Manifest,
        index_hash: str,
        rows: dict[int, np.memmap],
        meta: sqlite3.Connection,
    ) -> None:
        self.path, self.name, self.hash = path, path.name, index_hash
        self.count, self.spec, self.created = manifest.count, manifest.spec, manifest.created
        self._rows, self._meta, self._lock = rows, meta, threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike, descriptor_spec: DescriptorSpec | None = None) -> Index:
        """Open the index in folder `path`, read-only, and verify all of it.

        Reads every byte once (about a second a gigabyte). Safe while a build replaces the index:
        the result is wholly the old or wholly the new one.

        Raises
        ------
        AMGError
            No index there; a file missing, truncated or altered; or `descriptor_spec` is given
            and is not the one of the index. Names the file and the next step.
        """
        path = Path(os.path.abspath(path))
        for _ in range(5):
            place = _locate(path)
            before = _manifest_bytes(place)
            try:
                index = cls._open(path, place, before, descriptor_spec)
            except AMGError:
                if _unchanged(path, place, before):
                    raise
            else:
                if _unchanged(path, place, before):
                    return index
                index.close()
        raise AMGError(f"{path} keeps changing while it is opened: wait for the build to end.")

    @classmethod
    def _open(
        cls, path: Path, place: Path, data: bytes | None, spec: DescriptorSpec | None
    ) -> Index:
        """One attempt; `place` is where the folder lies at the moment."""
        if data is None:
            raise _absent(path, place)
        manifest = fmt.parse_manifest(data, place / fmt.MANIFEST)
        check_descriptor(path, manifest.spec, spec)
        for name, entry in manifest.files.items():
            _check_file(place / name, entry)
        try:
            rows = {
                scale: _open_rows(place / fmt.rows_name(scale), manifest.count, dim)
                for scale, dim in manifest.dims.items()
            }
        except (OSError, ValueError) as error:
            raise AMGError(f"Cannot read the rows of {path} ({error}): {MEND}.") from error
        meta = _open_meta(place / fmt.META, manifest.count)
        return cls(path, manifest, hashlib.sha256(data).hexdigest(), rows, meta)

    def check_descriptor(self, spec: DescriptorSpec) -> None:
        """AMGError, naming both, unless `spec` is the descriptor of this index."""
        check_descriptor(self.path, self.spec, spec)

    def rows(self, scale: int) -> np.memmap:
        """(N, D) float16, read-only, of one of `spec.scales`. ValueError for another scale."""
        self._need_open()
        if scale not in self._rows:
            raise ValueError(f"index {self.name} has no scale {scale}, only {self.spec.scales}")
        return self._rows[scale]

    def caption(self, i: int) -> str:
        """Caption of row `i`, "" where there is none. IndexError outside 0 .. N-1."""
        return self._one("SELECT caption FROM pictures WHERE id = ?", i)

    def source(self, i: int) -> str:
        """Path of picture `i`, relative to the folder the index was built from, with slashes."""
        return self._one("SELECT source FROM pictures WHERE id = ?", i)

    def thumbnail(self, i: int) -> Image.Image:
        """Picture `i` in RGB, longest side at most 256 px."""
        from PIL import Image

        data = self._one("SELECT data FROM thumbnails WHERE id = ?", i)
        try:
            with Image.open(BytesIO(data), formats=("WEBP", "JPEG")) as image:
                return image.convert("RGB")
        except (OSError, ValueError) as error:
            raise AMGError(
                f"Thumbnail {i} in {self.path / fmt.META} cannot be decoded ({error}): {MEND}, "
                f"or update Pillow."
            ) from error

    def close(self) -> None:
        """Let go of the files (Windows cannot replace them before). Safe to call twice."""
        self._rows = {}
        with self._lock:
            self._meta.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.count

    def _need_open(self) -> None:
        if not self._rows:
            raise ValueError(f"index {self.name} is closed")

    def _one(self, query: str, i: int):
        self._need_open()
        i = int(i)
        if not 0 <= i < self.count:
            raise IndexError(f"index {self.name} has ids 0 to {self.count - 1}, not {i}")
        try:
            with self._lock:
                (value,) = self._meta.execute(query, (i,)).fetchone()
        except sqlite3.Error as error:
            raise AMGError(f"Cannot read {self.path / fmt.META} ({error}): {MEND}.") from error
        return value


def check_descriptor(path: Path, built_with: DescriptorSpec, wanted: DescriptorSpec | None) -> None:
    """AMGError, naming both, unless `wanted` is None or equal to `built_with`."""
    if wanted is not None and wanted != built_with:
        raise AMGError(
            f"Index {path} was built with descriptor {fmt.describe(built_with)}, but "
            f"{fmt.describe(wanted)} is in use: rebuild the index with it, or choose descriptor "
            f"{built_with.id} as the index has it."
        )


def _locate(path: Path) -> Path:
    """The folder to read: `path`, or the hidden place of the old index in the midst of a swap."""
    old = fmt.old_folder(fmt.real(path)) if path.name else path
    return old if not path.exists() and old.exists() else path


def _manifest_bytes(place: Path) -> bytes | None:
    """Content of the manifest, None where there is none to read."""
    try:
        with open(place / fmt.MANIFEST, "rb") as file:
            return file.read(fmt.MAX_MANIFEST_BYTES)
    except OSError:
        return None


def _unchanged(path: Path, place: Path, before: bytes | None) -> bool:
    """False where a build has swapped the folder since `before` was read."""
    return _locate(path) == place and _manifest_bytes(place) == before


def _absent(path: Path, place: Path) -> AMGError:
    manifest = place / fmt.MANIFEST
    if not place.exists():
        return AMGError(
            f"There is no index at {path}: check the path, or build one "
            f"(python -m index_tools build PICTURES {path.name})."
        )
    if not place.is_dir():
        return AMGError(f"{path} is a file: give the index folder, which holds {fmt.MANIFEST}.")
    if manifest.exists():
        return AMGError(f"{manifest} cannot be read: check its permissions.")
    return AMGError(
        f"{manifest} is missing, so {path} is not an index or a damaged one: give another folder, "
        f"or build the index again."
    )


def _check_file(path: Path, entry: fmt.FileEntry) -> None:
    """Size first (cheap), then content."""
    try:
        size = path.stat().st_size
        if size != entry.size:
            word = "truncated" if size < entry.size else "too long"
            raise AMGError(f"{path} is {word} ({size} of {entry.size} bytes): {MEND}.")
        if fmt.digest(path) != entry:
            raise AMGError(f"{path} was altered after the index was built: {MEND}.")
    except FileNotFoundError:
        raise AMGError(f"{path} is missing: {MEND}.") from None
    except OSError as error:
        raise AMGError(f"{path} cannot be read ({error.strerror or error}): {MEND}.") from error


def _open_rows(path: Path, count: int, dim: int) -> np.memmap:
    """Map (count, dim) float16 rows; the header must be, byte for byte, the one a build writes."""
    header = fmt.rows_header(count, dim)
    with open(path, "rb") as file:
        if file.read(fmt.HEADER_BYTES) != header:
            raise AMGError(f"{path} does not hold {count} x {dim} float16 rows: {MEND}.")
    if path.stat().st_size != fmt.HEADER_BYTES + 2 * count * dim:
        raise AMGError(f"{path} has not the size of {count} x {dim} float16 rows: {MEND}.")
    rows = np.memmap(path, dtype="<f2", mode="r", offset=fmt.HEADER_BYTES, shape=(count, dim))
    step = max(1, (1 << 22) // dim)
    for start in range(0, count, step):
        bits = rows[start : start + step].view(np.uint16)
        if ((bits & 0x7C00) == 0x7C00).any():
            raise AMGError(f"{path} holds values that are not finite: {MEND}.")
    return rows


def _open_meta(path: Path, count: int) -> sqlite3.Connection:
    """Read-only connection, one for all threads (the index serialises its use)."""
    try:
        meta = sqlite3.connect(_uri(path), uri=True, check_same_thread=False)
    except sqlite3.Error as error:
        raise AMGError(f"{path} cannot be opened ({error}): {MEND}.") from error
    try:
        meta.execute("PRAGMA trusted_schema=OFF")
        for table, columns in (
            ("pictures", "id, source, caption, sha256, width, height"),
            ("thumbnails", "id, data"),
        ):
            meta.execute(f"SELECT {columns} FROM {table} LIMIT 1").fetchall()
            found = meta.execute(f"SELECT count(*), min(id), max(id) FROM {table}").fetchone()
            if found != (count, 0, count - 1):
                raise AMGError(f"{path} has not the {count} {table} of the manifest: {MEND}.")
    except BaseException as error:
        meta.close()
        if isinstance(error, sqlite3.Error):
            raise AMGError(f"{path} cannot be read ({error}): {MEND}.") from error
        raise
    return meta


def _uri(path: Path) -> str:
    """SQLite URI of a file nobody writes to: no lock, no journal; any characters in the path."""
    name = path.absolute().as_posix()
    raw = os.fsencode(name if name.startswith("/") else "/" + name)
    return f"file://{quote(raw, safe='/:')}?mode=ro&immutable=1"
