"""A killed build leaves the old index or none, and the next build works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest

from amg_core.errors import AMGError
from amg_core.index import Index, build
from tests.index.helpers import PATIENCE, ROOT, content, fill, paint, run

# Runs changes in forked children that kill themselves at the n-th call of one function.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from amg_core.descriptors import create
from amg_core.index import add, build, commit, embedding, format, mute, remove, shard
from tests.index.killing import KILLED, Change, child, end, make_small_shards

work = Path(sys.argv[1])
make_small_shards()
pixel = create("pixel")

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

CHANGES = {
    "build": lambda out: build(work / "many", out, pixel, batch=2),
    "add": lambda out: add(work / "many", out, pixel, batch=2),
    "remove": lambda out: remove(out, lambda e: e.source == "p001.png"),
    "mute": lambda out: mute(out, lambda e: e.source == "p001.png", "mine"),
}
MOMENTS = [
    (embedding, "decode", 1), (embedding, "decode", 7), (embedding.Embedder, "__call__", 3),
    (shard.ShardWriter, "add", 1), (shard.ShardWriter, "add", 6), (shard.ShardWriter, "add", 14),
    (shard.ShardWriter, "finish", 1), (shard.ShardWriter, "finish", 2, True),
    (shard.ShardWriter, "finish", 6), (shard, "flush", 3), (shard, "flush", 9),
    (format, "digest", 2), (format, "digest", 12), (format, "dump_manifest", 1),
    (format, "dump_manifest", 5), (os, "replace", 1), (os, "replace", 1, True), (os, "replace", 5),
    (os, "replace", 5, True), (commit, "publish", 1), (os, "rename", 1), (os, "rename", 1, True),
    (os, "rename", 2), (os, "rename", 3, True), (commit, "_collect", 1), (os, "unlink", 1, True),
    (os, "unlink", 5), (os, "rmdir", 1), (os, "rmdir", 2, True),
]

killed = 0
before = work / "before"
assert end(child(lambda: build(work / "few", before, pixel))) == 0
for name, task in CHANGES.items():
    change = Change(task, work / "absent" if name == "build" else before, work / f"after {name}",
                    drafts=name in ("mute", "remove"))
    for moment in MOMENTS[3:] if name == "remove" else MOMENTS[13:] if name == "mute" else MOMENTS:
        def kill(out):
            def doomed():
                die_at(*moment)
                task(out)
            code = end(child(doomed))
            assert code in (0, KILLED), (moment, code)
            global killed
            killed += code == KILLED
        print(name, moment[1:], change.attempt(work / f"at {name}", kill))
    if name in ("build", "add"):  # and at moments nobody chose, again and again
        rng = random.Random(name)
        for number in range(5):
            def kill(out):
                for _ in range(3):
                    pid = child(lambda: task(out))
                    time.sleep(rng.random() * 0.06)
                    os.kill(pid, signal.SIGKILL)
                    end(pid)
            print(name, "random", change.attempt(work / f"rng {name}", kill))
assert not [p for p in work.iterdir() if p.name.startswith(".")]
print("killed", killed)
"""


# Changes that leave what a killed one must not leave, and one that does not succeed again.
SEEN = """
import sys
from pathlib import Path
from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import build
from tests.index.killing import Change

work, pixel = Path(sys.argv[1]), create("pixel")
build(work / "few", work / "old", pixel)
refuse = work / "refuse"

def task(out):
    if refuse.exists():
        raise AMGError("not again")
    build(work / "many", out, pixel)

def cut(out):
    path = next((out / "shards").iterdir()) / "meta.sqlite"
    path.write_bytes(path.read_bytes()[:-1])

def other(out):
    build(work / "other", out, pixel)

def again(out):
    refuse.touch()

def litter(out):
    change.usual.discard("cache")

change = Change(task, work / "old", work / "new")
assert change.attempt(work / "out", lambda out: None) is False
assert change.attempt(work / "out", task) is True
for kill in (cut, other, again, litter):
    try:
        change.attempt(work / "out", kill)
        print(kill.__name__, "is not seen")
    except AssertionError as error:
        print(kill.__name__, error)
    refuse.unlink(missing_ok=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_what_killing_must_not_leave_is_seen(tmp_path):
    for number, name in enumerate(("few", "many", "other"), 2):
        fill(tmp_path / name, number)
    written = [line for line in run(SEEN, tmp_path).splitlines() if not line.startswith("AMGError")]
    wanted = [r"cut .*meta\.sqlite is truncated", "other neither the old index nor the new one",
              "again the same change again failed", "litter .*was left lying about"]  # fmt: skip
    for pattern, line in zip(wanted, written, strict=True):
        assert re.match(pattern, line), line


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_changes_end_in_the_index_of_undisturbed_ones(tmp_path):
    fill(tmp_path / "few", 4)
    fill(tmp_path / "many", 11, first=2)
    printed = run(SCRIPT, tmp_path)
    lines = printed.splitlines()
    assert int(lines[-1].split()[1]) >= 70, printed
    assert any(line.endswith("True") for line in lines)
    assert any(line.endswith("False") for line in lines)


def test_an_interrupted_build_embeds_nothing_twice(tmp_path, pixel):
    """Killed after some parts were sealed: the next one takes them over."""
    pictures, out = fill(tmp_path / "pictures", 12), tmp_path / "out"
    parts = []

    def stop(done, total, source):
        if done == 8:
            parts.extend((out / ".build" / "parts").iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(pictures, out, pixel, progress=stop, batch=4)
    (pictures / "p005.png").unlink()  # the folder changes before the next attempt
    report = build(pictures, out, pixel, batch=4)
    assert parts and (report.embedded, report.count) == (4, 11)
    build(pictures, tmp_path / "plain", pixel)
    assert content(out) == content(tmp_path / "plain")


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


READER = """
import sys
from amg_core.index import Index
seen, opened = set(), 0
while len(seen) < 2 or opened < 40:
    with Index.open(sys.argv[1]) as index:
        index.verify() if opened % 5 == 0 else None
        assert [r.source for r in index.records()] == [f"p{i:03}.png" for i in range(index.count)]
        assert len(index.rows(16)[:]) == index.count
        seen.add(index.count)
        opened += 1
print(sorted(seen))
"""


BUILDER = """
import select, sys
from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import build
done = refused = 0
while not (select.select([sys.stdin], [], [], 0.02)[0] and done):
    try:
        build(sys.argv[2], sys.argv[1], create("pixel"))
        done += 1
    except AMGError as error:
        assert "is being built or changed" in str(error), error
        refused += 1
print(done, refused)
"""


@pytest.mark.skipif(os.name == "nt", reason="select reads no pipes on Windows")
def test_two_processes_build_while_two_read(tmp_path, pixel):
    """Builders keep each other out; readers find one whole index or the other."""
    few, many = fill(tmp_path / "few", 2), fill(tmp_path / "many", 4)
    out = tmp_path / "index"
    build(few, out, pixel)

    def start(script, *arguments):
        return subprocess.Popen(
            [sys.executable, "-c", script, str(out), *map(str, arguments)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    readers = [start(READER), start(READER)]
    builders = [start(BUILDER, few), start(BUILDER, many)]
    for reader in readers:
        printed, errors = reader.communicate(timeout=PATIENCE)
        assert (reader.returncode, printed.strip()) == (0, "[2, 4]"), errors
    for builder in builders:
        printed, errors = builder.communicate("stop", timeout=PATIENCE)
        assert builder.returncode == 0, errors
        assert int(printed.split()[0]) > 0
    assert Index.open(out).count in (2, 4)


def test_an_open_index_outlives_its_replacement(tmp_path, pixel, made):
    with Index.open(made) as index:
        build(fill(tmp_path / "other", 1, first=7), made, pixel)
        assert index.count == 5 and index.source(4) == "p004.png"
        assert float(index.rows(16)[4].sum()) > 0
        assert index.thumbnail(3).size == (40, 30)


def test_a_failed_change_leaves_the_old_index(made, pictures, pixel, monkeypatch):
    paint(50).save(pictures / "new.png")
    before = content(made)
    for name in ("rename", "replace"):
        with monkeypatch.context() as patch:

            def refuse(source, to):
                if os.sep + "manifest.tmp" not in str(source):
                    raise OSError("no")
                os.link(source, to)

            patch.setattr(os, name, refuse)
            with pytest.raises(AMGError, match="Cannot write"):
                build(pictures, made, pixel)
        assert content(made) == before
        build(fill(made.parent / "same", 5), made, pixel)
