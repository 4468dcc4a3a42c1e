"""What is damaged, and how it is read: indexes, search codes, weights, captions, and the like.

A target makes sound files once, the same bytes on every run; `mutate` damages a copy of them, as chance
would or, signed again, as somebody would who means harm; `read` reads what is there as the program does,
to a digest.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from amg_core import report
from amg_core.decoders import load_taesd
from amg_core.descriptors import create
from amg_core.descriptors.tensors import read_tensors, tensors_sha256
from amg_core.detection import calibration, statistics
from amg_core.errors import AMGError
from amg_core.index import Index, build, codes, commit, mute, writer
from amg_core.index import format as fmt
from amg_core.index.picture import Unreadable, decode
from amg_core.index.reader import VERIFIED
from amg_core.index.search import Searcher
from amg_core.index.sources import open_source
from benchmarks.fuzz.mutations import WILD_NUMBERS, WILD_TEXTS, damaged, wild_json
from tests.index.helpers import paint, reseal


@dataclass(frozen=True)
class Case:
    """Where the damaged files are, what was done, and whether they may only be read as they were."""

    path: Path
    done: str
    guarded: bool


@dataclass(frozen=True)
class Target:
    """`make` puts sound files into a folder; `mutate` damages a copy; `read` gives a digest.

    `read` of the very same content gives the same digest, and raises AMGError where it refuses.
    """

    make: Callable[[Path], None]
    mutate: Callable[[Path, random.Random], Case]
    read: Callable[[Path], str]


def _digest(parts: Iterable[object]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part if isinstance(part, bytes) else repr(part).encode())
    return state.hexdigest()


def _write_over(path: Path, rng: random.Random) -> str:
    words, data = damaged(path.read_bytes(), rng)
    path.write_bytes(data)
    return f"{path.name} {words}"


# ---------------------------------------------------------------- indexes


def _make_indexes(folder: Path) -> None:
    """One of two shards with aliases and a muted picture."""
    with mock.patch.object(commit, "now", lambda: "2020-01-01T00:00:00.000000+00:00"):
        _fill_indexes(folder)


def _fill_indexes(folder: Path) -> None:
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(5):
        paint(number).save(pictures / f"p{number}.png")
        (pictures / f"p{number}.txt").write_text(f"a picture of {number} things, naïve")
    (pictures / "p1 again.png").write_bytes((pictures / "p1.png").read_bytes())
    with mock.patch.object(writer, "ROWS_PER_SHARD", 3):
        build(pictures, folder / "index", create("pixel"))
    mute(folder / "index", lambda entry: entry.source == "p2.png", "mine")
    _read_index(folder / "index")  # makes the cache
    (folder / "index" / fmt.CACHE / VERIFIED).write_text('{"rows": [1, 2, 3, 4, "5"]}')


def _mutate_index(folder: Path, rng: random.Random) -> Case:
    index = folder / "index"
    shard = rng.choice(sorted((index / fmt.SHARDS).iterdir()))
    files = sorted(path for path in shard.iterdir() if path.is_file() and path.name != fmt.MANIFEST)
    kind = rng.choice(
        ("bytes", "header", "manifest", "tree", "value", "thumbnail", "files", "cache")
    )
    signed = rng.random() < 0.5
    if kind == "bytes":
        done = _write_over(rng.choice(files), rng)
    elif kind == "header":
        path = rng.choice([path for path in files if path.suffix == ".npy"])
        words, head = damaged(path.read_bytes()[: fmt.HEADER_BYTES], rng)
        path.write_bytes(head + path.read_bytes()[fmt.HEADER_BYTES :])
        done = f"header of {path.name} {words}"
    elif kind == "manifest":
        done, signed = _write_over(index / fmt.MANIFEST, rng), False
    elif kind == "tree":
        done = _wild_manifest(index / fmt.MANIFEST, rng, signed)
    elif kind == "value":
        done = _wild_value(shard / fmt.META, rng)
    elif kind == "thumbnail":
        done = _wild_thumbnail(shard / fmt.META, rng)
    elif kind == "files":
        a, b = rng.choice(files), rng.choice(sorted(index.rglob("*.*")))
        if rng.random() < 0.3:
            a.unlink()
            done = f"{a.name} gone"
        elif b.is_file():
            a_data, b_data = a.read_bytes(), b.read_bytes()
            a.write_bytes(b_data), b.write_bytes(a_data)
            done = f"{a.name} and {b.name} changed places"
        else:
            done = "nothing"
    else:
        done, signed = _write_over(index / fmt.CACHE / VERIFIED, rng), False
    if signed and kind != "tree":
        try:
            reseal(index)
        except (OSError, AMGError):  # a file is gone, or is another's: nothing to sign
            signed = False
    return Case(index, f"{index.name}: {done}{', signed' if signed else ''}", not signed)


def _wild_manifest(path: Path, rng: random.Random, signed: bool) -> str:
    tree = json.loads(path.read_bytes())
    checksum = tree.pop("checksum")
    done, tree = wild_json(tree, rng)
    if signed:
        checksum = hashlib.sha256(_manifest_bytes(tree)).hexdigest()
    path.write_bytes(_manifest_bytes(tree | {"checksum": checksum}))
    return f"manifest {done}"


def _manifest_bytes(tree: dict) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def _wild_value(path: Path, rng: random.Random) -> str:
    """One value of the database, one row of it, or a setting of its own."""
    values: list[Any] = [None, 0.5, 1e308, rng.randbytes(40), b"", *WILD_NUMBERS, *WILD_TEXTS]
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
        table = rng.choice(tables)
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        rowids = [row for (row,) in database.execute(f"SELECT rowid FROM {table}")] or [0]
        column, row, value = rng.choice(columns), rng.choice(rowids), rng.choice(values)
        act = rng.random()
        if act < 0.1:
            done, statement, given = "row gone", f"DELETE FROM {table} WHERE rowid = ?", [row]
        elif act < 0.2:
            done = f"user_version {value!r:.20}"
            statement, given = f"PRAGMA user_version = {rng.randrange(1 << 31)}", []
        else:
            done = f"{column} of row {row} = {value!r:.60}"
            statement = f"UPDATE {table} SET {column} = CAST(? AS {rng.choice(('BLOB', 'TEXT'))}) "
            statement = statement if rng.random() < 0.2 else f"UPDATE {table} SET {column} = ? "
            statement, given = statement + "WHERE rowid = ?", [value, row]
        try:
            database.execute(statement, given)
        except sqlite3.Error as error:  # the table refuses it
            done += f" ({error})"
        database.commit()
    return f"{table}: {done}"


def _wild_thumbnail(path: Path, rng: random.Random) -> str:
    with closing(sqlite3.connect(path)) as database:
        rows = list(database.execute("SELECT id, data FROM thumbnails"))
        row, data = rng.choice(rows)
        words, data = damaged(data, rng)
        database.execute("UPDATE thumbnails SET data = ? WHERE id = ?", [data, row])
        database.commit()
    return f"thumbnail {row} {words}"


def _read_index(path: Path) -> str:
    """All that can be asked of an index, once."""
    with Index.open(path) as index:
        parts: list[object] = [
            index.hash,
            index.muted,
            list(index.records()),
            list(index.aliases()),
        ]
        for i in range(index.count):
            parts += [index.record(i), index.captions(i), index.thumbnail(i).tobytes()]
            parts += [index.find(index.record(i).sha256)]
        searcher = Searcher(index)
        for scale in index.spec.scales:
            rows = index.rows(scale)
            parts.append(rows[:].tobytes())
            query = torch.full((1, rows.shape[1]), 0.5)
            values, ids = searcher.nearest(query, scale, 3)
            if not torch.isfinite(values).all():
                raise ValueError(f"a search came to {values}")
            parts += [values.numpy().tobytes(), ids.tolist()]
        index.verify()
        index.check_descriptor(create("pixel").spec)
        return _digest(parts)


# ---------------------------------------------------------------- search codes


CODED = np.random.default_rng(0).random((70, 12)).astype(np.float16)
CODES = {"version": codes.VERSION, "rows": "k", "count": 70, "dim": 12, "metric": "nl2"}


def _make_codes(folder: Path) -> None:
    codes.open_codes(folder, "k", 16, CODED, cosine=False)


def _mutate_codes(folder: Path, rng: random.Random) -> Case:
    path = folder / "pq4-16.bin"
    data = path.read_bytes()
    act = rng.random()
    if act < 0.4:
        return Case(path, f"codes {_write_over(path, rng)}", True)
    header = json.loads(data[40 : codes.HEADER])
    body = data[codes.HEADER :]
    if act < 0.8:
        done, header = wild_json(rng.choice((header, {"all": header})), rng)
        header = header.get("all", header) if isinstance(header, dict) else header
    else:
        done, body = damaged(body, rng)
        size = 4 * (12 + 12 * header["width"] + codes.CENTROIDS * header["width"])
        halves = [hashlib.sha256(piece).digest() for piece in (body[:size], body[size:])]
        header["sha256"] = hashlib.sha256(b"".join(halves)).hexdigest()
    text = json.dumps(header).encode()[: codes.HEADER - 40].ljust(codes.HEADER - 40)
    path.write_bytes(codes.MAGIC + hashlib.sha256(text).digest() + text + body)
    return Case(path, f"codes {done}, signed", False)


def _read_codes(path: Path) -> str:
    """As a search does: what cannot be used is made again, and the cache is mended by that."""
    found = codes.open_codes(path.parent, "k", 16, CODED, cosine=False)
    (scanned,) = found.scan(np.full((1, 12), 0.5, np.float32), 70)
    if sorted(scanned.ids.tolist()) != list(range(70)):
        raise ValueError(f"a scan of everything found rows {scanned.ids}")
    return _digest([scanned.ids.tobytes(), scanned.scores.tobytes(), found.tail, found.floor])


# ---------------------------------------------------------------- weights


def _make_weights(folder: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "1.weight": torch.rand(4, 3, 3, 3, generator=rng), "1.bias": torch.rand(4, generator=rng),
        "half": torch.rand(5, generator=rng).half(), "steps": torch.tensor(7),
    }  # fmt: skip
    save_file(tensors, folder / "w.safetensors")
    tree = {"state_dict": tensors | {"view": tensors["1.weight"][1:, :, ::2]}, "epoch": 3}
    torch.save(tree, folder / "w.pth")
    one = {"state_dict": {"a": tensors["1.weight"], "view": tensors["1.weight"][1:, :, ::2]}}
    torch.save(one, folder / "old.pth", _use_new_zipfile_serialization=False)
    data = (folder / "old.pth").read_bytes()  # which calls numbers by their addresses in memory
    (folder / "old.pth").write_bytes(re.sub(rb"X.\0\0\0\d{9,}", b"X\1\0\0\0" + b"7", data))
    _read_weights(folder / "old.pth")


def _mutate_weights(folder: Path, rng: random.Random) -> Case:
    path = folder / rng.choice(("w.safetensors", "w.pth", "old.pth"))
    if rng.random() < 0.5 and path.name != "old.pth":
        make = _signed_safetensors if path.suffix == ".safetensors" else _signed_archive
        return Case(path, make(path, rng), False)
    return Case(path, _write_over(path, rng), False)


def _signed_safetensors(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        done, tree = wild_json(json.loads(data[8:end]), rng)
        head = json.dumps(tree).encode("utf-8", "surrogatepass")
    else:
        done, head = damaged(data[8:end], rng)
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])
    return f"{path.name} header {done}"


def _signed_archive(path: Path, rng: random.Random) -> str:
    """One entry damaged, with the checksum that fits; the pickle mostly."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in entries if name.endswith("data.pkl")]
    name = rng.choice([*pickles * 6, *entries])
    done, entries[name] = damaged(entries[name], rng)
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in entries.items():
            archive.writestr(zipfile.ZipInfo(key), data)
    return f"{path.name} {name} {done}, signed"


def _read_weights(path: Path) -> str:
    """`read_tensors` may raise what it will, as it says; those who call it name the file."""
    try:
        tensors = read_tensors(path)
    except Exception as error:
        if isinstance(error, (MemoryError, RecursionError)):
            raise
        load_taesd(path)  # raises AMGError
        raise ValueError("weights that cannot be read were taken for a decoder") from error
    held = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if held > 4 * path.stat().st_size:
        raise ValueError(f"tensors of {held} bytes in a file of {path.stat().st_size}")
    parts = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    return _digest([*parts, tensors_sha256(tensors)])


# ---------------------------------------------------------------- captions


ROWS = [("a.png", "a fox"), ("b/c.png", "ein Bär, zwei Bären"), ("d.png", "")]


def _make_captions(folder: Path) -> None:
    tree = folder / "tree"
    (tree / "b").mkdir(parents=True)
    for number, (name, _) in enumerate(ROWS):
        paint(number, (12, 9)).save(tree / name)
    (tree / "a.txt").write_text("a fox")
    (tree / "d.json").write_text('{"caption": ["a dog", "two dogs"], "width": 12}')
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in ROWS]
    for path in (tree / "metadata.jsonl", tree / "list.jsonl"):
        path.write_text("\n".join(lines))
    table = "file_name;text\n" + "".join(f'{name};"{text}"\n' for name, text in ROWS)
    for path in (tree / "table.csv", tree / "list.csv"):
        path.write_text("sep=;\n" + table, "utf-16")
    (tree / "list.tsv").write_text(table.replace(";", "\t"), "utf-8")
    with (
        zipfile.ZipFile(folder / "tree.zip", "w") as packed,
        tarfile.open(folder / "tree.tar", "w") as tar,
    ):
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            name, data = path.relative_to(tree).as_posix(), path.read_bytes()
            packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tarred = (folder / "tree.tar").read_bytes()
    (folder / "tree.tar.gz").write_bytes(gzip.compress(tarred, mtime=0))
    _make_parquet(tree)


def _make_parquet(tree: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    held = [{"bytes": (tree / name).read_bytes(), "path": name} for name, _ in ROWS]
    texts = [text for _, text in ROWS]
    parquet.write_table(arrow.table({"image": held, "text": texts}), tree / "list.parquet")


SOURCES = (
    *("tree", "tree", "tree.zip", "tree.tar", "tree.tar.gz"),
    *("tree/list.csv", "tree/list.tsv", "tree/list.jsonl", "tree/list.parquet"),
)
BESIDE = ("a.txt", "d.json", "metadata.jsonl", "table.csv", "a.png")


def _mutate_captions(folder: Path, rng: random.Random) -> Case:
    path = folder / rng.choice(SOURCES)
    if path.name == "tree":
        return Case(path, _write_over(path / rng.choice(BESIDE), rng), False)
    if path.suffix == ".zip" and rng.random() < 0.5:
        return Case(path, _signed_archive(path, rng), False)
    if path.suffix == ".jsonl" and rng.random() < 0.5:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        done, rows = wild_json(rows, rng)
        path.write_text("\n".join(map(json.dumps, rows)))
        return Case(path, f"{path.name} {done}", False)
    return Case(path, _write_over(path, rng), False)


def _read_captions(path: Path) -> str:
    """As a build goes through a source: every name and caption is text that a database can hold."""
    source = open_source(path)
    parts: list[object] = []
    seen = set()
    for item in source:
        if item.source in seen:
            raise ValueError(f"two pictures are called {item.source}")
        seen.add(item.source)
        if "\0" in item.source + item.caption:
            raise ValueError("a NUL in a name or caption")
        parts += [item.source.encode(), item.caption.encode()]
        try:
            parts.append(decode(item.read(), item.source).sha256)
        except Unreadable as error:
            parts.append(str(error))
    if any(len(note) > 2000 for note in source.notes):
        raise ValueError("a note of over 2,000 characters")
    parts += [*map(str.encode, source.notes), *(f"{a}: {b}".encode() for a, b in source.skipped)]
    return _digest(parts)


# ---------------------------------------------------------------- calibrations, reports


def _make_calibration(folder: Path) -> None:
    rng = random.Random(0)

    def measured() -> list[dict[str, float]]:
        rows = [{name: rng.gauss(1, 1) for name in statistics.NAMES} for _ in range(2)]
        del rows[0]["agreement"]  # of one noise alone
        return rows

    prompts = [measured() for _ in range(calibration.FEWEST + 2)]
    made = calibration.Calibration("key", (4, 8, 8), 2, 0.04, prompts, prompts[:3])
    calibration.save(made, folder / "key.json")


def _mutate_json(path: Path, rng: random.Random) -> Case:
    if rng.random() < 0.3:
        return Case(path, _write_over(path, rng), False)
    done, tree = wild_json(json.loads(path.read_text()), rng)
    path.write_text(json.dumps(tree))
    return Case(path, done, False)


def _read_calibration(path: Path) -> str:
    known = calibration.load(path)
    parts: list[object] = [known]
    for kind in calibration.SCORES:
        try:
            parts.append(known.scale(kind).judge(known.ordinary[0]))
        except AMGError as error:  # too few noises for it
            parts.append(str(error))
    return _digest(parts)


def _make_report(folder: Path) -> None:
    """A tree of the right shape: what is in its parts is not checked by the reader."""
    kinds = {"schema": report.SCHEMA, "seed": 1}
    written = {key: kinds.get(key) or kind() for key, kind in report._SHAPE.items()}
    (folder / "report.json").write_text(json.dumps({"7": written}))


def _mutate_report(folder: Path, rng: random.Random) -> Case:
    case = _mutate_json(folder / "report.json", rng)
    data = PngInfo()
    data.add_text(report.KEY, case.path.read_bytes().decode("latin-1"))
    path = folder / "picture.png"
    paint(0).save(path, pnginfo=data)
    done = case.done
    if rng.random() < 0.3:
        done += f", {_write_over(path, rng)}"
    return Case(path, done, False)


def _read_report(path: Path) -> str:
    return _digest([json.dumps(report.of_picture(path))])


TARGETS = {
    "index": Target(_make_indexes, _mutate_index, _read_index),
    "codes": Target(_make_codes, _mutate_codes, _read_codes),
    "weights": Target(_make_weights, _mutate_weights, _read_weights),
    "captions": Target(_make_captions, _mutate_captions, _read_captions),
    "calibration": Target(
        _make_calibration, lambda at, rng: _mutate_json(at / "key.json", rng), _read_calibration
    ),
    "report": Target(_make_report, _mutate_report, _read_report),
}
