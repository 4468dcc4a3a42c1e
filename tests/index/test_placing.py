"""Links, copies and moves of what dedup keeps or drops, and taking that back."""

from __future__ import annotations

import errno
import json
import os

import pytest

from amg_core.errors import AMGError
from amg_core.index import Index, build
from index_tools import dedup, placing
from tests.index.helpers import fill, options_of, paint


@pytest.fixture
def place(tmp_path, pixel):
    """A folder with p000 to p003, of p000 also a small copy; p001 has a caption in a table."""
    folder = fill(tmp_path / "set", 4)
    paint(0).resize((20, 15)).save(folder / "small.png")
    (folder / "sub").mkdir()
    paint(9).save(folder / "sub/deep.png")
    (folder / "p000.txt").write_text("a fox")
    (folder / "small.txt").write_text("fox")
    (folder / "metadata.jsonl").write_text('{"file_name": "p001.png", "text": "a sea"}\n')
    build(folder, tmp_path / "index", pixel)
    return tmp_path


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(place, *arguments) -> None:
    dedup.run(options_of(dedup, place / "index", "--pictures", place / "set", *arguments))


KEPT = {"p000.png", "p000.txt", "p001.png", "p002.png", "p003.png", "sub/deep.png"}


@pytest.mark.parametrize("how", ["--copy", "--link"])
def test_what_stays_is_put_into_a_folder_and_taken_back(place, how, capsys):
    before, out = files(place / "set"), place / "out"
    run(place, how, out)
    assert (
        f"5 pictures {'linked' if how == '--link' else 'copied'} to {out}"
        in capsys.readouterr().out
    )
    made = files(out)
    assert set(made) - {placing.RECORD} == KEPT
    assert all(made[name] == before[name] for name in KEPT)
    same = os.path.samefile(out / "p001.png", place / "set/p001.png")
    assert same == (how == "--link")
    assert not os.path.samefile(out / "p000.txt", place / "set/p000.txt")
    dedup.run(options_of(dedup, "--undo", out))
    assert not out.exists() and files(place / "set") == before


def test_what_is_dropped_is_moved_and_moved_back(place, capsys):
    before, out = files(place / "set"), place / "out"
    run(place, "--move", out)
    assert set(files(out)) == {"small.png", "small.txt", placing.RECORD}
    assert set(files(place / "set")) == set(before) - {"small.png", "small.txt"}
    (place / "set/small.png").write_bytes(b"new")
    dedup.run(options_of(dedup, "--undo", out))
    assert "left alone: small.png" in capsys.readouterr().out
    (place / "set/small.png").unlink()
    dedup.run(options_of(dedup, "--undo", out))
    assert files(place / "set") == before and not out.exists()


def test_undo_removes_nothing_that_was_changed_or_added(place, capsys):
    out = place / "out"
    run(place, "--copy", out)
    (out / "p000.txt").write_text("edited")
    (out / "mine.png").write_bytes(b"mine")
    dedup.run(options_of(dedup, "--undo", out))
    assert "left alone: p000.txt was changed" in capsys.readouterr().out
    assert set(files(out)) == {"p000.txt", "mine.png", placing.RECORD}


def test_kohya_has_repeat_folders_and_every_caption(place):
    run(place, "--copy", place / "out", "--layout", "kohya", "--repeats", 10, "--concept", "fox")
    made = files(place / "out")
    assert {name for name in made if name.endswith(".png")} == {
        f"10_fox/{name}"
        for name in ("p000.png", "p001.png", "p002.png", "p003.png", "sub__deep.png")
    }
    assert made["10_fox/p000.txt"] == b"a fox" and made["10_fox/p001.txt"] == b"a sea\n"


def test_folders_of_repeats_stay(tmp_path, pixel):
    folder = fill(tmp_path / "set/3_cat", 2).parent
    fill(folder, 1, first=5)
    build(folder, tmp_path / "index", pixel)
    run(tmp_path, "--copy", tmp_path / "out", "--layout", "kohya", "--repeats", 2)
    names = {name for name in files(tmp_path / "out") if name.endswith(".png")}
    assert names == {"3_cat/p000.png", "3_cat/p001.png", "2_set/p005.png"}


def test_onetrainer_gets_its_list_of_concepts(place):
    run(place, "--copy", place / "out", "--layout", "onetrainer", "--repeats", 4)
    (concept,) = json.loads((place / "out/concepts.json").read_text())
    assert concept["path"] == str(place / "out/set") and concept["balancing"] == 4
    assert concept["balancing_strategy"] == "REPEATS"
    assert "set/sub__deep.png" in files(place / "out")
    placing.undo(place / "out")
    assert not (place / "out").exists()


def test_a_caption_that_two_pictures_share_is_not_moved_away(tmp_path, pixel):
    folder = fill(tmp_path / "set", 1)
    paint(0).resize((20, 15)).save(folder / "p000.jpg", quality=95)
    (folder / "p000.txt").write_text("both")
    build(folder, tmp_path / "index", pixel)
    run(tmp_path, "--move", tmp_path / "out")
    assert files(tmp_path / "out")["p000.txt"] == b"both"
    assert set(files(folder)) == {"p000.png", "p000.txt"}


def test_changed_and_missing_pictures_are_left_out(place, capsys):
    (place / "set/p002.png").unlink()
    paint(77).save(place / "set/p003.png")
    run(place, "--copy", place / "out")
    printed = capsys.readouterr().out
    assert "p002.png (not in the folder of the pictures)" in printed
    assert "p003.png (changed since the index was built)" in printed
    assert "3 pictures copied" in printed and "p003.png" not in files(place / "out")


def test_what_cannot_be_done_is_explained(place, monkeypatch):
    with pytest.raises(AMGError, match="where the next build would find it"):
        run(place, "--copy", place / "set/out")
    with pytest.raises(AMGError, match="--pictures with the folder"):
        dedup.run(options_of(dedup, place / "index", "--copy", place / "out"))
    with pytest.raises(AMGError, match="nothing was put there"):
        placing.undo(place)
    with pytest.raises(AMGError, match="No index was given"):
        dedup.run(options_of(dedup))

    def other_disk(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    with pytest.raises(AMGError, match="use --copy"):
        run(place, "--link", place / "out")
    placing.undo(place / "out")
    assert not (place / "out").exists()


def test_a_record_cannot_point_outside(place):
    out = place / "out"
    run(place, "--copy", out)
    record = json.loads((out / placing.RECORD).read_text())
    record["files"][0]["name"] = "../set/p000.png"
    (out / placing.RECORD).write_text(json.dumps(record))
    with pytest.raises(AMGError, match="not of this program"):
        placing.undo(out)
    assert (place / "set/p000.png").exists()


def test_decisions_of_the_page_are_used(place, capsys):
    run(place, "--out", place / "lists")
    html = (place / "lists/review.html").read_text()
    assert "data:image/jpeg;base64," in html and "http" not in html.replace("http-equiv", "")
    made = {"made_for": "amg dedup", "pictures": [
        {"index": "", "source": "p000.png", "keep": False},
        {"index": "", "source": "small.png", "keep": True},
        {"index": "", "source": "absent.png", "keep": True},
    ]}  # fmt: skip
    (place / "decisions.json").write_text(json.dumps(made))
    run(place, "--decisions", place / "decisions.json", "--out", place / "again")
    assert (place / "again/drop.txt").read_text() == "p000.png\n"
    assert "in no cluster: absent.png" in capsys.readouterr().out
    (place / "decisions.json").write_text("{}")
    with pytest.raises(AMGError, match="holds no decisions"):
        run(place, "--decisions", place / "decisions.json")


def test_names_and_captions_cannot_end_the_script(place, pixel):
    (place / "set/p000.txt").write_text("</script><script>alert(1)</script>")
    build(place / "set", place / "index", pixel)
    with Index.open(place / "index") as index:
        found = dedup.clusters(index, 0.7)
        dedup.write(place / "lists", found, index, 0.7)
    html = (place / "lists/review.html").read_text()
    assert html.count("</script>") == 2 and "\\u003c/script>" in html
