"""Readers of the public lists of prompts, in the forms in which they are published.

================================  ==========================================================================
Webster's 500 (Wen et al.)        JSON lines: {"caption", "index", "url"}
localizing_memorization (NeMo)    csv with ";": Caption, URL, Index, and for memorised ones type (VM, TM)
                                  and mean_sscd, max_sscd. Its hard negatives and COCO lack these three
MemBench                          csv with ",": prompt, urls (a Python list)
COCO captions                     JSON: {"annotations": [{"image_id", "caption"}]}; the first of a picture
others                            text: a prompt a line
================================  ==========================================================================
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amg_core.errors import AMGError
from amg_core.files import read_bounded
from amg_core.index.sources.base import decode_text

MOST_BYTES = 1 << 28  # captions_val2017.json has 4 MB, captions_train2017.json 92 MB
VERBATIM, TEMPLATE = TYPES = ("VM", "TM")


@dataclass(frozen=True)
class Prompt:
    """One line of a list.

    Attributes
    ----------
    number : int
        Its place in the list, from 0.
    text : str
    key : str
        The list's own name of its picture: LAION's index, COCO's image_id. "" if there is none.
    type : str
        VM (verbatim memory), TM (template memory), or "" where the list does not say.
    urls : tuple of str
        Where its training pictures were. They are never opened by this program.
    published : float or None
        The largest SSCD that the list reports for it.
    """

    number: int
    text: str
    key: str = ""
    type: str = ""
    urls: tuple[str, ...] = ()
    published: float | None = None


def read(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a list, the first `limit` of them.

    Raises
    ------
    AMGError
        The file is missing, or its form is none of the published ones.
    """
    try:
        text = decode_text(read_bounded(path, MOST_BYTES))
    except OSError as error:
        raise AMGError(
            f"{path} cannot be read ({error}). docs/benchmark.md says what to download."
        ) from error
    try:
        rows = list(_rows(path.suffix.lower(), text))
    except (ValueError, KeyError, TypeError, csv.Error, SyntaxError) as error:
        raise AMGError(
            f"{path} has none of the published forms ({type(error).__name__}: {error}). "
            "docs/benchmark.md shows them."
        ) from error
    made = [Prompt(i, **row) for i, row in enumerate(row for row in rows if row["text"])]
    if not made:
        raise AMGError(f"{path} has no prompts.")
    return made[:limit]


def _rows(suffix: str, text: str) -> Iterable[dict[str, Any]]:
    if suffix == ".jsonl":
        lines = (json.loads(line) for line in text.splitlines() if line.strip())
        return (_of_webster(line) for line in lines)
    if suffix == ".json":
        return _of_coco(json.loads(text)["annotations"])
    if suffix == ".csv":
        heading = text.partition("\n")[0]
        table = csv.DictReader(io.StringIO(text), delimiter=";" if ";" in heading else ",")
        if "Caption" in heading:
            return [_of_nemo(row) for row in table]
        return [_of_membench(row) for row in table]
    return ({"text": line.strip()} for line in text.splitlines())


def _of_webster(row: Mapping[str, Any]) -> dict[str, Any]:
    urls = (str(row["url"]),) if row.get("url") else ()
    return {"text": str(row["caption"]).strip(), "key": str(row.get("index", "")), "urls": urls}


def _of_nemo(row: Mapping[str, str]) -> dict[str, Any]:
    kind, largest = (row.get(name) or "" for name in ("type", "max_sscd"))
    return {
        "text": row["Caption"].strip(),
        "key": row.get("Index") or "",
        "type": kind if kind in TYPES else "",
        "urls": (row["URL"],) if row.get("URL") else (),
        "published": float(largest) if largest else None,
    }


def _of_membench(row: Mapping[str, str]) -> dict[str, Any]:
    urls = ast.literal_eval(row["urls"]) if row.get("urls") else []
    return {"text": row["prompt"].strip(), "urls": tuple(map(str, urls))}


def _of_coco(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    seen: set[object] = set()
    for row in rows:
        if row["image_id"] not in seen:
            seen.add(row["image_id"])
            yield {"text": str(row["caption"]).strip(), "key": str(row["image_id"])}


def labelled(prompts: list[Prompt], labels: list[Prompt]) -> list[Prompt]:
    """`prompts` with the types of another list, where it has the same picture or the same text."""
    by_key = {one.key: one for one in labels if one.key}
    by_text = {one.text: one for one in labels}
    found = (by_key.get(one.key) or by_text.get(one.text) for one in prompts)
    return [
        one if label is None else Prompt(
            one.number, one.text, one.key, label.type, one.urls or label.urls, label.published
        )
        for one, label in zip(prompts, found, strict=True)
    ]  # fmt: skip
