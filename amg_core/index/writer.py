"""Makes and changes indexes: build, add, remove, mute, merge.

Embeddings are never computed twice. A build first embeds pictures that are not in the index or in an
interrupted build, into parts that are sealed every few seconds (`_Store`). Then it writes the rows in the
order of the source. So a build that is killed at any time can be continued, and the result is, byte for
byte, the same as without the interruption. Another build after some pictures changed costs only the
difference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import astuple, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TextIO, TypeAlias

import numpy as np
import torch

from ..descriptors.base import Descriptor, DescriptorSpec
from ..errors import AMGError
from ..files import brief
from . import commit, own
from . import format as fmt
from .digests import Digests
from .embedding import Embedder, Prepared, Seen, read_ahead
from .reader import Index
from .shard import Record, Shard, ShardWriter, flush, flush_new
from .sources import Source, open_source

ROWS_PER_SHARD = 1 << 17
PART_ROWS, PART_SECONDS = 4096, 15.0  # a part of a build is sealed after this many rows or seconds
OPEN_PARTS = 16  # a slow build has thousands of parts, and a process may open 256 files (macOS)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Entry:
    """One file of an index: the SHA-256 (hex) of its picture, its name and its caption."""

    sha256: str
    source: str
    caption: str


Chosen = Callable[[Entry], bool]


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Attributes
    ----------
    count : int
        Number of pictures in the index.
    embedded, reused : int
        Number of files whose picture was embedded, and of those whose picture was there already: in the
        index, in an interrupted build, or under another name.
    skipped : list of (source, reason)
        Pictures that are NOT in the index, with the reason.
    seconds : float
    path : Path
        The index folder.
    hash : str
        `Index.hash`.
    files, captioned : int
        Number of usable files of the source, and of those that have a caption.
    duplicates : int
        Number of files of a build that hold the same picture as another of its files. 0 for `add`.
    removed : int
        Number of pictures that the index had before a build and has no more. 0 for `add`, and where the
        index before could not be read or has another descriptor.
    notes : list of str
        Files that were left out, caption files that could not be used or only in part, and pictures of
        which only an undamaged part is in the index.
    """

    count: int
    embedded: int
    reused: int
    skipped: list[tuple[str, str]]
    seconds: float
    path: Path
    hash: str
    files: int = 0
    captioned: int = 0
    notes: list[str] = field(default_factory=list)
    duplicates: int = 0
    removed: int = 0


def build(
    source: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    descriptor: Descriptor,
    *,
    progress: Progress | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    captions: fmt.CaptionRule | None = None,
) -> BuildReport:
    """Make the index folder `out` with exactly the pictures of `source`.

    An existing index is brought up to date: pictures that it has are not embedded again, pictures that
    `source` no longer has are removed, and excluded (muted) pictures stay excluded. For each picture only
    its name and 24 bytes are kept in memory. No global random generator is used.

    Parameters
    ----------
    source : path or Source
        `sources.open_source` says what can be read.
    out : path
        A new or empty folder, or an index. Anything else is refused, never deleted.
    descriptor : Descriptor
        It is moved to `device`.
    progress : callable, optional
        ``progress(done, total, source)`` for each file. `total` is 0 if it is not known. If it raises an
        exception, the build ends with that, and the next build continues.
    batch : int
        Pictures embedded at once.
    workers : int, optional
        Threads that read and decode.
    captions : CaptionRule, optional
        What is kept of captions. The manifest says it.

    Raises
    ------
    AMGError
        There are no pictures, `out` is something else or is being changed, or the disk cannot be written.
    """
    rule = captions or fmt.CaptionRule()
    run = _Run(source, out, descriptor, progress, batch, device, workers, rule)
    with commit.changing(run.target) as work, ExitStack() as opened:
        old = _old(run.target, descriptor.spec, opened)
        store = run.embed(work, old.shards if old else (), opened)
        muted = _muted(run.target)
        removed = _removed(old, store.digests, run.order()) if old else 0
        manifest = _publish(run.target, work, store, run.order(), (), muted, rule)
        commit.forget_build(run.target)
        return run.report(manifest, duplicates=run.files - manifest.count, removed=removed)


def add(
    source: str | os.PathLike[str] | Source,
    index: str | os.PathLike[str],
    descriptor: Descriptor,
    *,
    progress: Progress | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> BuildReport:
    """Add the pictures of `source` to an index. The parameters are those of `build`.

    Captions are treated as when the index was built.

    A picture that is there already, under any name, is not added again. Its new name or caption is stored
    as an alias. A changed file is added as a new picture, and the old one stays.

    Raises
    ------
    AMGError
        As `build`, and if `index` is missing or was made with another descriptor.
    """
    rule = fmt.CaptionRule()
    run = _Run(source, index, descriptor, progress, batch, device, workers, rule)
    with commit.changing(run.target) as work, ExitStack() as opened:
        old = opened.enter_context(Index.open(run.target, descriptor.spec))
        run.captions = old.manifest.captions or rule
        store = run.embed(work, old.shards, opened)
        kept = _kept(old.shards, store.stored)
        order = chain(_entries(old.shards[kept:]), run.order())
        manifest = _publish(
            run.target, work, store, order, old.shards[:kept], old.manifest.muted,
            old.manifest.captions,
        )  # fmt: skip
        commit.forget_build(run.target)
        return run.report(manifest)


def remove(index: str | os.PathLike[str], chosen: Chosen) -> int:
    """Remove the chosen files from an index. Returns their number.

    A picture is removed with its last file. Until then another of its files gives it its name and caption.
    Only shards that change are written again.

    Raises
    ------
    AMGError
        Nothing would be left, or the index cannot be read or written.
    """
    target = fmt.real(index)
    with commit.changing(target) as work, Index.open(target) as old:
        removed = 0
        changed: set[int] = set()
        gone: set[str] = set()  # pictures whose first file is removed
        for number, shard in enumerate(old.shards):
            first = {entry.sha256 for entry in _own(shard) if chosen(entry)}
            others = sum(chosen(entry) for entry in _others(shard))
            if first or others:
                changed.add(number)
            removed += len(first) + others
            gone |= first
        if not removed:
            return 0
        for number, shard in enumerate(old.shards):
            if any(e.sha256 in gone and not chosen(e) for e in _others(shard)):
                changed.add(number)  # the alias becomes the first
        order = _entries([old.shards[number] for number in sorted(changed)])
        kept = [shard for number, shard in enumerate(old.shards) if number not in changed]
        left_over = (entry for entry in order if not chosen(entry))
        pool = _Pool(old.spec, old.shards)
        _publish(target, work, pool, left_over, kept, old.manifest.muted, old.manifest.captions)
        return removed


def mute(index: str | os.PathLike[str], chosen: Chosen, reason: str) -> int:
    """Exclude (mute) the chosen pictures, such as one's own or public-domain art, from searches.

    They stay in the index, and stay excluded when it is built again. Returns their number.
    """
    target = fmt.real(index)
    with commit.changing(target), Index.open(target) as old:
        found = {entry.sha256 for entry in _entries(old.shards) if chosen(entry)}
        if found:
            _mark(target, old, dict(old.manifest.muted) | dict.fromkeys(found, reason))
        return len(found)


def unmute(index: str | os.PathLike[str], chosen: Chosen) -> int:
    """Undo `mute` for the chosen pictures. Returns their number."""
    target = fmt.real(index)
    with commit.changing(target), Index.open(target) as old:
        muted = dict(old.manifest.muted)
        found = {e.sha256 for e in _entries(old.shards) if e.sha256 in muted and chosen(e)}
        if found:
            _mark(target, old, {key: why for key, why in muted.items() if key not in found})
        return len(found)


def merge(
    indexes: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, replace: bool = False
) -> int:
    """Make one index from several. Returns its number of pictures.

    A picture of several indexes is stored once, with its further names and captions as aliases. A picture
    that is excluded (muted) in one is excluded in the result. Shards without duplicates are copied
    unchanged, so the parts of a large index can be built on many machines.

    Raises
    ------
    AMGError
        The descriptors differ, `out` is one of the indexes, an index (without `replace`) or something
        else, or the disk cannot be written.
    """
    target = fmt.real(out)
    if target in {fmt.real(index) for index in indexes}:
        raise AMGError(f"{target} is one of the indexes to merge: give another folder.")
    with commit.changing(target) as work, ExitStack() as opened:
        if not replace:
            commit.refuse_index(target)
        whole = Index.combine([opened.enter_context(Index.open(index)) for index in indexes])
        digests = Digests()
        kept: list[Shard] = []
        again: list[Shard] = []
        for number, shard in enumerate(whole.shards):
            (again if digests.find_all(shard.hashes).any() else kept).append(shard)
            digests.add(shard.hashes, number)
        pool = _Pool(whole.spec, whole.shards)
        manifest = _publish(
            target, work, pool, _entries(again), kept, whole.manifest.muted, whole.manifest.captions
        )
        return manifest.count


# ---------------------------------------------------------------- embed new pictures


class _Pool:
    """Pictures that are embedded already, by the hash of their file."""

    def __init__(self, spec: DescriptorSpec, shards: Iterable[Shard]) -> None:
        self.spec, self.digests = spec, Digests()
        self.shards: list[Shard] = []
        for shard in shards:
            self._enter(shard)

    def _enter(self, shard: Shard) -> None:
        self.digests.add(shard.hashes, len(self.shards))
        self.shards.append(shard)

    def _shard(self, number: int) -> Shard:
        return self.shards[number]

    def copy(self, entry: Entry, writer: ShardWriter) -> None:
        """Append the picture to `writer`, under the name and caption of `entry`."""
        place = self.digests.find(bytes.fromhex(entry.sha256))
        if place is None:
            raise KeyError(f"{entry.source} was never embedded")
        number, row = place
        shard = self._shard(number)
        there = shard.record(row)
        record = Record(entry.source, entry.caption, entry.sha256, there.width, there.height)
        rows = {scale: shard.rows(scale)[row] for scale in self.spec.scales}
        writer.add(record, rows, shard.thumbnail(row))

    def close(self) -> None:
        """Nothing of its own to let go of."""


class _Store(_Pool):
    """The pictures that a build has embedded so far, in sealed parts below the build folder.

    Complete parts of an interrupted build with the same descriptor are used. Only the hashes of the parts
    are kept in memory, and at most OPEN_PARTS are open at once.
    """

    def __init__(self, folder: Path, spec: DescriptorSpec, shards: Iterable[Shard]) -> None:
        super().__init__(spec, shards)
        self.folder, self._first = folder, len(self.shards)
        self._parts: list[tuple[Path, fmt.ShardEntry, dict[int, int]]] = []
        self._open: dict[int, Shard] = {}  # the least recently used first
        self._next = 0
        self._writer: ShardWriter | None = None
        self._unsealed: set[str] = set()
        self._started = 0.0
        for part in sorted(folder.glob("[0-9]" * 8)):
            self._next = max(self._next, int(part.name) + 1)
            if own.is_link(part):
                continue
            if not (part / fmt.MANIFEST).exists():  # incomplete: its pictures are embedded again
                own.remove(part, own.SHARD)
                continue
            # A part that cannot be used is kept, because the disk may be missing only for a moment.
            with suppress(AMGError, OSError):
                manifest = fmt.parse_manifest((part / fmt.MANIFEST).read_bytes(), part)
                if manifest.spec == spec:
                    self._take(part, manifest.shards[0], dict(manifest.dims), check=True)

    def _take(
        self, part: Path, entry: fmt.ShardEntry, dims: dict[int, int], check: bool = False
    ) -> None:
        """Add a sealed part."""
        with closing(Shard(part, entry, dims)) as shard:
            if check:
                shard.check()
            self.digests.add(shard.hashes, self._first + len(self._parts))
        self._parts.append((part, entry, dims))

    def _shard(self, number: int) -> Shard:
        if number < self._first:
            return self.shards[number]
        shard = self._open.pop(number, None)
        if shard is None:
            if len(self._open) >= OPEN_PARTS:
                self._open.pop(next(iter(self._open))).close()
            shard = Shard(*self._parts[number - self._first])
        self._open[number] = shard
        return shard

    @property
    def stored(self) -> int:
        """The number of pictures in the sealed parts."""
        return sum(entry.count for _, entry, _ in self._parts)

    def has(self, sha256: str) -> bool:
        """Whether the picture needs no embedding. May be called from several threads."""
        return sha256 in self._unsealed or self.digests.find(bytes.fromhex(sha256)) is not None

    def add(self, record: Record, rows: dict[int, np.ndarray], thumbnail: bytes | None) -> None:
        """Store a picture, as `ShardWriter.add`. Seals the part if it is large or old."""
        if self._writer is None:
            self._writer = ShardWriter(self.folder / f"{self._next:08}", self.spec)
            self._next, self._started = self._next + 1, time.monotonic()
        writer = self._writer
        try:
            writer.add(record, rows, thumbnail)
        except BaseException:  # a row may be half written, so this part cannot be used
            self._drop(writer)
            raise
        self._unsealed.add(record.sha256)
        old = time.monotonic() - self._started > PART_SECONDS
        if old or writer.count >= PART_ROWS:
            self.seal()

    def seal(self) -> None:
        """Make the stored pictures survive a crash. The manifest, written last, makes the part valid."""
        if self._writer is None:
            return
        writer = self._writer
        try:
            entry = writer.finish(_PART)
            manifest = fmt.Manifest(self.spec, dict(writer.dims), [entry], commit.now())
            fresh = writer.folder / own.MANIFEST_DRAFT
            fresh.write_bytes(fmt.dump_manifest(manifest))
            flush(fresh)
            os.replace(fresh, writer.folder / fmt.MANIFEST)
            flush_new(writer.folder)
        except BaseException:
            self._drop(writer)
            raise
        self._writer = None
        self._take(writer.folder, entry, dict(writer.dims))
        self._unsealed = set()

    def _drop(self, writer: ShardWriter) -> None:
        """Delete the part that is being written."""
        self._writer, self._unsealed = None, set()
        writer.close()
        own.remove(writer.folder, own.SHARD)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for shard in self._open.values():
            shard.close()
        self._open = {}


_Fresh: TypeAlias = "tuple[Seen, Prepared]"  # a file, and its picture that has to be embedded
_PART = f"{fmt.SHARDS}/{'0' * 16}"  # a placeholder, because a part has no place in an index yet


class _Run:
    """One reading of a source into an index."""

    def __init__(
        self,
        source: str | os.PathLike[str] | Source,
        out: str | os.PathLike[str],
        descriptor: Descriptor,
        progress: Progress | None,
        batch: int,
        device: torch.device | str,
        workers: int | None,
        captions: fmt.CaptionRule,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self.started = time.perf_counter()
        self.out, self.target = Path(out), fmt.real(out)
        if isinstance(source, (str, os.PathLike)):
            source = open_source(source)
        self.source = source
        self.descriptor, self.progress = descriptor, progress
        self.batch, self.device, self.workers = batch, device, workers
        self.skipped: list[tuple[str, str]] = []
        self.flaws: list[str] = []
        self.captions = captions
        self.files = self.captioned = self.embedded = self.done = self.cut = 0

    def embed(self, work: Path, shards: Sequence[Shard], opened: ExitStack) -> _Store:
        """Embed pictures that are not in `shards` or an earlier build, and record the order of all files.

        The store is closed with `opened`. AMGError if the source has no readable picture.
        """
        with commit.writing(self.target):
            work.mkdir(exist_ok=True, parents=True)
            store = _Store(work / own.PARTS, self.descriptor.spec, shards)
            opened.callback(store.close)
            self._order = work / own.ORDER
            order = open(self._order, "w", encoding="utf-8")  # noqa: SIM115
            opened.callback(_close, order)
            flush_new(work)
            flush_new(self.target)
        embedder = Embedder(self.descriptor, self.device, self.batch)
        try:
            for seen in self._embedded(store, embedder):
                with commit.writing(self.target):
                    caption = self.captions(seen.caption)
                    self.cut += len(self.captions.shaped(seen.caption)) > self.captions.length
                    order.write(json.dumps([seen.sha256, seen.source, caption]) + "\n")
            with commit.writing(self.target):
                store.seal()
                order.close()
            if not self.files:
                raise AMGError(self._nothing())
        except BaseException:
            with suppress(OSError, sqlite3.Error, AMGError):  # keep what was done
                store.seal()
            _close(order)
            if not store.stored:
                store.close()
                commit.forget_build(self.target)
            raise
        return store

    def _embedded(self, store: _Store, embedder: Embedder) -> Iterator[Seen]:
        """The usable files in order, each after its picture is in the store."""
        group: list[Seen] = []
        fresh: dict[str, _Fresh] = {}
        for seen in read_ahead(self.source, store.has, embedder.prepare, self.workers):
            group.append(seen)
            if seen.prepared is not None and not store.has(seen.sha256):
                fresh.setdefault(seen.sha256, (seen, seen.prepared))
            if len(group) >= _GROUP or embedder.full([p for _, p in fresh.values()]):
                yield from self._flush(group, fresh, store, embedder)
                group, fresh = [], {}
        yield from self._flush(group, fresh, store, embedder)

    def _flush(
        self, group: list[Seen], fresh: dict[str, _Fresh], store: _Store, embedder: Embedder
    ) -> Iterator[Seen]:
        new = list(fresh.values())
        rows = embedder([prepared for _, prepared in new]) if new else {}
        for place, (seen, _) in enumerate(new):
            own = {scale: values[place] for scale, values in rows.items()}
            if all(np.isfinite(row).all() for row in own.values()):
                record = Record("", "", seen.sha256, seen.width, seen.height)
                with commit.writing(self.target):
                    store.add(record, own, seen.thumbnail)
                self.embedded += 1
        for seen in group:
            self.done += 1
            if seen.problem:
                self.skipped.append((seen.source, seen.problem))
            elif store.has(seen.sha256):
                self.files += 1
                self.captioned += bool(seen.caption)
                if seen.flaw:
                    self.flaws.append(f"{seen.source}: {seen.flaw}")
                yield seen
            else:
                why = "the descriptor gave values that are not finite"
                self.skipped.append((seen.source, why))
            if self.progress is not None:
                self.progress(self.done, len(self.source), seen.source)

    def order(self) -> Iterator[Entry]:
        """All usable files of the source in order."""
        with open(self._order, encoding="utf-8") as lines:
            for line in lines:
                yield Entry(*json.loads(line))

    def report(self, manifest: fmt.Manifest, duplicates: int = 0, removed: int = 0) -> BuildReport:
        return BuildReport(
            count=manifest.count,
            embedded=self.embedded,
            reused=self.files - self.embedded,
            skipped=sorted([*self.skipped, *self.source.skipped]),
            seconds=time.perf_counter() - self.started,
            path=self.out,
            hash=fmt.identity(manifest),
            files=self.files,
            captioned=self.captioned,
            notes=[*self.source.notes, *self._cuts(), *self.flaws],
            duplicates=duplicates,
            removed=removed,
        )

    def _cuts(self) -> list[str]:
        if not self.cut:
            return []
        one = self.cut == 1
        return [
            f"{self.cut} caption{' is' if one else 's are'} longer than {self.captions.length} characters "
            f"and {'was' if one else 'were'} cut (build has --caption-lines and --caption-length)"
        ]

    def _nothing(self) -> str:
        skipped = sorted([*self.skipped, *self.source.skipped])
        if not skipped:
            return f"No pictures in {self.source.name}: put some there, or give another place."
        shown = "; ".join(f"{brief(source)}: {brief(reason)}" for source, reason in skipped[:3])
        return (
            f"No readable picture in {self.source.name} ({len(skipped)} skipped: {shown}"
            f"{'; …' if len(skipped) > 3 else ''}): replace the damaged files, or give another place."
        )


def _close(file: TextIO) -> None:
    """Close a file that is no longer needed, and ignore errors of writing."""
    with suppress(OSError):
        file.close()


_GROUP = 1024  # files that are noted at once, where few of them are new


# ---------------------------------------------------------------- write the rows in order


def _publish(
    target: Path,
    work: Path,
    pool: _Pool,
    order: Iterable[Entry],
    kept: Sequence[Shard],
    muted: Mapping[str, str],
    captions: fmt.CaptionRule | None,
) -> fmt.Manifest:
    """Make the index from the unchanged shards `kept`, followed by the files of `order`.

    The first file of a picture gives its row a name. The others become aliases.
    """
    with commit.writing(target), ExitStack() as opened:
        layout = _Layout(target, work, pool, kept)
        opened.callback(layout.close)
        for entry in order:
            layout.put(entry)
        layout.seal()
        if not layout.entries:
            raise AMGError(f"That would leave the index {target} empty: delete its folder instead.")
        if layout.early:  # names only, which need a shard to be in
            layout.close()
            order = chain(_entries(kept[-1:]), layout.early)
            return _publish(target, work, pool, order, kept[:-1], muted, captions)
        manifest = fmt.Manifest(
            pool.spec, layout.dims, layout.entries, commit.now(), muted, captions
        )
        layout.close()
        pool.close()
    commit.publish(target, manifest, layout.made)
    return manifest


class _Layout:
    """Rows in their final order, cut into shards."""

    def __init__(self, target: Path, work: Path, pool: _Pool, kept: Sequence[Shard]) -> None:
        self.work, self.pool = work / fmt.SHARDS, pool
        self.entries: list[fmt.ShardEntry] = []
        self.made: dict[str, Path] = {}  # shards that are still to be moved to their place
        self.dims: dict[int, int] = {}
        self._shards: list[Shard] = []
        self._mine: list[Shard] = []  # those made here
        self._placed = Digests()
        self._writer: ShardWriter | None = None
        self._names: dict[str, tuple[str, str]] = {}  # of the rows in the writer
        self._aliases: set[tuple[str, str, str]] = set()
        self.early: list[Entry] = []  # aliases that came before any row
        own.clear(self.work, own.LAYOUT)
        self.work.mkdir(parents=True, exist_ok=True)
        for shard in kept:
            if shard.folder != target / shard.entry.path:  # of another index
                folder = self.work / f"copy{len(self._shards)}"
                _copy(shard, folder)
                self.made[shard.entry.path] = folder
            self._place(shard.entry, shard)
            self._aliases.update(shard.aliases())
            self.dims = {scale: shard.rows(scale).shape[1] for scale in pool.spec.scales}

    def put(self, entry: Entry) -> None:
        if (names := self._names_of(entry.sha256)) is None:
            if self._writer is not None and self._writer.count >= ROWS_PER_SHARD:
                self.seal()
            if self._writer is None:
                self._writer = ShardWriter(self.work / f"new{len(self._shards)}", self.pool.spec)
            self.pool.copy(entry, self._writer)
            self._names[entry.sha256] = (entry.source, entry.caption)
            early, self.early = self.early, []
            for alias in early:
                self._writer.alias(alias.sha256, alias.source, alias.caption)
        elif names != (entry.source, entry.caption) and astuple(entry) not in self._aliases:
            self._aliases.add(astuple(entry))
            if self._writer is None:
                self.early.append(entry)
            else:
                self._writer.alias(entry.sha256, entry.source, entry.caption)

    def seal(self) -> None:
        """Finish the shard that is being written."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        entry = writer.finish()
        self.made[entry.path] = writer.folder
        self.dims = dict(writer.dims)
        shard = Shard(writer.folder, entry, self.dims)
        self._mine.append(shard)
        self._place(entry, shard)
        self._names = {}

    def _place(self, entry: fmt.ShardEntry, shard: Shard) -> None:
        self._placed.add(shard.hashes, len(self._shards))
        self._shards.append(shard)
        self.entries.append(entry)

    def _names_of(self, sha256: str) -> tuple[str, str] | None:
        """Name and caption of the row of a picture; None where it has none yet."""
        if sha256 in self._names:
            return self._names[sha256]
        place = self._placed.find(bytes.fromhex(sha256))
        if place is None:
            return None
        record = self._shards[place[0]].record(place[1])
        return record.source, record.caption

    def close(self) -> None:
        """Let go of the files that were made (Windows moves no open files)."""
        if self._writer is not None:
            self._writer.close()
        for shard in self._mine:
            shard.close()


def _copy(shard: Shard, folder: Path) -> None:
    """Copy the files of a shard into a new folder, and flush them to the disk."""
    folder.mkdir()
    for name in shard.entry.files:
        shutil.copyfile(shard.folder / name, folder / name)
        flush(folder / name)
    flush(folder)


def _mark(target: Path, old: Index, muted: Mapping[str, str]) -> None:
    manifest = dataclasses.replace(old.manifest, muted=muted, created=commit.now())
    commit.publish(target, manifest, {})


def _own(shard: Shard) -> Iterator[Entry]:
    """The first file of each picture of a shard, in order."""
    return (Entry(record.sha256, record.source, record.caption) for record in shard.records())


def _others(shard: Shard) -> Iterator[Entry]:
    """The further files that a shard names."""
    return (Entry(*alias) for alias in shard.aliases())


def _entries(shards: Iterable[Shard]) -> Iterator[Entry]:
    """All files, in an order that gives the same shards again."""
    for shard in shards:
        yield from _own(shard)
        yield from _others(shard)


def _kept(shards: Sequence[Shard], fresh: int) -> int:
    """The number of shards that stay unchanged when `fresh` pictures are added.

    The last shards are written again with the new pictures while each is at most twice as long as what
    follows. So there are few shards, and each row is rewritten O(log N) times [1]_.

    References
    ----------
    .. [1] J. Bentley, J. Saxe, "Decomposable searching problems I", J. Algorithms 1980.
    """
    kept, size = len(shards), fresh
    while kept and (last := shards[kept - 1].count) <= min(2 * size, ROWS_PER_SHARD - size):
        kept -= 1
        size += last
    return kept


def _old(target: Path, spec: DescriptorSpec, opened: ExitStack) -> Index | None:
    """The existing index with embeddings to reuse. None if there is none of this descriptor, or if it is
    damaged, which the build repairs."""
    try:
        return opened.enter_context(Index.open(target, spec))
    except AMGError:
        return None


def _removed(old: Index, places: Digests, order: Iterable[Entry]) -> int:
    """The number of pictures of `old` that are not among the files of `order`.

    places : of the pictures by the hashes of their files; those of `old` come first.
    """
    missing = [np.ones(shard.count, bool) for shard in old.shards]
    for entry in order:
        number, row = places.find(bytes.fromhex(entry.sha256)) or (len(missing), 0)
        if number < len(missing):
            missing[number][row] = False
    return sum(int(rows.sum()) for rows in missing)


def _muted(target: Path) -> Mapping[str, str]:
    """The excluded (muted) pictures of an existing index, even if its rows cannot be used."""
    try:
        data = (target / fmt.MANIFEST).read_bytes()
        return fmt.parse_manifest(data, target / fmt.MANIFEST).muted
    except (OSError, AMGError):
        return {}
