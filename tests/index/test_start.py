"""How the command line starts: without packages, on a busy machine, for a shell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from index_tools import cli, terminal
from tests.index.helpers import PATIENCE, ROOT

BARE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from index_tools.cli import main; sys.exit(main())"


def bare(*arguments: str) -> subprocess.CompletedProcess:
    """The command line in a Python without any package, started in another folder."""
    command = [sys.executable, "-I", "-S", "-c", BARE, str(ROOT), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=PATIENCE)


def test_help_loads_no_package():
    shown = bare("--help")
    assert shown.returncode == 0, shown.stderr
    assert all(command.line in shown.stdout for command in terminal.COMMANDS.values())
    wrong = bare("paint")
    assert wrong.returncode == 2 and "invalid choice: 'paint'" in wrong.stderr


def test_missing_packages_are_named():
    for arguments in (["build", "--help"], ["info", "x"]):
        failed = bare(*arguments)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
        assert "pip install numpy pillow safetensors torch" in failed.stderr


def test_exit_codes_are_one_table(tmp_path, made, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for code, meaning in cli.EXITS.items():
        assert f"{code:3}  {meaning}" in printed
    none = str(made)
    for arguments, code in [
        (["info", none], cli.DONE),
        (["info", str(tmp_path / "absent")], cli.FAILED),
        (["remove", none, "absent"], cli.UNMATCHED),
        (["remove", none, "absent", "--dry-run"], cli.UNMATCHED),
        (["remove", none, "absent", "--dry-run", "--json"], cli.UNMATCHED),
        (["mute", none, "absent"], cli.UNMATCHED),
        (["mute", none, "absent", "--dry-run"], cli.UNMATCHED),
        (["mute", none, "*", "--undo"], cli.UNMATCHED),
        (["mute", none, "*", "--undo", "--dry-run"], cli.UNMATCHED),
    ]:
        assert cli.main(arguments) == code, arguments
        printed = capsys.readouterr()
        assert (printed.out == "") == (code != cli.DONE)
    assert cli.main(["mute", none, "p000.png", "p001.png"]) == 0
    assert cli.main(["mute", none, "p001.png", "p002.png", "--undo", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("p001.png\n1 files would be guarded again\n")


def test_every_option_has_help():
    for name, parser in parsers().items():
        for action in parser._actions:
            assert action.help, f"{name} {action.dest}"


def parsers() -> dict:
    (commands,) = (
        action.choices
        for action in cli.parser_of(terminal.COMMANDS)._actions
        if action.dest != "help" and action.choices
    )
    assert set(commands) == set(terminal.COMMANDS)
    return commands


def test_completion(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "amg-index" in script and "dry" in script and "dedup" in script
    if os.path.exists("/bin/bash"):
        cli.main(["completion", "bash"])
        script = capsys.readouterr().out
        typed = (
            'COMP_WORDS=(amg-index mute x --un) COMP_CWORD=3; _shtab_amg_index; echo "$COMPREPLY"'
        )
        done = subprocess.run(
            ["/bin/bash", "-c", f"{script}\n{typed}"], capture_output=True, text=True
        )
        assert done.stdout.strip() == "--undo", done.stderr


@pytest.mark.parametrize(("busy", "threads"), [(0.2, None), (2.6, "5"), (40.0, "1")])
def test_a_busy_machine_keeps_its_cores(monkeypatch, busy, threads):
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "cores", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (busy, 0.0, 0.0), raising=False)
    cli._share_cores()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cli._share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_settings_of_another_program_stay(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (40.0, 0.0, 0.0), raising=False)
    assert "torch" in sys.modules
    cli._share_cores()
    assert "OMP_NUM_THREADS" not in os.environ


def test_without_a_load_all_cores_are_free(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cli.free_cores() == os.cpu_count()
