"""Puts pictures where a training needs them, and takes that back.

`link` and `copy` put the pictures that stay into a new folder. `move` puts those to drop into it, so that
the old folder holds what stays. Caption files go along. A record in the new folder says what was done, and
is written first, so that `undo` works after a crash, too. `undo` removes only files that still are what
this program wrote, and puts back only what it took away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amg_core.errors import AMGError
from amg_core.files import brief

from .captions import inside, new_folder

HOW = LINK, COPY, MOVE = "link", "copy", "move"
LAYOUTS = PLAIN, KOHYA, ONETRAINER = "plain", "kohya", "onetrainer"
RECORD = "amg-dedup.json"
CONCEPTS = "concepts.json"  # OneTrainer's list of folders
BESIDE = (".txt", ".caption", ".json")  # endings of the files that belong to a picture
REPEATED = re.compile(
    r"\d+_.+"
)  # a folder of kohya's layout: repeats, then the name of the concept


@dataclass(frozen=True)
class Wanted:
    """A picture to put into the folder: its name in the index, its hash, and its caption there."""

    source: str
    sha256: str
    caption: str = ""


@dataclass(frozen=True)
class Step:
    """One file of the record. `origin` is "" for a file that was written. Both names are absolute or
    relative to the folder of the record."""

    origin: str
    name: str
    sha256: str


def place(
    how: str,
    folder: Path,
    pictures: Path,
    wanted: Sequence[Wanted],
    *,
    staying: Iterable[str] = (),
    layout: str = PLAIN,
    repeats: int = 1,
    concept: str = "",
) -> list[str]:
    """Link, copy or move pictures with their captions into a new folder.

    Parameters
    ----------
    folder : Path
        New or empty, and outside `pictures`.
    pictures : Path
        The folder from which the index was built.
    wanted : sequence of Wanted
    staying : names of pictures that are not moved
        A caption file that belongs to one of these, too, is copied.
    layout : str
        "plain": the same names in the new folder. "kohya": <repeats>_<concept>/ without folders in it; a
        folder of that form at the top of a name is kept. "onetrainer": <concept>/ and a list of concepts,
        in which the repeats stand. A picture without a caption file gets one with its caption of the index,
        because these trainers read no other.
    concept : str
        Default: the name of `pictures`.

    Returns
    -------
    Notes on pictures that were left out: gone, changed since the index was built, or in an archive.

    Raises
    ------
    AMGError
        The folder cannot be used, or a file cannot be written. `undo` takes back what was done.
    """
    pictures, folder = pictures.resolve(), folder.resolve()
    if not pictures.is_dir():
        raise AMGError(f"{pictures} is not a folder: give --pictures the folder of the pictures.")
    if folder.is_relative_to(pictures):
        raise AMGError(
            f"{folder} is in {pictures}, where the next build would find it: choose another."
        )
    new_folder(folder)
    name = _namer(layout, repeats, concept or pictures.name)
    stay = {_stem(source) for source in staying}
    steps: list[Step] = []
    texts: dict[str, bytes] = {}
    notes: list[str] = []
    for one in wanted:
        path = pictures / inside(one.source)
        problem = _problem(path, one.sha256)
        if problem:
            notes.append(f"left out: {one.source} ({problem})")
            continue
        target = name(one.source)
        steps.append(Step(str(path), target, one.sha256))
        texts_there = [p for ending in BESIDE if (p := path.with_suffix(ending)).is_file()]
        for text in texts_there:
            moved = how != MOVE or _stem(one.source) not in stay
            steps.append(_text_step(text, target, moved, texts))
        if one.caption and not texts_there and layout != PLAIN:
            made = str(PurePosixPath(target).with_suffix(".txt"))
            texts[made] = one.caption.encode("utf-8") + b"\n"
            steps.append(Step("", made, hashlib.sha256(texts[made]).hexdigest()))
    if layout == ONETRAINER:
        texts[CONCEPTS] = _concepts(folder, steps, repeats)
        steps.append(Step("", CONCEPTS, hashlib.sha256(texts[CONCEPTS]).hexdigest()))
    steps = list({step.name: step for step in steps}.values())
    _write_record(folder, {"how": how, "files": [asdict(step) for step in steps]})
    try:
        for step in steps:
            _do(how, step, folder / step.name, texts.get(step.name))
    except OSError as error:
        raise AMGError(_advice(how, folder, error)) from error
    return notes


def undo(folder: Path) -> list[str]:
    """Take back what `place` did: remove its links and copies, or move the pictures back.

    Returns
    -------
    Notes on files that were left alone, because they were changed, or because their old place is taken.

    Raises
    ------
    AMGError
        The folder has no record, or a file cannot be moved.
    """
    how, steps = _read_record(folder)
    notes = []
    try:
        for step in steps:
            path = folder / step.name
            if not path.is_file() or path.is_symlink():
                continue
            if how == MOVE and step.origin:
                notes += _move_back(path, Path(step.origin))
            elif _sha256(path) == step.sha256:
                path.unlink()
            else:
                notes.append(f"left alone: {step.name} was changed")
        if notes:
            return notes  # the record stays, for another try
        (folder / RECORD).unlink()
    except OSError as error:
        raise AMGError(f"Cannot undo all of {folder} ({brief(error)}): try again.") from error
    folders = {parent for step in steps for parent in (folder / step.name).parents}
    for made in sorted(folders, key=lambda one: -len(one.parts)):
        if made == folder or folder in made.parents:
            with suppress(OSError):
                made.rmdir()
    return notes


def _namer(layout: str, repeats: int, concept: str) -> Callable[[str], str]:
    """A function from the name of a picture in the index to a new one in the folder."""
    taken: set[str] = set()

    def name(source: str) -> str:
        path = PurePosixPath(inside(source))
        if layout == PLAIN:
            return str(path)
        top, rest = (path.parts[0], path.parts[1:]) if len(path.parts) > 1 else ("", path.parts)
        if layout == KOHYA and REPEATED.fullmatch(top):
            place = top
        else:
            place = f"{repeats}_{concept}" if layout == KOHYA else concept
            rest = path.parts
        flat = PurePosixPath("__".join(rest))
        found, count = f"{place}/{flat}", 2
        while _stem(found).lower() in taken:  # a caption file belongs to one picture only
            found, count = f"{place}/{flat.stem}-{count}{flat.suffix}", count + 1
        taken.add(_stem(found).lower())
        return found

    return name


def _stem(source: str) -> str:
    return str(PurePosixPath(inside(source)).with_suffix(""))


def _text_step(text: Path, target: str, moved: bool, texts: dict[str, bytes]) -> Step:
    """The step for a caption file. One that is needed in both places is written anew."""
    data, name = text.read_bytes(), str(PurePosixPath(target).with_suffix(text.suffix))
    if not moved:
        texts[name] = data
    return Step(str(text) if moved else "", name, hashlib.sha256(data).hexdigest())


def _problem(path: Path, sha256: str) -> str:
    if not path.is_file():
        return "not in the folder of the pictures"
    try:
        return "" if _sha256(path) == sha256 else "changed since the index was built"
    except OSError as error:
        return brief(error)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _concepts(folder: Path, steps: Sequence[Step], repeats: int) -> bytes:
    """OneTrainer's list of concepts: one for each folder at the top."""
    names = sorted({PurePosixPath(step.name).parts[0] for step in steps})
    entries = [
        {
            "name": name,
            "path": str(folder / name),
            "enabled": True,
            "balancing": float(repeats),
            "balancing_strategy": "REPEATS",
            "text": {"prompt_source": "sample"},
        }
        for name in names
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False).encode("utf-8")


def _do(how: str, step: Step, path: Path, data: bytes | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not step.origin:
        with open(path, "xb") as file:
            file.write(data or b"")
    elif how == MOVE:
        if path.exists():
            raise FileExistsError(f"{path} is there already")
        shutil.move(step.origin, path)
    elif how == LINK and path.suffix.lower() not in BESIDE:
        os.link(step.origin, path)
    else:  # a caption is edited later, so that it must not be the same file
        shutil.copy2(step.origin, path)


def _move_back(path: Path, origin: Path) -> list[str]:
    if origin.exists():
        return [f"left alone: {path.name}, because there is a new {origin}"]
    origin.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, origin)
    return []


def _advice(how: str, folder: Path, error: OSError) -> str:
    step = "use --copy, or a folder on the same disk" if how == LINK else "make room"
    return (
        f"Cannot {how} all pictures to {folder} ({brief(error)}): {step}. What was done so far is taken "
        f"back by dedup --undo {folder}"
    )


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    try:
        text = json.dumps({"version": 1, **record}, indent=1, ensure_ascii=False)
        (folder / RECORD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise AMGError(f"Cannot write to {folder} ({error}): choose another folder.") from error


def _read_record(folder: Path) -> tuple[str, list[Step]]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        how, steps = record["how"], [Step(**one) for one in record["files"]]
        if how not in HOW or not all(inside(step.name) == step.name for step in steps):
            raise ValueError("it is not of this program")
    except FileNotFoundError:
        raise AMGError(f"{folder} has no {RECORD}: nothing was put there by dedup.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AMGError(f"Cannot read {folder / RECORD} ({brief(error)}).") from error
    return how, steps
