"""A killed build leaves the old index or none, and the next build works."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from amg_core.errors import AMGError
from amg_core.index import Index, build
from amg_core.index import format as fmt
from tests.index.helpers import fill

ROOT = Path(__file__).parents[2]

# Runs builds in forked children that kill themselves at the n-th call of one function.
SCRIPT = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import Index, build, folder, format, writer

work = Path(sys.argv[2])
# What children would each import anew.
import PIL.Image, PIL.features, PIL.PngImagePlugin, PIL.WebPImagePlugin
PIL.Image.init()
create("pixel")

def child(task):
    pid = os.fork()
    if pid == 0:
        try:
            task()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def die_at(owner, name, n, after=False):
    real, calls = getattr(owner, name), [0]
    def wrapped(*args, **options):
        calls[0] += 1
        if calls[0] == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

def make(pictures, out):
    build(work / pictures, out, create("pixel"), batch=2)

MOMENTS = [
    (writer, "load_picture", 1), (writer, "load_picture", 4), (writer, "_thumbnail", 3),
    (format, "digest", 1), (format, "digest", 4), (format, "dump_manifest", 1),
    (writer, "_flush", 2), (writer, "_flush", 6), (writer, "_swap", 1),
    (os, "rename", 1), (os, "rename", 1, True), (os, "rename", 2), (os, "rename", 2, True),
    (os, "unlink", 1, True), (os, "unlink", 3),
]
for had_old in (False, True):
    for number, moment in enumerate(MOMENTS):
        out = work / f"index {had_old} {number}"
        if had_old:
            assert child(lambda: make("few", out)) == 0, moment
        def killed():
            die_at(*moment)
            make("many", out)
        status = child(killed)
        assert status in (0, signal.SIGKILL), (moment, status)
        try:
            with Index.open(out) as index:
                found = index.count
        except AMGError as error:
            assert "There is no index" in str(error), error
            found = 0
        assert found in ({2, 5} if had_old else {0, 5}), (moment, found)
        print(moment[1:], had_old, status, found)
        assert child(lambda: make("many", out)) == 0, moment
        with Index.open(out) as index:
            assert index.count == 5
        assert not [p for p in work.iterdir() if p.name.startswith(".")], moment
        shutil.rmtree(out)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_builds(tmp_path):
    fill(tmp_path / "few", 2)
    fill(tmp_path / "many", 5)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 30 and sum(" 9 " in line for line in lines) >= 25
    for count in "025":
        assert any(line.endswith(count) for line in lines)


def test_reading_while_builds_swap(tmp_path, pixel):
    few, many = fill(tmp_path / "few", 2), fill(tmp_path / "many", 4)
    out = tmp_path / "index"
    build(few, out, pixel)
    seen, failures, stop = set(), [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                with Index.open(out) as index:
                    assert index.source(index.count - 1) == f"p{index.count - 1:03}.png"
                    assert len(index.rows(16)) == index.count
                    seen.add(index.count)
            except BaseException as error:
                failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(20):
        build(many, out, pixel)
        build(few, out, pixel)
    stop.set()
    thread.join()
    assert failures == [] and seen == {2, 4}


def test_an_open_index_outlives_its_replacement(tmp_path, pixel, made):
    with Index.open(made) as index:
        build(fill(tmp_path / "other", 1, first=7), made, pixel)
        assert index.count == 5 and index.source(4) == "p004.png"
        assert float(index.rows(16)[4].sum()) > 0
        assert index.thumbnail(3).size == (40, 30)


def test_half_done_swap_is_read_and_mended(made, pictures, pixel):
    os.rename(made, fmt.old_folder(made))
    with Index.open(made) as index:
        assert index.count == 5 and index.name == "index"
    with pytest.raises(KeyboardInterrupt):
        build(pictures, made, pixel, progress=_interrupt)
    assert made.is_dir() and not fmt.old_folder(made).exists()


def test_failed_swap_puts_the_old_index_back(made, pictures, pixel, monkeypatch):
    real, calls = os.rename, []

    def rename(source, to):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        real(source, to)

    before = (made / "manifest.json").read_bytes()
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(AMGError, match="Cannot write"):
        build(pictures, made, pixel)
    assert (made / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in made.parent.iterdir()) == ["index", "pictures"]


def _interrupt(done, total, source):
    raise KeyboardInterrupt
