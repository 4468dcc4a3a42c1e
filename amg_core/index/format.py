"""What an index folder looks like on disk, and nothing else: names, the manifest, hashes.

::

    my_index/
      manifest.json          what is below, with sizes and SHA-256; last key: its own checksum
      rows.<scale>.f16.npy   (count, dim) little-endian float16, row = id; one file a scale
      meta.sqlite            pictures(id, source, caption, sha256, width, height),
                             thumbnails(id, data)

While a build runs there are hidden siblings: ``.my_index.amg-build`` (the index in the making),
``.my_index.amg-old`` (the replaced one, for the moment of the swap) and ``.my_index.amg-lock``.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..descriptors.base import DescriptorSpec
from ..errors import AMGError

FORMAT = "amg-index"
VERSION = 1
MANIFEST = "manifest.json"
META = "meta.sqlite"
HEADER_BYTES = 128
THUMBNAIL_SIDE = 256
MAX_MANIFEST_BYTES = 1 << 20
METRICS = ("nl2", "cosine")

SCHEMA = """
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, caption TEXT NOT NULL, sha256 TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE TABLE thumbnails (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""


@dataclass(frozen=True)
class FileEntry:
    """One data file: its size in bytes and the SHA-256 of its content (hex)."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest. `dims` maps scale -> D, `files` maps file name -> FileEntry."""

    spec: DescriptorSpec
    count: int
    created: str
    dims: dict[int, int]
    files: dict[str, FileEntry]


def rows_name(scale: int) -> str:
    """File name of the rows at one scale."""
    return f"rows.{scale}.f16.npy"


def rows_header(count: int, dim: int) -> bytes:
    """The .npy v1 header of a (count, dim) float16 array, always HEADER_BYTES long.

    The fixed length lets a build write rows before it knows how many there will be.
    """
    fields = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({count}, {dim}), }}".encode()
    body = fields.ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def build_folder(index: Path) -> Path:
    """Where the index in the making lives."""
    return index.with_name(f".{index.name}.amg-build")


def old_folder(index: Path) -> Path:
    """Where the replaced index rests for the moment of the swap."""
    return index.with_name(f".{index.name}.amg-old")


def lock_file(index: Path) -> Path:
    """Held while a build runs."""
    return index.with_name(f".{index.name}.amg-lock")


def real(path: str | os.PathLike) -> Path:
    """Absolute path with links resolved, so that siblings lie where the folder really is."""
    return Path(os.path.realpath(path))


def digest(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces. Raises OSError."""
    state, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
            size += len(piece)
    return FileEntry(size, state.hexdigest())


def describe(spec: DescriptorSpec) -> str:
    """A descriptor's identity for a person: 'pixel (rgb01-square-area/1, nl2, scales 8/16/32)'."""
    parts = [spec.preprocessing, spec.metric, "scales " + "/".join(map(str, spec.scales))]
    if spec.weights_sha256:
        parts.append(f"weights {spec.weights_sha256[:12]}")
    return f"{spec.id} ({', '.join(parts)})"


def dump_manifest(manifest: Manifest) -> bytes:
    """The one byte string that stands for this manifest; `parse_manifest` reads it back."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "created": manifest.created,
        "count": manifest.count,
        "descriptor": manifest.spec.to_json(),
        "rows": [
            {"scale": scale, "file": rows_name(scale), "dim": dim}
            for scale, dim in manifest.dims.items()
        ],
        "files": {
            name: {"size": entry.size, "sha256": entry.sha256}
            for name, entry in sorted(manifest.files.items())
        },
    }
    return _dump(data | {"checksum": _checksum(data)})


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Read and check a manifest. `path` is used in messages only.

    Raises
    ------
    AMGError
        Not an index manifest, a version this code does not know, or altered since it was written.
    """
    try:
        tree = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(path, "is not valid JSON") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise _damaged(path, f"is not the manifest of an AMG index (format {FORMAT!r})")
    if type(tree.get("version")) is not int:
        raise _damaged(path, "names no format version")
    if tree["version"] != VERSION:
        raise AMGError(
            f"{path} has index format version {tree['version']}, this plugin reads version "
            f"{VERSION}: update the plugin, or rebuild the index."
        )
    try:
        checksum = tree.pop("checksum", None)
        if checksum != _checksum(tree) or _dump(tree | {"checksum": checksum}) != data:
            raise _damaged(path, "was altered after the index was built")
        return _typed(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"does not describe an index ({error})") from None


def _typed(tree: dict) -> Manifest:
    """Manifest from its JSON tree; ValueError, TypeError or KeyError where the tree is wrong."""
    spec = tree["descriptor"]
    for name in ("id", "metric", "preprocessing", "weights_sha256"):
        _need(isinstance(spec[name], str), f"descriptor {name}")
    _need(spec["metric"] in METRICS, "descriptor metric")
    scales = spec["scales"]
    _need(isinstance(scales, list) and bool(scales) and all(map(_positive, scales)), "scales")
    _need(scales == sorted(set(scales)), "scales")
    _need(_positive(tree["count"]), "count")
    _need(isinstance(tree["created"], str), "created")
    rows = tree["rows"]
    _need(isinstance(rows, list) and [row["scale"] for row in rows] == scales, "rows")
    for row in rows:
        _need(row["file"] == rows_name(row["scale"]) and _positive(row["dim"]), "rows")
    files = {
        name: FileEntry(entry["size"], entry["sha256"]) for name, entry in tree["files"].items()
    }
    _need(set(files) == {META, *map(rows_name, scales)}, "files")
    for entry in files.values():
        _need(_positive(entry.size) and isinstance(entry.sha256, str), "files")
    return Manifest(
        spec=DescriptorSpec.from_json(spec),
        count=tree["count"],
        created=tree["created"],
        dims={row["scale"]: row["dim"] for row in rows},
        files=files,
    )


def _positive(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 62


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"wrong {what}")


def _dump(tree: dict) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=True) + "\n").encode()


def _checksum(tree: dict) -> str:
    return hashlib.sha256(_dump(tree)).hexdigest()


def _damaged(path: Path, what: str) -> AMGError:
    return AMGError(f"{path} {what}: rebuild the index, or restore the folder from a backup.")
