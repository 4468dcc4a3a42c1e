"""Archives, which are read without unpacking: zip files, and tar shards of WebDataset."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import mmap
import os
import posixpath
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ...errors import AMGError
from ...files import brief, read_bounded
from ..picture import MAX_FILE_BYTES, Unreadable
from .base import Item, Names, inner, is_system, storable
from .captions import MAX_JSON_BYTES, Captions, beside
from .kinds import (
    HEAD,
    TEXTS,
    LeftOut,
    beside_none,
    is_other_name,
    is_picture,
    is_picture_name,
    refusal_in_archive,
)

if TYPE_CHECKING:
    from typing_extensions import Self

TOO_BIG = f"file larger than {MAX_FILE_BYTES >> 20} MiB"
MAX_HEADER_BYTES = 1 << 20  # of a long name or other extra of a tar member
HELD_BYTES = 1 << 28  # of one WebDataset sample; a larger group of equal keys is none
HELD_FILES = 256


def _refusal(name: str, size: int) -> str:
    """Why a member with this name cannot be used, or "" if it can be tried."""
    return refusal_in_archive(name) or (TOO_BIG if size > MAX_FILE_BYTES else "")


# --- zip ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A file in a zip. `fetch(limit)` returns its bytes (-1: all) or raises Unreadable."""

    name: str
    refusal: str
    fetch: Callable[[int], bytes]


class ZipSource:
    """The pictures in a zip file, sorted by name, with captions as in a folder.

    If a zip is truncated, so that its directory is missing, its complete members are read, and the loss is
    reported in `skipped`. Raises AMGError if it is no zip file or holds no picture.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._damage = ""
        entries = self._open()
        self._pictures, self._others = _sorted(entries)
        self._tree = _ZipTree(self.path, entries, {entry.name for entry in self._pictures})
        if all(entry.refusal for entry in self._pictures):
            reasons = [self._damage] if self._damage else self._others.notes()
            reasons += [f"{entry.name}: {entry.refusal}" for entry in self._pictures[:3]]
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise AMGError(f"No picture files in {path}{why}: give another archive.")

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[Item]:
        self.notes[:] = self._others.notes()
        self.skipped[:] = [(self.path.name, self._damage)] if self._damage else []
        captions, names = Captions(self._tree, self.notes), Names()
        for entry in self._pictures:
            name = names(storable(entry.name))
            if entry.refusal:
                self.skipped.append((name, entry.refusal))
            else:
                yield Item(name, captions.get(entry.name), partial(entry.fetch, -1))
        captions.finish(self._tree.alone([entry.name for entry in self._pictures]))

    def _open(self) -> list[_Entry]:
        try:
            archive = zipfile.ZipFile(self.path)  # open as long as one of its items is about
        except (OSError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError):
                raise AMGError(
                    f"Cannot open {self.path} ({error.strerror or error}): check the path."
                ) from None
        except Exception:  # a damaged directory raises nearly everything
            pass
        else:
            lock = threading.Lock()
            return [
                _Entry(name, _zip_refusal(info), partial(_zip_read, archive, lock, info))
                for info in archive.infolist()
                if (name := inner(_zip_name(info))) and not info.filename.endswith("/")
            ]
        try:
            entries = list(_salvage(self.path))
        except (OSError, ValueError):  # cannot be mapped: empty
            entries = []
        if not entries:
            raise AMGError(f"{self.path} is not a zip file, or is damaged: get it again.")
        self._damage = (
            f"the archive is damaged or cut: {len(entries)} files in it were found, "
            f"others are missing; get a complete copy"
        )
        return entries


def _sorted(entries: Sequence[_Entry]) -> tuple[list[_Entry], LeftOut]:
    """(pictures and what is reported like them, what is neither picture nor caption)."""
    pictures: list[_Entry] = []
    others = LeftOut()
    for entry in sorted(entries, key=lambda entry: entry.name):
        name = entry.name
        if is_system(name):
            continue
        if is_picture_name(name) or refusal_in_archive(name):
            pictures.append(entry)
        elif not is_other_name(name):
            try:
                head = b"" if entry.refusal else entry.fetch(HEAD)
            except Unreadable as error:
                pictures.append(replace(entry, refusal=str(error)))
                continue
            locked = entry.refusal and entry.refusal != TOO_BIG  # nobody can tell what it is
            if locked or is_picture(head):
                pictures.append(entry)
            else:
                others.add(storable(name))
    return pictures, others


class _ZipTree:
    """The files of a zip, for `Captions`."""

    def __init__(self, path: Path, entries: Sequence[_Entry], pictures: Collection[str]) -> None:
        self.path = path
        # Pictures are not asked for; the first file of a name wins.
        self._files = {e.name: e for e in reversed(entries) if e.name not in pictures}
        self._folded = {name.casefold(): name for name in sorted(self._files, reverse=True)}
        self._tables: dict[str, list[str]] = {}
        for name in sorted(self._files):
            if name.lower().endswith(".csv") and not is_system(name):
                at = posixpath.dirname(name)
                self._tables.setdefault(at and at + "/", []).append(name)

    def read(self, path: str, limit: int = -1) -> bytes:
        entry = self._files.get(path)
        if entry is None:
            raise FileNotFoundError(path)
        try:
            if entry.refusal:
                raise Unreadable(entry.refusal)
            return entry.fetch(limit)
        except Unreadable as error:
            raise OSError(str(error)) from None

    def spelled(self, path: str) -> str | None:
        return self._folded.get(path.casefold())

    def alone(self, pictures: Sequence[str]) -> list[str]:
        """Caption files beside none of these pictures."""
        texts = [n for n in self._files if n.lower().endswith(TEXTS) and not is_system(n)]
        return beside_none(texts, pictures)

    def tables(self, at: str) -> list[str]:
        return self._tables.get(at, [])

    def where(self, path: str) -> str:
        return f"{self.path}/{path}"


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name; many programs write UTF-8 without saying so."""
    if not info.flag_bits & 0x800:
        try:
            return info.orig_filename.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return info.filename


def _zip_refusal(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 1:
        return "encrypted: unpack the archive with its password, and give the folder"
    return _refusal(info.filename, info.file_size)


def _zip_read(
    archive: zipfile.ZipFile, lock: threading.Lock, info: zipfile.ZipInfo, limit: int
) -> bytes:
    try:
        with lock, archive.open(info) as file:
            return file.read(limit)  # no more than info.file_size, whatever the data unpacks to
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise Unreadable(f"damaged in the archive ({brief(error, 160)})") from None


_LOCAL = struct.Struct("<4s5H3I2H")  # the header before each member of a zip
_MARK = b"PK\x03\x04"


def _salvage(path: Path) -> Iterator[_Entry]:
    """The whole members of a zip that has lost the directory at its end."""
    lock = threading.Lock()
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at = 0 if data[:4] == _MARK else -1
    while 0 <= at <= len(data) - _LOCAL.size:
        _, _, flags, method, _, _, crc, packed, size, *lengths = _LOCAL.unpack_from(data, at)
        start = at + _LOCAL.size + sum(lengths)
        raw = data[at + _LOCAL.size : at + _LOCAL.size + lengths[0]]
        extra = data[start - lengths[1] : start]
        if packed == 0xFFFFFFFF and len(extra) >= 20 and extra[:2] == b"\x01\x00":
            size, packed = struct.unpack_from("<QQ", extra, 4)
        if flags & 8 and not packed and method == 8:  # the sizes follow the data
            packed, size, crc = _deflated(data, start), 0, None
        if packed < 0 or start + packed > len(data):
            return  # the member that was cut
        name = inner(raw.decode("utf-8" if flags & 0x800 else "cp437", "replace"))
        if name and not raw.endswith(b"/"):
            encrypted = "encrypted: get a complete copy and unpack it" if flags & 1 else ""
            fetch = partial(_inflate, data, lock, slice(start, start + packed), method, crc)
            yield _Entry(name, encrypted or _refusal(name, size), fetch)
        at = data.find(_MARK, start + packed)


def _deflated(data: mmap.mmap, start: int) -> int:
    """Length of the deflate stream at `start`, -1 where it does not end."""
    stream, at = zlib.decompressobj(-15), start
    try:
        while at < len(data) and not stream.eof:
            chunk = data[at : at + (1 << 16)]
            at += len(chunk)
            while chunk and not stream.eof:
                stream.decompress(chunk, 1 << 20)
                chunk = stream.unconsumed_tail
    except zlib.error:
        return -1
    return at - len(stream.unused_data) - start if stream.eof else -1


def _inflate(
    data: mmap.mmap, lock: threading.Lock, place: slice, method: int, crc: int | None, limit: int
) -> bytes:
    with lock:
        packed = data[place]
    if method not in (0, 8):
        raise Unreadable(f"compressed by method {method}, which is not read")
    try:
        most = MAX_FILE_BYTES + 1
        plain = packed if method == 0 else zlib.decompressobj(-15).decompress(packed, most)
    except zlib.error as error:
        raise Unreadable(f"damaged in the archive ({error})") from None
    if len(plain) > MAX_FILE_BYTES:
        raise Unreadable(TOO_BIG)
    if crc is not None and zlib.crc32(plain) != crc:
        raise Unreadable("damaged in the archive (bad checksum)")
    return plain if limit < 0 else plain[:limit]


# --- tar ---------------------------------------------------------------------------------------


class TarSource:
    """The pictures in tar files, in the order of the members; one picture in memory at a time.

    Files whose names are equal up to the first dot of their last part belong together, as in WebDataset
    and img2dataset: ``a/001.jpg``, ``a/001.txt``, ``a/001.json``. They must follow one another. A damaged
    file is read up to the damage, and the loss is reported in `skipped`.

    Parameters
    ----------
    shards : sequence of (prefix, path)
        The name of a picture is prefix + its name in the tar.
    name : str
        For messages.

    Raises
    ------
    AMGError
        The only tar file (its prefix is "") cannot be read at all.
    """

    def __init__(self, shards: Sequence[tuple[str, Path]], name: str) -> None:
        self.name = name
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._shards = list(shards)
        self._count = _announced(path for _, path in shards)
        if len(shards) == 1 and not shards[0][0]:
            self._check(shards[0][1])

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        self.notes.clear()
        self.skipped.clear()
        count, others = 0, LeftOut()
        for prefix, path in self._shards:
            for item in self._shard(prefix, path, others):
                count += 1
                yield item
        self.notes += others.notes()
        self._count = count

    def _shard(self, prefix: str, path: Path, others: LeftOut) -> Iterator[Item]:
        names, alone = Names(), 0
        for sample in _samples(self._files(prefix, path)):
            if not sample.pictures:
                alone += len(sample.texts)
                for name in sample.others:  # beside a picture they are WebDataset's fields
                    others.add(storable(prefix + name))
            for name, data in sample.pictures:
                caption = beside(
                    partial(_text_of, sample.texts),
                    *(posixpath.splitext(name)[0], name, sample.key),
                )
                yield Item(names(storable(prefix + name)), caption, partial(bytes, data))
        if alone:
            self.notes.append(
                f"{path}: {alone} caption files lie beside no picture: pack pictures and captions "
                f"next to each other (tar --sort=name)"
            )

    def _files(self, prefix: str, path: Path) -> Iterator[_File]:
        """The pictures and caption files, and the rest without bytes; ends at the first damage."""
        count = 0
        try:
            with _unpacked(path) as stream, _tar(stream) as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # else it keeps every header
                    if info.isdir():
                        continue
                    name = inner(info.name)
                    kind = self._kind(tar, info, name, path)
                    if kind == "other":
                        yield _File(name, b"", kind)
                    refusal = _refusal(name, info.size)
                    if not info.isreg():
                        refusal = "a link in the archive: give the folder it was packed from"
                    if kind == "picture" and refusal:
                        self.skipped.append((storable(prefix + name), refusal))
                    if kind not in ("picture", "text") or refusal:
                        continue
                    data = _read(tar, info)
                    if len(data) != info.size:
                        raise tarfile.ReadError("unexpected end of data")
                    count += kind == "picture"
                    yield _File(name, data, kind)
        except Exception as error:  # decoders raise nearly everything on damaged files
            self.skipped.append(
                (
                    storable(prefix.rstrip("/") or path.name),
                    f"the archive is damaged or cut after {count} pictures ({brief(error, 160)}): "
                    f"what follows is missing; get a complete copy",
                )
            )

    def _kind(self, tar: _Tar, info: tarfile.TarInfo, name: str, path: Path) -> str:
        """ "picture" (or reported like one), "text", "other", or "" for what is passed over."""
        if is_system(name):
            return ""
        if is_picture_name(name) or refusal_in_archive(name):
            return "picture"
        if self._is_caption(name, info, path):
            return "text"
        if is_other_name(name):
            return ""
        head = _read(tar, info, HEAD) if info.isreg() else b""
        return "picture" if is_picture(head) else "other"

    def _is_caption(self, name: str, info: tarfile.TarInfo, path: Path) -> bool:
        if not info.isreg():
            return False
        if posixpath.basename(name) == "metadata.jsonl" or name.lower().endswith(".csv"):
            self.notes.append(f"{path}/{name}: not read in a tar; use .txt files, or a zip")
        return name.lower().endswith(TEXTS) and info.size <= MAX_JSON_BYTES

    @staticmethod
    def _check(path: Path) -> None:
        try:
            with _unpacked(path) as stream, _tar(stream):
                pass
        except OSError as error:
            if error.errno is not None:
                reason = error.strerror or str(error)
                raise AMGError(f"Cannot open {path} ({reason}): check the path.") from None
            raise AMGError(f"{path} is damaged ({brief(error, 160)}): get it again.") from None
        except Exception as error:
            raise AMGError(
                f"{path} is not a tar file, or is damaged at its start ({brief(error, 160)}): "
                f"get it again."
            ) from None


class _File(NamedTuple):
    name: str
    data: bytes
    kind: str  # "picture", "text" or "other"


@dataclass
class _Sample:
    """Members of one key: the pictures as (name, bytes), the texts by name, names of the rest."""

    key: str
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    held: int = 0


def _samples(files: Iterator[_File]) -> Iterator[_Sample]:
    """Consecutive files grouped by WebDataset's key."""
    sample = _Sample("")
    for name, data, kind in files:
        folder, last = posixpath.split(name)
        key = posixpath.join(folder, last.split(".", 1)[0])
        full = sample.held + len(data) > HELD_BYTES
        full |= len(sample.pictures) + len(sample.texts) + len(sample.others) >= HELD_FILES
        if key != sample.key or full:
            yield sample
            sample = _Sample(key)
        sample.held += len(data)
        if kind == "picture":
            sample.pictures.append((name, data))
        elif kind == "other":
            sample.others.append(name)
        else:
            sample.texts[name] = data
    yield sample


def _text_of(texts: dict[str, bytes], path: str, limit: int) -> bytes:
    """A caption file of a sample, whatever its case; b"" where there is none."""
    found = texts.get(path)
    if found is None:
        found = next((texts[name] for name in texts if name.casefold() == path.casefold()), b"")
    return found[:limit]


def _announced(paths: Iterator[Path]) -> int:
    """The number of pictures in all shards by img2dataset's _stats.json, or 0 if one is missing."""
    total = 0
    for path in paths:
        try:
            stem = path.name.split(".tar")[0]
            stats = read_bounded(path.with_name(f"{stem}_stats.json"), MAX_JSON_BYTES)
            count = json.loads(stats)["successes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0
        if type(count) is not int or not 0 <= count < 1 << 31:
            return 0
        total += count
    return total


def _unpacked(path: Path) -> BinaryIO | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    """The file, decompressed while it is read if it is compressed."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start[:2] == b"\x1f\x8b":
        return gzip.open(path)
    if start[:3] == b"BZh":
        return bz2.open(path)
    if start == b"\xfd7zXZ\0":
        return lzma.open(path)
    if start[:4] == b"\x28\xb5\x2f\xfd":
        raise tarfile.ReadError("compressed by zstd: unpack it to .tar first")
    return open(path, "rb")


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # the headers that were read; no stub names it


def _tar(stream: BinaryIO | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> _Tar:
    return _Tar.open(fileobj=stream, mode="r:", tarinfo=_Header)


def _read(tar: _Tar, info: tarfile.TarInfo, limit: int = -1) -> bytes:
    """The bytes of a regular file, at most `limit` of them unless it is -1."""
    file = tar.extractfile(info)
    if file is None:
        raise tarfile.ReadError(f"{info.name} is not a regular file")
    return file.read(limit)


class _Header(tarfile.TarInfo):
    """A header that reports damage, which tarfile would treat as the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTRAS and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header of absurd length")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # no stub; the mark at the end
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]  # no stub names it
            raise tarfile.ReadError("ends without its end mark") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


_EXTRAS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
