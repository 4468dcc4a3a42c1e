"""Captions in files beside the pictures, in a folder or in an archive."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from ...files import brief
from .base import Fields, caption_of, clean, decode_text, picture_name, text_lines

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 30


class Tree(Protocol):
    """Files by relative POSIX path."""

    def read(self, path: str, limit: int = -1) -> bytes:
        """The first `limit` bytes. FileNotFoundError where there is none, OSError else."""

    def spelled(self, path: str) -> str | None:
        """The file that differs from `path` in upper and lower case only; None where there is none."""

    def tables(self, at: str) -> list[str]:
        """Paths of the csv files in folder `at` ("" or "a/b/"), sorted."""

    def where(self, path: str) -> str:
        """How a message should call that file."""


class Captions:
    """Captions of the pictures of a tree, which must be requested in sorted order.

    A ``.txt`` (``.caption``, ``.json``) file beside the picture has priority over ``metadata.jsonl``, and
    that over ``*.csv``. A file in a nearer folder has priority over one in a farther folder. File names in
    jsonl and csv are relative to the folder of that file. `notes` collects problems with such files, and
    `finish` adds those that are only known at the end.
    """

    def __init__(self, tree: Tree, notes: list[str] | None = None) -> None:
        self.tree = tree
        self.notes: list[str] = [] if notes is None else notes
        self.missing = 0  # pictures without a caption so far
        self._blank: list[str] = []  # names of caption files that say nothing: the first few
        self._blanks = 0
        self._tables: dict[str, tuple[list[_Table], list[_Table]]] = {}

    def get(self, source: str) -> str:
        """Caption of the picture at relative POSIX path `source`, "" where there is none."""
        caption, there = self._beside(source)
        caption = caption or self._listed(source)
        if not caption:
            self.missing += 1
            self._blanks += bool(there)
            self._blank += there[: max(0, SHOWN - len(self._blank))]
        return caption

    def finish(self, alone: Sequence[str] = ()) -> None:
        """Add notes on missing captions. `alone` are caption files without a picture."""
        self._close(list(self._tables))
        if not self.missing:
            return
        if self._blanks:
            self.notes.append(
                f"{_files(self._blanks)} without words ({_some(self._blank, self._blanks)}): empty, or a "
                f".json that has neither text nor caption nor prompt"
            )
        if alone:
            self.notes.append(
                f"{_files(len(alone))} beside no picture of that name ({_some(alone, len(alone))}): name "
                f"it as its picture, fox.txt for fox.png"
            )

    def _beside(self, source: str) -> tuple[str, list[str]]:
        """Caption in the picture's own files, and which of these there are."""
        there: list[str] = []

        def read(path: str, limit: int) -> bytes:
            data = self._read(path, limit)
            if data is not None:
                there.append(path)
            return data or b""

        return beside(read, posixpath.splitext(source)[0], source), there

    def _listed(self, source: str) -> str:
        """Caption in a table of the picture's folder or one above it."""
        above = _ancestors(source)
        self._close([at for at in self._tables if at not in above])
        for at in above:
            if at not in self._tables:
                self._tables[at] = (self._jsonl(at + "metadata.jsonl"), self._csv(at))
        for kind in (0, 1):
            for at in above:
                for table in self._tables[at][kind]:
                    if caption := table.get(source[len(at) :]):
                        return caption
        return ""

    def _close(self, folders: Iterable[str]) -> None:
        """Free tables whose pictures are all done."""
        for at in folders:
            for table in (*self._tables[at][0], *self._tables[at][1]):
                if self.missing and not table.used and table.unused_because:
                    self.notes.append(f"{self.tree.where(table.path)}: {table.unused_because}")
            del self._tables[at]

    def _jsonl(self, path: str) -> list[_Table]:
        """A metadata.jsonl, if it is there."""
        data = self._read(path)
        if data is None:
            return []
        table, bad = _Table(path), 0
        for _, record in json_records(text_lines(io.BytesIO(data))):
            if record is None:
                bad += 1
            else:
                table.enter(record)
        if bad:
            where = self.tree.where(path)
            self.notes.append(f"{where}: {bad} lines are not JSON objects and were ignored")
        return [table]

    def _csv(self, at: str) -> list[_Table]:
        """All csv files in folder `at`; the first in name order wins."""
        tables = []
        for path in self.tree.tables(at):
            table = _Table(path)
            for number, record in csv_records(text_lines(io.BytesIO(self._read(path) or b""))):
                if isinstance(record, str):
                    self.notes.append(f"{self.tree.where(path)}: line {number}: {record}")
                else:
                    table.enter(record)
            tables.append(table)
        return tables

    def _read(self, path: str, limit: int = -1) -> bytes | None:
        """None where there is no such file, or it cannot be read, which is noted."""
        try:
            return self.tree.read(path, limit)
        except FileNotFoundError:
            if (spelled := self.tree.spelled(path)) is None:
                return None
        except OSError as error:
            self.notes.append(f"{self.tree.where(path)}: {error.strerror or error}")
            return None
        return self._read(spelled, limit) if spelled != path else None


SHOWN = 3  # caption files named in a note


def _files(count: int) -> str:
    return "1 caption file" if count == 1 else f"{count} caption files"


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if count > SHOWN else "")


class _Table:
    """Captions by file name, from one file."""

    def __init__(self, path: str) -> None:
        self.path, self.used = path, False
        self._captions: dict[str, str] = {}
        self._folded: dict[str, str] | None = None  # by names in lower case
        self._rows = self._named = 0
        self._columns: dict[str, None] = {}

    def enter(self, record: Fields) -> None:
        """Put one record's caption under its file name, unless one is there."""
        self._rows += 1
        if self._rows <= 100:
            self._columns |= dict.fromkeys(map(str, record))
        name, caption = picture_name(record), caption_of(record)
        self._named += bool(name)
        if name and caption:
            self._captions.setdefault(_key(name), caption)

    def get(self, name: str) -> str:
        """Caption of the file of that path, relative to the table's folder; "" where none."""
        if not self._captions:
            return ""
        if caption := self._captions.get(_key(name), ""):
            self.used = True
            return caption
        if self._folded is None:
            self._folded = {}
            for key, text in self._captions.items():
                self._folded.setdefault(key.casefold(), text)
        caption = self._folded.get(_key(name).casefold(), "")
        self.used |= bool(caption)
        return caption

    @property
    def unused_because(self) -> str:
        """Why no picture has a caption of this table; "" where it has no rows."""
        columns = brief(", ".join(list(self._columns)[:12]))
        if not self._rows:
            return ""
        if not self._named:
            return f"has no column that names pictures (it has: {columns}): call one file_name"
        if not self._captions:
            return f"has no captions (it has: {columns}): call their column text"
        return (
            f"names {self._named} files, and none of them is here (for instance "
            f"{brief(next(iter(self._captions)))}): names are relative to the folder of this file"
        )


def beside(read: Callable[[str, int], bytes], *stems: str) -> str:
    """Caption in a picture's own file, "" where there is none.

    Parameters
    ----------
    read : callable
        ``read(path, limit)`` gives the first `limit` bytes, b"" where there is no such file.
    stems : str
        What that file may be called, without extension.
    """
    for extension in (".txt", ".caption"):
        for stem in stems:
            if caption := clean(decode_text(read(stem + extension, MAX_CAPTION_BYTES))):
                return caption
    for stem in stems:
        data = read(stem + ".json", MAX_JSON_BYTES)
        if data and (caption := caption_of(_json_object(decode_text(data)) or {})):
            return caption
    return ""


def json_records(lines: Iterable[str]) -> Iterator[tuple[int, Fields | None]]:
    """(line number, record with lower-case keys) of JSON lines; None where a line is no object."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _json_object(line)


def csv_records(lines: Iterable[str]) -> Iterator[tuple[int, Fields | str]]:
    """(line number, record with lower-case keys, or what is wrong) of a csv file with a header.

    The separator is the one that a first line ``sep=;`` names, as Excel writes it, else the one of
    comma, semicolon and tab that the header holds most of.
    """
    lines = iter(lines)
    header = next(lines, "")
    if said := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", header, re.IGNORECASE):  # as Excel writes
        header, delimiter, first = next(lines, ""), said[1], 1
    else:
        delimiter, first = max(",;\t", key=header.count), 0

    def whole() -> Iterator[str]:
        yield header
        yield from lines

    rows = csv.reader(whole(), delimiter=delimiter)
    keys: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num + first, str(error)
            continue
        if keys is None:
            keys = [key.strip().lower() for key in row]
        elif row:
            yield rows.line_num + first, dict(zip(keys, row, strict=False))


def _json_object(text: str) -> Fields | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return {key.strip().lower(): value for key, value in record.items()}


def _ancestors(source: str) -> list[str]:
    """'a/b/c.png' -> ['a/b/', 'a/', '']."""
    parts = source.split("/")[:-1]
    return ["".join(part + "/" for part in parts[:n]) for n in range(len(parts), -1, -1)]


def _key(name: str) -> str:
    """File names as tables spell them, made comparable: slashes, './', composed accents."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))
