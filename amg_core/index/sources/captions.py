"""Captions that lie beside pictures: in a folder, or in an archive that holds one."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from .base import caption_of, clean, decode_text, picture_name, text_lines

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 30


class Tree(Protocol):
    """Files by relative POSIX path."""

    def read(self, path: str, limit: int = -1) -> bytes:
        """The first `limit` bytes. FileNotFoundError where there is none, OSError else."""

    def tables(self, at: str) -> list[str]:
        """Paths of the csv files in folder `at` ("" or "a/b/"), sorted."""

    def where(self, path: str) -> str:
        """How a message should call that file."""


class Captions:
    """Captions of the pictures of a tree, asked for in sorted order.

    A ``.txt`` (``.caption``, ``.json``) file beside the picture wins over ``metadata.jsonl``, which
    wins over ``*.csv``; a nearer folder's file wins over a farther one's. File names in jsonl and
    csv are relative to the folder of that file. `notes` collects what was wrong with such files.
    """

    def __init__(self, tree: Tree, notes: list[str] | None = None) -> None:
        self.tree = tree
        self.notes: list[str] = [] if notes is None else notes
        self._tables: dict[str, tuple[dict[str, str], dict[str, str]]] = {}

    def get(self, source: str) -> str:
        """Caption of the picture at relative POSIX path `source`, "" where there is none."""
        if caption := beside(self._read, posixpath.splitext(source)[0]):
            return caption
        above = _ancestors(source)
        self._tables = {at: tables for at, tables in self._tables.items() if at in above}
        for at in above:
            if at not in self._tables:
                self._tables[at] = (self._jsonl(at + "metadata.jsonl"), self._csv(at))
        for kind in (0, 1):
            for at in above:
                key = _key(source[len(at) :])
                if caption := self._tables[at][kind].get(key, ""):
                    return caption
        return ""

    def _jsonl(self, path: str) -> dict[str, str]:
        """{file name: caption} of a metadata.jsonl."""
        table: dict[str, str] = {}
        bad = 0
        for _, record in json_records(text_lines(io.BytesIO(self._read(path)))):
            if record is None:
                bad += 1
            else:
                _enter(table, record)
        if bad:
            where = self.tree.where(path)
            self.notes.append(f"{where}: {bad} lines are not JSON objects and were ignored")
        return table

    def _csv(self, at: str) -> dict[str, str]:
        """{file name: caption} of all csv files in folder `at`; the first in name order wins."""
        table: dict[str, str] = {}
        for path in self.tree.tables(at):
            for number, record in csv_records(text_lines(io.BytesIO(self._read(path)))):
                if isinstance(record, str):
                    self.notes.append(f"{self.tree.where(path)}: line {number}: {record}")
                else:
                    _enter(table, record)
        return table

    def _read(self, path: str, limit: int = -1) -> bytes:
        try:
            return self.tree.read(path, limit)
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.notes.append(f"{self.tree.where(path)}: {error.strerror or error}")
            return b""


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


def json_records(lines: Iterable[str]) -> Iterator[tuple[int, dict | None]]:
    """(line number, record with lower-case keys) of JSON lines; None where a line is no object."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _json_object(line)


def csv_records(lines: Iterable[str]) -> Iterator[tuple[int, dict | str]]:
    """(line number, record with lower-case keys, or what is wrong) of a csv file with a header.

    The separator is the one of comma, semicolon and tab that the header holds most of.
    """
    lines = iter(lines)
    header = next(lines, "")
    delimiter = max(",;\t", key=header.count)

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
            yield rows.line_num, str(error)
            continue
        if keys is None:
            keys = [key.strip().lower() for key in row]
        elif row:
            yield rows.line_num, dict(zip(keys, row, strict=False))


def _json_object(text: str) -> dict | None:
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


def _enter(table: dict[str, str], record: dict) -> None:
    """Put one record's caption under its file name, unless one is there."""
    name, caption = picture_name(record), caption_of(record)
    if name and caption:
        table.setdefault(_key(name), caption)


def _key(name: str) -> str:
    """File names as tables spell them, made comparable: slashes, './', composed accents."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))
