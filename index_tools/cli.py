"""The command line for indexes. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from amg_core.errors import AMGError

from . import building, changing, dedup, evaluate, reading, searching, terminal

ABOUT = """\
An index holds the pictures to stay away from. Make one from a folder of pictures, then choose it in
the AMG nodes."""

STEPS = """\
a first index, step by step:
  python -m index_tools build  my_pictures  my_index
  python -m index_tools info   my_index
  python -m index_tools search my_index  some_picture.png  --sheet found.png

before a LoRA training: which pictures are duplicates, and which to drop
  python -m index_tools dedup  my_index  --out duplicates

after generating: how close are my pictures to the training set?
  python -m index_tools eval   my_outputs  --index my_index  --out report

captions (used to steer away from a picture's prompt; best the prompts it was trained with):
  a .txt beside the picture, or metadata.jsonl (file_name, text), or a .csv (file_name, text)

exit codes: 0 done, 1 error (one line says why), 2 wrong command line, 130 interrupted"""

SEARCH = """\
Find the pictures of one or more indexes that are nearest to a picture, and say whether it is a copy,
by the same two checks as the node Similarity Probe."""

DEDUP = """\
Find pictures of an index that are copies of each other, and list, link, copy or move what to keep.
Nothing is deleted. A model memorises duplicates first (Somepalli et al. 2023)."""

EVAL = """\
Measure how close generated pictures are to an index, with the figures of the AMG paper, as a table,
JSON or an HTML page."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code. argparse itself exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may have letters that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    _open_many_files()
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # warnings of decoders about odd files, which are reported anyway
            code = options.run(options)
        sys.stdout.flush()
        return code or 0
    except AMGError as error:
        terminal.close_bars()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        terminal.close_bars()
        print(
            "interrupted; an existing index is unchanged, and the same command continues here",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        detail = " ".join(str(error).split())
        print(f"error: unexpected {type(error).__name__}: {detail}", file=sys.stderr)
        return 1


def _open_many_files() -> None:
    """Raise the limit of open files. A shard has several files, and there can be hundreds of shards."""
    if sys.platform != "win32":  # there is no such limit
        import resource

        with suppress(OSError, ValueError):
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m index_tools",
        description=ABOUT,
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    building.register(commands)
    changing.register(commands)
    reading.register(commands)
    for module, name, help_, about in (
        (
            searching,
            "search",
            "find the pictures nearest to pictures, and say which are copies",
            SEARCH,
        ),
        (dedup, "dedup", "find duplicates, and list which to keep", DEDUP),
        (evaluate, "eval", "how close are generated pictures to an index?", EVAL),
    ):
        command = commands.add_parser(name, help=help_, description=about)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
