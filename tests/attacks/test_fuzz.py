"""What random damage has found; a little more of it; and that the fuzzer sees what it looks for."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from amg_core import report
from amg_core.decoders import load_taesd
from amg_core.descriptors import create
from amg_core.detection import calibration
from amg_core.errors import AMGError
from amg_core.files import read_bounded
from amg_core.index import Index, codes
from amg_core.index import format as fmt
from amg_core.index.sources import open_source
from index_tools.captions import extra_captions
from tests.attacks.apart import apart
from tests.index.helpers import fill, paint, reseal, shard_of

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
LONGEST = 2000  # characters of a message

RUN = """
from benchmarks.fuzz.__main__ import run, Bench, MOST_BYTES
from benchmarks.fuzz.targets import TARGETS, Case, Target
import logging, os, random, tempfile, time
from pathlib import Path
from amg_core.errors import AMGError
logging.disable(logging.WARNING)
before = peak()
with tempfile.TemporaryDirectory() as folder:
"""


@POSIX
def test_a_hundred_mutations_are_refused_or_read_right():
    pytest.importorskip("faiss"), pytest.importorskip("pyarrow")
    written, _ = apart(RUN + "    tell(run, Bench(Path(folder), 1, TARGETS), range(100))\n")
    (ends,) = written
    assert [number for number, *_ in ends] == list(range(100))
    assert [each for each in ends if each[3] not in ("refused", "read")] == []
    assert {name for _, name, *_ in ends} == {
        *("index", "codes", "weights", "captions", "calibration", "report"),
    }
    assert {end for *_, end in ends} == {"refused", "read"}


SAME = """
    import hashlib
    bench, told_of = Bench(Path(folder), 3, TARGETS), hashlib.sha256()
    def damage():
        for number in range(60):
            name, case, place = bench.draw(number)
            told_of.update(f"{name} {case.done}".encode())
            for path in sorted(path for path in place.rglob("*") if path.is_file()):
                told_of.update(path.read_bytes())
        return told_of.hexdigest()
    tell(damage)
"""


@POSIX
def test_a_seed_gives_the_same_damage_again():
    pytest.importorskip("faiss"), pytest.importorskip("pyarrow")
    first, second = (apart(RUN + SAME)[0] for _ in range(2))
    assert first == second and len(first[0]) == 64


SEEN = """
    def error(path): raise AttributeError("oh")
    def hang(path):
        while True: pass
    def crash(path): os.abort()
    def memory(path): return str(len(bytearray(2 * MOST_BYTES)))
    def hidden(path):
        try: bytearray(2 * MOST_BYTES)
        except MemoryError as error: raise AMGError("no") from error
    def endless(path): raise AMGError("x" * 5000)
    def otherwise(path): return str(path.stat().st_size)
    def refusal(path): raise AMGError("no")
    def right(path): return "right"
    import benchmarks.fuzz.__main__ as fuzz
    fuzz.SECONDS = 0.2
    for read in (error, hang, crash, memory, hidden, endless, otherwise, refusal, right):
        def make(place): (place / "f").write_bytes(b"abc")
        def mutate(place, rng):
            (place / "f").write_bytes(b"ab")
            return Case(place / "f", "cut", True)
        place = Path(folder) / read.__name__
        place.mkdir()
        tell(run, Bench(place, 0, {"t": Target(make, mutate, read)}), range(2))
"""


@POSIX
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_the_fuzzer_sees_what_it_looks_for():
    written, _ = apart(RUN + SEEN)
    wanted = ["AttributeError: oh", "took over", "killed by SIGABRT", "MemoryError", "memory ran out",
              "AMGError of 5000", "something else", "refused", "read"]  # fmt: skip
    for ends, words in zip(written, wanted, strict=True):
        assert [number for number, *_ in ends] == [0, 1]  # the second one is read after all
        assert all(words in end and done == "cut" for _, _, done, end in ends), (words, ends)


# ---------------------------------------------------------------- what it has found


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_small_picture_takes_little_memory(tmp_path):
    """Room for the largest file allowed was taken for every file: 1 GiB for each reading thread."""
    paint(1).save(tmp_path / "a.png")
    written, _ = apart(
        "import resource\nfrom pathlib import Path\n"
        "from amg_core.index.picture import read_file\n"
        "before = peak()\n"
        "held = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 27), held + (1 << 27)))\n"
        "tell(lambda: len(read_file(Path(sys.argv[1]))))\n",
        tmp_path / "a.png",
    )
    assert written == [(tmp_path / "a.png").stat().st_size]


def test_a_file_of_the_limit_is_read_and_a_longer_one_is_not(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert read_bounded(tmp_path / "f", 3) == b"abc"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        read_bounded(tmp_path / "f", 2)


def test_a_file_that_grows_while_it_is_read_is_not_taken_for_whole(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"abc")
    real = os.fstat

    def earlier(handle):
        state = list(real(handle))
        state[6] = 2  # bytes, a moment ago
        return os.stat_result(state)

    monkeypatch.setattr(os, "fstat", earlier)
    with pytest.raises(OSError, match="being written"):
        read_bounded(tmp_path / "f", 100)


ROWS = np.random.default_rng(0).random((70, 12)).astype(np.float16)
WANTED = {"version": codes.VERSION, "rows": "k", "count": 70, "dim": 12, "metric": "nl2"}
HEADERS = {
    "a list": lambda h: [h],
    "a number": lambda h: 7,
    "no width": lambda h: h | {"width": 0},
    "a width below nothing": lambda h: h | {"width": -12},
    "a wide turn": lambda h: h | {"width": 1 << 40},
    "half a width": lambda h: h | {"width": 12.0},
    "endless width": lambda h: h | {"width": float("inf")},
    "no blocks": lambda h: h | {"block_bytes": 0},
    "blocks below nothing": lambda h: h | {"block_bytes": -64},
    "short blocks": lambda h: h | {"block_bytes": h["block_bytes"] // 2},
    "long blocks": lambda h: h | {"block_bytes": h["block_bytes"] * 2},
    "no tail": lambda h: h | {"tail": float("nan")},
    "a short tail": lambda h: h | {"tail": 0.0},
    "a large tail": lambda h: h | {"tail": 10**400},
    "a tail of text": lambda h: h | {"tail": "1"},
    "no floor": lambda h: h | {"floor": -1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_search_codes_that_cannot_be_are_made_again(tmp_path, name):
    """Somebody's cache, every hash of it right: blocks too short would be written beyond memory's end."""
    pytest.importorskip("faiss")
    path = _codes(tmp_path)
    data = path.read_bytes()
    header = HEADERS[name](json.loads(data[40 : codes.HEADER]))
    body = data[codes.HEADER :]
    if (
        isinstance(header, dict) and type(header["block_bytes"]) is int
    ):  # the size that it speaks of
        size = len(body) - 3 * json.loads(data[40 : codes.HEADER])["block_bytes"]
        body = (body + bytes(1 << 16))[: size + 3 * max(0, header["block_bytes"])]
        halves = [hashlib.sha256(piece).digest() for piece in (body[:size], body[size:])]
        header["sha256"] = hashlib.sha256(b"".join(halves)).hexdigest()
    path.write_bytes(_head(header) + body)
    assert codes.read(path, WANTED) is None
    assert codes.open_codes(tmp_path, "k", 16, ROWS, cosine=False).count == 70
    assert codes.read(path, WANTED) is not None


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_tables_of_values_that_are_none_are_made_again(tmp_path, value):
    """With them a scan finds no rows at all."""
    pytest.importorskip("faiss")
    path = _codes(tmp_path)
    data = path.read_bytes()
    header, body = json.loads(data[40 : codes.HEADER]), bytearray(data[codes.HEADER :])
    body[:4] = np.array([value], "<f4").tobytes()
    size = len(body) - 3 * header["block_bytes"]
    halves = [hashlib.sha256(piece).digest() for piece in (body[:size], body[size:])]
    header["sha256"] = hashlib.sha256(b"".join(halves)).hexdigest()
    path.write_bytes(_head(header) + body)
    assert codes.read(path, WANTED) is None


def _codes(folder: Path) -> Path:
    codes.open_codes(folder, "k", 16, ROWS, cosine=False)
    assert codes.read(folder / "pq4-16.bin", WANTED) is not None
    return folder / "pq4-16.bin"


def _head(header: object) -> bytes:
    text = json.dumps(header).encode().ljust(codes.HEADER - 40)
    return codes.MAGIC + hashlib.sha256(text).digest() + text


def test_an_error_of_a_database_that_is_no_text_is_refused(made):
    """SQLite's own words quote what a file holds."""
    path = shard_of(made) / fmt.META
    with closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
    data = path.read_bytes()
    at = data.index(b"CREATE TABLE")
    assert at < size
    for offset in range(0, 300, 7):
        path.write_bytes(data[: at + offset] + b"\xbf" + data[at + offset + 1 :])
        reseal(made)
        with pytest.raises(AMGError, match=r"meta\.sqlite"):
            Index.open(made)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_of_any_length_make_no_long_message(tmp_path, suffix):
    path = tmp_path / f"list{suffix}"
    long = "x" * 70_000
    if suffix == ".csv":
        path.write_text(f"{long},b\n1,2\n")
    elif suffix == ".jsonl":
        path.write_text(json.dumps({long: "1"}))
    else:
        arrow, parquet = (pytest.importorskip(n) for n in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(arrow.table({long: ["1"]}), path)
    with pytest.raises(AMGError, match="no column that names pictures") as caught:
        open_source(path)
    assert len(str(caught.value)) < LONGEST


def test_tables_of_any_length_make_no_long_note(tmp_path):
    folder = fill(tmp_path / "in", 1)
    long = "x" * 70_000
    for table in (
        f"{long},b\n1,2\n",
        f"file_name,{long}\na.png,2\n",
        f"file_name,text\n{long},2\n",
    ):
        (folder / "t.csv").write_text(table)
        source = open_source(folder)
        assert len(list(source)) == 1 and source.notes
        assert all(len(note) < LONGEST for note in source.notes)


def test_a_descriptor_of_any_length_makes_no_long_message(made):
    path = made / fmt.MANIFEST
    tree = json.loads(path.read_bytes())
    del tree["checksum"]
    tree["descriptor"] |= {"id": "x" * 70_000, "preprocessing": "y" * 70_000}
    path.write_bytes(fmt._dump(tree | {"checksum": fmt._checksum(tree)}))
    with pytest.raises(AMGError, match="built with descriptor") as caught:
        Index.open(made, create("pixel").spec)
    assert len(str(caught.value)) < LONGEST


def test_weights_whose_names_are_long_make_no_long_message(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"1.weight": torch.ones(4, 4, 3, 3), "x" * 70_000: torch.ones(1)}, path)
    head = b'{"a":"' + b"x" * 70_000 + b'"}'
    for _ in range(2):
        with pytest.raises(AMGError, match="not a readable TAESD") as caught:
            load_taesd(path)
        assert len(str(caught.value)) < LONGEST
        path.write_bytes(len(head).to_bytes(8, "little") + head)


@pytest.mark.parametrize("said", ["Infinity", "1" + "0" * 400, "-5", "true", '"7"', "[" * 100_000])
def test_how_many_pictures_a_shard_says_it_has(tmp_path, said):
    """A progress bar that cannot be is none."""
    paint(1).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    (tmp_path / "0_stats.json").write_text(f'{{"successes": {said}}}')
    source = open_source(tmp_path / "0.tar")
    assert len(source) == 0 and len(list(source)) == 1


@pytest.mark.parametrize(
    "changes",
    [{"seeds": 1 << 31}, {"seeds": float("inf")}, {"seeds": 0}, {"shape": [float("inf")]},
     {"ordinary": []}, {"ordinary": {"norm": []}}, {"model": "x"}],
)  # fmt: skip
def test_a_calibration_of_wrong_numbers_is_refused_in_little_memory(tmp_path, changes):
    body = {"format": calibration.FORMAT, "model": "k", "shape": [4, 8, 8], "seeds": 2, "low": 0.04,
            "ordinary": {name: [[1.0] * 20] * 2 for name in calibration.statistics.NAMES},
            "memorised": {}}  # fmt: skip
    path = tmp_path / "k.json"
    path.write_text(json.dumps(body))
    calibration.load(path)
    path.write_text(json.dumps(body | changes))
    if "model" in changes:
        assert calibration.load(path).model == "x"
        return
    with pytest.raises(AMGError):
        calibration.load(path)


def test_a_picture_that_is_none_has_no_report(tmp_path):
    path = tmp_path / "a.png"
    paint(1).save(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(AMGError, match=r"a\.png cannot be read as a picture"):
        report.of_picture(path)
    for text in ("[" * 100_000, "7", "{", '{"7": [' * 20_000):
        data = PngInfo()
        data.add_text(report.KEY, text)
        paint(1).save(path, pnginfo=data)
        with pytest.raises(AMGError, match=r"report in .*a\.png is damaged"):
            report.of_picture(path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"' + "x" * 70_000, "7", "[]"])
def test_a_list_of_further_captions_that_is_none(tmp_path, line):
    (tmp_path / "l.jsonl").write_text(line)
    with pytest.raises(AMGError, match=r"l\.jsonl, line 1") as caught:
        extra_captions(tmp_path / "l.jsonl")
    assert len(str(caught.value)) < LONGEST
