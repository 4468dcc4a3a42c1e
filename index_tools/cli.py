"""The command line for indexes. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from amg_core.errors import AMGError

from . import terminal

ABOUT = """\
An index holds the pictures to stay away from. Make one from a folder of pictures, then choose it in
the AMG nodes."""

STEPS = """\
a first index, step by step:
  %(prog)s build  my_pictures  my_index
  %(prog)s info   my_index
  %(prog)s search my_index  some_picture.png  --sheet found.png

before a LoRA training: which pictures are duplicates, and which to drop
  %(prog)s dedup  my_index  --out duplicates

after generating: how close are my pictures to the training set?
  %(prog)s eval   my_outputs  --index my_index  --out report

captions (used to steer away from a picture's prompt; best the prompts it was trained with):
  a .txt beside the picture, or metadata.jsonl (file_name, text), or a .csv (file_name, text)

exit codes, the same for every command:
{exits}

cores: a command leaves those alone that other programs kept busy in the last minute. OMP_NUM_THREADS
sets another number."""

DONE, FAILED, WRONG, UNMATCHED, INTERRUPTED = 0, 1, 2, terminal.UNMATCHED, 130
EXITS = {
    DONE: "done",
    FAILED: "error: a line on stderr says what to do",
    WRONG: "wrong command line",
    UNMATCHED: "no picture matches the choice, so nothing was changed",
    INTERRUPTED: "interrupted; the same command continues",
}

SEARCH = """\
Find the pictures of one or more indexes that are nearest to a picture, and say whether it is a copy,
by the same two checks as the node Similarity Probe."""

DEDUP = """\
Find pictures of an index that are copies of each other, and list, link, copy or move what to keep.
Nothing is deleted. A model memorises duplicates first (Somepalli et al. 2023)."""

EVAL = """\
Measure how close generated pictures are to an index, with the figures of the AMG paper, as a table,
JSON or an HTML page."""

SINGLE = {  # modules of one command
    "searching": ("search", SEARCH),
    "dedup": ("dedup", DEDUP),
    "evaluate": ("eval", EVAL),
}

# Packages that come with every host, and that pip does not install with this one.
PACKAGES = {"numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "torch": "torch"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code. argparse itself exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may have letters that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    _open_many_files()
    _share_cores()
    try:
        options = _options(sys.argv[1:] if arguments is None else arguments)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # warnings of decoders about odd files, which are reported anyway
            code = options.run(options)
        sys.stdout.flush()
        return code or DONE
    except AMGError as error:
        terminal.close_bars()
        print(f"error: {error}", file=sys.stderr)
        return UNMATCHED if isinstance(error, terminal.Unmatched) else FAILED
    except KeyboardInterrupt:
        terminal.close_bars()
        print(
            "interrupted; an existing index is unchanged, and the same command continues here",
            file=sys.stderr,
        )
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        detail = " ".join(str(error).split())
        print(f"error: unexpected {type(error).__name__}: {detail}", file=sys.stderr)
        return FAILED


def _open_many_files() -> None:
    """Raise the limit of open files. A shard has several files, and there can be hundreds of shards."""
    if sys.platform != "win32":  # there is no such limit
        import resource

        with suppress(OSError, ValueError):
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _share_cores() -> None:
    """On a busy machine, compute only on the cores that are free, and never wait for others by spinning.

    Libraries read these settings when they are loaded. So nothing happens in a process that has torch
    already, whose settings belong to somebody else. The user's own settings stay.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    free = free_cores()
    if free < cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(free))


def cores() -> int:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # type: ignore[attr-defined, unused-ignore]
    except AttributeError:
        return os.cpu_count() or 1


def free_cores() -> int:
    """The cores that are left by the programs that ran in the last minute, at least 1.

    Windows does not report these, so there it is `cores`.
    """
    try:
        busy = os.getloadavg()[0]
    except (AttributeError, OSError):
        busy = 0.0
    return max(1, cores() - round(busy))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    chosen = next((word for word in arguments if word in terminal.COMMANDS), None)
    if chosen is not None:
        _demand_packages()
    return parser_of([] if chosen is None else [chosen]).parse_args(arguments)


def _demand_packages() -> None:
    """AMGError if a package is missing that every command needs."""
    if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
        raise AMGError(
            f"{' and '.join(missing)} cannot be found by {sys.executable}: install amg-index into the "
            f"Python of ComfyUI, which has them, or run pip install {' '.join(missing)} (for a graphics "
            f"card, torch first, as https://pytorch.org says)."
        )


def parser_of(loaded: Collection[str], program: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the commands `loaded`. Modules of no such command stay unloaded."""
    exits = "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXITS.items())
    parser = argparse.ArgumentParser(
        prog=program or _name(),
        description=ABOUT,
        epilog=STEPS.format(exits=exits),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    modules = {terminal.COMMANDS[name].module for name in loaded}
    for name, command in terminal.COMMANDS.items():
        if command.module not in modules:
            terminal.add_command(commands, name)
    for name in sorted(modules):
        module = import_module(f".{name}", __package__)
        if name in SINGLE:
            command_name, about = SINGLE[name]
            single = terminal.add_command(commands, command_name, description=about)
            module.add_arguments(single)
            single.set_defaults(run=module.run)
        else:
            module.register(commands)
    return parser


def _name() -> str:
    """How this program was started."""
    return "amg-index" if Path(sys.argv[0]).stem == "amg-index" else "python -m index_tools"
