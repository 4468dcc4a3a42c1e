"""What is kept of a run: one JSON line for each picture, and the settings that all of them share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amg_core.errors import AMGError

Line = dict[str, Any]
SETTINGS = "settings.json"


def shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4). ValueError if it is not i/n with 1 <= i <= n."""
    part, count = (int(each) for each in text.split("/"))
    if not 1 <= part <= count:
        raise ValueError(f"{text} is not a shard: give i/n with i from 1 to n")
    return part, count


def mine(items: Sequence[Any], part: int, count: int) -> list[Any]:
    """Every `count`-th item, from number `part` on. The parts of all shards are all items, each once."""
    return list(items[part - 1 :: count])


def agree(folder: Path, settings: Mapping[str, object]) -> None:
    """Write the settings into a new folder of results.

    Raises
    ------
    AMGError
        The folder has results of other settings. The message names the first that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        for name in sorted({*own, *before}):
            if own.get(name) != before.get(name):
                raise AMGError(
                    f"{folder} has results of another run ({name} was {before.get(name)!r}, and is now "
                    f"{own.get(name)!r}). Give the same options, or another --out."
                )
        return
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(own, indent=1), "utf-8")
    draft.replace(path)  # whole, also for the other shards


def file_of(folder: Path, part: int, count: int) -> Path:
    return folder / f"pictures-{part}of{count}.jsonl"


def append(path: Path, lines: Iterable[Line]) -> None:
    """Add lines at once, after removing one that an interrupted run left unfinished."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.truncate(file.read(size).rfind(b"\n") + 1)
        file.write(text.encode())


def read(folder: Path) -> list[Line]:
    """The lines of all shards. Unfinished ones are left out; of equal ones the first counts."""
    found: dict[tuple[str, str, int, int], Line] = {}
    for path in sorted(folder.glob("pictures-*of*.jsonl")):
        for line in _whole(path.read_text("utf-8")):
            found.setdefault((line["method"], line["list"], line["number"], line["seed"]), line)
    return list(found.values())


def _whole(text: str) -> Iterator[Line]:
    for line in text.split("\n")[:-1]:
        yield json.loads(line)


def done(lines: Iterable[Line]) -> set[tuple[str, str, int]]:
    """(method, list, number of the prompt) of what has been drawn. All seeds of one are written at once."""
    return {(line["method"], line["list"], line["number"]) for line in lines}


def settings(folder: Path) -> dict[str, Any]:
    """Those that `agree` wrote."""
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text("utf-8"))
    return found
