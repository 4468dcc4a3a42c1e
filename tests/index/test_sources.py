"""Whatever pictures come in, the same pictures and captions come out."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amg_core.errors import AMGError
from amg_core.index.picture import MAX_FILE_BYTES, Unreadable, decode, pixel_hash
from amg_core.index.sources import Item, Pictures, open_source, open_sources
from amg_core.index.sources.base import Names, inner
from tests.index import helpers
from tests.index.helpers import encoded, fill

# name -> (bytes, caption)
GIVEN = {
    "a/one.png": (encoded(1), "a red fox, at dawn"),
    "a/two.jpg": (encoded(2, "JPEG"), 'she said "no"; twice'),
    "b/größe.webp": (encoded(3, "WEBP"), "größer 画像"),
    "b/c/plain.bmp": (encoded(4, "BMP"), ""),
    "z.gif": (encoded(5, "GIF"), "two\nlines"),
}
WANTED = Counter((hashlib.sha256(data).hexdigest(), text) for data, text in GIVEN.values())


def read(source) -> list[tuple[str, str, bytes]]:
    return [(item.source, item.caption, item.read()) for item in source]


def outcome(source) -> Counter:
    found = read(source)
    assert len({name for name, _, _ in found}) == len(found)
    return Counter((hashlib.sha256(data).hexdigest(), text) for _, text, data in found)


def as_folder(at: Path, captions: str = "txt") -> Path:
    for name, (data, text) in GIVEN.items():
        path = at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if text and captions == "txt":
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
        elif captions == "json":
            path.with_suffix(".json").write_text(json.dumps({"caption": text or None, "url": "x"}))
    if captions == "jsonl":
        (at / "metadata.jsonl").write_text(jsonl("file_name", "text"), encoding="utf-8")
    elif captions == "csv":
        (at / "list.csv").write_text(table(","), encoding="utf-8")
    return at


def as_zip(at: Path, captions: str) -> Path:
    folder = as_folder(at.with_name(f"for-{at.name}"), captions)
    with zipfile.ZipFile(at, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder).as_posix())
    return at


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def as_tar(at: Path, captions: str = "txt", mode: str = "w") -> Path:
    with tarfile.open(at, mode) as archive:
        for name, (data, text) in GIVEN.items():
            stem = name.rsplit(".", 1)[0]
            if captions == "txt" and text:
                add(archive, f"{stem}.txt", text.encode())
            add(archive, f"{stem}.cls", b"7")
            add(archive, name, data)
            if captions == "json":
                add(archive, f"{stem}.json", json.dumps({"caption": text, "key": "9"}).encode())
    return at


def jsonl(key: str, text_key: str) -> str:
    rows = ({key: name, text_key: text, "n": 1} for name, (_, text) in GIVEN.items())
    return "\n".join(json.dumps(row) for row in rows)


def table(delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["n", "Image_Path", "TEXT"])
    writer.writerows([i, name, text] for i, (name, (_, text)) in enumerate(GIVEN.items()))
    return file.getvalue()


def as_list(at: Path) -> Path:
    as_folder(at.parent, "none")
    if at.suffix == ".jsonl":
        at.write_text(jsonl("filepath", "prompt"), encoding="utf-8")
    else:
        at.write_text(table("," if at.suffix == ".csv" else "\t"), encoding="utf-8", newline="")
    return at


def as_parquet(at: Path, columns: dict) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), at)
    return at


CAPTIONS = [text or None for _, text in GIVEN.values()]
DATA = [data for data, _ in GIVEN.values()]
MAKERS = {
    **{
        f"folder {kind}": lambda at, kind=kind: as_folder(at / "x", kind)
        for kind in ("txt", "json", "jsonl", "csv")
    },
    **{
        f"zip {kind}": lambda at, kind=kind: as_zip(at / "x.ZIP", kind)
        for kind in ("txt", "json", "jsonl", "csv")
    },
    "tar": lambda at: as_tar(at / "x.tar"),
    "tar json": lambda at: as_tar(at / "x.tar", "json"),
    "tar.gz": lambda at: as_tar(at / "x.tar.gz", mode="w:gz"),
    "tar.bz2": lambda at: as_tar(at / "x.tar.bz2", mode="w:bz2"),
    "tar.xz": lambda at: as_tar(at / "x.tar.xz", mode="w:xz"),
    "folder of tars": lambda at: as_tar(at / "00000.tar").parent,
    "jsonl": lambda at: as_list(at / "x.jsonl"),
    "csv": lambda at: as_list(at / "x.csv"),
    "tsv": lambda at: as_list(at / "x.tsv"),
    "parquet of paths": lambda at: as_parquet(
        as_folder(at, "none") / "x.parquet", {"Filename": list(GIVEN), "TEXT": CAPTIONS}
    ),
    "parquet of structs": lambda at: as_parquet(
        at / "x.parquet",
        {
            "image": [{"bytes": data, "path": "same.png"} for data in DATA],
            "text": CAPTIONS,
        },
    ),
    "parquet of bytes": lambda at: as_parquet(
        at / "x.parquet", {"jpg": DATA, "caption": CAPTIONS, "key": list("abcde"), "url": CAPTIONS}
    ),
    "folder of parquet": lambda at: (
        as_parquet(
            at / "train-0.parquet", {"image": [{"bytes": d} for d in DATA], "prompt": CAPTIONS}
        ).parent
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_gives_the_same_pictures(tmp_path, kind):
    source = open_source(MAKERS[kind](tmp_path))
    assert outcome(source) == WANTED
    assert source.skipped == []
    assert all("plain.json" in note and "without words" in note for note in source.notes)
    assert len(source.notes) == (kind in ("folder json", "zip json"))
    assert len(source) == len(GIVEN)
    assert [item.source for item in source] == [item.source for item in source]
    assert isinstance(source.name, str) and str(tmp_path) in source.name


def test_names_and_order(tmp_path):
    as_zip(tmp_path / "x.zip", "txt")
    as_tar(tmp_path / "x.tar")
    sorted_names = sorted(GIVEN)
    assert [item.source for item in open_source(tmp_path / "for-x.zip")] == sorted_names
    assert [item.source for item in open_source(tmp_path / "x.zip")] == sorted_names
    assert [item.source for item in open_source(tmp_path / "x.tar")] == list(GIVEN)
    (tmp_path / "for-x.zip" / "deep").mkdir()
    as_tar(tmp_path / "for-x.zip" / "deep" / "0.tar")
    both = [item.source for item in open_source(tmp_path / "for-x.zip")]
    assert both == sorted_names + [f"deep/0.tar/{name}" for name in GIVEN]


def test_several_sources(tmp_path):
    one, two = (fill(tmp_path / side / "in", 2) for side in "ab")
    fill(tmp_path / "c", 1)
    chain = open_sources([one, two, tmp_path / "c"])
    names = ["in/p000.png", "in/p001.png", "in#2/p000.png", "in#2/p001.png", "c/p000.png"]
    assert [item.source for item in chain] == names and len(chain) == 5
    (two / "x.heic").write_bytes(b"?")
    (two / "metadata.jsonl").write_text("broken")
    chain = open_sources([one, two])
    for _ in range(2):
        assert len(read(chain)) == 4
        assert [name for name, _ in chain.skipped] == ["in#2/x.heic"] and len(chain.notes) == 1
    assert [item.source for item in open_sources([one])] == ["p000.png", "p001.png"]
    with pytest.raises(AMGError, match="No pictures were given"):
        open_sources([])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "a#2", "a#2#2", "a#3", "b"])))
def test_one_name_never_comes_twice(given):
    names = Names()
    found = [names(name) for name in given]
    assert len(set(found)) == len(given)
    assert all(new.startswith(old) for old, new in zip(given, found, strict=True))


def test_img2dataset_shards(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as archive:
            for i in range(3):
                key, data = f"{shard:05}{i:04}", encoded(10 * shard + i, "JPEG")
                add(archive, f"{key}.jpg", data)
                add(archive, f"{key}.json", json.dumps({"caption": "j", "status": "ok"}).encode())
                if i:
                    add(archive, f"{key}.txt", f"text {key}".encode())
        (tmp_path / f"{shard:05}_stats.json").write_text(json.dumps({"successes": 3}))
        (tmp_path / f"{shard:05}.parquet").write_bytes(b"never opened")
    source = open_source(tmp_path)
    assert len(source) == 6
    found = {name: text for name, text, _ in read(source)}
    assert list(found) == [f"{s:05}.tar/{s:05}{i:04}.jpg" for s in range(2) for i in range(3)]
    assert found["00001.tar/000010000.jpg"] == "j"
    assert found["00001.tar/000010002.jpg"] == "text 000010002"
    (tmp_path / "00000_stats.json").write_text("[]")
    source = open_source(tmp_path)
    assert len(source) == 0 and len(read(source)) == len(source) == 6


def test_img2dataset_files(tmp_path):
    folder = fill(tmp_path / "00000", 2)
    (folder / "p000.txt").write_text("from txt")
    for i in range(2):
        (folder / f"p00{i}.json").write_text(json.dumps({"CAPTION": "from json"}))
    (tmp_path / "00000.parquet").write_bytes(b"never opened")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = [(name, text) for name, text, _ in read(open_source(tmp_path))]
    assert found == [("00000/p000.png", "from txt"), ("00000/p001.png", "from json")]


def test_webdataset_samples(tmp_path):
    a, b, c = (encoded(i) for i in range(3))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "k/1.left.png", a)
        add(archive, "k/1.right.png", b)
        add(archive, "k/1.right.txt", b"right")
        add(archive, "k/1.txt", b"both")
        add(archive, "k/10.png", c)  # another key, although it starts alike
        add(archive, "k/2.txt", b"no picture")
        add(archive, "metadata.jsonl", b"{}")
        add(archive, "k/._3.png", a)
        add(archive, "4.HEIC", a)
        add(archive, "k/1.left.png", c)
        link = tarfile.TarInfo("5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "k/10.png"
        archive.addfile(link)
    source = open_source(tmp_path / "x.tar")
    assert read(source) == [
        ("k/1.left.png", "both", a),
        ("k/1.right.png", "right", b),
        ("k/10.png", "", c),
        ("k/1.left.png#2", "", c),
    ]
    assert [name for name, _ in source.skipped] == ["4.HEIC", "5.png"]
    assert "metadata.jsonl" in source.notes[0] and "1 caption files" in source.notes[1]


def test_a_tar_is_never_held_whole(tmp_path, monkeypatch):
    """Pictures arrive as they are read, and nothing is read twice."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for i in range(30):
            add(archive, f"{i:03}.png", encoded(i) + bytes(50_000))
    places, rewinds = [], []

    class Watched(gzip.GzipFile):
        def read(self, *args):
            data = super().read(*args)
            places.append(self.tell())
            return data

        def rewind(self):
            rewinds.append(self.tell())
            super().rewind()

    monkeypatch.setattr(gzip, "open", lambda path: Watched(path, "rb"))
    source = open_source(tmp_path / "x.tar.gz")
    places.clear()
    for number, _ in enumerate(source):
        assert places[-1] < (number + 3) * 60_000
    assert number == 29 and places == sorted(places) and rewinds == []


def test_folder_ignores_what_systems_leave(tmp_path):
    folder = fill(tmp_path / "in", 1)
    for name in ("._p000.png", "__MACOSX/._p000.png", "@eaDir/p000.png", "$RECYCLE.BIN/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not a picture")
    (folder / ".mine.png").write_bytes(encoded(7))
    (folder / "copy.zip").write_bytes(b"?")
    source = open_source(folder)
    assert [item.source for item in source] == [".mine.png", "p000.png"]
    assert [name for name, _ in source.skipped] == ["copy.zip"]


def test_zip_ignores_what_systems_leave_and_reports_what_is_locked(tmp_path):
    files = {"p.png": encoded(1), "__MACOSX/._p.png": b"?", "locked.png": encoded(2)}
    path = helpers.as_zip(files | {"phone.heic": b"?", "huge.png": b"?"}, tmp_path / "x")
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"locked.png"))
    raw[at + 8] |= 1  # "encrypted" in the directory
    at = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"huge.png"))
    raw[at + 24 : at + 28] = (MAX_FILE_BYTES + 1).to_bytes(4, "little")
    path.write_bytes(raw)
    source = open_source(path)
    assert [item.source for item in source] == ["p.png"]
    reasons = dict(source.skipped)
    assert set(reasons) == {"locked.png", "phone.heic", "huge.png"}
    assert "encrypted" in reasons["locked.png"] and "larger" in reasons["huge.png"]


def test_zip_twice_the_same_name_and_names_that_lead_elsewhere(tmp_path):
    names = ["../../up.png", "/root.png", "back\\slash.png", "up.png", "./dot//p.png", "up.png"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning):
        for i, name in enumerate(names):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, encoded(i))
        archive.writestr("../up.txt", "caption of up")
    before = sorted(tmp_path.parent.iterdir())
    found = {name: (text, data) for name, text, data in read(open_source(tmp_path / "x.zip"))}
    assert set(found) == {
        *("up.png", "up.png#2", "up.png#3", "root.png", "back/slash.png", "dot/p.png")
    }
    assert {data for _, data in found.values()} == {encoded(i) for i in range(6)}
    assert found["up.png"][0] == "caption of up"
    assert sorted(tmp_path.parent.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip"]


@pytest.mark.parametrize("raw", ["größe".encode(), b"\xff\xfe", "größe".encode("cp437")])
def test_zip_names_in_other_encodings(tmp_path, raw):
    path = helpers.as_zip({"q" * len(raw) + ".png": encoded(1)}, tmp_path / "x")
    path.write_bytes(path.read_bytes().replace(b"q" * len(raw), raw))
    ((name, _, data),) = read(open_source(path))
    name.encode()
    assert data == encoded(1) and (raw == b"\xff\xfe" or name == "größe.png")


@pytest.mark.parametrize(
    "name", ["\udcff.png", "a\\b.png", "../up.png", "x" * 300 + ".png", "画.png"]
)
def test_tar_names(tmp_path, name):
    path = helpers.as_tar({name: encoded(1)}, tmp_path / "x")
    ((found, _, data),) = read(open_source(path))
    assert data == encoded(1) and ".." not in found.split("/")
    found.encode()


def test_zip_member_without_a_name(tmp_path):
    path = helpers.as_zip({"q": b"?", "p.png": encoded(1)}, tmp_path / "x")
    path.write_bytes(path.read_bytes().replace(b"q", b"\0"))
    assert [item.source for item in open_source(path)] == ["p.png"]


def test_zip_from_many_threads(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(40):
            archive.writestr(f"{i:02}.png", encoded(i))
    items = list(open_source(tmp_path / "x.zip"))  # the source itself is gone by now
    results: dict[int, bytes] = {}

    def work(part: int) -> None:
        for i in range(part, 40, 4):
            results[i] = items[i].read()

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert results == {i: encoded(i) for i in range(40)}


# --- damage ------------------------------------------------------------------------------------


class Pipe(io.RawIOBase):
    """A file that cannot seek: zip writers then put the sizes behind the data."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.data += bytes(data)
        return len(data)


# Where a member is stored and its size comes behind it, nobody can tell where it ends.
@pytest.mark.parametrize(
    ("method", "piped"),
    [
        (zipfile.ZIP_STORED, False),
        (zipfile.ZIP_DEFLATED, False),
        (zipfile.ZIP_DEFLATED, True),
    ],
)
def test_truncated_zip(tmp_path, method, piped):
    file = Pipe() if piped else io.BytesIO()
    ends = []
    with zipfile.ZipFile(file, "w", method) as archive:
        for i in range(6):
            archive.writestr(f"{i}.png", encoded(i))
            archive.writestr(f"{i}.txt", f"caption {i}")
            ends.append(len(file.data) if piped else file.tell())
    whole = file.data if piped else file.getvalue()
    for kept in (6, 3):
        (tmp_path / "x.zip").write_bytes(whole[: ends[kept - 1] + 20])
        source = open_source(tmp_path / "x.zip")
        for _ in range(2):
            assert read(source) == [(f"{i}.png", f"caption {i}", encoded(i)) for i in range(kept)]
            assert source.skipped[0][0] == "x.zip" and "damaged or cut" in source.skipped[0][1]
    (tmp_path / "x.zip").write_bytes(whole[:100])
    with pytest.raises(AMGError, match=r"x\.zip is not a zip file, or is damaged"):
        open_source(tmp_path / "x.zip")


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_tar(tmp_path, packed):
    whole = io.BytesIO()
    starts = []
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for i in range(6):
            starts.append(whole.tell())
            add(archive, f"{i}.png", encoded(i))
            add(archive, f"{i}.txt", f"caption {i}".encode())
    data = whole.getvalue()
    pack = gzip.compress if packed else bytes
    cuts = {"in a picture": starts[3] + 600, "in a header": starts[3] + 100, "between": starts[3]}
    for cut in cuts.values():
        (tmp_path / "x.tar").write_bytes(pack(data[:cut]))
        source = open_source(tmp_path / "x.tar")
        assert read(source) == [(f"{i}.png", f"caption {i}", encoded(i)) for i in range(3)]
        assert source.skipped[0][0] == "x.tar" and "after 3 pictures" in source.skipped[0][1]
    if packed:
        (tmp_path / "x.tar").write_bytes(pack(data)[:-500])
        source = open_source(tmp_path / "x.tar")
        assert len(read(source)) < 6 and "damaged or cut" in source.skipped[0][1]
    broken = bytearray(data)
    broken[starts[3] + 10] ^= 1  # a header that fails its checksum
    (tmp_path / "x.tar").write_bytes(pack(bytes(broken)))
    source = open_source(tmp_path)
    assert [name for name, _, _ in read(source)] == [f"x.tar/{i}.png" for i in range(3)]
    assert source.skipped[0][0] == "x.tar"


def test_a_damaged_tar_does_not_hide_the_pictures_beside_it(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "x.tar").write_bytes(b"hello")
    source = open_source(tmp_path)
    assert [item.source for item in source] == ["p000.png", "p001.png"]
    assert [name for name, _ in source.skipped] == ["x.tar"]


def test_damaged_members(tmp_path):
    good, bad = encoded(1), bytearray(encoded(2))
    files = {"bad.png": bytes(bad), "bad.txt": b"lost", "good.png": good}
    path = helpers.as_zip(files, tmp_path / "x")
    raw = bytearray(path.read_bytes())
    raw[raw.index(bytes(bad)) + 50] ^= 1
    raw[raw.index(b"lost")] ^= 1
    path.write_bytes(raw)
    source = open_source(path)
    first, second = source
    with pytest.raises(Unreadable, match="damaged in the archive"):
        first.read()
    assert second.read() == good
    assert len(source.notes) == 1 and "bad.txt" in source.notes[0]


def try_everything(path: Path) -> int:
    """Pictures read; nothing but Unreadable and AMGError may be raised."""
    count = 0
    try:
        source = open_source(path)
        for item in source:
            item.source.encode(), item.caption.encode()
            try:
                decode(item.read(), item.source)
                count += 1
            except Unreadable as error:
                assert str(error)
        assert all(reason for _, reason in source.skipped)
    except AMGError as error:
        assert path.name in str(error)
    return count


def flips(data: bytes, rounds: int, seed: int):
    rng = random.Random(seed)
    for _ in range(rounds):
        broken = bytearray(data if rng.random() < 0.8 else data[: rng.randrange(1, len(data))])
        for _ in range(rng.choice((1, 1, 3, 20))):
            broken[rng.randrange(len(broken))] = rng.choice((0, 255, rng.randrange(256)))
        yield broken


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip txt", "zip jsonl", "tar", "tar.gz", "parquet of structs"])
def test_fuzzed_archives(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    data, counts = path.read_bytes(), Counter()
    for broken in flips(data, 60, seed=len(kind)):
        path.write_bytes(broken)
        counts[try_everything(path)] += 1
    assert len(counts) > 1 and max(counts) > 0


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_zip_directory_and_headers(tmp_path):
    data = as_zip(tmp_path / "x.zip", "txt").read_bytes()
    tail = data.index(b"PK\x01\x02")
    for broken in flips(data[tail:], 100, seed=3):
        (tmp_path / "x.zip").write_bytes(data[:tail] + broken)
        try_everything(tmp_path / "x.zip")
    for broken in flips(data[:tail], 60, seed=4):  # no directory: members are searched for
        (tmp_path / "x.zip").write_bytes(broken)
        try_everything(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_tar_headers(tmp_path):
    whole = as_tar(tmp_path / "x.tar").read_bytes()
    for broken in flips(whole[:512], 120, seed=5):
        header = bytes(broken[:512].ljust(512, b"\0"))
        total = sum(header[:148]) + 8 * 32 + sum(header[156:])  # a checksum that fits
        header = header[:148] + b"%06o\0 " % total + header[156:]
        (tmp_path / "x.tar").write_bytes(header + whole[512:])
        try_everything(tmp_path / "x.tar")


def test_tar_header_of_absurd_length(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    path = helpers.as_tar({"a.png": encoded(1)}, tmp_path / "x")
    data = path.read_bytes()
    end = data.index(encoded(1)) + -(-len(encoded(1)) // 512) * 512
    path.write_bytes(data[:end] + info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    source = open_source(path)
    assert len(read(source)) == 1 and "absurd" in source.skipped[0][1]


# --- lists -------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used(tmp_path):
    folder = fill(tmp_path / "in", 2)
    rows = [
        {"file_name": "p000.png", "text": "first"},
        {"file_name": "./p000.png", "text": "second"},
        {"file_name": str(folder / "p001.png"), "text": 7, "captions": ["", "one of two", "two"]},
        {"file_name": "https://example.com/x.png", "text": "far"},
        {"url": "http://example.com/y.png"},
        {"file_name": None, "text": "nothing"},
        {"file_name": "gone.png"},
        {"file_name": "nul\0.png"},
        {"file_name": "sub\\p.png"},
        ["no object"],
    ]
    (folder / "sub").mkdir()
    (folder / "sub" / "p.png").write_bytes(encoded(9))
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n{broken")
    source = open_source(folder / "list.jsonl")
    items = {item.source: item for item in source}
    captions = [items[name].caption for name in ("p000.png", "p000.png#2")]
    assert captions == ["first", "second"]
    assert items["p000.png"].read() == items["p000.png#2"].read()
    assert items[(folder / "p001.png").as_posix()].caption == "one of two"
    assert items["sub/p.png"].read() == encoded(9)
    for missing in ("gone.png", "nul.png"):
        with pytest.raises(Unreadable):
            items[missing].read()
    reasons = dict(source.skipped)
    assert list(reasons) == ["line 4", "line 5", "line 6", "line 10", "line 12"]
    assert "nothing is downloaded" in reasons["line 4"] and "web" in reasons["line 5"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_list_encodings(tmp_path, encoding, end):
    (tmp_path / "x.csv").write_bytes(f"file;text{end}a.png;größer{end}".encode(encoding))
    ((item),) = open_source(tmp_path / "x.csv")
    assert (item.source, item.caption) == ("a.png", "größer")


def test_a_list_may_call_its_files_keys(tmp_path):
    (tmp_path / "x.tsv").write_text("key\ttext\t\na.png\tone\tfrom a nameless column\n")
    (tmp_path / "a.png").write_bytes(encoded(1))
    assert read(open_source(tmp_path / "x.tsv")) == [("a.png", "one", encoded(1))]
    (tmp_path / "y.csv").write_text("url,key\nhttps://example.com/a.png,000000001\n")
    with pytest.raises(AMGError, match=r"y\.csv has no column.*img2dataset"):
        open_source(tmp_path / "y.csv")


def test_csv_goes_on_after_a_bad_row(tmp_path):
    rows = ["file,text", "a.png,one", f"b.png,{'x' * 200_000}", "c.png,three", "d.png", ""]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    source = open_source(tmp_path / "x.csv")
    found = [(item.source, item.caption) for item in source]
    assert found == [("a.png", "one"), ("c.png", "three"), ("d.png", "")]
    assert source.skipped[0][0] == "line 3"


def test_parquet_rows_that_cannot_be_used(tmp_path):
    path = as_parquet(
        tmp_path / "x.parquet",
        {
            "image": [
                {"bytes": encoded(1), "path": "../a.png"},
                {"bytes": None, "path": "p000.png"},
                {"bytes": None, "path": "https://example.com/x.png"},
                {"bytes": None, "path": None},
                None,
                {"bytes": encoded(2), "path": None},
            ]
        },
    )
    fill(tmp_path, 1)
    source = open_source(path)
    found = [(name, data) for name, _, data in read(source)]
    here = (tmp_path / "p000.png").read_bytes()
    assert found == [("a.png", encoded(1)), ("p000.png", here), ("row 6", encoded(2))]
    assert [name for name, _ in source.skipped] == ["row 3", "row 4", "row 5"]
    path = as_parquet(
        tmp_path / "odd.parquet", {"Pixels": [{"bytes": encoded(1)}], "key": ["k.png"]}
    )
    assert read(open_source(path)) == [("k.png", "", encoded(1))]
    path = as_parquet(tmp_path / "meta.parquet", {"url": ["https://x"], "key": ["000000001"]})
    with pytest.raises(AMGError, match=r"meta\.parquet has no column.*img2dataset"):
        open_source(path)


def test_without_pyarrow(tmp_path, monkeypatch):
    import sys

    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(AMGError, match="pip install pyarrow"):
        open_source(tmp_path / "x.parquet")


def test_errors(tmp_path):
    def refused(name: str, data: bytes, match: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AMGError, match=match):
            open_source(tmp_path / name)

    with pytest.raises(AMGError, match=r"absent.*does not exist"):
        open_source(tmp_path / "absent")
    refused("x.zip", b"hello", "not a zip file")
    refused("x.tar", b"hello" * 500, "not a tar file")
    refused("x.tar.gz", b"\x1f\x8b" + b"?" * 50, r"x\.tar\.gz is")
    refused("zstd.tar", b"\x28\xb5\x2f\xfd", "zstd")
    refused("x.parquet", b"hello", r"x\.parquet is not parquet|pip install pyarrow")
    refused("x.csv", b"a.png,caption\nb.png,c\n", r"x\.csv has no column")
    refused("y.csv", b"", r"y\.csv has no rows")
    refused("x.docx", b"", r"x\.docx is a file that holds no pictures")
    with pytest.raises(AMGError, match=r"No picture files in .*none\.zip"):
        open_source(helpers.as_zip({"a.txt": b"x"}, tmp_path / "none"))
    (tmp_path / "void").mkdir()
    with pytest.raises(AMGError, match=r"No picture files in .*void"):
        open_source(tmp_path / "void")


def test_a_single_picture(tmp_path):
    """With its caption, and without what lies beside it."""
    for name in ("fox.png", "owl.png", "fox"):
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "fox.txt").write_text("a red fox")
    (tmp_path / "owl.txt").write_text("an owl")
    for name in ("fox.png", "fox"):
        source = open_source(tmp_path / name)
        (item,) = source
        assert (item.source, item.caption, len(source)) == (name, "a red fox", 1)
        assert source.skipped == source.notes == []


# --- memory ------------------------------------------------------------------------------------


def test_pictures_in_memory():
    batch = torch.rand(4, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    batch[3] = batch[0]
    source = Pictures(batch, ["a", "b", "c", "d"], "mine")
    first, again = list(source), list(source)
    assert [i.source for i in first] == [i.source for i in again] and len(source) == 4
    assert first[3].source == f"{first[0].source}#2" and len({i.source for i in first}) == 4
    assert [item.caption for item in first] == list("abcd")
    for item, image in zip(first, batch, strict=True):
        picture = decode(item.read(), item.source)
        np.testing.assert_array_equal(picture.pixels, (image * 255).round().byte().numpy())
        assert item.source.split("/")[1].startswith(picture.sha256[:16])
        assert (picture.width, picture.height) == (7, 5)
    assert [i.source for i in Pictures(batch.numpy(), name="mine")] == [i.source for i in first]
    assert {item.caption for item in Pictures(batch, "one")} == {"one"}
    assert {item.caption for item in Pictures(batch)} == {""}


def test_pictures_of_other_kinds():
    grey = np.full((2, 3, 3, 1), 0.5)
    assert [item.read()[0, 0].tolist() for item in Pictures(grey)] == [[128] * 3] * 2
    alpha = torch.tensor([1.0, 0.0, 0.0, 0.25]).expand(1, 2, 2, 4).to(torch.bfloat16)
    ((item),) = Pictures(alpha)
    assert item.read()[0, 0].tolist() == [255, 191, 191]
    whole = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    ((item),) = Pictures(whole)
    np.testing.assert_array_equal(item.read(), whole)
    wild = np.stack([np.full((2, 2, 3), 7.0), np.full((2, 2, 3), np.nan)])
    source = Pictures(wild, name="wild")
    assert [item.read().max() for item in source] == [255]
    assert source.skipped == [("wild/1", "has values that are not finite")]
    for shape in ((2, 2), (1, 2, 2, 2), (1, 0, 2, 3)):
        with pytest.raises(AMGError, match="cannot be used"):
            Pictures(np.zeros(shape))
    with pytest.raises(AMGError, match="3 captions for 2 pictures"):
        Pictures(grey, ["a", "b", "c"])
    assert list(Pictures(np.zeros((0, 4, 4, 3)))) == []


def test_pixel_hash_tells_shapes_apart():
    flat = np.zeros((2, 8, 3), np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.reshape(4, 4, 3))
    assert pixel_hash(flat[:, ::2]) == pixel_hash(np.zeros((2, 4, 3), np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_inner_names_stay_inside(name):
    found = inner(name)
    assert os.path.normpath(found or ".") == (found or ".").replace("/", os.sep)
    assert not found.startswith("/") and ".." not in found.split("/") and inner(found) == found


def test_item_is_what_the_contract_says(tmp_path):
    fill(tmp_path, 1)
    ((item),) = open_source(tmp_path)
    assert isinstance(item, Item) and isinstance(item.read(), bytes)
    assert Image.open(io.BytesIO(item.read())).size == (40, 30)
