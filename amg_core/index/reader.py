"""Opens an index folder and reads rows, captions and pictures by id. Several indexes can be read as one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..descriptors.base import DescriptorSpec
from ..errors import AMGError
from ..files import brief, open_regular, read_bounded, there
from . import format as fmt
from .digests import Digests
from .own import is_link
from .shard import MEND, Record, Rows, Shard

if TYPE_CHECKING:
    from PIL import Image

VERIFIED = "verified.json"
Stamp = list[int | str]  # see `_Verified`
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alias:
    """A further file with the same bytes as picture `id`."""

    id: int
    source: str
    caption: str


class Index:
    """An open index, made by `Index.open`. It may be used from several threads at once.

    Attributes
    ----------
    path : Path
        The absolute path of the folder.
    name : str
        The last part of the path.
    count : int
        Rows N; ids are 0 .. N-1.
    spec : DescriptorSpec
        The descriptor that made the rows.
    hash : str
        SHA-256 (hex) of the manifest, which identifies the content.
    created : str
        ISO 8601, UTC.
    muted : dict of int to str
        Excluded rows, which a search never returns, with the reason.
    cache : Path or None
        Folder for data that can be computed again. None if it cannot be written.
    members : tuple of Index
        The index itself, or the combined indexes in the order of their rows.
    """

    def __init__(self, path: Path, manifest: fmt.Manifest, shards: Sequence[Shard]) -> None:
        self.path, self.name, self.hash = path, path.name, fmt.identity(manifest)
        self.count, self.spec, self.created = manifest.count, manifest.spec, manifest.created
        self.manifest, self.shards = manifest, tuple(shards)
        self.members: tuple[Index, ...] = (self,)
        self.cache: Path | None = None
        self._rows = _joined(self.spec, self.shards)
        self._starts = _starts(shard.count for shard in self.shards)
        self.muted = self._ids_of(manifest.muted)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], descriptor_spec: DescriptorSpec | None = None
    ) -> Index:
        """Open the index in folder `path`, read-only.

        Sizes and headers of all files are checked. The content (SHA-256) is checked of files that were
        written after their last check: a copied or altered index is read through once, which takes about
        a second for a gigabyte. `verify` always reads everything. If another program changes the index
        meanwhile, the result is either the old or the new one.

        Raises
        ------
        AMGError
            There is no index, a file is missing, truncated or altered, or `descriptor_spec` is given and
            is not that of the index. The message names the file and the next step.
        """
        path = Path(os.path.abspath(path))
        for attempt in range(20):
            time.sleep(0.01 * attempt)
            before = _manifest_bytes(path)
            try:
                index = cls._open(path, before, descriptor_spec)
            except AMGError:
                if _manifest_bytes(path) == before:
                    raise
            else:
                return index
        raise AMGError(f"{path} keeps changing while it is opened: wait until that has ended.")

    @classmethod
    def _open(cls, path: Path, data: bytes | None, spec: DescriptorSpec | None) -> Index:
        if data is None:
            raise _absent(path)
        manifest = fmt.parse_manifest(data, path / fmt.MANIFEST)
        check_descriptor(path, manifest.spec, spec)
        shards: list[Shard] = []
        try:
            for entry in manifest.shards:
                shards.append(Shard(path / entry.path, entry, dict(manifest.dims)))
            cache = _cache_folder(path)
            sound = _Verified(cache)
            for shard in shards:
                sound.check(shard)
            sound.save()
            index = cls(path, manifest, shards)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        index.cache = cache
        return index

    @classmethod
    def combine(cls, indexes: Sequence[Index]) -> Index:
        """Several open indexes as one. Rows are in the order of the indexes.

        A picture that is excluded (muted) in one of them is excluded in all. Closing the result closes
        them.

        Raises
        ------
        AMGError
            The indexes have different descriptors, or there are none.
        """
        if not indexes:
            raise AMGError("No index to combine: give at least one.")
        first = indexes[0]
        if len(indexes) == 1:
            return first
        for other in indexes[1:]:
            check_descriptor(other.path, other.spec, first.spec)
        muted = {k: v for index in indexes for k, v in index.manifest.muted.items()}
        rules = {index.manifest.captions for index in indexes}
        manifest = fmt.Manifest(
            spec=first.spec,
            dims=first.manifest.dims,
            shards=[entry for index in indexes for entry in index.manifest.shards],
            created=max(index.created for index in indexes),
            muted=muted,
            captions=rules.pop() if len(rules) == 1 else None,
        )
        combined = cls(first.path, manifest, [s for index in indexes for s in index.shards])
        combined.name = " + ".join(index.name for index in indexes)
        combined.members = tuple(member for index in indexes for member in index.members)
        return combined

    def check_descriptor(self, spec: DescriptorSpec) -> None:
        """Raise AMGError, with both names, unless `spec` is the descriptor of this index."""
        check_descriptor(self.path, self.spec, spec)

    def rows(self, scale: int) -> Rows:
        """The rows at one of `spec.scales`, (N, D) float16 on the disk. ValueError for another scale."""
        self._need_open()
        if scale not in self._rows:
            raise ValueError(f"index {self.name} has no scale {scale}, only {self.spec.scales}")
        return self._rows[scale]

    def rows_key(self, scale: int) -> str:
        """SHA-256 (hex) that identifies the rows of one scale, whatever else in the index changes."""
        name = fmt.rows_name(scale)
        digests = "".join(shard.entry.files[name].sha256 for shard in self.shards)
        return hashlib.sha256(digests.encode()).hexdigest()

    def caption(self, i: int) -> str:
        """Caption of row `i`, "" if it has none. IndexError outside 0 .. N-1."""
        return self.record(i).caption

    def captions(self, i: int) -> list[str]:
        """Captions of row `i` and of further files with the same bytes, except empty ones."""
        record = self.record(i)
        further = [c for shard in self.shards for c in shard.aliases_of(record.sha256)]
        return [caption for caption in (record.caption, *further) if caption]

    def source(self, i: int) -> str:
        """Name of picture `i` in its source, with slashes."""
        return self.record(i).source

    def record(self, i: int) -> Record:
        """The record of picture `i`."""
        shard, row = self._at(i)
        return shard.record(row)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records of all rows from id `start` on, in order of ids, read as needed."""
        self._need_open()
        for first, shard in zip(self._starts, self.shards, strict=False):
            if start < first + shard.count:
                yield from shard.records(max(0, start - first))

    def aliases(self) -> Iterator[Alias]:
        """Further files of pictures that are there under another name, read as needed."""
        self._need_open()
        start = 0
        for member in self.members:
            for shard in member.shards:
                for sha256, source, caption in shard.aliases():
                    if (row := member.find(sha256)) is not None:
                        yield Alias(start + row, source, caption)
            start += member.count

    def find(self, sha256: str) -> int | None:
        """Id of the picture whose file has this SHA-256 (hex), or None."""
        place = self.digests.find(bytes.fromhex(sha256))
        return None if place is None else self._starts[place[0]] + place[1]

    def thumbnail(self, i: int) -> Image.Image:
        """Picture `i` in RGB, longest side at most 256 px.

        Raises
        ------
        AMGError
            The index was made from embeddings without pictures, or the data is damaged.
        """
        from PIL import Image

        shard, row = self._at(i)
        data = shard.thumbnail(row)
        if data is None:
            raise AMGError(
                f"Index {self.name} holds no picture of {brief(self.source(i))}: it was imported as "
                f"embeddings. Build it from the pictures to see and to check them."
            )
        try:
            with Image.open(BytesIO(data), formats=("WEBP", "JPEG")) as image:
                if max(image.size) > fmt.THUMBNAIL_SIDE:  # before it takes the memory
                    raise ValueError(f"it is {image.width} x {image.height}, too large for one")
                return image.convert("RGB")
        except Exception as error:  # decoders can raise anything on damaged data
            raise AMGError(
                f"Thumbnail {row} in {shard.folder / fmt.META} cannot be decoded ({brief(error)}): "
                f"{MEND}, or update Pillow."
            ) from error

    @cached_property
    def digests(self) -> Digests:
        """Places (shard, row) of the pictures by the hashes of their files."""
        digests = Digests()
        for number, shard in enumerate(self.shards):
            digests.add(shard.hashes, number)
        return digests

    def verify(self) -> None:
        """Read and hash every file. Raises AMGError with the name of the first that was altered."""
        self._need_open()
        for shard in self.shards:
            shard.check()

    def close(self) -> None:
        """Close the files, which Windows cannot remove before. May be called twice."""
        self._rows = {}
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.count

    def _need_open(self) -> None:
        if not self._rows:
            raise ValueError(f"index {self.name} is closed")

    def _at(self, i: int) -> tuple[Shard, int]:
        self._need_open()
        i = int(i)
        if not 0 <= i < self.count:
            raise IndexError(f"index {self.name} has ids 0 to {self.count - 1}, not {i}")
        number = bisect_right(self._starts, i) - 1
        return self.shards[number], i - self._starts[number]

    def _ids_of(self, muted: Mapping[str, str]) -> dict[int, str]:
        """Ids of all rows with these hashes (a combined index can hold a picture twice)."""
        if not muted:
            return {}
        wanted = Digests()
        wanted.add(np.array([list(bytes.fromhex(key)) for key in muted], np.uint8), 0)
        ids = {}
        for start, shard in zip(self._starts, self.shards, strict=False):
            for row in np.flatnonzero(wanted.find_all(shard.hashes)).tolist():
                ids[start + row] = muted[shard.hashes[row].tobytes().hex()]
        return ids


class _Verified:
    """Remembers which files were checked, by a stamp of each.

    A stamp is (size, time of the last write, time of the last change, file number, SHA-256). The system
    sets the time of the change and the number, so a copy always has others, and is read through once. A
    file that was written a moment ago gets no stamp, because it could be written again without a visible
    change of its time. If stamps cannot be stored, the index is read through at every opening.
    """

    MOMENT = 2_000_000_000  # ns; FAT counts time in steps of 2 s

    def __init__(self, cache: Path | None) -> None:
        self.path = cache / VERIFIED if cache else None
        self.stamps: dict[str, Stamp] = {}
        self.changed = False
        with suppress(OSError, ValueError, TypeError, RecursionError):
            if self.path:
                self.stamps = dict(json.loads(read_bounded(self.path, fmt.MAX_MANIFEST_BYTES)))

    def check(self, shard: Shard) -> None:
        """Raise AMGError if a file of the shard is damaged."""
        found = {
            f"{shard.entry.path}/{name}": (_touched(shard.folder / name), file.sha256)
            for name, file in shard.entry.files.items()
        }
        now: dict[str, Stamp] = {name: [*marks, sha256] for name, (marks, sha256) in found.items()}
        if any(self.stamps.get(name) != stamp for name, stamp in now.items()):
            shard.check()
            settled = time.time_ns() - self.MOMENT
            old = (name for name, (marks, _) in found.items() if max(marks[1:3]) < settled)
            self.stamps |= {name: now[name] for name in old}
            self.changed = True

    def save(self) -> None:
        if self.path is None or not self.changed:
            return
        with suppress(OSError):
            fresh = self.path.with_suffix(f".{os.getpid()}.tmp")
            fresh.write_text(json.dumps(self.stamps))
            os.replace(fresh, self.path)


def _touched(path: Path) -> tuple[int, int, int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise AMGError(f"{path} cannot be read ({error.strerror or error}): {MEND}.") from error
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _cache_folder(path: Path) -> Path | None:
    """The cache folder of the index at `path`, or None if it cannot be used."""
    cache = path / fmt.CACHE
    if is_link(cache):  # nothing is written or removed through a link
        log.warning("%s is a link and is not used: remove it, and it will be made again.", cache)
        return None
    with suppress(OSError):
        cache.mkdir(exist_ok=True)
    return cache if os.access(cache, os.W_OK) else None


def _joined(spec: DescriptorSpec, shards: Sequence[Shard]) -> dict[int, Rows]:
    return {scale: Rows([shard.rows(scale) for shard in shards]) for scale in spec.scales}


def _starts(counts: Iterator[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def check_descriptor(path: Path, built_with: DescriptorSpec, wanted: DescriptorSpec | None) -> None:
    """Raise AMGError, with both names, unless `wanted` is None or equal to `built_with`."""
    if wanted is not None and wanted != built_with:
        raise AMGError(
            f"Index {path} was built with descriptor {fmt.describe(built_with)}, but "
            f"{fmt.describe(wanted)} is in use: rebuild the index with it, or choose descriptor "
            f"{brief(built_with.id)}, which made the index."
        )


def _manifest_bytes(path: Path) -> bytes | None:
    """Content of the manifest, or None if it cannot be read."""
    try:
        with open_regular(path / fmt.MANIFEST) as file:
            return file.read(fmt.MAX_MANIFEST_BYTES + 1)
    except OSError:
        return None


def _absent(path: Path) -> AMGError:
    manifest = path / fmt.MANIFEST
    if not there(path):
        return AMGError(
            f"There is no index at {path}: check the path, or build one "
            f"(python -m index_tools build PICTURES {path.name})."
        )
    if not path.is_dir():
        return AMGError(f"{path} is a file: give the index folder, which holds {fmt.MANIFEST}.")
    if there(manifest):
        return AMGError(f"{manifest} cannot be read: check its permissions.")
    if (path / fmt.BUILD).exists():
        return AMGError(
            f"{path} holds a build that was interrupted: run it again, and it continues."
        )
    return AMGError(
        f"{manifest} is missing, so {path} is not an index or a damaged one: give another folder, "
        f"or build the index again."
    )
