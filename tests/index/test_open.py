"""Whatever is wrong with an index, opening it says what and names the next step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import sqlite3

import numpy as np
import pytest

from amg_core.descriptors import create
from amg_core.descriptors.base import DescriptorSpec
from amg_core.errors import AMGError
from amg_core.index import Index, build, mute
from amg_core.index.reader import _Verified
from tests.index.helpers import fill, reseal, shard_of

NAMES = ["manifest.json", "meta.sqlite", "sha256.npy", "rows.16.f16.npy", "rows.32.f16.npy"]
STEP = "rebuild|build|give|update the plugin|check"


def file_of(index, name):
    return (index if name == "manifest.json" else shard_of(index)) / name


def refused(path, *words: str, spec=None) -> str:
    """The message of the AMGError that opening must raise; it holds `words` and a next step."""
    with pytest.raises(AMGError, match=STEP) as caught:
        Index.open(path, spec).close()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    return message


def test_absent_places(tmp_path, pictures):
    refused(tmp_path / "nowhere", "nowhere", "There is no index", "build one")
    refused(pictures, "pictures", "manifest.json is missing")
    refused(pictures / "p000.png", "p000.png", "is a file")


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(made, name):
    file_of(made, name).unlink()
    refused(made, name, "missing")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_truncated_file(made, name, keep):
    data = file_of(made, name).read_bytes()
    file_of(made, name).write_bytes(data[: keep if keep < 0 else int(len(data) * keep)])
    refused(made, name, "" if name == "manifest.json" else "truncated")


@pytest.mark.parametrize("name", NAMES)
def test_flipped_bytes(made, name):
    path = file_of(made, name)
    data = path.read_bytes()
    rng = random.Random(name)
    for place in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(30))}:
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        refused(made, name)
    path.write_bytes(data + b"x")
    refused(made, name)
    path.write_bytes(data)
    Index.open(made).close()


def test_wrong_descriptor(made, pixel):
    other = DescriptorSpec("sscd_disc_mixup", "cosine", "imagenet/1", (32, 288), "ab" * 32)
    message = refused(made, "pixel (rgb01", "sscd_disc_mixup", "abababababab", spec=other)
    assert "rebuild the index" in message and "choose descriptor pixel" in message
    refused(made, "rgb01-square-area/2", spec=dataclasses.replace(
        pixel.spec, preprocessing="rgb01-square-area/2"))  # fmt: skip
    with Index.open(made, pixel.spec) as index:
        index.check_descriptor(pixel.spec)
        with pytest.raises(AMGError, match="sscd_disc_mixup"):
            index.check_descriptor(other)


@pytest.mark.parametrize(
    ("version", "step"), [(1, "build the index again, in a new folder"), (3, "update the plugin")]
)
def test_another_version_of_the_format(made, version, step):
    path = made / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', f'"version": {version}'))
    assert refused(made, f"version {version}", step).count(". ") == 0  # one sentence


def test_files_that_fit_their_hashes_but_not_the_manifest(made, tmp_path):
    """A manifest and hashes that agree do not make a file sound."""

    def case(name, change):
        copy = tmp_path / name
        shutil.copytree(made, copy)
        change(copy)
        return copy

    def save(shape, dtype="<f2", value=0.5, order="C", allow=None):
        def change(copy):
            array = np.full(shape, value, dtype, order=order)
            np.save(shard_of(copy) / "rows.16.f16.npy", array, allow_pickle=True)
            reseal(copy)

        return change

    def sql(statement):
        def change(copy):
            with sqlite3.connect(shard_of(copy) / "meta.sqlite") as database:
                database.execute(statement)
            database.close()
            reseal(copy)

        return change

    def not_a_database(copy):
        (shard_of(copy) / "meta.sqlite").write_bytes(b"no database at all" * 100)
        reseal(copy)

    def few_hashes(copy):
        np.save(shard_of(copy) / "sha256.npy", np.zeros((4, 32), np.uint8))
        reseal(copy)

    for name, change, word in [
        ("few", save((4, 768)), "rows.16"),
        ("wide", save((5, 769)), "rows.16"),
        ("f4", save((5, 384), "<f4"), "rows.16"),
        ("order", save((5, 768), order="F"), "rows.16"),
        ("flat", save(3840), "rows.16"),
        ("pickle", save((5, 768), object), "rows.16"),
        ("nan", save((5, 768), value=np.nan), "not finite"),
        ("inf", save((5, 768), value=-np.inf), "not finite"),
        ("count", lambda copy: reseal(copy, count=6), "rows.16"),
        ("row", sql("DELETE FROM pictures WHERE id = 4"), "meta.sqlite"),
        ("thumbs", sql("DROP TABLE thumbnails"), "meta.sqlite"),
        ("hashes", few_hashes, "sha256.npy"),
        ("id", sql("UPDATE pictures SET id = 9 WHERE id = 4"), "meta.sqlite"),
        ("table", sql("DROP TABLE pictures"), "meta.sqlite"),
        ("column", sql("ALTER TABLE pictures RENAME caption TO text"), "meta.sqlite"),
        ("nodb", not_a_database, "meta.sqlite"),
    ]:
        refused(case(name, change), word)
    blob = case("blob", sql("UPDATE thumbnails SET data = x'00' WHERE id = 0"))
    with Index.open(blob) as index, pytest.raises(AMGError, match=r"Thumbnail 0"):
        index.thumbnail(0)


def seal(tree) -> bytes:
    """A manifest with a right checksum, whatever is in it."""
    body = json.dumps(tree, indent=1) + "\n"
    tree = tree | {"checksum": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(tree, indent=1) + "\n").encode()


def test_garbage_manifest(made):
    path = made / "manifest.json"
    for data in (
        b"", b"\0" * 9, b"null", b"[]", b"{}", b'"x"', b"NaN", b"\xff\xfe", b"[" * 100_000,
        b'{"format": "amg-index"}', b'{"format": "amg-index", "version": 2}',
        b'{"format": "amg-index", "version": true}', b'{"version": ' + b"9" * 5000 + b"}",
    ):  # fmt: skip
        path.write_bytes(data)
        refused(made, "manifest.json")


def test_fuzzed_manifest_with_a_right_checksum(made):
    path = made / "manifest.json"
    good = json.loads(path.read_text())
    del good["checksum"]
    path.write_bytes(seal(good))
    Index.open(made).close()
    values = [
        None, True, 0, -1, 1.5, 10**30, "", "x", "../x", [], {}, [1], {"a": 1}, float("nan"),
        float("inf"), "\ud800",
    ]  # fmt: skip
    rng = random.Random(5)

    def places(tree, at=()):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield (*at, key)
            if isinstance(value, (dict, list)):
                yield from places(value, (*at, key))

    for at in places(good):
        for value in [*rng.sample(values, 4), "delete"]:
            tree = json.loads(json.dumps(good))
            spot = tree
            for key in at[:-1]:
                spot = spot[key]
            if value == "delete":
                del spot[at[-1]]
            else:
                spot[at[-1]] = value
            path.write_bytes(seal(tree))
            free_text = at in [("created",), ("descriptor", "id"), ("descriptor", "preprocessing")]
            free_text |= at == ("descriptor", "weights_sha256")
            if (at, value) in ((("muted",), {}), (("captions",), "delete")):
                continue  # no picture is muted; from before there was a choice
            if free_text and isinstance(value, str) and value != "delete":
                continue
            refused(made)


def test_manifest_extra_keys_are_sound(made):
    path = made / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["checksum"]
    path.write_bytes(seal(tree | {"note": "from a later version"}))
    Index.open(made).close()


def test_unreadable_manifest(made):
    (made / "manifest.json").unlink()
    (made / "manifest.json").mkdir()
    refused(made, "manifest.json cannot be read", "permissions")


def test_a_damaged_file_whose_time_was_put_back(made, monkeypatch):
    """Found when opened, for the system keeps the time of the change; and when verified."""
    monkeypatch.setattr(_Verified, "MOMENT", -(10**18))  # as if all had been written long ago
    path = shard_of(made) / "rows.16.f16.npy"
    Index.open(made).close()
    stamps = (made / "cache" / "verified.json").read_text()
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    refused(made, "rows.16")
    found = json.loads(stamps)  # even where a stamp says it is sound
    state = path.stat()
    found[f"shards/{path.parent.name}/{path.name}"][:4] = [
        state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
    ]  # fmt: skip
    (made / "cache" / "verified.json").write_text(json.dumps(found))
    with Index.open(made) as index, pytest.raises(AMGError, match=r"rows\.16.*altered"):
        index.verify()
    (made / "cache" / "verified.json").write_text("[broken")
    refused(made, "rows.16")


def test_several_indexes_as_one(tmp_path, pixel, made):
    more = fill(tmp_path / "more", 3, first=3)
    shutil.copy(more / "p004.png", more / "z.png")
    build(more, tmp_path / "other", pixel)
    mute(tmp_path / "other", lambda entry: entry.source == "p004.png", "mine")
    with Index.combine([Index.open(made), Index.open(tmp_path / "other")]) as both:
        assert both.count == 8 and both.name == "index + other" and len(both.members) == 2
        assert [r.source for r in both.records()] == [
            f"p00{i}.png" for i in [0, 1, 2, 3, 4, 3, 4, 5]
        ]
        assert both.muted == {4: "mine", 6: "mine"}  # the same picture, in both
        assert [(alias.id, alias.source) for alias in both.aliases()] == [(6, "z.png")]
        rows = both.rows(16)
        assert rows.shape == (8, 768) and len(rows) == 8
        np.testing.assert_array_equal(rows[np.array([7, 0, 5])], np.asarray(rows)[[7, 0, 5]])
        np.testing.assert_array_equal(rows[3:7], np.asarray(rows)[3:7])
        assert both.thumbnail(7).size == (40, 30)
    lone = Index.open(made)
    assert Index.combine([lone]) is lone
    lone.close()
    odd = tmp_path / "odd"
    build(tmp_path / "more", odd, create("pixel", scales=(16,)))
    with Index.open(made) as a, Index.open(odd) as b, pytest.raises(AMGError, match="scales 16"):
        Index.combine([a, b])
