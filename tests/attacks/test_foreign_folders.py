"""A change of an index deletes what this program made, and nothing else."""

from __future__ import annotations

import os
import shutil

import pytest

from amg_core.errors import AMGError
from amg_core.index import Index, add, build, merge, mute, remove, unmute
from tests.index.helpers import content, fill, shard_of

links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


def everything(entry) -> bool:
    return True


def first(entry) -> bool:
    return entry.source == "p000.png"


CHANGES = {
    "build": lambda index, pictures, pixel: build(pictures, index, pixel),
    "add": lambda index, pictures, pixel: add(pictures, index, pixel),
    "remove": lambda index, pictures, pixel: remove(index, first),
    "mute": lambda index, pictures, pixel: mute(index, first, "mine"),
    "unmute": lambda index, pictures, pixel: unmute(index, everything),
}


@pytest.fixture(params=CHANGES)
def change(request, made, pixel):
    """A change of an index that really changes it: ``change(index)``."""
    mute(made, lambda entry: entry.source == "p004.png", "before")
    more = fill(made.parent / "more", 3, first=3)
    return lambda index: CHANGES[request.param](index, more, pixel)


def keep(folder):
    """Fill a folder of a person's; the files that must be there afterwards, with their bytes."""
    for name in ("notes.txt", "inner/meta.sqlite", "inner/deep/rows.16.f16.npy", ".hidden"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")
    return tree(folder)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["my-backup", "0123456789abcdef", "new0", "0123456789ABCDEF"])
def test_a_folder_among_the_shards_stays(made, change, name):
    held = keep(made / "shards" / name)
    change(made)
    assert tree(made / "shards" / name) == held
    Index.open(made).close()


def test_folders_and_files_in_the_build_folder_stay(made, change):
    held = keep(made / ".build" / "mine")
    (made / ".build" / "parts").mkdir()
    (made / ".build" / "parts" / "notes.txt").write_text("mine")
    change(made)
    assert tree(made / ".build" / "mine") == held
    assert (made / ".build" / "parts" / "notes.txt").read_text() == "mine"


def test_a_file_of_ours_in_name_only_stays(made, change):
    """A folder that is called as a file of ours, and a link that is."""
    (made.parent / "far").write_text("mine")
    shard = made / "shards" / "0123456789abcdef"
    held = keep(shard / "meta.sqlite")
    if os.name != "nt":
        (shard / "sha256.npy").symlink_to(made.parent / "far")
    change(made)
    assert tree(shard / "meta.sqlite") == held
    assert (made.parent / "far").read_text() == "mine"
    assert os.name == "nt" or (shard / "sha256.npy").is_symlink()


@links
@pytest.mark.parametrize("place", ["shards", ".build", ".build/parts", ".build/shards"])
def test_a_linked_folder_is_refused_and_keeps_its_content(made, change, place):
    elsewhere = made.parent / "disk"
    if place == "shards":
        shutil.move(made / "shards", elsewhere)
    (made / place).parent.mkdir(exist_ok=True)
    held = keep(elsewhere) | tree(elsewhere)
    (made / place).symlink_to(elsewhere)
    before = content(made)
    with pytest.raises(AMGError, match=r"is a link.*put the folder itself"):
        change(made)
    assert tree(elsewhere) == held
    assert content(made) == before  # it is still read


@links
def test_an_archive_does_not_reach_its_neighbour(made, change, pixel):
    """`shards -> ..` of an index from somebody else."""
    neighbour = made.parent / "neighbour"
    build(fill(made.parent / "others", 2, first=20), neighbour, pixel)
    held = content(neighbour)
    shard = shard_of(made)
    shutil.move(shard, made.parent / shard.name)
    (made / "shards").rmdir()
    (made / "shards").symlink_to("..")
    with pytest.raises(AMGError, match="is a link"):
        change(made)
    assert content(neighbour) == held


@links
@pytest.mark.parametrize("name", ["0123456789abcdef", "my-backup"])
def test_a_linked_shard_keeps_its_content(made, change, name):
    held = keep(made.parent / "disk")
    (made / "shards" / name).symlink_to(made.parent / "disk")
    change(made)
    assert tree(made.parent / "disk") == held


@links
def test_a_linked_cache_is_not_written_through(made, tmp_path):
    shutil.rmtree(made / "cache", ignore_errors=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "verified.json").write_text("mine")
    (made / "cache").symlink_to(tmp_path / "disk")
    for path in shard_of(made).iterdir():
        os.utime(path, (10**9, 10**9))
    with Index.open(made) as index:
        assert index.cache is None
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["verified.json"]
    assert (tmp_path / "disk" / "verified.json").read_text() == "mine"


@links
def test_what_is_in_the_way_of_a_shard_is_named(made, pixel):
    """The place of a new shard, taken by something else."""
    (made.parent / "disk").mkdir()
    shard = shard_of(made)
    shutil.rmtree(shard)
    (made.parent / "disk" / "notes.txt").write_text("mine")
    shard.symlink_to(made.parent / "disk")
    with pytest.raises(AMGError, match=f"{shard.name} is in the way.*move it away"):
        build(made.parent / "pictures", made, pixel)
    shard.unlink()
    shard.mkdir()
    (shard / "notes.txt").write_text("mine")
    with pytest.raises(AMGError, match=r"in the way.*notes\.txt"):
        build(made.parent / "pictures", made, pixel)
    (shard / "notes.txt").unlink()
    build(made.parent / "pictures", made, pixel)
    Index.open(made).close()
    assert (made.parent / "disk" / "notes.txt").read_text() == "mine"


def test_a_failed_build_leaves_the_empty_folder_that_was_there(tmp_path, pixel):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_text("no")
    (tmp_path / "chosen").mkdir()
    for out in ("chosen", "fresh"):
        with pytest.raises(AMGError):
            build(tmp_path / "none", tmp_path / out, pixel)
    assert list((tmp_path / "chosen").iterdir()) == []
    assert not (tmp_path / "fresh").exists()


def test_merging_copies_shards_and_not_what_lies_beside_their_files(made, tmp_path, pixel):
    build(fill(tmp_path / "others", 2, first=20), tmp_path / "other", pixel)
    (shard_of(tmp_path / "other") / "private.txt").write_text("mine")
    merge([made, tmp_path / "other"], tmp_path / "both")
    assert not list((tmp_path / "both").rglob("private.txt"))


def test_nothing_of_ours_is_left_after_changes(made, change):
    """The other side: shards that are no longer named do go."""
    change(made)
    with Index.open(made) as index:
        named = {shard.entry.path for shard in index.shards}
    assert {f"shards/{path.name}" for path in (made / "shards").iterdir()} == named
    assert not (made / ".build").exists()


def test_small_changes_keep_what_an_interrupted_build_has_embedded(made, tmp_path, pixel):
    more = fill(tmp_path / "more", 8, first=20)

    def stop(done, total, source):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(more, made, pixel, progress=stop, batch=4)
    mute(made, first, "mine")
    remove(made, lambda entry: entry.source == "p001.png")
    report = add(more, made, pixel, batch=4)
    assert (report.embedded, report.count) == (0, 12)
    assert not (made / ".build").exists()
