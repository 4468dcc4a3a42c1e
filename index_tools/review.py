"""A page on which a person looks through the duplicates, and the decisions that come back from it.

The page is one HTML file (review.html) with its thumbnails in it, and needs no server and no network. Its
button saves `decisions.json`, which `dedup --decisions` reads.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amg_core.errors import AMGError
from amg_core.files import brief

if TYPE_CHECKING:
    from .dedup import Cluster, Member

Name = tuple[str, str]  # of an index ("" if there is only one), and of a picture in it
MADE_FOR = "amg dedup"  # in files of decisions, so that no other JSON is taken for one


def render(
    found: Sequence[Cluster], about: str, title: Callable[[Cluster], str],
    thumbnail: Callable[[int], bytes | None],
) -> str:  # fmt: skip
    """The page. `thumbnail` maps the id of a row to a JPEG, or to None if there is none."""
    clusters = [
        {
            "title": title(one),
            "pictures": [_entry(member, thumbnail) for member in ordered(one.members)],
        }
        for one in found
    ]
    data = json.dumps({"made_for": MADE_FOR, "about": about, "clusters": clusters})
    # Inside a script element only "</" and "<!--" have a meaning.
    template = Path(__file__).with_name("review.html").read_text("utf-8")
    return template.replace("@DATA@", data.replace("<", "\\u003c"))


def ordered(members: Iterable[Member]) -> list[Member]:
    """Each kept picture before those that are dropped for it."""
    return sorted(members, key=lambda member: (member.kept_id, not member.keep))


def why(member: Member) -> str:
    """One line: the size, and why the picture is a duplicate."""
    parts = [f"{member.width}x{member.height}"]
    if member.index:
        parts.insert(0, f"in {member.index}")
    if member.alias:
        parts.append("the same bytes")
    elif not member.keep:
        parts.append(f"similarity {member.likeness:.2f}")
        if member.verified is not None:
            parts.append(f"verified {member.verified:.2f}")
    return ", ".join(parts)


def _entry(member: Member, thumbnail: Callable[[int], bytes | None]) -> dict[str, object]:
    jpeg = thumbnail(member.id)
    image = "" if jpeg is None else "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return {
        "index": member.index, "source": member.source, "keep": member.keep, "why": why(member),
        "caption": " ".join(member.caption.split()), "image": image,
    }  # fmt: skip


def decisions(path: Path) -> dict[Name, bool]:
    """Whether to keep each picture, as the page saved it. AMGError if the file is none of the page's."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["made_for"] != MADE_FOR:
            raise ValueError("it is another file")
        return {
            (str(one["index"]), str(one["source"])): bool(one["keep"]) for one in data["pictures"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AMGError(
            f"{path} holds no decisions ({brief(error)}): save them on the page review.html."
        ) from error


def unknown(made: Mapping[Name, bool], found: Iterable[Cluster]) -> list[Name]:
    """Decisions on pictures that are in no cluster."""
    there = {(member.index, member.source) for one in found for member in one.members}
    return sorted(set(made) - there)
