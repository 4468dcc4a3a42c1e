"""The command line, run as users run it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from index_tools import cli

ROOT = Path(__file__).parents[2]


def process(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "index_tools", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )


def test_from_a_terminal(tmp_path, pictures):
    (pictures / "p001.txt").write_text("größe", encoding="utf-8")
    (pictures / "bad.png").write_text("no")
    made = process("build", pictures, tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert "5 pictures" in made.stdout and "bad.png: not a picture" in made.stdout
    assert "6/6 pictures" in made.stderr and "left" in made.stderr
    found = process("search", tmp_path / "out", pictures / "p001.png", "-k", 2)
    assert found.returncode == 0, found.stderr
    assert "p001.png  gr\\xf6\\xdfe" in found.stdout.splitlines()[1]
    assert len(found.stdout.splitlines()) == 3
    failed = process("info", tmp_path / "absent")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: There is no index") and failed.stderr.count("\n") == 1


def test_json(tmp_path, pictures, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["build", str(pictures), out, "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["count"] == 5 and built["skipped"] == []
    assert cli.main(["info", out, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["hash"] == built["hash"] and info["descriptor"]["id"] == "pixel"
    picture = str(pictures / "p002.png")
    assert cli.main(["search", out, picture, "-k", "9", "--scale", "16", "--json"]) == 0
    nearest = json.loads(capsys.readouterr().out)["nearest"]
    assert [len(nearest), nearest[0]["source"]] == [5, "p002.png"]
    assert nearest[0]["distance"] < 0.01 < nearest[1]["distance"]


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


@pytest.mark.parametrize("arguments", [[], ["paint"], ["build"], ["search", "a", "b", "-k", "0"]])
def test_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_teaches(capsys):
    for arguments, words in [
        (["--help"], ["my_pictures", "metadata.jsonl", "exit codes"]),
        (["build", "--help"], ["FOLDER", "--descriptor", "replaced in one step"]),
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

    monkeypatch.setattr(cli, "progress_printer", stop)
    assert cli.main(["build", str(pictures), str(made)]) == 130
    assert "unchanged" in capsys.readouterr().err


def test_progress_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    times = iter([0.0, 1.0, 1.05, 4.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(times))
    stream = Terminal()
    show = cli.progress_printer(stream)
    for done in (1, 2, 4):
        show(done, 4, "a")
    parts = [part.rstrip(" ") for part in stream.getvalue().split("\r")]
    assert parts[1] == "1/4 pictures, 1.0/s, 0:03 left" and len(parts) == 3
    assert stream.getvalue().endswith("\n")
    assert cli._clock(3725) == "1:02:05"
