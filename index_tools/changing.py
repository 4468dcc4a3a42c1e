"""The commands that change an index without reading pictures: remove, mute, merge."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import terminal

if TYPE_CHECKING:
    from amg_core.index import Entry

REMOVE = "Remove pictures from an index. Nothing is embedded again, and no picture file is changed."

MUTE = """\
Exclude (mute) pictures that may be copied: your own work, public-domain art. They stay in the index,
but nothing is compared with them, also after the index is built again. Without a choice of pictures,
print the excluded ones."""

MERGE = """\
Make one index, OUT, from several, for example from several machines. Identical files are stored only
once. Nothing is embedded again. To add pictures to an existing index, use add."""


def register(commands: terminal.Commands) -> None:
    for name, about, run in (("remove", REMOVE, _remove), ("mute", MUTE, _mute)):
        parser = terminal.add_command(
            commands, name, description=about, epilog=terminal.SELECTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("index", metavar="INDEX", type=Path, help="index folder")
        terminal.add_selection(parser)
        if name == "mute":
            parser.add_argument("--reason", default="", help="why they may be copied, as a note")
            parser.add_argument("--undo", action="store_true", help="compare with them again")
        terminal.add_json(parser)
        parser.set_defaults(run=run)

    merge = terminal.add_command(commands, "merge", description=MERGE)
    merge.add_argument("indexes", metavar="INDEX", type=Path, nargs="+", help="index folders")
    merge.add_argument("out", metavar="OUT", type=Path, help="new index folder")
    merge.add_argument("--replace", action="store_true", help="replace OUT if it is an index")
    terminal.add_json(merge)
    merge.set_defaults(run=_merge)


def _remove(options: argparse.Namespace) -> None:
    from amg_core.index import remove

    chosen = terminal.selection(options)
    _apply(options, "removed", chosen, lambda: remove(options.index, chosen))


def _mute(options: argparse.Namespace) -> None:
    from amg_core.index import mute, unmute

    if not (options.patterns or options.picture or options.caption or options.list):
        return _list_muted(options)
    chosen = terminal.selection(options)
    if options.undo:
        _apply(options, "guarded again", chosen, lambda: unmute(options.index, chosen))
    else:
        _apply(options, "muted", chosen, lambda: mute(options.index, chosen, options.reason))
    return None


def _apply(
    options: argparse.Namespace, word: str, chosen: terminal.Selection, change: Callable[[], int]
) -> None:
    undo = getattr(options, "undo", False)
    names: list[str] = []
    if options.dry_run:
        muted = _muted(options.index) if undo else None
        names = sorted(
            entry.source
            for entry in _files(options.index)
            if chosen(entry) and (muted is None or entry.sha256 in muted)
        )
    count = len(names) if options.dry_run else change()
    for name in sorted(chosen.unmet):
        terminal.warn(f"not in the index: {name}")
    if not count:
        if undo:
            raise terminal.Unmatched(
                f"No muted picture matches: 'mute {options.index}' lists them."
            )
        example = next(_files(options.index)).source
        raise terminal.Unmatched(
            f"No picture of {options.index} matches. Names in it are like {example!r}: "
            f"give the whole name, or a pattern such as '*part of it*'."
        )
    if options.dry_run:
        if options.json:
            terminal.print_json(path=str(options.index), count=count, sources=names)
        else:
            print("\n".join([*names, f"{count} files would be {word}"]))
    elif options.json:
        terminal.print_json(path=str(options.index), count=count)
    else:
        print(f"{options.index}: {count} {word}")


def _muted(path: Path) -> set[str]:
    """The hashes of the muted pictures."""
    from amg_core.index import Index

    with Index.open(path) as index:
        return {index.record(i).sha256 for i in index.muted}


def _files(path: Path) -> Iterator[Entry]:
    from amg_core.index import Entry, Index

    with Index.open(path) as index:
        hashes = {}
        for i, record in enumerate(index.records()):
            hashes[i] = record.sha256
            yield Entry(record.sha256, record.source, record.caption)
        for alias in index.aliases():
            yield Entry(hashes[alias.id], alias.source, alias.caption)


def _list_muted(options: argparse.Namespace) -> None:
    from amg_core.index import Index

    with Index.open(options.index) as index:
        muted = [
            {"source": index.source(i), "sha256": index.record(i).sha256, "reason": reason}
            for i, reason in sorted(index.muted.items())
        ]
    if options.json:
        terminal.print_json(path=str(options.index), muted=muted)
        return
    for entry in muted:
        print(f"{entry['source']}  {entry['reason']}".rstrip())
    print(f"{options.index}: {len(muted)} muted")


def _merge(options: argparse.Namespace) -> None:
    from amg_core.index import merge

    count = merge(options.indexes, options.out, replace=options.replace)
    if options.json:
        terminal.print_json(path=str(options.out), count=count)
    else:
        print(f"{options.out}: {count} pictures of {len(options.indexes)} indexes")
