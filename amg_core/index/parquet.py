"""Reads parquet files by pyarrow, an optional package. It has no types, so they are declared here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from ..errors import AMGError
from ..files import brief
from ..optional import needed


class Metadata(Protocol):
    """The metadata at the end of a file."""

    num_rows: int


class Schema(Protocol):
    """The columns in order. `field(name).type` is for the functions of `pyarrow.types`."""

    names: list[str]

    def field(self, name: str) -> Any: ...


class Batch(Protocol):
    """Some rows."""

    def to_pylist(self) -> list[dict[str, object]]: ...


class Parquet(Protocol):
    """An open file: the part of `pyarrow.parquet.ParquetFile` that is used here."""

    metadata: Metadata
    schema_arrow: Schema

    def iter_batches(
        self, batch_size: int, *, columns: Sequence[str], use_threads: bool = True
    ) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def open_parquet(path: Path, step: str = "pip install pyarrow") -> Parquet:
    """Open a file for reading in small pieces.

    Raises
    ------
    AMGError
        pyarrow is missing (`step` says how to install it), or the file is missing or damaged.
    """
    parquet = needed("pyarrow.parquet", f"Reading {path}", step)
    try:
        opened = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        return cast(Parquet, opened)  # pyarrow has no types
    except OSError as error:
        reason = error.strerror or str(error)
        raise AMGError(f"Cannot read {path} ({reason}): check the path.") from None
    except Exception as error:  # pyarrow can raise anything on damaged files
        raise AMGError(
            f"{path} is not parquet, or is damaged ({brief(error, 160)}): get it again."
        ) from None
