"""Lists of pictures: csv, tsv, jsonl and parquet files with a row for each picture."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import AMGError
from ...files import brief, open_regular
from ..parquet import Parquet, open_parquet
from ..picture import read_file
from .base import (
    FILE_KEYS,
    TEXT_KEYS,
    Fields,
    Item,
    Names,
    caption_of,
    inner,
    picture_name,
    storable,
    text_lines,
)
from .captions import csv_records, json_records

LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
# Columns of a parquet file that may hold the pictures themselves.
BYTE_KEYS = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "picture", "bytes"),
    *("image_bytes", "image_data", "img_bytes"),
)
LONGEST_NAME = 4096  # characters of a path
ROWS_AT_ONCE = 32
PYARROW = "pip install pyarrow (or save it as csv)"
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive


@dataclass(frozen=True)
class _Row:
    """A row of a list, by lower-case columns. `data`: its picture, where the list holds that itself;
    `problem`: why nothing of it can be used."""

    where: str
    fields: Fields
    data: bytes | None = None
    problem: str = ""


class TableSource:
    """The pictures that the rows of a list name, or hold, in the order of the rows.

    Paths are absolute or relative to the list's folder. Nothing is downloaded: rows with a web address are
    listed in `skipped`. If two rows name the same file, it appears twice, as "a.png" and "a.png#2", because
    each row may have its own caption.

    Raises
    ------
    AMGError
        The list cannot be read, or has no column for pictures; pyarrow is missing (parquet).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._parquet = self.path.suffix.lower() == ".parquet"
        self._count = 0
        if self._parquet:
            with closing(open_parquet(self.path, PYARROW)) as table:
                self._count = table.metadata.num_rows
                _columns(table, self.path)
        else:
            self._check()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        self.notes.clear()
        self.skipped.clear()
        names, count, captioned = Names(), 0, 0
        columns: tuple[str, ...] = ()
        for row in self._parquet_rows() if self._parquet else self._text_rows():
            count += 1
            item = self._item(row, names)
            columns = columns or tuple(row.fields)
            captioned += isinstance(item, Item) and bool(item.caption)
            if isinstance(item, Item):
                yield item
            else:
                self.skipped.append((row.where, item))
        self._count = count
        if not captioned:
            known = brief(", ".join(map(str, columns[:12])))
            self.notes.append(
                f"{self.path} has no captions (it has: {known}): call their column text"
            )

    def _item(self, row: _Row, names: Names) -> Item | str:
        """The picture of a row, or why there is none."""
        if row.problem:
            return row.problem
        name, caption = picture_name(row.fields), caption_of(row.fields)
        if not name:  # "key" is a file in some lists, and a mere number in others
            key = row.fields.get("key") or row.fields.get("url")
            name = key.strip() if isinstance(key, str) else ""
        if row.data is not None:
            return Item(
                names(storable(inner(name)) or row.where), caption, partial(bytes, row.data)
            )
        if not name:
            return "names no picture"
        if ADDRESS.match(name):
            return f"a web address, and nothing is downloaded: {name[:200]}"
        if len(name) > LONGEST_NAME:
            return (
                f"names no file, but holds {len(name)} characters, which may be the picture in base64: "
                f"give the pictures as files, or as bytes in parquet"
            )
        path = self.path.parent / name
        if "\\" in name and os.sep == "/" and not os.path.lexists(path):
            path = self.path.parent / name.replace("\\", "/")
        source = storable(name.replace("\0", "").replace("\\", "/").removeprefix("./"))
        return Item(names(source), caption, partial(read_file, path))

    def _check(self) -> None:
        """Raise AMGError where the first row shows that this is no list of pictures."""
        first = next(self._text_rows(strict=True), None)
        if first is None:
            raise AMGError(f"{self.path} has no rows: give a list with a row for each picture.")
        if not first.problem and not _names_files(first.fields):
            raise _no_column(self.path, first.fields)

    def _text_rows(self, strict: bool = False) -> Iterator[_Row]:
        try:
            with open_regular(self.path) as file:
                if self.path.suffix.lower() in (".jsonl", ".ndjson"):
                    for number, found in json_records(text_lines(file)):
                        problem = "" if found else "not a JSON object"
                        yield _Row(f"line {number}", found or {}, problem=problem)
                else:
                    for number, record in csv_records(text_lines(file)):
                        if isinstance(record, str):
                            yield _Row(f"line {number}", {}, problem=record)
                        else:
                            yield _Row(f"line {number}", record)
        except OSError as error:
            if strict:
                reason = error.strerror or str(error)
                raise AMGError(f"Cannot read {self.path} ({reason}): check the path.") from None
            yield _Row("the rest", {}, problem=error.strerror or str(error))

    def _parquet_rows(self) -> Iterator[_Row]:
        number = 0
        try:
            with closing(open_parquet(self.path, PYARROW)) as table:
                held, columns = _columns(table, self.path)
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield _row(f"row {number}", row, held)
        except AMGError:
            raise
        except Exception as error:  # pyarrow raises nearly everything on damaged files
            problem = f"the list is damaged ({brief(error, 160)})"
            yield _Row(f"row {number + 1} and all after it", {}, problem=problem)


def _columns(table: Parquet, path: Path) -> tuple[str, list[str]]:
    """(column with the pictures or "", columns worth reading) of an open parquet file."""
    import pyarrow.types as types

    schema = table.schema_arrow
    lower = {name.lower(): name for name in reversed(schema.names)}

    def holds_bytes(name: str) -> bool:
        kind = schema.field(name).type
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    candidates = [lower[key] for key in BYTE_KEYS if key in lower]
    candidates += [name for name in schema.names if types.is_struct(schema.field(name).type)]
    held = next(filter(holds_bytes, candidates), "")
    if not held and not _names_files(lower):
        raise _no_column(path, schema.names)
    wanted = [held] if held else []
    wanted += [lower[key] for key in (*FILE_KEYS, "key", *TEXT_KEYS, "url") if key in lower]
    return held, list(dict.fromkeys(wanted))


def _names_files(columns: Collection[str]) -> bool:
    """Whether these columns (lower case) name files. img2dataset's "key", beside "url", does not."""
    return not set(FILE_KEYS).isdisjoint(columns) or ("key" in columns and "url" not in columns)


def _row(where: str, given: Fields, held: str) -> _Row:
    """A row of a parquet file whose pictures are in the column `held`, "" where in none."""
    fields = {key.lower(): value for key, value in given.items() if key != held}
    picture = given.get(held)
    if isinstance(picture, dict):  # as HuggingFace's datasets keep pictures
        if isinstance(picture.get("path"), str):
            fields["file_name"] = picture["path"]
        picture = picture.get("bytes")
    return _Row(where, fields, picture if isinstance(picture, bytes) else None)


def _no_column(path: Path, found: Iterable[str]) -> AMGError:
    columns = brief(", ".join(map(str, list(found)[:12])) or "none")
    hint = ""
    if "url" in {str(name).lower() for name in found}:
        hint = " It lists web addresses: download them with img2dataset, and give its output."
    return AMGError(
        f"{path} has no column that names pictures (it has: {columns}): call one file_name, "
        f"and one text for the captions.{hint}"
    )
