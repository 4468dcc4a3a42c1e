"""The layout of an index folder on disk: names, the manifest, hashes.

::

    my_index/
      manifest.json            all files with size and SHA-256; the last key is its own checksum
      shards/<name>/           at most ROWS_PER_SHARD pictures; never changed after it is written
        rows.<scale>.f16.npy   (n, dim) little-endian float16; one file for each scale
        sha256.npy             (n, 32) uint8: SHA-256 of the picture's file
        meta.sqlite            pictures(id, source, caption, width, height), id = row in the shard;
                               thumbnails(id, data); aliases(sha256, source, caption): further
                               files with the bytes of a picture of this index
      cache/                   can be computed again, so it may be deleted at any time
      .build/                  a build in progress or interrupted, which the next build continues
    .my_index.amg-lock         beside the folder, only while the index is changed: the lock

A row's id is its place in the shards, in the manifest's order. A change writes new shards and then
replaces the manifest, so a reader finds either the old index or the new one. All files can be read with
a few lines of code in any language, SQLite by its library. It was chosen over Parquet because it needs no
package on a portable Windows ComfyUI, and reads one row in 0.1 ms. docs/decisions/index-format.md has
the alternatives.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..descriptors.base import DescriptorSpec
from ..errors import AMGError
from ..files import brief, open_regular

FORMAT = "amg-index"
VERSION = 2
MANIFEST = "manifest.json"
META = "meta.sqlite"
HASHES = "sha256.npy"
SHARDS, CACHE, BUILD = "shards", "cache", ".build"
HEADER_BYTES = 128
THUMBNAIL_SIDE = 256
MAX_MANIFEST_BYTES = 1 << 25
Tree = dict[str, Any]  # JSON; `_typed` checks the contents of a manifest
METRICS = ("nl2", "cosine")

SCHEMA = """
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, caption TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE TABLE thumbnails (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE aliases (sha256 TEXT NOT NULL, source TEXT NOT NULL, caption TEXT NOT NULL);
"""


@dataclass(frozen=True)
class FileEntry:
    """Size, in bytes, and SHA-256 (hex) of one data file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its path in the index, its number of rows, its files."""

    path: str
    count: int
    files: Mapping[str, FileEntry]


LINES = ("all", "first", "joined")
LONGEST_CAPTION = 1 << 30  # characters
CAPTION_LENGTH = 2000  # characters; the text encoders of diffusion models read 77 to 512 tokens


@dataclass(frozen=True)
class CaptionRule:
    """What an index keeps of the captions that its sources give.

    Attributes
    ----------
    lines : str
        "all" lines as they are, the "first" line that has words, or all lines "joined" by a space.
    length : int
        Most characters that are kept. A longer caption ends after its last whole word.
    """

    lines: str = LINES[0]
    length: int = CAPTION_LENGTH

    def __post_init__(self) -> None:
        if self.lines not in LINES or not 1 <= self.length <= LONGEST_CAPTION:
            raise ValueError(f"lines must be one of {LINES}, and length above 0, not {self}")

    def shaped(self, caption: str) -> str:
        """The caption with the chosen lines, of any length."""
        if self.lines == "all":
            return caption
        lines = [line.strip() for line in caption.splitlines() if line.strip()]
        return " ".join(lines[:1] if self.lines == "first" else lines)

    def __call__(self, caption: str) -> str:
        """What is kept of a caption."""
        shaped = self.shaped(caption)
        if len(shaped) <= self.length:
            return shaped
        cut = shaped[: self.length]
        return cut if shaped[self.length].isspace() else cut.rsplit(None, 1)[0]


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest. `dims` maps scale -> D, `muted` the SHA-256 of an excluded picture -> reason.

    `captions` is None in indexes that were made before there was a choice.
    """

    spec: DescriptorSpec
    dims: Mapping[int, int]
    shards: Sequence[ShardEntry]
    created: str
    muted: Mapping[str, str] = field(default_factory=dict)
    captions: CaptionRule | None = None

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


def rows_name(scale: int) -> str:
    """File name of the rows at one scale."""
    return f"rows.{scale}.f16.npy"


def npy_header(dtype: str, count: int, dim: int) -> bytes:
    """The .npy v1 header of a (count, dim) array, always HEADER_BYTES long.

    Because the length is fixed, rows can be written before their number is known.
    """
    fields = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({count}, {dim}), }}"
    body = fields.encode().ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def shard_name(files: Mapping[str, FileEntry]) -> str:
    """The name of a shard, from the hashes of its files."""
    listing = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def lock_file(index: Path) -> Path:
    """The file that is locked while the index is changed."""
    return index.with_name(f".{index.name}.amg-lock")


def real(path: str | os.PathLike[str]) -> Path:
    """Absolute path with links resolved."""
    return Path(os.path.realpath(path))


def digest(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces. Raises OSError."""
    state, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            state.update(piece)
            size += len(piece)
    return FileEntry(size, state.hexdigest())


def describe(spec: DescriptorSpec) -> str:
    """A descriptor's identity in words: 'pixel (rgb01-square-area/1, nl2, scales 16/32)'."""
    parts = [spec.preprocessing, spec.metric, "scales " + "/".join(map(str, spec.scales))]
    if spec.weights_sha256:
        parts.append(f"weights {spec.weights_sha256[:12]}")
    return brief(f"{spec.id} ({', '.join(parts)})")


def identity(manifest: Manifest) -> str:
    """The index hash: SHA-256 (hex) of the manifest without its time."""
    return _checksum({k: v for k, v in _tree(manifest).items() if k != "created"})


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest as bytes, always the same for the same manifest. `parse_manifest` reads it back.

    AMGError if it would be too long to be read.
    """
    tree = _tree(manifest)
    data = _dump(tree | {"checksum": _checksum(tree)})
    if len(data) > MAX_MANIFEST_BYTES:
        raise AMGError(
            f"The manifest would be larger than {MAX_MANIFEST_BYTES >> 20} MiB, with "
            f"{len(manifest.muted)} muted pictures and {len(manifest.shards)} shards: remove those "
            f"pictures from the index instead of muting them."
        )
    return data


def _tree(manifest: Manifest) -> Tree:
    rule = manifest.captions
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": manifest.created,
        "count": manifest.count,
        "descriptor": manifest.spec.to_json(),
        "rows": [{"scale": scale, "dim": dim} for scale, dim in manifest.dims.items()],
        "shards": [
            {
                "path": shard.path,
                "count": shard.count,
                "files": {
                    name: {"size": entry.size, "sha256": entry.sha256}
                    for name, entry in sorted(shard.files.items())
                },
            }
            for shard in manifest.shards
        ],
        "muted": dict(sorted(manifest.muted.items())),
        **({} if rule is None else {"captions": asdict(rule)}),
    }


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Read and check a manifest. `path` is used in messages only.

    Raises
    ------
    AMGError
        It is no index manifest, has another format version, or was altered after it was written.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise _damaged(path, f"is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    try:
        tree = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(path, "is not valid JSON") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise _damaged(path, f"is not the manifest of an AMG index (format {FORMAT!r})")
    if type(tree.get("version")) is not int:
        raise _damaged(path, "names no format version")
    if tree["version"] != VERSION:
        old = tree["version"] < VERSION  # from before the first release
        step = "build the index again" if old else "update the plugin, or build the index again"
        raise AMGError(
            f"{path} has index format version {tree['version']}, and this plugin reads version "
            f"{VERSION}: {step}, in a new folder."
        )
    try:
        checksum = tree.pop("checksum", None)
        if checksum != _checksum(tree) or _dump(tree | {"checksum": checksum}) != data:
            raise _damaged(path, "was altered after the index was built")
        return _typed(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"does not describe an index ({brief(error)})") from None


def _typed(tree: Tree) -> Manifest:
    """A manifest from its JSON tree. ValueError, TypeError or KeyError if the tree is wrong."""
    spec = tree["descriptor"]
    for name in ("id", "metric", "preprocessing", "weights_sha256"):
        _need(isinstance(spec[name], str), f"descriptor {name}")
    _need(spec["metric"] in METRICS, "descriptor metric")
    scales = spec["scales"]
    _need(isinstance(scales, list) and bool(scales) and all(map(_positive, scales)), "scales")
    _need(scales == sorted(set(scales)), "scales")
    _need(isinstance(tree["created"], str), "created")
    rows = tree["rows"]
    _need(isinstance(rows, list) and [row["scale"] for row in rows] == scales, "rows")
    _need(all(_positive(row["dim"]) for row in rows), "rows")
    _need(isinstance(tree["shards"], list) and bool(tree["shards"]), "shards")
    shards = [_shard(item, scales) for item in tree["shards"]]
    _need(len({shard.path for shard in shards}) == len(shards), "shards")
    muted = tree["muted"]
    _need(all(is_digest(k) and isinstance(v, str) for k, v in muted.items()), "muted")
    manifest = Manifest(
        spec=DescriptorSpec.from_json(spec),
        dims={row["scale"]: row["dim"] for row in rows},
        shards=shards,
        created=tree["created"],
        muted=muted,
        captions=_captions(tree["captions"]) if "captions" in tree else None,
    )
    _need(type(tree["count"]) is int and manifest.count == tree["count"], "count")
    return manifest


def _shard(tree: Tree, scales: list[int]) -> ShardEntry:
    files = {
        name: FileEntry(entry["size"], entry["sha256"]) for name, entry in tree["files"].items()
    }
    path = tree["path"]
    _need(isinstance(path, str), "shard path")
    folder, _, name = path.partition("/")
    _need(folder == SHARDS and len(name) == 16 and set(name) <= set(_HEX), "shard path")
    _need(set(files) == {META, HASHES, *map(rows_name, scales)}, "files")
    for entry in files.values():
        _need(_positive(entry.size) and is_digest(entry.sha256), "files")
    _need(_positive(tree["count"]), "count")
    return ShardEntry(path, tree["count"], files)


_HEX = "0123456789abcdef"


def is_digest(text: object) -> bool:
    """Whether it is a SHA-256 in hex, lower case."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set(_HEX)


def _positive(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 62


def _captions(rule: Tree) -> CaptionRule:
    _need(set(rule) == {"lines", "length"} and _positive(rule["length"]), "captions")
    _need(rule["length"] <= LONGEST_CAPTION, "captions")
    return CaptionRule(rule["lines"], rule["length"])


def _need(condition: bool, what: str = "files") -> None:
    if not condition:
        raise ValueError(f"wrong {what}")


def _dump(tree: Tree) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=True) + "\n").encode()


def _checksum(tree: Tree) -> str:
    return hashlib.sha256(_dump(tree)).hexdigest()


def _damaged(path: Path, what: str) -> AMGError:
    return AMGError(f"{path} {what}: rebuild the index, or restore the folder from a backup.")
