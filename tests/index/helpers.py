"""Small pictures for the tests."""

from __future__ import annotations

import dataclasses
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
