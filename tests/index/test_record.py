"""The commands for records: write, verify, decide, sheet."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from amg_core.descriptors import create
from amg_core.index import build
from amg_core.record import stored
from index_tools.cli import main
from tests.index.helpers import encoded, fill, paint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An index of 12 pictures, and a folder with a copy, two new pictures and a broken one."""
    root = tmp_path_factory.mktemp("records")
    (fill(root / "train", 12) / "p003.txt").write_text('<b>the "hero"</b>')
    build(root / "train", root / "index", create("pixel"))
    fill(root / "made", 2, first=500, prefix="new")
    (root / "made" / "sub").mkdir()
    paint(3).save(root / "made" / "sub" / "copy.jpg", quality=95)
    (root / "made" / "broken.png").write_bytes(encoded(1)[:200])
    return root


@pytest.fixture
def place(source, tmp_path) -> Path:
    shutil.copytree(source, tmp_path / "x")
    return tmp_path / "x"


@pytest.fixture
def command(place, capsys):
    """`command(*words)` -> (exit code, stdout), with the paths of `place` for MADE and INDEX."""

    def run(*words: str) -> tuple[int, str]:
        paths = {"MADE": str(place / "made"), "INDEX": str(place / "index")}
        code = main(["record", *(paths.get(word, word) for word in words)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    text = path.read_text(encoding="utf-8-sig")
    return {row["picture"]: row for row in csv.DictReader(io.StringIO(text))}


def test_write_and_verify(command, place):
    before = {path: path.read_bytes() for path in (place / "made").rglob("*.[pj]*g")}
    code, said = command("write", "MADE", "--index", "INDEX")
    assert code == 0 and "1 copies (yes), 0 unsure, 2 no copies (no)" in said
    assert "sub/copy.jpg" in said and "NOT checked: broken.png" in said
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((place / "made").rglob("*.amg.json"))) == 3
    code, said = command("verify", "MADE", "--index", "INDEX", "--json")
    found = {Path(one["picture"]).name: one["findings"] for one in json.loads(said)["files"]}
    wrong = {name: [f["what"] for f in each if f["good"] is False] for name, each in found.items()}
    assert code == 1 and wrong.pop("broken.png") == ["picture", "file", "record"]
    assert wrong == {"copy.jpg": [], "new500.png": [], "new501.png": []}
    copy = str(place / "made" / "sub" / "copy.jpg")
    assert command("verify", copy, "--index", "INDEX")[0] == 0
    data = bytearray(Path(copy).read_bytes())
    data[len(data) // 2] ^= 1
    Path(copy).write_bytes(data)
    code, said = command("verify", copy)
    assert code == 1 and "CHANGED" in said and "were not checked again" in said


def test_the_wrong_index(command, place):
    command("write", "MADE", "--index", "INDEX")
    build(fill(place / "others", 5, first=100), place / "other", create("pixel"))
    picture = str(place / "made" / "sub" / "copy.jpg")
    code, said = command("verify", picture, "--index", str(place / "other"))
    assert code == 1 and "another index" in said and "the record says yes" in said


def test_written_once(command, place):
    command("write", "MADE", "--index", "INDEX")
    record = stored.beside(place / "made" / "new500.png")
    first = record.stat().st_mtime_ns
    model = place / "lora.safetensors"
    model.write_bytes(b"weights")
    command("write", "MADE", "--index", "INDEX", "--lora", str(model))
    assert record.stat().st_mtime_ns == first
    command("write", "MADE", "--index", "INDEX", "--lora", str(model), "--again")
    (named,) = json.loads(record.read_text())["models"]
    assert named["kind"] == "loras" and named["sha256"].startswith("9a129038")  # of b"weights"
    command("write", "MADE", "--index", "INDEX", "--privacy", "full")
    assert "p003.png" in stored.beside(place / "made/sub/copy.jpg").read_text()


def test_a_foreign_file_stays(command, place):
    mine = place / "made" / "new500.png.amg.json"
    mine.write_text('{"mine": 1}')
    code, said = command("write", "MADE", "--index", "INDEX")
    assert code == 0 and "NOT checked: new500.png" in said and "2 pictures have a record" in said
    assert mine.read_text() == '{"mine": 1}'


def test_a_decision_is_kept(command, place):
    command("write", "MADE", "--index", "INDEX")
    copy = str(place / "made" / "sub" / "copy.jpg")
    code, said = command("decide", copy, "no", "--by", "Ada", "--note", "our own sketch")
    assert code == 0 and "no, by Ada" in said
    for _ in range(2):
        assert command("sheet", "MADE", "--index", "INDEX")[0] == 0
    row = rows_of(place / "made" / "clearance.csv")["sub/copy.jpg"]
    assert (row["checks say"], row["decision"], row["reviewed by"]) == ("yes", "no", "Ada")
    assert float(row["likeness"]) > 0.9 and row["copy above"] == "0.4" < row["composition"]
    assert row["note"] == "our own sketch" and row["nearest"] == "p003.png"
    page = (place / "made" / "clearance.html").read_text()
    assert "our own sketch" in page and page.count("×") == 1 and "1 of 4" in page
    assert "<b>the" not in page and "&lt;b&gt;the" in page
    assert page.index("sub/copy.jpg") < page.index("broken.png") < page.index("new500.png")
    paint(4).save(copy)
    command("sheet", "MADE", "--index", "INDEX")
    row = rows_of(place / "made" / "clearance.csv")["sub/copy.jpg"]
    assert row["decision"] == "" and "changed after it was checked" in row["reason"]
    assert "changed after Ada decided" in (place / "made" / "clearance.html").read_text()


@pytest.mark.parametrize("mark", [",", ";"])
def test_typed_into_the_spreadsheet(command, place, mark):
    command("write", "MADE", "--index", "INDEX")
    command("sheet", "MADE")
    path = place / "made" / "clearance.csv"

    def type_in(**changes: dict[str, str]) -> None:
        rows = rows_of(path)
        for name, cells in changes.items():
            rows[f"{name}.png"] |= cells
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows["new500.png"].keys(), delimiter=mark)
            table.writeheader()
            table.writerows(rows.values())

    type_in(new500={"decision": "No", "reviewed by": "Ben", "note": "=1+1"})
    code, said = command("sheet", "MADE")
    assert code == 0 and "taken over from clearance.csv: 1 decisions" in said
    row = rows_of(path)["new500.png"]
    assert (row["decision"], row["reviewed by"], row["note"]) == ("no", "Ben", "'=1+1")
    assert "taken over" not in command("sheet", "MADE")[1]
    type_in(new500={"decision": "yes"}, new501={"decision": "no"})
    typed = path.read_bytes()
    code, said = command("sheet", "MADE")
    assert code == 1 and "'reviewed by'" in said and path.read_bytes() == typed
    assert "Ben" in command("verify", str(place / "made" / "new500.png"))[1]


def test_only_a_sheet_is_overwritten(command, place):
    (place / "made" / "clearance.html").write_text("mine")
    code, said = command("sheet", "MADE")
    assert code == 1 and "no clearance sheet" in said
    assert (place / "made" / "clearance.html").read_text() == "mine"
    (place / "out").mkdir()
    (place / "out" / "clearance.csv").write_text("a,b\n1,2\n")
    code, said = command("sheet", "MADE", "--out", str(place / "out"))
    assert code == 1 and "no clearance sheet" in said
    assert command("sheet", "MADE", "--out", str(place / "new"))[0] == 0
    assert "not checked: there is no record" in (place / "new" / "clearance.html").read_text()


def test_a_name_in_the_csv_cannot_leave_the_folder(command, place):
    command("sheet", "MADE")
    path = place / "made" / "clearance.csv"
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    wanted = dict(zip(rows[0], rows[1], strict=True))
    wanted |= {"picture": "../train/p001.png", "decision": "no", "reviewed by": "Eve"}
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([rows[0], [wanted[column] for column in rows[0]]])
    assert command("sheet", "MADE")[0] == 0
    assert not list((place / "train").glob("*.amg-decision.json"))
