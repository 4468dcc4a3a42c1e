"""Small pictures for the tests, in folders and archives, and processes of their own."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from amg_core.descriptors.base import DescriptorSpec
from amg_core.index import Index
from amg_core.index import format as fmt
from amg_demo.model import PICTURES

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds: what takes as long hangs


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


def encoded(picture: Image.Image | int, kind: str = "PNG", **options) -> bytes:
    """A file of that kind. picture : what is in it, or the seed to paint it from."""
    file = io.BytesIO()
    (paint(picture) if isinstance(picture, int) else picture).save(file, kind, **options)
    return file.getvalue()


def as_folder(files: dict[str, bytes], at: Path) -> Path:
    for name, data in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(data)
    return at


def as_zip(files: dict[str, bytes], at: Path) -> Path:
    with zipfile.ZipFile(at.with_suffix(".zip"), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return at.with_suffix(".zip")


def as_tar(files: dict[str, bytes], at: Path) -> Path:
    with tarfile.open(at.with_suffix(".tar"), "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return at.with_suffix(".tar")


def demo_pictures(folder: Path, count: int, first: str = "") -> Path:
    """`count` training pictures of the demo with their captions; those named in `first` before others."""
    lines = (PICTURES / "metadata.jsonl").read_text().splitlines()
    lines = sorted(lines, key=lambda line: json.loads(line)["file_name"] not in first)[:count]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for line in lines:
        name = json.loads(line)["file_name"]
        shutil.copy(PICTURES / name, folder / name)
    return folder


class Stored:
    """As much of an index as a Searcher needs, in memory."""

    def __init__(self, rows, metric="cosine", cache=None, muted=()):
        self._rows = np.asarray(rows).astype("<f2")
        self.spec = DescriptorSpec("test", metric, "none/1", (8,))
        self.cache, self.muted = cache, dict.fromkeys(muted, "ours")
        self.members = (self,)

    def rows(self, scale: int) -> np.ndarray:
        return self._rows

    def rows_key(self, scale: int) -> str:
        return hashlib.sha256(self._rows.tobytes()).hexdigest()


class Identity:
    """A decoder: three-channel latents are pictures."""

    name, channels, factor = "identity", 3, 1

    def __call__(self, latent, at_least=None):
        return latent

    def to(self, device):
        return self


def options_of(tool, *arguments) -> argparse.Namespace:
    """The options of a command (`index_tools.dedup`, `index_tools.evaluate`) from its arguments."""
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


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


def run(script: str, *arguments: object) -> str:
    """What a piece of Python prints, run in a process of its own in the folder of the checkout.

    AssertionError where it fails, crashes or hangs.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AssertionError("it hangs") from None
    told = f"ended with {done.returncode}: {done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert done.returncode == 0, told
    return done.stdout
