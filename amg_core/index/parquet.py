"""Parquet files, read by pyarrow: optional, and without types of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from ..errors import AMGError
from ..files import brief
from ..optional import needed


class Metadata(Protocol):
    """What the end of a file says of it."""

    num_rows: int


class Schema(Protocol):
    """The columns, in their order. `field(name).type` is for the questions of `pyarrow.types`."""

    names: list[str]

    def field(self, name: str) -> Any: ...


class Batch(Protocol):
    """Some rows."""

    def to_pylist(self) -> list[dict[str, object]]: ...


class Parquet(Protocol):
    """An open file: of `pyarrow.parquet.ParquetFile` what is used."""

    metadata: Metadata
    schema_arrow: Schema

    def iter_batches(
        self, batch_size: int, *, columns: Sequence[str], use_threads: bool = True
    ) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def open_parquet(path: Path, step: str = "pip install pyarrow") -> Parquet:
    """A file, open for reading in small pieces.

    Raises
    ------
    AMGError
        pyarrow is absent (`step`: what to do about it), or the file is absent or damaged.
    """
    parquet = needed("pyarrow.parquet", f"Reading {path}", step)
    try:
        opened = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        return cast(Parquet, opened)  # pyarrow has no types
    except OSError as error:
        reason = error.strerror or str(error)
        raise AMGError(f"Cannot read {path} ({reason}): check the path.") from None
    except Exception as error:  # pyarrow raises nearly everything on damaged files
        raise AMGError(
            f"{path} is not parquet, or is damaged ({brief(error, 160)}): get it again."
        ) from None
