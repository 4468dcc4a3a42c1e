"""What people decided about a picture, kept beside it. A decision belongs to the pixels that were seen."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..errors import AMGError
from ..index.format import is_digest
from .checked import ANSWERS
from .stored import read_json, write_json

SCHEMA = "amg-decision/1"
ENDING = ".amg-decision.json"


@dataclass(frozen=True)
class Decision:
    """One answer of one person: does the picture recreate protected material?

    Attributes
    ----------
    answer : one of ANSWERS' values
    by, note : str
    at : str
        ISO 8601, UTC.
    pixels : str
        Hash of the pixels that the person saw (`picture.stored_pixels`).
    """

    answer: str
    by: str
    note: str
    at: str
    pixels: str


def decide(picture: Path, pixels: str, answer: str, by: str, note: str = "") -> Decision:
    """Add a decision. Earlier ones are kept.

    AMGError if the answer is none of yes, no and unsure, if `by` is empty, or if it cannot be written.
    """
    if answer not in ANSWERS.values():
        raise AMGError(f"{answer!r} is no answer: give one of {', '.join(ANSWERS.values())}.")
    if not by.strip():
        raise AMGError("A decision needs a name: say who decided with --by NAME.")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = Decision(answer, by.strip(), note.strip(), now, pixels)
    every = [asdict(each) for each in (*decisions(picture), made)]
    write_json(beside(picture), {"schema": SCHEMA, "decisions": every})
    return made


def decisions(picture: Path) -> list[Decision]:
    """All decisions about a picture, oldest first. AMGError if the file is damaged."""
    path = beside(picture)
    if not os.path.lexists(path):
        return []
    found = read_json(path)
    listed = found.get("decisions") if isinstance(found, dict) else None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(listed, list):
        raise AMGError(f"{path} is damaged: it is no {SCHEMA}. Restore or delete it.")
    try:
        made = [Decision(**each) for each in listed]
    except TypeError:
        raise AMGError(f"{path} is damaged: an entry is missing. Restore or delete it.") from None
    for each in made:
        sound = all(isinstance(value, str) for value in asdict(each).values())
        if not sound or each.answer not in ANSWERS.values() or not is_digest(each.pixels):
            raise AMGError(f"{path} is damaged: a decision is wrong. Restore or delete it.")
    return made


def beside(picture: Path) -> Path:
    """The file for the decisions about a picture."""
    return picture.with_name(picture.name + ENDING)
