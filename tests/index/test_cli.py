"""The command line, run as users run it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from amg_core.index import Index
from index_tools import cli, terminal
from tests.index.helpers import PATIENCE, ROOT, fill, shard_of

COMMANDS = "build add import remove mute merge weights info search verify export dedup eval".split()


def process(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "index_tools", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )


def test_from_a_terminal(tmp_path, pictures):
    (pictures / "p001.txt").write_text("größe", encoding="utf-8")
    (pictures / "bad.png").write_text("no")
    made = process("build", pictures, tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert "5 pictures" in made.stdout and "bad.png: not a picture" in made.stdout
    assert "6/6 " in made.stderr
    found = process("search", tmp_path / "out", pictures / "p001.png", "-k", 2)
    assert found.returncode == 0, found.stderr
    assert "p001.png  gr\\xf6\\xdfe" in found.stdout.splitlines()[1]
    assert len(found.stdout.splitlines()) == 3 and "likeness 1.00" in found.stdout
    failed = process("info", tmp_path / "absent")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: There is no index") and failed.stderr.count("\n") == 1


def test_json(tmp_path, pictures, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["build", str(pictures), out, "--descriptor", "pixel", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["count"] == 5 and built["skipped"] == []
    assert cli.main(["info", out, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["hash"] == built["hash"] and info["descriptor"]["id"] == "pixel"
    picture = str(pictures / "p002.png")
    assert cli.main(["search", out, picture, "-k", "9", "--scale", "16", "--json"]) == 0
    nearest = json.loads(capsys.readouterr().out)["nearest"]
    assert [len(nearest), nearest[0]["source"]] == [5, "p002.png"]
    assert nearest[0]["similarity"] > -0.01 > nearest[1]["similarity"]


def test_errors_are_one_line(tmp_path, pictures, made, capsys):
    for arguments, word in [
        (["build", str(tmp_path / "absent"), str(tmp_path / "o")], "absent"),
        (["build", str(pictures), str(pictures)], "will not be replaced"),
        (["build", str(pictures), str(tmp_path / "o"), "--device", "warp"], "--device cpu"),
        (["search", str(made), str(tmp_path / "absent.png")], "absent.png"),
        (["search", str(made), str(pictures / "p000.png"), "--scale", "5"], "16, 32"),
        (["info", str(pictures)], "manifest.json"),
    ]:
        assert cli.main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and word in printed.err
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


WRONG = [[], ["paint"], ["build"], ["search", "a", "b", "-k", "0"], ["merge", "a"], ["eval", "x"]]


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_teaches(capsys):
    for arguments, words in [
        (["--help"], ["my_pictures", "metadata.jsonl", "exit codes", *COMMANDS]),
        (["build", "--help"], ["SOURCE", "--descriptor", "continues", "WebDataset"]),
        (["remove", "--help"], ["sha256:HEX", "--picture", "drop.txt"]),
        *(([name, "--help"], ["usage", "--json"]) for name in COMMANDS),
    ]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        printed = capsys.readouterr().out
        assert exit_.value.code == 0 and all(word in printed for word in words)


def test_interrupt(made, pictures, monkeypatch, capsys):
    def stop(stream):
        def show(done, total, source):
            raise KeyboardInterrupt

        return show

    monkeypatch.setattr(terminal, "progress_printer", stop)
    assert cli.main(["build", str(pictures), str(made)]) == 130
    assert "unchanged" in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch):
    times = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(times))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = io.StringIO()
    show = terminal.progress_printer(stream)
    for done in (1, 2, 3, 4):
        show(done, 4, "a")
    assert stream.getvalue() == "2/4 pictures, 0.3/s, 6 s left\n4/4 pictures, 0.5/s, 0 s left\n"


def run(capsys, *arguments, code=0) -> str:
    assert cli.main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def said(capsys, *arguments) -> dict:
    return json.loads(run(capsys, *arguments, "--json"))


def test_a_life_of_an_index(tmp_path, pictures, made, capsys):
    more = fill(tmp_path / "more", 3, first=4)
    added = said(capsys, "add", more, made)
    assert (added["count"], added["embedded"], added["reused"]) == (7, 2, 1)
    out = run(capsys, "remove", made, "p00[01].png", "--dry-run")
    assert out.splitlines() == ["p000.png", "p001.png", "2 files would be removed"]
    assert said(capsys, "remove", made, "p00[01].png")["count"] == 2
    (tmp_path / "drop.txt").write_text("p002.png\n\ntypo.png\n")
    assert cli.main(["remove", str(made), "--from", str(tmp_path / "drop.txt")]) == 0
    printed = capsys.readouterr()
    assert "1 removed" in printed.out and printed.err == "not in the index: typo.png\n"
    assert "Names in it are like" in fails(capsys, "remove", made, "absent*", code=3)
    assert "No picture was named" in fails(capsys, "remove", made)
    picture = pictures / "p003.png"
    assert said(capsys, "mute", made, "--picture", picture, "--reason", "mine")["count"] == 1
    muted = said(capsys, "mute", made)["muted"]
    assert [(one["source"], one["reason"]) for one in muted] == [("p003.png", "mine")]
    nearest = said(capsys, "search", made, picture)["nearest"]
    assert "p003.png" not in [one["source"] for one in nearest]
    digest = muted[0]["sha256"]
    assert said(capsys, "mute", made, f"sha256:{digest}", "--undo")["count"] == 1
    assert said(capsys, "search", made, picture)["nearest"][0]["source"] == "p003.png"
    info = said(capsys, "info", made)
    assert (info["count"], info["muted"]) == (4, 0)
    assert said(capsys, "verify", made)["sound"] is True


def fails(capsys, *arguments, code=1) -> str:
    assert cli.main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().err


def test_merge_search_sheet_and_export(tmp_path, pictures, made, capsys):
    (pictures / "p002.txt").write_text("größe")
    other, both = tmp_path / "other", tmp_path / "both"
    assert (
        said(
            capsys,
            "build",
            pictures,
            fill(tmp_path / "x", 2, first=30),
            other,
            "--descriptor",
            "pixel",
        )["count"]
        == 7
    )
    assert said(capsys, "merge", made, other, both)["count"] == 7
    picture = pictures / "p002.png"
    sheet = tmp_path / "found.png"
    run(capsys, "search", made, other, picture, "-k", 4, "--sheet", sheet)
    with Image.open(sheet) as image:
        assert image.width > 300 and len(image.getcolors(1 << 20)) > 50
    assert "give a .png" in fails(capsys, "search", both, picture, "--sheet", tmp_path / "no/x.png")
    out = tmp_path / "export"
    run(capsys, "export", other, out, "--metadata", "jsonl", "--thumbnails")
    rows = np.load(out / "img_emb" / "img_emb_0.npy")
    lines = (out / "metadata" / "metadata_0.jsonl").read_text(encoding="utf-8").splitlines()
    table = [json.loads(line) for line in lines]
    with Index.open(other) as index:
        np.testing.assert_array_equal(rows, index.rows(32))
        assert [row["image_path"] for row in table] == [r.source for r in index.records()]
    assert {row["caption"] for row in table} == {"", "größe"}
    assert len(list((out / "thumbnails").iterdir())) == 7
    assert "not empty" in fails(capsys, "export", other, out)
    pytest.importorskip("pyarrow")
    run(capsys, "export", other, tmp_path / "parquet")
    assert (tmp_path / "parquet" / "metadata" / "metadata_0.parquet").stat().st_size > 500


def test_verify_finds_damage_and_compares_engines(made, capsys):
    pytest.importorskip("faiss")
    figures = said(capsys, "verify", made, "--search", 20)["search"]["pq4"]
    assert figures["recall@1"] == 1 and figures["loss"] == 0
    path = shard_of(made) / "meta.sqlite"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    assert "meta.sqlite was altered" in fails(capsys, "verify", made)


def test_merge_and_import_replace_no_index_unasked(tmp_path, made, capsys):
    other = tmp_path / "other"
    assert cli.main(["build", str(fill(tmp_path / "more", 2, first=50)), str(other)]) == 0
    before = (other / "manifest.json").read_bytes()
    for command in ("merge", "import"):
        assert cli.main([command, str(made), str(other)]) == 1
        assert "--replace" in capsys.readouterr().err
    assert (other / "manifest.json").read_bytes() == before
    assert cli.main(["merge", str(made), str(other), "--replace"]) == 0
    with Index.open(other) as index, Index.open(made) as original:
        assert list(index.records()) == list(original.records())


def test_a_build_from_less_says_so(tmp_path, pictures, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["build", str(pictures), out]) == 0
    assert "before" not in capsys.readouterr().out
    assert cli.main(["build", str(fill(tmp_path / "few", 1)), out]) == 0
    assert "there were 5 pictures before" in capsys.readouterr().out


def test_names_are_names_and_misses_are_explained(tmp_path, capsys):
    pictures, out = fill(tmp_path / "in", 3), str(tmp_path / "out")
    (pictures / "p001.png").rename(pictures / "fox [1].png")
    assert cli.main(["build", str(pictures), out]) == 0
    assert cli.main(["remove", out, "nothing"]) == 3
    assert "'fox [1].png'" in capsys.readouterr().err
    assert cli.main(["mute", out, "fox*", "--undo"]) == 3
    assert "No muted picture" in capsys.readouterr().err
    assert cli.main(["remove", out, "--from", str(tmp_path / "none.txt")]) == 1
    assert "none.txt (No such file" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6\xdfe.png")
    assert cli.main(["remove", out, "--from", str(tmp_path / "latin.txt")]) == 1
    assert "UTF-8" in capsys.readouterr().err
    assert cli.main(["remove", out, "fox [1].png"]) == 0
    with Index.open(out) as index:
        assert [record.source for record in index.records()] == ["p000.png", "p002.png"]


def test_two_stage_search(tmp_path, pictures, capsys):
    transformers = pytest.importorskip("transformers")
    save = pytest.importorskip("safetensors.torch").save_file
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.CLIPVisionConfig(
        **sizes, num_attention_heads=1, image_size=32, patch_size=16, projection_dim=16
    )
    network = transformers.CLIPVisionModelWithProjection(config)
    weights = tmp_path / "clip.safetensors"
    save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, weights)
    out = tmp_path / "clip index"
    run(capsys, "build", pictures, out, "--descriptor", "clip", "--weights", weights)
    picture = pictures / "p003.png"
    (pictures / "p001.png").unlink()
    search = ["search", out, picture, "--weights", weights, "--rerank", "pixel"]
    found = said(capsys, *search, "--pictures", pictures)
    assert found["nearest"][0]["source"] == "p003.png"
    assert found["nearest"][0]["similarity"] > -0.01 > found["nearest"][1]["similarity"]
    assert (len(found["nearest"]), found["not_compared"]) == (4, 1)
    assert "None of the 5 candidates" in fails(capsys, *search, "--pictures", tmp_path)
