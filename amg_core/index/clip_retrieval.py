"""Makes an index of CLIP embeddings from a folder of clip-retrieval or img2dataset.

::

    folder/
      img_emb/img_emb_0.npy …            (n, D) float16 or float32
      metadata/metadata_0.parquet …      n rows: image_path, caption, url, key, … (needs pyarrow)
      image.index                        FAISS, read if there is no img_emb (needs faiss-cpu)

``.npy`` files directly in the folder are read too. The pictures themselves are not there, so the index
has no thumbnails. A row is named by the path of its picture, or else by the URL.

References
----------
.. [1] R. Beaumont, clip-retrieval, https://github.com/rom1504/clip-retrieval
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..descriptors.base import DescriptorSpec
from ..descriptors.clip import IMPORTED
from ..errors import AMGError
from ..optional import needed
from . import commit
from . import format as fmt
from .parquet import open_parquet
from .shard import Record, ShardWriter, check_mapped

if TYPE_CHECKING:
    from .writer import BuildReport

MODEL = "ViT-B/32"  # the default of clip-retrieval
BLOCK = 1 << 14  # rows read at once
_COLUMNS = ("image_path", "caption", "url", "key", "width", "height")


@dataclass(frozen=True)
class Folder:
    """The files of such a folder. If there are both, `vectors` and `tables` correspond one to one.

    `vectors` are .npy files. `tables` are .parquet files, none if there is no metadata. `faiss` is the
    index file that is read instead of `vectors`, or None.
    """

    path: Path
    vectors: tuple[Path, ...]
    tables: tuple[Path, ...]
    faiss: Path | None = None


def look(folder: str | os.PathLike[str]) -> Folder:
    """Find the files of `folder` that hold embeddings and metadata.

    Raises
    ------
    AMGError
        There are none, or embeddings and metadata do not belong together.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AMGError(
            f"{path} is not a folder: give the output folder of clip-retrieval inference."
        )
    home = path.parent if path.name == "img_emb" else path
    vectors = _numbered(home / "img_emb", ".npy") or _numbered(path, ".npy")
    tables = _numbered(home / "metadata", ".parquet")
    if vectors:
        if tables and [_number(v) for v in vectors] != [_number(t) for t in tables]:
            raise AMGError(
                f"{home}: the {len(vectors)} files of embeddings and the {len(tables)} of metadata do "
                f"not belong together, one of each number: complete the download, or move metadata "
                f"away to import without captions."
            )
        return Folder(path, vectors, tables)
    if (path / "image.index").is_file():
        return Folder(path, (), tables, path / "image.index")
    raise AMGError(
        f"{path} holds no embeddings: neither img_emb/*.npy, nor *.npy, nor image.index. Give the "
        f"output folder of clip-retrieval inference."
    )


def read_clip_retrieval(
    folder: str | os.PathLike[str],
) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """Read blocks of at most BLOCK rows, (n, D) float32 as stored, with a `Record` of each row.

    Memory does not grow with the folder, except that a FAISS index is read whole. `Record.sha256` is "",
    and sizes are 0 if the metadata does not have them.

    Raises
    ------
    AMGError
        As `look`, and if a file is damaged or an optional package is missing.
    """
    found = look(folder)
    if found.faiss is not None:
        yield from _from_faiss(found.faiss, found.tables)
        return
    dims = {path: _open(path).shape for path in found.vectors}
    if len({shape[1] for shape in dims.values()}) > 1:
        raise AMGError(
            f"{found.path} mixes embeddings of several sizes: import one model's at a time."
        )
    for i, path in enumerate(found.vectors):
        table = found.tables[i] if found.tables else None
        if table is not None and (rows := open_parquet(table).metadata.num_rows) != len(
            _open(path)
        ):
            raise AMGError(
                f"{table} has {rows} rows and {path} {len(_open(path))}: one of them is incomplete."
            )
        values = _open(path)
        records = _records(table, path.stem, 0)
        for start in range(0, len(values), BLOCK):
            check_mapped(values)
            block = np.asarray(values[start : start + BLOCK], np.float32)
            yield block, list(islice(records, len(block)))


def import_clip_retrieval(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str = MODEL,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    replace_index: bool = False,
) -> BuildReport:
    """Make an index of the embeddings in `folder`, for `two_stage` or any search by CLIP.

    Rows are scaled to norm 1 and kept as float16. Rows that are not finite, or are zero, are left out and
    reported. If an index is replaced, its excluded (muted) pictures stay excluded.

    Parameters
    ----------
    out : path
        A new or empty folder, or an index, see `writer.build`.
    model : str
        The CLIP model that made the embeddings, as clip-retrieval spells it ("ViT-B/32", "ViT-L/14",
        "open_clip:ViT-H-14"). The files do not have it, and queries must come from the same model.
    progress : callable, optional
        ``progress(done, total, source)`` for each block.

    Returns
    -------
    BuildReport

    Raises
    ------
    AMGError
        As `read_clip_retrieval`, and if the embeddings cannot be that model's, `out` is an index (without
        `replace_index`) or something else, or the disk cannot be written.
    """
    from .writer import ROWS_PER_SHARD, BuildReport, _muted

    started, target = time.perf_counter(), fmt.real(out)
    spec, muted = spec_of(model), _muted(target)
    skipped: list[tuple[str, str]] = []
    with commit.changing(target) as work:
        if not replace_index:
            commit.refuse_index(target)
        found = look(folder)
        captioned = done = 0
        total = sum(len(_open(path)) for path in found.vectors)
        commit.forget_build(target)
        shards = _Shards(work / fmt.SHARDS, spec, ROWS_PER_SHARD)
        try:
            for rows, records in read_clip_retrieval(folder):
                _check_width(folder, rows.shape[1], model)
                units, usable = _unit(rows)
                with commit.writing(target):
                    for unit, fine, record in zip(units, usable, records, strict=True):
                        if fine:
                            captioned += bool(record.caption)
                            shards.add(_identified(record, done), unit)
                        else:
                            skipped.append(
                                (record.source, "the embedding is not finite, or is zero")
                            )
                        done += 1
                if progress is not None:
                    progress(done, total, records[-1].source if records else "")
            if not shards.count:
                raise AMGError(f"{folder} holds no usable embedding: nothing was made.")
            with commit.writing(target):
                shards.seal()
            manifest = fmt.Manifest(spec, shards.dims, shards.entries, commit.now(), muted)
        except BaseException:
            shards.close()
            commit.forget_build(target)
            raise
        commit.publish(target, manifest, shards.made)
    notes = [] if found.tables else [f"{found.path} has no metadata: rows have no captions."]
    return BuildReport(
        count=shards.count,
        embedded=0,
        reused=shards.count,
        skipped=skipped,
        seconds=time.perf_counter() - started,
        path=target,
        hash=fmt.identity(manifest),
        files=shards.count,
        captioned=captioned,
        notes=notes,
    )


WIDTHS = {"b_32": 512, "b_16": 512, "l_14": 768, "h_14": 1024, "g_14": 1024, "bigg_14": 1280}


def _check_width(folder: str | os.PathLike[str], width: int, model: str) -> None:
    """AMGError if the width shows that the embeddings are not the model's. Not every width is known."""
    size = spec_of(model).id.partition("clip_vit_")[2]
    expected = next((WIDTHS[s] for s in sorted(WIDTHS, key=len)[::-1] if size.startswith(s)), width)
    if width != expected:
        raise AMGError(
            f"{folder} holds vectors of {width} values, and {model} makes {expected}: name the model "
            f"that made them."
        )


def spec_of(model: str) -> DescriptorSpec:
    """The spec of an imported index, without a hash of weights: "ViT-B/32" -> id ``clip_vit_b_32``.

    OpenCLIP's models have another activation than OpenAI's, unless their name says otherwise.
    """
    name = model.strip().lower()
    found = re.search(r"vit[-/_](b|l|h|g|bigg)[-/_](\d+)", name)
    if not found:
        raise AMGError(
            f"model: {model!r} names no CLIP that can be compared with. Give the one that made the "
            f"embeddings, for instance ViT-B/32, ViT-L/14 or open_clip:ViT-H-14."
        )
    ours = name.startswith("open_clip:") and not re.search(r"quickgelu|/openai", name)
    preprocessing = IMPORTED.format("gelu" if ours else "quick_gelu")
    side = 336 if "336" in name else 224
    return DescriptorSpec(f"clip_vit_{found[1]}_{found[2]}", "cosine", preprocessing, (side,))


class _Shards:
    """Writes rows into shards of at most `most` rows."""

    def __init__(self, folder: Path, spec: DescriptorSpec, most: int) -> None:
        self.folder, self.spec, self.most, self.count = folder, spec, most, 0
        self.dims: dict[int, int] = {}
        self.entries: list[fmt.ShardEntry] = []
        self.made: dict[str, Path] = {}
        self._writer: ShardWriter | None = None

    def add(self, record: Record, unit: np.ndarray) -> None:
        if self._writer is not None and self._writer.count >= self.most:
            self.seal()
        if self._writer is None:
            self._writer = ShardWriter(self.folder / f"new{len(self.entries)}", self.spec)
        self._writer.add(record, {self.spec.scales[0]: unit}, None)
        self.count += 1

    def seal(self) -> None:
        """Finish the shard that is being written."""
        if self._writer is None:
            return
        writer, entry = self._writer, self._writer.finish()
        self.entries.append(entry)
        self.made[entry.path], self.dims = writer.folder, writer.dims
        self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) float32 -> (n, D) float16 of norm 1, and which rows are usable, (n,) bool."""
    finite = np.isfinite(rows).all(axis=1)
    rows = np.where(finite[:, None], rows, 0)
    length = np.linalg.norm(rows.astype(np.float64), axis=1)
    usable = length > 1e-6
    return (rows / np.where(usable, length, 1)[:, None]).astype(np.float16), usable


def _identified(record: Record, number: int) -> Record:
    """The record with a hash of its place and name, because the picture's file is not available."""
    identity = f"clip-retrieval\n{number}\n{record.source}".encode("utf-8", "replace")
    return replace(record, sha256=hashlib.sha256(identity).hexdigest())


# ---------------------------------------------------------------- files


def _numbered(folder: Path, ending: str) -> tuple[Path, ...]:
    """Files with that ending, ordered by number: "img_emb_2.npy" before "img_emb_10.npy"."""
    if not folder.is_dir():
        return ()
    files = [path for path in folder.iterdir() if path.suffix == ending and path.name[0] != "."]
    return tuple(sorted(files, key=lambda path: (_number(path), path.name)))


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else -1


def _open(path: Path) -> np.ndarray:
    """The rows of a .npy file, (n, D) floats, memory-mapped."""
    try:
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AMGError(
            f"{path} is damaged or is no .npy file ({error}): fetch it again."
        ) from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise AMGError(f"{path} holds {values.dtype} {values.shape}, not rows of embeddings.")
    return values


def _records(table: Path | None, stem: str, first: int) -> Iterator[Record]:
    """A record for each row of a metadata file. Without a name, it is named by `stem` and the row."""
    if table is None:
        while True:
            yield Record(f"{stem}#{first}", "", "", 0, 0)
            first += 1
    file = open_parquet(table)
    columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
    try:
        for batch in file.iter_batches(BLOCK, columns=columns):
            for row in batch.to_pylist():
                yield _record(row, f"{stem}#{first}")
                first += 1
    except (OSError, ValueError) as error:
        raise AMGError(f"{table} is damaged ({error}): fetch it again.") from error


def _record(row: Mapping[str, object], otherwise: str) -> Record:
    """The record of a row, named by the path of a file, or else the URL, or else `otherwise`."""
    path, url, key = (_text(row.get(name)) for name in ("image_path", "url", "key"))
    source = path if Path(path).suffix else url or path or key or otherwise
    width, height = (
        value if isinstance(value := row.get(name), int) and value > 0 else 0
        for name in ("width", "height")
    )
    return Record(source, _text(row.get("caption")), "", width, height)


def _text(value: object) -> str:
    text = "" if value is None else str(value)
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


# ---------------------------------------------------------------- FAISS


def _from_faiss(path: Path, tables: Sequence[Path]) -> Iterator[tuple[np.ndarray, list[Record]]]:
    index = _read_faiss(path)
    rows = sum(open_parquet(table).metadata.num_rows for table in tables)
    if tables and rows != index.ntotal:
        raise AMGError(
            f"{path} has {index.ntotal} rows and its metadata {rows}: they do not belong together."
        )
    records: Iterator[Record]
    if tables:
        records = (record for table in tables for record in _records(table, table.stem, 0))
    else:
        records = _records(None, path.name, 0)
    for start in range(0, index.ntotal, BLOCK):
        block = index.reconstruct_n(start, min(BLOCK, index.ntotal - start))
        yield block, list(islice(records, len(block)))


def _read_faiss(path: Path) -> Any:  # faiss has no types
    """Read a FAISS index that stores its vectors exactly.

    The file is opened by Python, because FAISS cannot open every path on Windows.
    """
    faiss = needed("faiss", f"Reading {path}", "pip install faiss-cpu")
    try:
        with open(path, "rb") as file:
            index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
    except (OSError, RuntimeError) as error:
        raise AMGError(f"{path} is damaged or is no FAISS index ({error}).") from error
    kind = type(index).__name__
    if isinstance(index, faiss.IndexIVFFlat):
        index.make_direct_map()
    elif not (
        isinstance(index, (faiss.IndexFlat, faiss.IndexHNSWFlat))
        or (
            isinstance(index, faiss.IndexScalarQuantizer)
            and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        )
    ):
        raise AMGError(
            f"{path} is an {kind}: it holds compressed codes, from which the exact embeddings cannot be "
            f"restored. Import the img_emb folder from which it was made (clip-retrieval inference "
            f"writes it), or make a flat index."
        )
    return index
