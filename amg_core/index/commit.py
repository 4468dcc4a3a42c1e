"""Changes an index folder in such a way that every reader finds either the old index or the new one.

New shards are written into the hidden build folder, flushed to the disk, and moved into place under names
that depend on their content. Then the manifest is replaced, which is atomic. Then shards that it no longer
names are removed, but nothing that this program did not make (`own`). A program that has the old index
open can go on reading it. On POSIX, removed files stay readable while they are open. On Windows, they
cannot be removed and stay until the next change.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from ..errors import AMGError
from . import format as fmt
from . import own
from .shard import check_file, flush, flush_new

OURS = frozenset({fmt.MANIFEST, fmt.SHARDS, fmt.CACHE, fmt.BUILD})
PATIENCE = 5.0  # seconds to wait until a virus scanner or reader closes a file (Windows)


@contextmanager
def changing(index: Path) -> Iterator[Path]:
    """A context that locks the index for one change. Yields the build folder, which survives a crash.

    Raises
    ------
    AMGError
        Another change is running, `index` is no index, or the disk cannot be written.
    """
    if not index.name:
        raise AMGError(f"{index} cannot be an index: give a folder below it.")
    with writing(index):
        index.parent.mkdir(parents=True, exist_ok=True)
    with _locked(index):
        with writing(index):
            there = index.exists()
            refuse_foreign(index)
            own.refuse_links(index)
        try:
            yield index / fmt.BUILD
        except BaseException:  # free the space; embedded pictures are kept for the next attempt
            own.remove(index / fmt.BUILD, own.DRAFTS)
            raise
        finally:
            if not there:  # the folder was made for an index that failed
                with suppress(OSError):
                    index.rmdir()


def publish(index: Path, manifest: fmt.Manifest, made: dict[str, Path]) -> None:
    """Make `manifest` the current one. `made` maps the path of a shard to the folder with its files."""
    entries = {entry.path: entry for entry in manifest.shards}
    with writing(index):
        (index / fmt.SHARDS).mkdir(exist_ok=True)
        for path, folder in made.items():
            place, entry = index / path, entries[path]
            if place.exists() and _sound(place, entry):  # the index has it already
                continue
            own.make_way(place, own.SHARD)
            _patiently(os.rename, folder, place)
        flush(index / fmt.SHARDS)
        flush(index)
        fresh = index / fmt.BUILD / fmt.MANIFEST
        fresh.parent.mkdir(exist_ok=True)
        fresh.write_bytes(fmt.dump_manifest(manifest))
        flush(fresh)
        _patiently(os.replace, fresh, index / fmt.MANIFEST)
        flush_new(index)
    _collect(index, manifest)


def _sound(place: Path, entry: fmt.ShardEntry) -> bool:
    try:
        for name, file in entry.files.items():
            check_file(place / name, file)
    except AMGError:
        return False
    return True


def now() -> str:
    """The time in ISO 8601, UTC, with microseconds, so that two manifests always differ."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _collect(index: Path, manifest: fmt.Manifest) -> None:
    """Remove shards that are no longer used. Files that are open stay until the next change (Windows)."""
    own.remove(index / fmt.BUILD, own.DRAFTS)
    kept = {shard.path.rpartition("/")[2] for shard in manifest.shards}
    own.clear(index / fmt.SHARDS, own.SHARDS, kept)


def forget_build(index: Path) -> None:
    """Remove the embeddings of a build, when they are in the index or not needed."""
    own.remove(index / fmt.BUILD, own.BUILD)


def refuse_foreign(index: Path) -> None:
    """AMGError if `index` is a file or a folder with other files, which must not be touched."""
    if not index.exists():
        return
    if not index.is_dir():
        raise AMGError(f"{index} is a file: give a folder for the index, new or an index.")
    names = {entry.name for entry in index.iterdir()} - own.LEFT_BY_SYSTEMS
    if others := sorted(names - OURS):
        raise AMGError(
            f"{index} holds other files ({', '.join(others[:3])}) and will not be replaced: give "
            f"another folder for the index, or move them away."
        )
    if names and not names & {fmt.SHARDS, fmt.BUILD}:
        raise AMGError(f"{index} is not an index and will not be replaced: give another folder.")


def refuse_index(index: Path) -> None:
    """AMGError if `index` is an index. Replacing all of it needs the user's consent."""
    if (index / fmt.MANIFEST).exists():
        raise AMGError(
            f"{index} is an index already, and all of it would be replaced: give a new folder, or "
            f"confirm with --replace."
        )


@contextmanager
def writing(index: Path) -> Iterator[None]:
    """A context that turns disk errors into an AMGError with the name of the index."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise AMGError(
            f"Cannot write the index {index} ({error}): {_step(index, error)}."
        ) from error


FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


def _step(index: Path, error: OSError | sqlite3.Error) -> str:
    """The next step for the user after a disk error."""
    if os.name == "nt" and isinstance(error, PermissionError):
        return "close the programs that have this index open, then try again"
    number = getattr(error, "errno", None)
    if number in FULL or "is full" in str(error):
        build = index / fmt.BUILD
        held = own.size(build)
        if not held:
            return "the disk is full; free space, then try again"
        return (
            f"the disk is full; free space, then try again. {build} holds {held / 2**20:.1f} MiB of a "
            f"build that can be continued: delete that folder to give it up"
        )
    if number in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
        return "another file is in its place; move it away or choose another folder"
    return "choose a folder you may write to, or free space, then try again"


def _patiently(move: Callable[[Path, Path], None], source: Path, to: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return move(source, to)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.1)


@contextmanager
def _locked(index: Path) -> Iterator[None]:
    """A context with a lock on the index. The system releases it when the process ends."""
    path = fmt.lock_file(index)
    with writing(index):
        file = _take(path)
    if file is None:
        raise AMGError(f"The index {index} is being built or changed: wait until that is finished.")
    try:
        yield
    finally:
        if os.name == "nt":
            file.close()
        with suppress(OSError):  # another change holds it already (Windows)
            path.unlink()
        file.close()


def _take(path: Path) -> BinaryIO | None:
    """The locked file, open, or None if another process has the lock."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 (held until the change ends)
        try:
            _system_lock(file)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:  # a file system without locks: continue without one
            if os.name == "nt" or error.errno == errno.EACCES:
                file.close()
                return None
        try:  # a change that just ended may have removed the locked file
            if os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _system_lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
