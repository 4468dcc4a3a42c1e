"""Full disks, copies, power cuts, files that are cut while they are open."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from amg_core.errors import AMGError
from amg_core.index import Index, add, build, commit, mute, reader, remove, shard, writer
from amg_core.index.reader import _Verified
from tests.index.helpers import content, fill, run, shard_of

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


# --- copies ------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("how", ["cp", "copy2"])
def test_a_damaged_copy_is_found(made, tmp_path, monkeypatch, how):
    """Its times, and the note that its files are sound, come from the original."""
    monkeypatch.setattr(_Verified, "MOMENT", -(10**18))  # as if all had been written long ago
    Index.open(made).close()
    assert (made / "cache" / "verified.json").exists()
    copy = tmp_path / "copy"
    if how == "cp":
        subprocess.run(["cp", "-a", made, copy], check=True)
    else:
        shutil.copytree(made, copy)
    path = shard_of(copy) / "rows.16.f16.npy"
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(AMGError, match=r"rows\.16.*altered"):
        Index.open(copy)


def test_an_index_that_was_found_sound_is_not_read_again(made, monkeypatch):
    monkeypatch.setattr(_Verified, "MOMENT", -(10**18))
    Index.open(made).close()
    monkeypatch.setattr(shard.Shard, "check", lambda self: pytest.fail("read again"))
    Index.open(made).close()


# --- files that are cut while they are open ----------------------------------------------------

CUT = """
import os, sys
from pathlib import Path
import torch
from amg_core.errors import AMGError
from amg_core.index import Index
from amg_core.index.search import Searcher
index = Index.open(sys.argv[1])
searcher = Searcher(index)
(folder,) = (Path(sys.argv[1]) / "shards").iterdir()
uses = {
    "slice": lambda: index.rows(32)[:].sum(),
    "ids": lambda: index.rows(32)[[4, 0]].sum(),
    "row": lambda: index.rows(32)[4].sum(),
    "shard": lambda: index.shards[0].rows(32)[4].sum(),
    "search": lambda: searcher.nearest(torch.zeros(1, 3072), 32, 1),
    "hashes": lambda: index.find("00" * 32),
}
os.truncate(folder / "rows.32.f16.npy", 128)
os.truncate(folder / "sha256.npy", 0)
try:
    uses[sys.argv[2]]()
except AMGError as error:
    print(error)
"""


@posix
@pytest.mark.parametrize("use", ["slice", "ids", "row", "shard", "search", "hashes"])
def test_a_file_cut_while_it_is_open_does_not_kill_the_process(made, use):
    assert "was cut while it was open" in run(CUT, made, use)


# --- full disks --------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import Index, add, build, mute, remove
from tests.index.helpers import content
index, more, before = sys.argv[1], sys.argv[2], None
pixel = create("pixel")
changes = {
    "build": lambda: build(more, index, pixel, batch=2),
    "add": lambda: add(more, index, pixel, batch=2),
    "remove": lambda: remove(index, lambda e: e.source == "p001.png"),
    "mute": lambda: mute(index, lambda e: e.source == "p003.png", "mine"),
}
before = content(Path(index))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for name, change in changes.items():
    for limit in (0, 100, 1000, 3000, 5000, 9000, 15_000, 20_000, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            change()
        except AMGError as error:
            assert "Cannot write the index" in str(error), error
            print(name, "refused")
        else:
            print(name, "done")
            break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert content(Path(index)) == before, (name, limit)
        left = [p for p in Path(index, ".build").rglob("*") if p.is_file()]
        sealed = {p.parent for p in left if p.name == "manifest.json"}
        assert all(p.parent in sealed or p.name == "order.jsonl" for p in left), left
    before = content(Path(index))
"""


@posix
def test_a_full_disk_is_an_error_with_a_next_step_and_loses_nothing(made, tmp_path, pixel):
    more = fill(tmp_path / "more", 12)
    report = run(LIMITED, made, more).splitlines()
    for name in ("build", "add", "remove", "mute"):
        assert f"{name} refused" in report
    build(more, made, pixel)
    with Index.open(made) as index:
        index.verify()
        assert index.count == 12


def refuse(number: int):
    def refused(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return refused


def test_a_full_disk_is_told_with_the_folder_that_holds_the_room(
    made, tmp_path, pixel, monkeypatch
):
    more = fill(tmp_path / "more", 12, first=20)

    def stop(done, total, source):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(more, made, pixel, progress=stop, batch=4)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "flush", refuse(errno.ENOSPC))
        with pytest.raises(AMGError) as caught:
            mute(made, lambda entry: True, "mine")
    message = str(caught.value)
    assert str(made / ".build") in message and "MiB" in message and "delete that folder" in message
    with monkeypatch.context() as patch:
        patch.setattr(commit, "flush", refuse(errno.EACCES))
        with pytest.raises(AMGError, match="choose a folder you may write to"):
            mute(made, lambda entry: True, "mine")
    assert add(more, made, pixel, batch=4).embedded == 4  # what was embedded is still there


@pytest.mark.parametrize("command", ["info", "add", "build"])
def test_a_folder_that_one_may_not_look_into_is_told_in_words(
    made, pictures, tmp_path, monkeypatch, capsys, command
):
    """As an ordinary user; `benchmarks/disk.py` does it with a real one."""
    from index_tools.cli import main

    shut = pictures if command == "build" else made
    real = os.stat

    def stat(path, *rest, **named):
        if not isinstance(path, int) and Path(path).is_relative_to(shut):
            refuse(errno.EACCES)()
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(reader, "open_regular", refuse(errno.EACCES))
    out = tmp_path / "new"
    more = {"info": [made], "add": [pictures, made], "build": [pictures, out]}[command]
    assert main([command, *map(str, more)]) == 1
    (report,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert report.startswith(f"error: {shut}") and "that you may read" in report


def test_a_failed_change_gives_the_room_back(made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(commit, "_patiently", refuse(errno.ENOSPC))
        with pytest.raises(AMGError, match="disk is full; free space"):
            remove(made, lambda entry: entry.source == "p000.png")
    assert not (made / ".build").exists()
    assert remove(made, lambda entry: entry.source == "p000.png") == 1


def test_trouble_in_clearing_up_never_hides_the_first(made, pictures, pixel, monkeypatch):
    def stop(done, total, source):
        monkeypatch.setattr(os, "unlink", refuse(errno.EIO))
        monkeypatch.setattr(os, "rmdir", refuse(errno.EIO))
        monkeypatch.setattr(os, "scandir", refuse(errno.EIO))
        monkeypatch.setattr(writer, "flush", refuse(errno.ENOSPC))
        monkeypatch.setattr(shard, "flush", refuse(errno.ENOSPC))
        raise RuntimeError("the first")

    fill(pictures, 1, first=30)
    with pytest.raises(RuntimeError, match="the first"):
        build(pictures, made, pixel, progress=stop)


def test_a_part_that_was_interrupted_in_a_row_is_not_used(tmp_path, pixel, monkeypatch):
    """Its files would not fit one another."""
    original, calls = shard.ShardWriter.add, []

    def half(self, record, rows, thumbnail):
        calls.append(1)
        if len(calls) == 3:
            self._file(16, 768).write(b"x" * 100)
            raise KeyboardInterrupt
        return original(self, record, rows, thumbnail)

    folder, out = fill(tmp_path / "in", 6), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shard.ShardWriter, "add", half)
        with pytest.raises(KeyboardInterrupt):
            build(folder, out, pixel, batch=2)
    assert not out.exists()
    build(folder, out, pixel)
    build(folder, tmp_path / "plain", pixel)
    assert content(out) == content(tmp_path / "plain")


# --- power cuts --------------------------------------------------------------------------------


@posix
def test_what_must_outlive_a_power_cut_is_flushed(tmp_path, pixel, monkeypatch):
    """Every file, and every folder that got a new name, before it is counted on."""
    flushed: list[Path] = []
    real = os.fsync

    def fsync(handle):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    home = tmp_path / "home"
    home.mkdir()
    out = home / "out"
    parts = []

    def look(done, total, source):
        parts[:] = [
            p for p in (out / ".build" / "parts").iterdir() if (p / "manifest.json").exists()
        ]

    monkeypatch.setattr(writer, "PART_ROWS", 2)
    build(fill(tmp_path / "in", 6), out, pixel, progress=look, batch=2)
    assert parts
    for part in parts:
        assert {part / "manifest.tmp", part, part.parent, part / "meta.sqlite"} <= set(flushed)
    assert {out / ".build", out, home, out / "shards"} <= set(flushed)
    assert flushed.index(out / "shards") < flushed.index(out / ".build" / "manifest.json")
    assert flushed[-1] == home
