"""Small pictures for the tests."""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path

import numpy as np
from PIL import Image

from amg_core.index import Index
from amg_core.index import format as fmt


def paint(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random RGB picture; `size` is (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size)


def fill(folder: Path, count: int, first: int = 0, prefix: str = "p") -> Path:
    """`count` PNG pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        paint(i).save(folder / f"{prefix}{i:03}.png")
    return folder


def shard_of(index: Path) -> Path:
    """The folder of the only shard of an index."""
    (shard,) = (index / fmt.SHARDS).iterdir()
    return shard


def reseal(index, **changes) -> None:
    """Rewrite the manifest so that its hashes fit the files as they are."""
    path = index / "manifest.json"
    manifest = fmt.parse_manifest(path.read_bytes(), path)
    shards = []
    for shard in manifest.shards:
        files = {name: fmt.digest(index / shard.path / name) for name in shard.files}
        shards.append(dataclasses.replace(shard, files=files, **changes))
    path.write_bytes(fmt.dump_manifest(dataclasses.replace(manifest, shards=shards)))


def content(index: Path) -> dict:
    """All that an index holds, but when it was made: file name -> bytes, and what it says."""
    with Index.open(index) as opened:
        held = {"hash": opened.hash, "muted": opened.muted, "aliases": list(opened.aliases())}
        for shard in opened.shards:
            for name in shard.entry.files:
                held[f"{shard.entry.path}/{name}"] = (shard.folder / name).read_bytes()
    return held


def as_version_1(index: Path) -> Path:
    """Rewrite an index of one shard as the first version of the format had it."""
    with Index.open(index) as opened:
        manifest, (shard,) = opened.manifest, opened.shards
        hashes = [row.tobytes().hex() for row in shard.hashes]
    folder = shard_of(index)
    for scale in manifest.spec.scales:
        (folder / fmt.rows_name(scale)).rename(index / fmt.rows_name(scale))
    old, new = sqlite3.connect(folder / fmt.META), sqlite3.connect(index / fmt.META)
    new.executescript(
        "CREATE TABLE pictures (id INTEGER PRIMARY KEY, source TEXT NOT NULL, "
        "caption TEXT NOT NULL, sha256 TEXT NOT NULL, width INTEGER NOT NULL, "
        "height INTEGER NOT NULL); CREATE TABLE thumbnails (id INTEGER PRIMARY KEY, "
        "data BLOB NOT NULL);"
    )
    for i, source, caption, width, height in old.execute("SELECT * FROM pictures ORDER BY id"):
        values = (i, source, caption, hashes[i], width, height)
        new.execute("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?)", values)
    new.executemany("INSERT INTO thumbnails VALUES (?, ?)", old.execute("SELECT * FROM thumbnails"))
    new.commit()
    old.close(), new.close()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir(), folder.parent.rmdir()
    names = [fmt.META, *map(fmt.rows_name, manifest.spec.scales)]
    files = {name: fmt.digest(index / name) for name in names}
    tree = {
        "format": fmt.FORMAT,
        "version": 1,
        "created": manifest.created,
        "count": manifest.count,
        "descriptor": manifest.spec.to_json(),
        "rows": [
            {"scale": scale, "file": fmt.rows_name(scale), "dim": dim}
            for scale, dim in manifest.dims.items()
        ],
        "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in sorted(files.items())},
    }
    (index / fmt.MANIFEST).write_bytes(fmt._dump(tree | {"checksum": fmt._checksum(tree)}))
    return index
