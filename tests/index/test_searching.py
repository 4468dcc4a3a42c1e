"""The command search: many pictures in one process, and figures that agree with the verdict."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from PIL import Image, ImageOps

from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.index import Index, build
from amg_core.index.picture import load_picture
from amg_core.index.search import Searcher
from amg_core.similarity.matcher import Matcher
from amg_core.similarity.verdict import verdict
from index_tools import searching
from tests.index.helpers import as_zip, demo_pictures, encoded, fill, options_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    (folder / "set").mkdir()
    demo_pictures(folder / "set", 12)
    build(folder / "set", folder / "index", create("compact"))
    return folder


def answers(capsys, *arguments) -> list[dict]:
    searching.run(options_of(searching, *arguments, "--json"))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_folders_archives_and_stdin_in_one_process(place, tmp_path, capsys, monkeypatch):
    made = fill(tmp_path / "made", 2)
    (made / "bad.png").write_text("no")
    archive = as_zip({"z.png": encoded(3)}, tmp_path / "more")
    single = tmp_path / "one.png"
    single.write_bytes(encoded(4))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{single}\n\n{tmp_path / 'absent.png'}\n"))
    searching.run(options_of(searching, place / "index", made, archive, "-", "--json"))
    printed = capsys.readouterr()
    names = [json.loads(line)["picture"] for line in printed.out.splitlines()]
    assert names == [f"{made}/p000.png", f"{made}/p001.png", f"{archive}/z.png", str(single)]
    assert (
        "NOT compared" in printed.err and "bad.png" in printed.err and "absent.png" in printed.err
    )


def test_the_verdict_is_that_of_similarity_probe(place, capsys):
    source = sorted((place / "set").glob("*.webp"))[0]
    (answer,) = answers(capsys, place / "index", source)
    with Index.open(place / "index") as index:
        matcher = Matcher(Searcher(index), create("compact"))
        (one,) = verdict(matcher, to_tensor(load_picture(source).pixels))
    assert answer["verdict"] == json.loads(json.dumps(one.to_json()))
    assert answer["score"] == one.score and answer["nearest"][0]["similarity"] == one.similarity
    searching.run(options_of(searching, place / "index", source))
    first = capsys.readouterr().out.splitlines()[0]
    assert "likeness 1.00" in first and one.to_json()["words"] in first


def test_a_mirrored_picture_is_as_near_in_the_list_as_in_the_verdict(place, tmp_path, capsys):
    source = sorted((place / "set").glob("*.webp"))[0]
    with Image.open(source) as image:
        ImageOps.mirror(image.convert("RGB")).save(tmp_path / "mirrored.png")
    (answer,) = answers(capsys, place / "index", tmp_path / "mirrored.png")
    assert answer["nearest"][0]["source"] == source.name
    assert answer["nearest"][0]["similarity"] > 0.95
    assert answer["verdict"]["outcome"] == "copy"


@pytest.mark.parametrize("descriptor", ["compact", "pixel"])
def test_the_nearest_is_the_match(tmp_path, descriptor):
    build(fill(tmp_path / "set", 9), tmp_path / "index", create(descriptor))
    with Index.open(tmp_path / "index") as index:
        matcher = Matcher(Searcher(index), create(descriptor))
        picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        found, match = matcher.nearest(picture, 4), matcher.match_pictures(picture)
    assert len(found) == 4 and len({i for i, _ in found}) == 4
    assert found[0] == (int(match.ids[0]), pytest.approx(float(match.similarity[0]), abs=1e-6))
    assert [value for _, value in found] == sorted((v for _, v in found), reverse=True)


def test_another_scale_has_no_verdict(place, capsys):
    source = sorted((place / "set").glob("*.webp"))[0]
    (answer,) = answers(capsys, place / "index", source, "--scale", 16)
    assert answer["verdict"] is None and answer["score"] == pytest.approx(1, abs=1e-3)


def test_mistakes_are_explained(place, tmp_path):
    with pytest.raises(AMGError, match="No picture was given"):
        searching.run(options_of(searching, place / "index"))
    with pytest.raises(AMGError, match="Cannot read"):
        searching.run(options_of(searching, place / "index", tmp_path / "absent.png"))
    with pytest.raises(AMGError, match="No picture could be read"):
        searching.run(
            options_of(searching, place / "index", tmp_path / "a.png", tmp_path / "b.png")
        )


def test_a_long_caption_is_printed_as_one_short_line(tmp_path, capsys):
    pictures = fill(tmp_path / "set", 2)
    for picture in list(pictures.iterdir()):
        picture.with_suffix(".txt").write_text("a fox\n" * 200)
    build(pictures, tmp_path / "index", create("pixel"))
    searching.run(options_of(searching, tmp_path / "index", picture, "-k", "1"))
    line = capsys.readouterr().out.splitlines()[1]
    assert "a fox a fox" in line and line.endswith("…") and len(line) < 200
