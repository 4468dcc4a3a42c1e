"""Goes through a folder of finished pictures, of any program, and writes a record beside each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import report as reports
from ..errors import AMGError
from ..index.picture import Unreadable, read_file
from ..index.sources.folder import demand_pictures, find
from ..similarity.matcher import Matcher
from . import stored
from .checked import NO, UNSURE, YES, Record, check_picture

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Written:
    """What came of one picture: its name in the folder, and its record, or the reason why there is none.

    `kept` says that the record was there already.
    """

    picture: str
    record: Record | None = None
    problem: str = ""
    kept: bool = False

    @property
    def answer(self) -> str:
        """yes, no or unsure, or "" without a record."""
        return str(self.record["answer"]["recreates"]) if self.record else ""


def pictures(folder: Path) -> list[str]:
    """The pictures below a folder, as relative paths with slashes. AMGError if there are none."""
    found = find(folder)
    demand_pictures(folder, found)
    return found.pictures


def write_folder(
    matcher: Matcher,
    folder: Path,
    *,
    privacy: str = reports.ANONYMOUS,
    models: Sequence[Mapping[str, Any]] = (),
    again: bool = False,
    versions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Iterator[Written]:
    """Check every picture of a folder, and write its record beside it. The pictures are not touched.

    A picture that has such a record already, of the same file and the same index, is left as it is, unless
    `again`. The other arguments are those of `check_picture`.

    Raises
    ------
    AMGError
        The folder holds no pictures, or a record cannot be written.
    """
    found = find(folder)
    demand_pictures(folder, found)
    for number, name in enumerate(found.pictures, 1):
        path = folder / name
        try:
            data = read_file(path)
            old = None if again else _still_right(path, data, matcher, privacy)
            record = old or check_picture(
                matcher, data, beside=True, privacy=privacy, models=models, versions=versions
            )
        except Unreadable as error:
            yield Written(name, problem=str(error))
        else:
            if old is None:
                stored.write_beside(path, record)
            yield Written(name, record, kept=old is not None)
        if progress:
            progress(number, len(found.pictures), name)
    for name, reason in found.skipped:
        yield Written(name, problem=reason)


def _still_right(path: Path, data: bytes, matcher: Matcher, privacy: str) -> Record | None:
    """The record beside a picture, if it is of this file, this index and in this privacy mode."""
    try:
        record = stored.read_beside(path)
    except AMGError:
        return None
    if record is None:
        return None
    same = (
        record["picture"].get("file") == hashlib.sha256(data).hexdigest()
        and record["index"]["hash"] == matcher.index.hash
        and record["privacy"] == privacy
    )
    return record if same else None


def counts(written: Sequence[Written]) -> dict[str, int]:
    """How many pictures have a record ("count"), and how many of these are "copies", "unsure", "others"."""
    answers = [one.answer for one in written if one.record]
    found = {"copies": answers.count(YES), "unsure": answers.count(UNSURE)}
    return found | {"count": len(answers), "others": answers.count(NO)}


def summary(written: Sequence[Written]) -> str:
    """The same in one sentence."""
    found = counts(written)
    text = f"{found['count']} pictures have a record: {found['copies']} copies (yes), "
    text += f"{found['unsure']} unsure, {found['others']} no copies (no)"
    if missing := len(written) - found["count"]:
        text += f". {missing} could NOT be checked"
    return text
