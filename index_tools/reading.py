"""Commands that only read an index: info, verify, export."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from amg_core.errors import AMGError
from amg_core.optional import needed

from . import terminal

if TYPE_CHECKING:
    from amg_core.index import Index
    from amg_core.index.shard import Shard

Row = dict[str, object]  # of the table that is exported

VERIFY = """\
Read and hash every file of an index. With --search N, also search for N of its pictures with noise
added, by every engine, and compare the results with those of exact search."""

EXPORT = """\
Write an index for other programs in the layout of clip-retrieval: img_emb/img_emb_<n>.npy (float16
rows of one scale) with metadata/metadata_<n>.parquet or .jsonl. With --thumbnails, also write the
thumbnails of the index."""


WEIGHTS = """\
Check a file of SSCD's weights that you have fetched: its size, its hashes, and whether it is that
network. Nothing in it is run and nothing is downloaded. Without FILE: where it is published, and where
to put it."""


def register(commands: terminal.Commands) -> None:
    weights = terminal.add_command(commands, "weights", description=WEIGHTS)
    weights.add_argument("file", metavar="FILE", type=Path, nargs="?", help="the file")
    terminal.add_json(weights)
    weights.set_defaults(run=_weights)

    info = terminal.add_command(
        commands, "info", description="Open an index and show what it holds."
    )
    info.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    terminal.add_json(info)
    info.set_defaults(run=_info)

    verify = terminal.add_command(commands, "verify", description=VERIFY)
    verify.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    verify.add_argument("--search", type=terminal.count, metavar="N", help="searches to compare")
    terminal.add_json(verify)
    verify.set_defaults(run=_verify)

    export = terminal.add_command(commands, "export", description=EXPORT)
    export.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    export.add_argument("out", metavar="OUT", type=Path, help="new folder")
    export.add_argument("--scale", type=int, help="scale of the rows (full detail)")
    export.add_argument(
        "--metadata", choices=("parquet", "jsonl"), default="parquet",
        help="format of names and captions (%(default)s)",
    )  # fmt: skip
    export.add_argument("--thumbnails", action="store_true", help="write the thumbnails too")
    terminal.add_json(export)
    export.set_defaults(run=_export)


def _weights(options: argparse.Namespace) -> None:
    from amg_core.descriptors import sscd

    found = sscd.examine(options.file)
    if options.json:
        terminal.print_json(**asdict(found))
    else:
        print(found.words())


def _info(options: argparse.Namespace) -> None:
    from amg_core.index import Index
    from amg_core.index.format import describe

    with Index.open(options.index) as index:
        captions = sum(bool(record.caption) for record in index.records())
        aliases = sum(1 for _ in index.aliases())
        sizes = {path: path.stat().st_size for path in index.path.rglob("*") if path.is_file()}
        cached = sum(size for path, size in sizes.items() if index.cache in path.parents)
        if options.json:
            terminal.print_json(
                path=str(index.path),
                name=index.name,
                count=index.count,
                captions=captions,
                aliases=aliases,
                muted=len(index.muted),
                shards=len(index.shards),
                descriptor=index.spec.to_json(),
                caption_rule=asdict(index.manifest.captions) if index.manifest.captions else None,
                created=index.created,
                bytes=sum(sizes.values()) - cached,
                cache_bytes=cached,
                hash=index.hash,
            )
            return
        shards = f"{len(index.shards)} shard{'s' if len(index.shards) > 1 else ''}"
        size = f"{(sum(sizes.values()) - cached) / 1e6:.1f} MB in {shards}"
        print(f"{index.path}: a sound index")
        print(f"  pictures    {index.count}, {captions} with a caption")
        if aliases:
            print(f"  aliases     {aliases} more files of the same bytes")
        if index.muted:
            print(f"  muted       {len(index.muted)}")
        print(f"  descriptor  {describe(index.spec)}")
        if rule := index.manifest.captions:
            print(f"  captions    {rule.lines} lines, at most {rule.length} characters")
        print(f"  created     {index.created}, {size}")
        if cached >= 5e4:  # a smaller one is not worth a line
            print(f"  cache       {cached / 1e6:.1f} MB, may be deleted")
        print(f"  hash        {index.hash}")


def _verify(options: argparse.Namespace) -> None:
    from amg_core.index import Index

    with Index.open(options.index) as index:
        index.verify()
        engines = _compare(index, options.search) if options.search else {}
        if options.json:
            more = {"search": engines} if engines else {}
            terminal.print_json(path=str(index.path), count=index.count, sound=True, **more)
            return
        print(f"{index.path}: every file of {index.count} pictures is as it was written")
        for engine, one in engines.items():
            print(
                f"  {engine}: nearest found {one['recall@1']:.2%} of {options.search}, "
                f"50 nearest {one['recall@50']:.2%}, largest loss {one['loss']:.2g}"
            )


def _compare(index: Index, searches: int) -> dict[str, dict[str, float]]:
    """Recall and largest loss of similarity of each engine, compared with exact search."""
    import numpy as np
    import torch

    from amg_core.index.search import Searcher

    scale, rng = index.spec.scales[-1], np.random.default_rng(0)
    rows = index.rows(scale)[np.sort(rng.integers(0, index.count, searches))].astype(np.float32)
    noise = rng.standard_normal(rows.shape).astype(np.float32)
    noise *= np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1)[:, None]
    query = torch.from_numpy(rows + noise * rng.uniform(0, 2, (searches, 1)).astype(np.float32))
    exact = Searcher(index, engine="exact").nearest(query, scale, 50)
    values, ids = Searcher(index, engine="pq4").nearest(query, scale, 50)
    same = [len(set(a) & set(b)) / len(a) for a, b in zip(exact[1].tolist(), ids.tolist())]  # noqa: B905
    pq4 = {
        "recall@1": float((ids[:, 0] == exact[1][:, 0]).float().mean()),
        "recall@50": sum(same) / len(same),
        "loss": float((values[:, 0] - exact[0][:, 0]).abs().max()),
    }
    return {"pq4": pq4}


def _export(options: argparse.Namespace) -> None:
    import numpy as np

    from amg_core.index import Index

    terminal.check_new(options.out)
    write = _parquet if options.metadata == "parquet" else _jsonl
    with Index.open(options.index) as index:
        scale = terminal.scale(index, options.scale)
        try:
            for name in ("img_emb", "metadata"):
                (options.out / name).mkdir(parents=True)
            first = 0
            for number, shard in enumerate(index.shards):
                rows = options.out / "img_emb" / f"img_emb_{number}.npy"
                np.save(rows, np.asarray(shard.rows(scale)), allow_pickle=False)
                table: list[Row] = [
                    {
                        "image_path": record.source,
                        "caption": record.caption,
                        "sha256": record.sha256,
                        "width": record.width,
                        "height": record.height,
                        "muted": index.muted.get(first + row),
                    }
                    for row, record in enumerate(shard.records())
                ]
                write(options.out / "metadata" / f"metadata_{number}", table)
                if options.thumbnails:
                    _thumbnails(options.out / "thumbnails", shard, first)
                first += shard.count
        except OSError as error:
            raise AMGError(f"Cannot write {options.out} ({error}): give another folder.") from None
        if options.json:
            terminal.print_json(path=str(options.out), count=index.count, scale=scale)
        else:
            print(f"{options.out}: {index.count} rows of scale {scale}")


def _parquet(path: Path, table: list[Row]) -> None:
    step = "pip install pyarrow, or choose --metadata jsonl"
    parquet = needed("pyarrow.parquet", "Writing parquet", step)
    pyarrow = needed("pyarrow", "Writing parquet", step)
    columns = pyarrow.Table.from_pylist(table)
    with open(path.with_suffix(".parquet"), "wb") as file:
        parquet.write_table(columns, file)


def _jsonl(path: Path, table: list[Row]) -> None:
    with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        for row in table:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _thumbnails(folder: Path, shard: Shard, first: int) -> None:
    folder.mkdir(exist_ok=True)
    for row in range(shard.count):
        if (data := shard.thumbnail(row)) is not None:
            extension = "webp" if data[:4] == b"RIFF" else "jpg"
            (folder / f"{first + row:09}.{extension}").write_bytes(data)
