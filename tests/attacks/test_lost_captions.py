"""A caption is found, or the build says why it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amg_core.index import Index, build
from amg_core.index.sources import open_source
from index_tools import cli
from tests.index.helpers import as_folder, as_tar, as_zip, encoded, fill

HEADER = "file_name;text\n"


def captions(source) -> dict[str, str]:
    return {item.source: item.caption for item in source}


@pytest.mark.parametrize("form", [as_folder, as_zip, as_tar])
@pytest.mark.parametrize("name", ["photo.TXT", "photo.png.txt", "photo.PNG.Caption", "photo.Json"])
def test_a_file_beside_it_in_another_spelling(tmp_path, form, name):
    text = b'{"Text": "a fox"}' if name.endswith("Json") else b"a fox"
    source = open_source(form({"photo.png": encoded(1), name: text}, tmp_path / "given"))
    assert captions(source) == {"photo.png": "a fox"} and source.notes == []


@pytest.mark.parametrize("form", [as_folder, as_zip])
def test_a_stem_in_another_case(tmp_path, form):
    files = {"b/photo.png": encoded(1), "b/PHOTO.TXT": b"a fox", "MetaData.JSONL": b""}
    assert captions(open_source(form(files, tmp_path / "given"))) == {"b/photo.png": "a fox"}


@pytest.mark.parametrize("form", [as_folder, as_zip])
def test_the_same_spelling_wins(tmp_path, form):
    if (tmp_path / "TMP").exists() or (form is as_folder and _folds(tmp_path)):
        pytest.skip("the file system knows no case")
    files = {"photo.png": encoded(1), "PHOTO.txt": b"upper", "photo.txt": b"lower",
             "photo.png.txt": b"both"}  # fmt: skip
    assert captions(open_source(form(files, tmp_path / "given"))) == {"photo.png": "lower"}


def _folds(folder: Path) -> bool:
    (folder / "case").write_text("")
    return (folder / "CASE").exists()


@pytest.mark.parametrize("first", ["sep=;\n", "SEP=;\r\n", '"sep=;"\n', "\ufeffsep=;\n"])
@pytest.mark.parametrize("form", [as_folder, as_zip])
def test_a_table_from_excel(tmp_path, form, first):
    table = (first + HEADER + "photo.png;a fox, a dog\n").encode()
    source = open_source(form({"photo.png": encoded(1), "t.csv": table}, tmp_path / "given"))
    assert captions(source) == {"photo.png": "a fox, a dog"} and source.notes == []


def test_a_list_from_excel(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "list.csv").write_text("sep=|\nfile_name|text\np000.png|a fox; a dog\n")
    assert captions(open_source(tmp_path / "list.csv")) == {"p000.png": "a fox; a dog"}


@pytest.mark.parametrize("form", [as_folder, as_zip])
def test_names_in_a_table_in_another_case(tmp_path, form):
    table = (HEADER + "A/PHOTO.PNG;a fox\n").encode()
    files = {"a/Photo.png": encoded(1), "t.CSV": table}
    assert captions(open_source(form(files, tmp_path / "given"))) == {"a/Photo.png": "a fox"}


@pytest.mark.parametrize("form", [as_folder, as_zip])
@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (
            "t.csv",
            b"picture id;words\n1;a fox\n",
            "no column that names pictures.*picture id, words",
        ),
        ("t.csv", b"file_name;beschreibung\nphoto.png;Fuchs\n", "has no captions.*beschreibung"),
        ("t.csv", b"file_name;text\nx/photo.png;a fox\n", "names 1 files.*x/photo.png.*relative"),
        ("metadata.jsonl", b'{"id": 1, "text": "a fox"}\n', "no column that names pictures"),
        ("metadata.jsonl", b'{"file_name": "other.png", "text": "a"}\n', "names 1 files"),
        ("photo_caption.txt", b"a fox", "1 caption file beside no picture.*photo_caption.txt"),
        ("photo.txt", b"  \n", "1 caption file without words.*photo.txt"),
        ("photo.json", b'{"words": "a fox"}', "1 caption file without words.*photo.json"),
    ],
)
def test_why_there_is_no_caption(tmp_path, form, name, data, says):
    source = open_source(form({"photo.png": encoded(1), name: data}, tmp_path / "given"))
    assert captions(source) == {"photo.png": ""}
    (note,) = source.notes
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(note)


def test_tables_of_other_matters_are_no_trouble_where_nothing_is_missing(tmp_path):
    files = {"photo.png": encoded(1), "photo.txt": b"a fox", "styles.csv": b"name,prompt\nx,y\n",
             "README.txt": b"read me"}  # fmt: skip
    source = open_source(as_folder(files, tmp_path / "given"))
    assert captions(source) == {"photo.png": "a fox"} and source.notes == []


def test_a_list_without_captions_says_so(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "list.csv").write_text("file_name,beschreibung\np000.png,Fuchs\np001.png,Hund\n")
    source = open_source(tmp_path / "list.csv")
    assert captions(source) == {"p000.png": "", "p001.png": ""}
    assert "has no captions (it has: file_name, beschreibung)" in source.notes[0]


def test_a_build_ends_by_saying_how_many(tmp_path, pixel, capsys):
    folder = fill(tmp_path / "in", 3)
    (folder / "P001.TXT").write_text("a fox")
    (folder / "notes.txt").write_text("mine")
    report = build(folder, tmp_path / "out", pixel)
    assert (report.captioned, report.files) == (1, 3)
    with Index.open(tmp_path / "out") as index:
        assert index.caption(1) == "a fox"
    given = ["build", str(folder), str(tmp_path / "out"), "--descriptor", "pixel"]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert (
        "1 of 3 with a caption\n" in printed
        and "beside no picture of that name (notes.txt)" in printed
    )
    assert cli.main([*given, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["captioned"], written["files"]) == (1, 3)
    (folder / "notes.txt").unlink()
    assert cli.main(given) == 0  # nothing to complain of: where captions are looked for
    assert "1 of 3 with a caption (see docs/sources.md)\n" in capsys.readouterr().out
