"""Indexes that change: nothing is embedded twice, nothing is in twice, nothing else moves."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest

from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import Entry, Index, add, build, merge, mute, remove, unmute, writer
from amg_core.index.digests import Digests
from amg_core.index.search import Searcher
from tests.index.helpers import content, fill, paint


def named(*sources):
    return lambda entry: entry.source in sources


def held(index):
    """{source: caption} of rows and of aliases."""
    with Index.open(index) as opened:
        rows = {record.source: record.caption for record in opened.records()}
        return rows, {alias.source: (alias.id, alias.caption) for alias in opened.aliases()}


class Counting:
    """The pixel descriptor, counting the pictures it embeds."""

    def __init__(self):
        self.inner = create("pixel")
        self.spec, self.space = self.inner.spec, self.inner.space
        self.pictures = 0

    def to(self, device):
        return self

    def embed(self, pictures, scale):
        self.pictures += len(pictures) * (scale == 16)
        return self.inner.embed(pictures, scale)


def test_build_again_embeds_the_difference_only(tmp_path, pictures, made):
    counting = Counting()
    paint(90).save(pictures / "new.png")
    paint(91).save(pictures / "p001.png")  # changed
    (pictures / "p002.png").unlink()
    (pictures / "p003.png").rename(pictures / "renamed.png")
    (pictures / "p004.txt").write_text("a caption now")
    report = build(pictures, made, counting)
    assert (report.embedded, report.reused, report.count, counting.pictures) == (2, 3, 5, 2)
    rows, aliases = held(made)
    expected = {"new.png": "", "p000.png": "", "p001.png": "", "p004.png": "a caption now"}
    assert rows == expected | {"renamed.png": ""} and aliases == {}
    build(pictures, tmp_path / "anew", create("pixel"))
    assert content(made) == content(tmp_path / "anew")


def test_a_picture_is_never_in_twice(tmp_path, pictures, pixel):
    (pictures / "p000.txt").write_text("first")
    for name, caption in (("a copy.png", "first"), ("z/p000.png", "other")):
        path = pictures / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(pictures / "p000.png", path)
        path.with_suffix(".txt").write_text(caption)
    report = build(pictures, tmp_path / "out", pixel)
    assert (report.count, report.embedded, report.reused) == (5, 5, 2)
    rows, aliases = held(tmp_path / "out")
    assert next(iter(rows)) == "a copy.png"
    assert aliases == {"p000.png": (0, "first"), "z/p000.png": (0, "other")}
    again = add(pictures, tmp_path / "out", pixel)
    assert (again.count, again.embedded, again.hash) == (5, 0, report.hash)


def test_add(tmp_path, pictures, made, pixel):
    more = fill(tmp_path / "more", 4, first=3)
    shutil.copy(more / "p004.png", more / "twice.png")
    counting = Counting()
    report = add(more, made, counting)
    assert (report.count, report.embedded, report.reused, counting.pictures) == (7, 2, 3, 2)
    rows, aliases = held(made)
    assert list(rows) == [f"p{i:03}.png" for i in range(7)]
    assert aliases == {"twice.png": (4, "")}
    names_only = tmp_path / "names"
    names_only.mkdir()
    shutil.copy(pictures / "p001.png", names_only / "other name.png")
    report = add(names_only, made, pixel)
    assert (report.count, report.embedded) == (7, 0)
    assert held(made)[1]["other name.png"] == (1, "")
    with pytest.raises(AMGError, match="There is no index"):
        add(more, tmp_path / "absent", pixel)
    with pytest.raises(AMGError, match="scales 16"):
        add(more, made, create("pixel", scales=(16,)))
    assert not (tmp_path / "absent").exists()


def test_remove(tmp_path, pictures, made, pixel):
    (pictures / "p001.txt").write_text("one")
    shutil.copy(pictures / "p001.png", pictures / "q.png")
    (pictures / "q.txt").write_text("queue")
    build(pictures, made, pixel)
    assert remove(made, named("no such")) == 0
    assert remove(made, named("p000.png", "p001.png")) == 2
    rows, aliases = held(made)
    assert set(rows) == {"p002.png", "p003.png", "p004.png", "q.png"} and aliases == {}
    assert rows["q.png"] == "queue"
    before = content(made)
    with pytest.raises(AMGError, match="empty: delete its folder"):
        remove(made, lambda entry: True)
    assert content(made) == before
    report = add(pictures, made, pixel)
    assert (report.count, report.embedded) == (5, 1)


def test_mute(tmp_path, pictures, made, pixel):
    assert mute(made, named("p001.png", "p003.png"), "my own") == 2
    assert mute(made, named("p003.png"), "public domain") == 1
    with Index.open(made) as index:
        assert index.muted == {1: "my own", 3: "public domain"}
        query = Searcher(index).rows(np.array([3]), 16)
        _, ids = Searcher(index).nearest(query, 16, 5)
        assert 3 not in ids and 1 not in ids and ids.shape == (1, 3)
    (pictures / "p000.png").unlink()
    build(pictures, made, pixel)
    with Index.open(made) as index:
        assert index.muted == {0: "my own", 2: "public domain"}
    assert unmute(made, named("p001.png", "p002.png")) == 1
    with Index.open(made) as index:
        assert index.muted == {2: "public domain"}
    assert mute(made, named("nothing"), "why") == 0


def test_merge(tmp_path, made, pixel):
    more = fill(tmp_path / "more", 3, first=4)
    build(more, tmp_path / "b", pixel)
    build(fill(tmp_path / "far", 2, first=50), tmp_path / "c", pixel)
    mute(tmp_path / "c", named("p050.png"), "mine")
    assert merge([made, tmp_path / "b", tmp_path / "c"], tmp_path / "all") == 9
    rows, aliases = held(tmp_path / "all")
    assert len(rows) == 9 and aliases == {}  # p004.png was the same file under the same name
    with Index.open(tmp_path / "all") as index:
        index.verify()
        assert sorted(index.muted.values()) == ["mine"]
        for record in index.records():
            i = index.find(record.sha256)
            original = Index.open(made) if record.source < "p005" else None
            if original:
                j = original.find(record.sha256)
                np.testing.assert_array_equal(index.rows(32)[i], original.rows(32)[j])
    with pytest.raises(AMGError, match="one of the indexes"):
        merge([made, tmp_path / "b"], made)
    with pytest.raises(AMGError, match="will not be replaced"):
        merge([made], more)


@pytest.mark.parametrize("seed", range(6))
def test_any_history_equals_the_plain_account(tmp_path, pixel, monkeypatch, seed):
    """Random adds, removals and merges against a dict; shards of 3 rows, so that all cases occur."""
    monkeypatch.setattr(writer, "ROWS_PER_SHARD", 3)
    rng = random.Random(seed)
    pool = fill(tmp_path / "pool", 12)
    index = tmp_path / "index"

    def some(step):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        chosen = {f"{rng.randrange(8)}-{step % 3}.png": rng.randrange(12) for _ in range(4)}
        for name, picture in chosen.items():
            shutil.copy(pool / f"p{picture:03}.png", folder / name)
        return folder, chosen

    folder, chosen = some(0)
    account = set(chosen.items())
    build(folder, index, pixel)
    for step in range(1, 9):
        kind = rng.choice(["add", "add", "remove", "merge"])
        if kind == "add":
            folder, chosen = some(step)
            add(folder, index, pixel)
            account |= set(chosen.items())
        elif kind == "remove":
            gone = {source for source, _ in account if rng.random() < 0.4}
            if {source for source, _ in account} - gone:
                remove(index, lambda entry, gone=gone: entry.source in gone)
                account = {(s, p) for s, p in account if s not in gone}
        else:
            folder, chosen = some(step)
            build(folder, tmp_path / f"other{step}", pixel)
            merge([index, tmp_path / f"other{step}"], tmp_path / f"merged{step}")
            index = tmp_path / f"merged{step}"
            account |= set(chosen.items())
        with Index.open(index) as opened:
            opened.verify()
            records, aliases = list(opened.records()), list(opened.aliases())
            found = [(r.source, r.sha256) for r in records]
            found += [(a.source, records[a.id].sha256) for a in aliases]
            by_hash = {}
            for source, sha256 in found:
                by_hash.setdefault(sha256, set()).add(source)
            expected = {}
            for source, picture in account:
                expected.setdefault(picture, set()).add(source)
            assert sorted(map(sorted, by_hash.values())) == sorted(map(sorted, expected.values()))
            assert len({r.sha256 for r in records}) == len(records) == len(expected)
            assert len(found) == len(set(found)) == len(account)
            assert len(opened.shards) <= 1 + len(records)
            rows = np.asarray(opened.rows(16))
            assert len(np.unique(rows, axis=0)) == len(rows)


def test_digests():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (1000, 32), dtype=np.uint8)
    rows[:40, :16] = 0
    rows[:40, 15] = np.arange(40)  # differ in the last byte that is kept, and end in zeros
    digests = Digests()
    start = 0
    for shard, size in enumerate([1, 1, 300, 2, 5, 600, 91]):
        digests.add(rows[start : start + size], shard)
        digests.add(rows[:1], 99)  # what was first stays
        start += size
    assert digests.find(rows[0].tobytes()) == (0, 0)
    assert digests.find(rows[999].tobytes()) == (6, 90)
    assert digests.find(rows[302].tobytes()) == (3, 0)
    assert digests.find(bytes(31) + b"x") == (0, 0) or rows[0, 15] != 0
    assert digests.find(b"x" * 32) is None and Digests().find(b"x" * 32) is None
    assert digests.find_all(rows[5:9]).all() and not digests.find_all(rows[5:9] ^ 3).any()


def test_entry_is_what_a_choice_sees(made):
    seen = []
    remove(made, lambda entry: bool(seen.append(entry)))
    assert seen[0].source == "p000.png" and isinstance(seen[0], Entry)
    assert len(seen[0].sha256) == 64


def test_a_build_of_many_parts_opens_few_files(tmp_path, pixel, monkeypatch):
    """A slow build seals thousands of parts; a process may open some hundred files."""
    pictures, opened, most = fill(tmp_path / "pictures", 9), set(), []

    class Watched(writer.Shard):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.add(self)
            most.append(len(opened))

        def close(self):
            super().close()
            opened.discard(self)

    build(pictures, tmp_path / "plain", pixel)
    monkeypatch.setattr(writer, "Shard", Watched)
    monkeypatch.setattr(writer, "PART_ROWS", 1)
    monkeypatch.setattr(writer, "OPEN_PARTS", 2)
    build(pictures, tmp_path / "parts", pixel)
    assert len(most) >= 18 and max(most) <= 3 and not opened
    assert content(tmp_path / "parts") == content(tmp_path / "plain")


def test_a_strange_file_among_the_parts_is_passed_over(tmp_path, pixel):
    parts = tmp_path / "index" / ".build" / "parts"
    parts.mkdir(parents=True)
    (parts / ".DS_Store").write_bytes(b"x")
    assert build(fill(tmp_path / "pictures", 2), tmp_path / "index", pixel).count == 2


def test_ids_beyond_the_rows_are_refused_with_one_shard_and_with_several(
    tmp_path, pixel, monkeypatch
):
    pictures = fill(tmp_path / "pictures", 4)
    for limit in (4, 3):
        monkeypatch.setattr(writer, "ROWS_PER_SHARD", limit)
        build(pictures, tmp_path / f"by{limit}", pixel)
        with Index.open(tmp_path / f"by{limit}") as index:
            assert len(index.shards) == (1 if limit == 4 else 2)
            for wrong in (-1, 4):
                with pytest.raises(IndexError):
                    index.rows(32)[np.array([0, wrong])]


def test_records_from_any_row_on(tmp_path, pixel):
    """Over several shards: as if the others had been passed over."""
    for name, count, first in (("a", 5, 0), ("b", 4, 5)):
        build(fill(tmp_path / name, count, first), tmp_path / f"{name}-index", pixel)
    with Index.combine([Index.open(tmp_path / f"{name}-index") for name in "ab"]) as index:
        assert len(index.shards) == 2
        every = list(index.records())
        assert len(every) == 9
        for start in range(11):
            assert list(index.records(start)) == every[start:]
