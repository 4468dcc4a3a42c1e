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
from .checked import NO, UNSURE, YES, Record, check_picture, demand_privacy

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
        The folder holds no pictures, `privacy` is unknown, or a record cannot be written.
    """
    demand_privacy(privacy)
    found = find(folder)
    demand_pictures(folder, found)
    for number, name in enumerate(found.pictures, 1):
        yield _one(folder, name, matcher, privacy, models, again, versions)
        if progress:
            progress(number, len(found.pictures), name)
    for name, reason in found.skipped:
        yield Written(name, problem=reason)


def _one(
    folder: Path,
    name: str,
    matcher: Matcher,
    privacy: str,
    models: Sequence[Mapping[str, Any]],
    again: bool,
    versions: Mapping[str, str] | None,
) -> Written:
    """`write_folder` for one picture."""
    path = folder / name
    try:
        data, old = read_file(path), stored.read_beside(path)
        if old is not None and not again and _is_right(old, data, matcher, privacy):
            return Written(name, old, kept=True)
        record = check_picture(
            matcher, data, beside=True, privacy=privacy, models=models, versions=versions
        )
    except (Unreadable, AMGError) as error:  # AMGError: another file has the record's name
        return Written(name, problem=str(error))
    stored.write_beside(path, record)
    return Written(name, record)


def _is_right(record: Record, data: bytes, matcher: Matcher, privacy: str) -> bool:
    """Whether a record is of this file and this index, in this privacy mode."""
    same_file = record["picture"].get("file") == hashlib.sha256(data).hexdigest()
    same_index = record["index"]["hash"] == matcher.index.hash
    return bool(same_file and same_index and record["privacy"] == privacy)


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
