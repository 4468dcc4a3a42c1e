"""Build an index from a folder of pictures, so that a crash leaves the old index or the new one.

Everything is written into a hidden sibling folder, flushed to the disk, and swapped in by two
renames. Between the two a reader finds the old index under its hidden name (`reader.Index.open`
looks there), so at every moment one whole index can be opened. Nothing half-built is ever visible.

On POSIX a program that has the old index open keeps reading the old one. On Windows a folder with
an open file in it cannot be renamed: the swap is tried for a few seconds, then the build ends with
an error that says so, and the old index stays.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from ..descriptors.base import Descriptor, DescriptorSpec
from ..errors import AMGError
from . import format as fmt
from .folder import Captions, Picture, Unreadable, list_pictures, load_picture, storable
from .search import plain_arithmetic

BATCH_PIXELS = 1 << 24  # a batch holds no more than this many pixels (or one larger picture)
SWAP_SECONDS = 5.0  # how long to wait for a virus scanner or a reader to let go of a folder
LEFT_BY_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes
    ----------
    count : int
        Rows written.
    skipped : list of (source, reason)
        Pictures that are NOT in the index, and why.
    seconds : float
    path : Path
        The index folder.
    hash : str
        SHA-256 (hex) of its manifest: `Index.hash`.
    notes : list of str
        Caption files that could not be used, wholly or in part.
    """

    count: int
    skipped: list[tuple[str, str]]
    seconds: float
    path: Path
    hash: str
    notes: list[str] = field(default_factory=list)


def build(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    descriptor: Descriptor,
    *,
    progress: Progress | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
) -> BuildReport:
    """Index every picture below `folder` into the index folder `out`, replacing an index there.

    Rows are in the order of the sorted relative POSIX paths. Memory does not grow with the
    pictures, only with their names. Draws nothing from the global random generator.

    Parameters
    ----------
    folder : path
        Searched recursively; see `folder.load_picture` and `folder.Captions` for what is read.
    out : path
        Must be absent, empty, or an index: anything else is refused, never deleted.
    descriptor : Descriptor
        Moved to `device`.
    progress : callable, optional
        ``progress(done, total, source)`` after each picture was read. What it raises propagates
        and leaves `out` as it was.
    batch : int
        Pictures embedded at once, at most.

    Raises
    ------
    AMGError
        No folder, no picture file, no readable picture, `out` is something else or is being
        built right now, or the disk refuses.
    """
    started = time.perf_counter()
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    folder, target = Path(folder), fmt.real(out)
    if not target.name:
        raise AMGError(f"{target} cannot be an index: give a folder below it.")
    sources, skipped = list_pictures(folder)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        with _writing(target):
            _tidy(target)
        _refuse_foreign(target)
        work = fmt.build_folder(target)
        try:
            with _writing(target):
                work.mkdir()
            captions = Captions(folder)
            with torch.inference_mode(False):
                descriptor = descriptor.to(device)
            with closing(_Store(work, target, descriptor.spec)) as store:
                for group in _batches(folder, sources, skipped, progress, batch):
                    store.add(group, captions, _embed(group, descriptor, device), skipped)
                if not store.count:
                    raise AMGError(_nothing_readable(folder, skipped))
                manifest = store.finish()
            with _writing(target):
                index_hash = _seal(work, manifest)
            _refuse_foreign(target)  # again: a build is long, and what is replaced is deleted
            with _writing(target):
                _swap(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return BuildReport(
        count=manifest.count,
        skipped=sorted(skipped),
        seconds=time.perf_counter() - started,
        path=Path(out),
        hash=index_hash,
        notes=captions.notes,
    )


def _batches(
    folder: Path,
    sources: list[str],
    skipped: list[tuple[str, str]],
    progress: Progress | None,
    batch: int,
) -> Iterator[list[Picture]]:
    """Readable pictures in order, a few at a time; the others go to `skipped`."""
    group: list[Picture] = []
    pixels = 0
    for done, source in enumerate(sources, 1):
        try:
            picture = load_picture(folder / source, source)
        except Unreadable as error:
            skipped.append((source, str(error)))
        else:
            area = picture.size[0] * picture.size[1]
            if group and (len(group) == batch or pixels + area > BATCH_PIXELS):
                yield group
                group, pixels = [], 0
            group.append(picture)
            pixels += area
        if progress is not None:
            progress(done, len(sources), source)
    if group:
        yield group


def _embed(
    group: list[Picture], descriptor: Descriptor, device: torch.device | str
) -> dict[int, np.ndarray]:
    """Scale -> (len(group), D) float32. Pictures of one size are embedded together."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for place, picture in enumerate(group):
        sizes.setdefault(picture.size, []).append(place)
    result: dict[int, np.ndarray] = {}
    with plain_arithmetic(device):
        for places in sizes.values():
            stack = np.stack([group[place].pixels for place in places])
            pictures = torch.from_numpy(stack).to(device).permute(0, 3, 1, 2).float() / 255
            for scale in descriptor.spec.scales:
                rows = descriptor.embed(pictures, scale).float().cpu().numpy()
                if scale not in result:
                    result[scale] = np.empty((len(group), rows.shape[1]), np.float32)
                result[scale][places] = rows
    return result


class _Store:
    """The data files in the making: one open row file a scale, and the database."""

    def __init__(self, work: Path, target: Path, spec: DescriptorSpec) -> None:
        self.work, self.target, self.spec = work, target, spec
        self.count = 0
        self.dims: dict[int, int] = {}
        self._rows: dict[int, object] = {}
        with _writing(target):
            self._meta = sqlite3.connect(work / fmt.META)
            # No journal: the whole folder is thrown away unless the build ends well.
            self._meta.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
            self._meta.executescript(fmt.SCHEMA)

    def add(
        self,
        group: list[Picture],
        captions: Captions,
        embeddings: dict[int, np.ndarray],
        skipped: list[tuple[str, str]],
    ) -> None:
        """Append the pictures whose embeddings float16 can hold; the others go to `skipped`."""
        with np.errstate(over="ignore"):
            halves = {scale: rows.astype("<f2") for scale, rows in embeddings.items()}
        good = np.logical_and.reduce([np.isfinite(rows).all(1) for rows in halves.values()])
        skipped.extend(
            (picture.source, "the descriptor gave values that are not finite")
            for picture, kept in zip(group, good, strict=True)
            if not kept
        )
        kept = [picture for picture, fine in zip(group, good, strict=True) if fine]
        texts = [captions.get(picture.source) for picture in kept]
        small = [_thumbnail(picture.pixels) for picture in kept]
        ids = range(self.count, self.count + len(kept))
        with _writing(self.target):
            for scale, rows in halves.items():
                self._file(scale, rows.shape[1]).write(rows[good].tobytes())
            self._meta.executemany(
                "INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (i, storable(picture.source), text, picture.sha256, *picture.size)
                    for i, picture, text in zip(ids, kept, texts, strict=True)
                ],
            )
            self._meta.executemany(
                "INSERT INTO thumbnails VALUES (?, ?)", zip(ids, small, strict=True)
            )
            self._meta.commit()
        self.count += len(kept)

    def _file(self, scale: int, dim: int):
        if scale not in self._rows:
            self._rows[scale] = open(self.work / fmt.rows_name(scale), "wb")  # noqa: SIM115
            self._rows[scale].write(fmt.rows_header(0, dim))
            self.dims[scale] = dim
        if self.dims[scale] != dim:
            raise ValueError(f"{self.spec.id} gave {self.dims[scale]}, then {dim} dimensions")
        return self._rows[scale]

    def finish(self) -> fmt.Manifest:
        """Put the final count into the headers, close, and hash."""
        with _writing(self.target):
            for scale, file in self._rows.items():
                file.seek(0)
                file.write(fmt.rows_header(self.count, self.dims[scale]))
            self.close()
            names = [fmt.META, *map(fmt.rows_name, self.spec.scales)]
            return fmt.Manifest(
                spec=self.spec,
                count=self.count,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                dims={scale: self.dims[scale] for scale in self.spec.scales},
                files={name: fmt.digest(self.work / name) for name in names},
            )

    def close(self) -> None:
        """Safe to call twice."""
        for file in self._rows.values():
            file.close()
        self._meta.close()


def _thumbnail(pixels: np.ndarray) -> bytes:
    """Longest side at most THUMBNAIL_SIDE px, never enlarged; WebP, or JPEG without it."""
    from PIL import Image, features

    image = Image.fromarray(pixels)
    image.thumbnail((fmt.THUMBNAIL_SIDE, fmt.THUMBNAIL_SIDE))
    file = BytesIO()
    image.save(file, "WEBP" if features.check("webp") else "JPEG", quality=85)
    return file.getvalue()


def _nothing_readable(folder: Path, skipped: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{source}: {reason}" for source, reason in sorted(skipped)[:3])
    return (
        f"No readable picture in {folder} ({len(skipped)} skipped: {shown}"
        f"{'; …' if len(skipped) > 3 else ''}): replace the damaged files, or give another folder."
    )


def _seal(work: Path, manifest: fmt.Manifest) -> str:
    """Write the manifest, flush every file to the disk, return the index hash."""
    data = fmt.dump_manifest(manifest)
    (work / fmt.MANIFEST).write_bytes(data)
    for path in work.iterdir():
        _flush(path)
    _flush(work)
    return hashlib.sha256(data).hexdigest()


def _flush(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(work: Path, target: Path) -> None:
    """Put the finished folder in the place of `target`. Ends with the old or the new one there."""
    old = fmt.old_folder(target)
    try:
        if target.exists():
            _rename(target, old)
        _rename(work, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _rename(source: Path, to: Path) -> None:
    """os.rename that waits for others to let go (Windows)."""
    until = time.monotonic() + SWAP_SECONDS
    while True:
        try:
            return os.rename(source, to)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.1)


def _tidy(target: Path) -> None:
    """Mend what a killed build left: a half-done swap, a half-built folder. Call under the lock."""
    old, work = fmt.old_folder(target), fmt.build_folder(target)
    if old.exists() and not target.exists():
        os.rename(old, target)
    for leftover in (old, work):
        if leftover.exists():
            shutil.rmtree(leftover)


def _refuse_foreign(target: Path) -> None:
    """A build replaces an index, and nothing else that a person may have in that place."""
    if not target.exists():
        return
    if not target.is_dir():
        raise AMGError(f"{target} is a file: give a folder for the index, new or an index.")
    names = {entry.name for entry in target.iterdir()} - LEFT_BY_SYSTEMS
    ours = {name for name in names if name in (fmt.MANIFEST, fmt.META) or _is_rows(name)}
    if names - ours:
        raise AMGError(
            f"{target} holds other files ({', '.join(sorted(names - ours)[:3])}) and will not be "
            f"replaced: give another folder for the index, or move them away."
        )
    if names and fmt.META not in names and not any(map(_is_rows, names)):
        raise AMGError(f"{target} is not an index and will not be replaced: give another folder.")


def _is_rows(name: str) -> bool:
    return name.startswith("rows.") and name.endswith(".f16.npy")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Disk errors in the block become an AMGError that names the index."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        held = os.name == "nt" and isinstance(error, PermissionError)
        step = (
            "close the programs that have this index open, then build again"
            if held
            else "free space or choose a folder you may write to, then build again"
        )
        raise AMGError(f"Cannot write the index {target} ({error}): {step}.") from error


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One build of an index at a time. The system lets go of the lock when a process dies."""
    path = fmt.lock_file(target)
    with _writing(target):
        file = _take(path)
    if file is None:
        raise AMGError(f"Another build of the index {target} is running: wait until it has ended.")
    try:
        yield
    finally:
        if os.name == "nt":
            file.close()
        with suppress(OSError):  # another build holds it already (Windows)
            path.unlink()
        file.close()


def _take(path: Path):
    """The locked file, open; None where another process has it."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 (held until the build ends)
        try:
            _system_lock(file)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:  # a file system without locks: go on without
            if os.name == "nt" or error.errno == errno.EACCES:
                file.close()
                return None
        try:  # the one we locked may have been removed by the build that ended just now
            if os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _system_lock(file) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
