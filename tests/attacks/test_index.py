"""An index made to harm: sealed like an honest one, so that every hash is right."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from amg_core.descriptors import create
from amg_core.descriptors.latent import LatentDescriptor
from amg_core.detection import calibration
from amg_core.errors import AMGError
from amg_core.index import Index, build
from amg_core.index import format as fmt
from amg_core.index.shard import Shard
from tests.attacks.apart import apart
from tests.index.helpers import fill, reseal, shard_of

LONGEST = 2000  # characters of a message
pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    build(fill(folder / "pictures", 4), folder / "index", create("pixel"))
    return folder / "index"


@pytest.fixture
def index(honest, tmp_path) -> Path:
    shutil.copytree(honest, tmp_path / "index")
    return tmp_path / "index"


def altered(index: Path, *statements: str, values=()) -> Path:
    """The index with these run on its database, sealed anew."""
    with closing(sqlite3.connect(shard_of(index) / fmt.META)) as database:
        for statement in statements:
            database.execute(statement, values)
        database.commit()
    reseal(index)
    return index


ENDLESS = "(WITH RECURSIVE e(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM e) SELECT n FROM e)"
PICTURES = "id INTEGER PRIMARY KEY, source TEXT NOT NULL"
PROGRAMS = {
    "endless view": ["DROP TABLE pictures", "CREATE VIEW pictures AS SELECT n AS id, 'a' AS source, "
                     f"'b' AS caption, 1 AS width, 1 AS height FROM {ENDLESS}"],
    "endless view of thumbnails": ["DROP TABLE thumbnails", "CREATE VIEW thumbnails AS SELECT "
                                   f"n AS id, x'00' AS data FROM {ENDLESS} WHERE n < 0"],
    "endless view of aliases": ["DROP TABLE aliases", "CREATE VIEW aliases AS SELECT 'a' AS sha256, "
                                f"'b' AS source, 'c' AS caption, n AS rowid FROM {ENDLESS}"],
    "computed column": ["ALTER TABLE pictures RENAME TO old", f"CREATE TABLE pictures ({PICTURES}, caption "
                        "TEXT AS (hex(zeroblob(400000000))), width INTEGER, height INTEGER)",
                        "INSERT INTO pictures (id, source, width, height) SELECT id, source, 1, 1 FROM old",
                        "DROP TABLE old"],
    "trigger": ["CREATE TRIGGER t AFTER INSERT ON pictures BEGIN DELETE FROM thumbnails; END"],
    "one more table": ["CREATE TABLE more (id INTEGER)"],
    "index on an expression": ["CREATE INDEX i ON pictures (upper(caption))"],
}  # fmt: skip


def open_apart(*indexes: Path) -> tuple[list[str], int]:
    """What came of opening and reading them, in a process of its own, and the bytes it took."""
    return apart(
        "from amg_core.index import Index\n"
        "import PIL.WebPImagePlugin, PIL.JpegImagePlugin\n"
        "def read(path):\n"
        "    with Index.open(path) as index:\n"
        "        list(index.records()), list(index.aliases())\n"
        "        for i in range(index.count):\n"
        "            index.record(i), index.captions(i), index.thumbnail(i)\n"
        "    return 'read'\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    tell(read, path)\n",
        *indexes,
    )


def test_programs_in_the_database_are_refused(honest, tmp_path):
    """Not one of them is asked anything: an endless view answers never."""
    indexes = []
    for name, statements in PROGRAMS.items():
        shutil.copytree(honest, tmp_path / name)
        indexes.append(altered(tmp_path / name, *statements))
    written, grown = open_apart(*indexes)
    for name, words in zip(PROGRAMS, written, strict=True):
        assert words.startswith("AMGError: ") and "other tables" in words, (name, words)
    assert grown < 1 << 28


def test_a_question_that_takes_too_long_is_given_up(index, monkeypatch):
    """A damaged tree of pages can be endless, too."""
    with Index.open(index) as opened:
        (shard,) = opened.shards
        monkeypatch.setattr(Shard, "_budget", 10_000_000)
        with pytest.raises(AMGError, match="interrupted"):
            shard._all(f"SELECT max(n) FROM {ENDLESS}")
        assert opened.record(0).source == "p000.png"  # and the next one is answered


def cyclic(index: Path) -> Path:
    """The pages of a long caption, of which the last one leads to the first again."""
    altered(index, "UPDATE pictures SET caption = ? WHERE id = 0", values=["x" * 60_000])
    path = shard_of(index) / fmt.META
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    pages = [at for at in range(0, len(data), size) if data[at + 4 : at + 1000] == b"x" * 996]
    last = next(at for at in pages if data[at : at + 4] == bytes(4) or at == pages[-1])
    data[last : last + 4] = (pages[0] // size + 1).to_bytes(4, "big")
    path.write_bytes(data)
    reseal(index)
    return index


def test_pages_that_are_used_twice_are_refused(index):
    written, _ = open_apart(cyclic(index))
    assert written[0].startswith("AMGError: ") and "not a sound database" in written[0]


VALUES = {
    "caption of bytes": ("UPDATE pictures SET caption = ? WHERE id = 2", b"\xff\xfe"),
    "source of bytes": ("UPDATE pictures SET source = CAST(? AS BLOB) WHERE id = 2", "a"),
    "no UTF-8": ("UPDATE pictures SET caption = CAST(? AS TEXT) WHERE id = 2", b"\xff" * 1_000_000),
    "wide as a word": ("UPDATE pictures SET width = ? WHERE id = 2", "wide"),
    "half a pixel": ("UPDATE pictures SET width = ? WHERE id = 2", 0.5),
    "width below nothing": ("UPDATE pictures SET width = ? WHERE id = 2", -1),
    "endlessly wide": ("UPDATE pictures SET height = ? WHERE id = 2", 1 << 62),
    "thumbnail of text": ("UPDATE thumbnails SET data = ? WHERE id = 2", "text"),
    "thumbnail of a number": ("UPDATE thumbnails SET data = ? WHERE id = 2", 7),
    "large thumbnail": ("UPDATE thumbnails SET data = ? WHERE id = 2", bytes(8_000_000)),
    "alias of no hash": ("INSERT INTO aliases VALUES (?, 'a', 'b')", "odd"),
    "alias of bytes": ("INSERT INTO aliases VALUES (?, x'00', 'b')", "0" * 64),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_of_a_wrong_kind_are_refused(index, name):
    statement, value = VALUES[name]
    altered(index, statement, values=[value])
    with pytest.raises(AMGError, match=r"meta\.sqlite") as caught, Index.open(index) as opened:
        list(opened.records()), list(opened.aliases())
        opened.captions(2), opened.thumbnail(2)
    assert len(str(caught.value)) < LONGEST


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_a_thumbnail_is_not_decoded_before_its_size_is_known(index, tmp_path, kind):
    file = tmp_path / "large"
    Image.new("RGB", (13_000, 13_000)).save(file, kind, quality=1)
    altered(index, "UPDATE thumbnails SET data = ? WHERE id = 0", values=[file.read_bytes()])
    written, grown = open_apart(index)
    assert "Thumbnail 0" in written[0] and "13000 x 13000" in written[0]
    assert grown < 1 << 28


# ---------------------------------------------------------------- files beside the pictures


def seal_with(index: Path, stamps) -> Path:
    (index / fmt.CACHE).mkdir(exist_ok=True)
    path = index / fmt.CACHE / "verified.json"
    path.unlink(missing_ok=True)
    path.write_text(stamps)
    return path


@pytest.mark.parametrize("text", ["[" * 100_000, "", "7", "[[]]", '{"a": ' * 50_000, "null", "{}"])
def test_odd_notes_of_what_was_checked(index, text):
    seal_with(index, text)
    with Index.open(index) as opened:
        assert opened.count == 4


@pipes
@pytest.mark.parametrize("name", [fmt.MANIFEST, "cache/verified.json"])
def test_a_pipe_is_not_waited_for(index, name):
    seal_with(index, "{}")
    (index / name).unlink()
    os.mkfifo(index / name)
    written, _ = open_apart(index)
    (words,) = written
    assert words == "read" if "cache" in name else "manifest.json cannot be read" in words


@pytest.mark.parametrize("name", [fmt.MANIFEST, "cache/verified.json"])
def test_a_sparse_file_is_not_read(index, name):
    seal_with(index, "{}")
    os.truncate(index / name, 1 << 36)
    written, grown = open_apart(index)
    (words,) = written
    assert words == "read" if "cache" in name else "larger than" in words
    assert grown < 1 << 28


def test_notes_that_come_with_an_index_are_not_believed(index):
    """Times of files travel in archives, so whoever packs an index knows them."""
    rows = shard_of(index) / "rows.16.f16.npy"
    data = bytearray(rows.read_bytes())
    data[500] ^= 1
    rows.write_bytes(data)
    old = 1_600_000_000 * 10**9
    stamps = {}
    manifest = fmt.parse_manifest((index / fmt.MANIFEST).read_bytes(), index)
    (shard,) = manifest.shards
    for name, file in shard.files.items():
        path = index / shard.path / name
        os.utime(path, ns=(old, old))
        stamps[f"{shard.path}/{name}"] = [file.size, old, old, file.sha256]
    if rows.stat().st_ctime_ns == old:
        pytest.skip("this system's time of change can be set")
    seal_with(index, json.dumps(stamps))
    with pytest.raises(AMGError, match="altered"):
        Index.open(index)


def test_a_long_manifest_is_refused_by_both_sides(index, monkeypatch):
    path = index / fmt.MANIFEST
    manifest = fmt.parse_manifest(path.read_bytes(), path)
    monkeypatch.setattr(fmt, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(AMGError, match="larger than"):
        fmt.dump_manifest(manifest)
    with pytest.raises(AMGError, match="larger than"):
        Index.open(index)


@pipes
def test_a_pipe_among_pictures_is_not_waited_for(tmp_path):
    pictures = fill(tmp_path / "pictures", 2)
    for name in ("p000.txt", "metadata.jsonl", "all.csv", "pipe.png"):
        os.mkfifo(pictures / name)
    written, _ = apart(
        "from amg_core.descriptors import create\n"
        "from amg_core.index import build\n"
        "before = peak()\n"
        "tell(lambda *given: build(*given, create('pixel')).count, *sys.argv[1:])\n",
        pictures, tmp_path / "index",
    )  # fmt: skip
    assert written == [2]


def test_a_picture_in_a_column_of_text_makes_no_long_message(tmp_path):
    """As when somebody exports pictures in base64."""
    fill(tmp_path, 1)
    rows = ["file_name,text", "p000.png,right", f"{'QUJD' * 25_000},wrong"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    report = build(tmp_path / "list.csv", tmp_path / "index", create("pixel"))
    assert report.count == 1
    ((where, reason),) = report.skipped
    assert len(where) + len(reason) < LONGEST and "base64" in reason


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\xff"])
def test_an_odd_calibration_is_refused(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(AMGError, match=r"odd\.json") as caught:
        calibration.load(path)
    assert len(str(caught.value)) < LONGEST


@pytest.mark.parametrize("parts", ["vae-99999999px-c4", "vae-512px-c99999999", "vae-0px-c4"])
def test_an_index_cannot_ask_for_huge_pictures(honest, parts):
    with Index.open(honest) as opened:
        spec = opened.spec
    from dataclasses import replace

    wrong = replace(spec, id="latent_sd15", preprocessing=f"{parts}-square-area/1")
    with pytest.raises((AMGError, ValueError), match="channels"):
        LatentDescriptor.for_spec(wrong)
