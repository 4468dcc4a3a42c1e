"""The command that prints a shell's completion script: completion."""

from __future__ import annotations

import argparse

from amg_core.optional import needed

from . import terminal

ABOUT = """\
Print a script with which a shell completes the commands and options of amg-index. It holds all words
itself, so completing starts no Python. It needs the package shtab, but only for printing."""

STEPS = """\
bash: amg-index completion bash > ~/.local/share/bash-completion/completions/amg-index
zsh:  amg-index completion zsh > _amg-index, in a folder of $fpath"""


def register(commands: terminal.Commands) -> None:
    parser = terminal.add_command(
        commands, "completion", description=ABOUT, epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    parser.set_defaults(run=_print)


def _print(options: argparse.Namespace) -> None:
    from .cli import parser_of

    shtab = needed("shtab", "The script", "pip install shtab")
    print(shtab.complete(parser_of(terminal.COMMANDS, "amg-index"), shell=options.shell))
