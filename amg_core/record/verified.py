"""Compares a picture with its records, and says what has changed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AMGError
from ..files import brief
from ..index.picture import Stored, Unreadable, read_file, stored_pixels
from ..similarity.matcher import Matcher
from . import checked, credentials, decided, stored
from .checked import Record

CLOSE = 0.01  # scores that differ by less are the same; machines round differently


@dataclass(frozen=True)
class Finding:
    """One comparison: what was compared, whether it agrees (None if it could not be), and in words."""

    what: str
    good: bool | None
    words: str


def verify(path: Path, matcher: Matcher | None = None) -> list[Finding]:
    """Compare a picture with its records, in the metadata, beside it and in its Content Credentials.

    Parameters
    ----------
    path : Path
        The picture.
    matcher : Matcher, optional
        The index at hand. The picture is then checked again, and the result compared.

    Raises
    ------
    AMGError
        The file cannot be read.
    """
    try:
        data = read_file(path)
    except Unreadable as error:
        raise AMGError(f"{path} cannot be read ({error}): check the path.") from None
    pixels, found = None, []
    try:
        pixels = stored_pixels(data)
    except Unreadable as error:
        found.append(Finding("picture", False, f"it can no longer be read as a picture: {error}"))
    if (damaged := damaged_chunk(data)) is not None:
        found.append(Finding("file", False, f"a part of the PNG is damaged: {damaged}"))
    signed, of_signature = _signature(data)
    found += of_signature
    records: dict[str, Record] = {}
    places: dict[str, Callable[[], Record | None]] = {
        stored.INSIDE: lambda: stored.read_inside(data, path.name),
        stored.BESIDE: lambda: stored.read_beside(path),
        stored.SIGNED: lambda: signed.record if signed else None,
    }
    for place, read in places.items():
        try:
            if (record := read()) is not None:
                records[place] = record
        except AMGError as error:
            found.append(Finding("record", False, f"{place}: {error}"))
    if not records and not any(finding.what == "record" for finding in found):
        found.append(Finding("record", False, "there is no record in this picture or beside it"))
    inside, sealed = records.get(stored.INSIDE), records.get(stored.SIGNED)
    if inside and sealed and checked.checksum(inside) == checked.checksum(sealed):
        del records[stored.SIGNED]  # the same once more
    for place, record in records.items():
        found += _record(place, record, data, pixels)
        if matcher is not None and pixels is not None:
            found += _again(place, record, checked.check_picture(matcher, data), matcher)
    found += _decisions(path, pixels)
    return found


def _signature(data: bytes) -> tuple[credentials.Credentials | None, list[Finding]]:
    """The Content Credentials, and what is to be said of them."""
    if not credentials.present(data):
        return None, []
    kind = kind_of(data)
    if kind is None:
        return None, []
    if not credentials.available():
        words = f"there are Content Credentials, and they were NOT checked: {credentials.STEP}"
        return None, [Finding("signature", None, words)]
    try:
        found = credentials.read(data, kind)
    except AMGError as error:
        return None, [Finding("signature", False, str(error))]
    if found is None:
        return None, [Finding("signature", False, "the Content Credentials cannot be found")]
    if not found.valid:
        words = f"the file was changed after it was signed ({', '.join(found.faults)})"
        return found, [Finding("signature", False, words)]
    words = f"valid, by {found.signer or 'a nameless certificate'}"
    words += f", at {found.time}" if found.time else ", without a time stamp"
    if found.test:
        words += " (this certificate proves no identity)"
    elif not found.trusted:
        words += " (on no list of trusted certificates)"
    findings = [Finding("signature", True, words)]
    if found.ingredients:
        findings.append(
            Finding("ingredients", True, f"it was made with {', '.join(found.ingredients)}")
        )
    return found, findings


def damaged_chunk(data: bytes) -> str | None:
    """The name of the first chunk of a PNG whose checksum does not fit, or None.

    The signature does not cover all bytes of its own block. In a PNG these have a checksum.
    """
    at = 8
    if kind_of(data) != "PNG":
        return None
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + size
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return repr(data[at + 4 : at + 8].decode("latin-1"))
        at = end + 4
    return None


def kind_of(data: bytes) -> str | None:
    """A key of `credentials.MIMES`, or None for files that carry no Content Credentials here."""
    heads = {"PNG": data[:8] == b"\x89PNG\r\n\x1a\n", "JPEG": data[:3] == b"\xff\xd8\xff"}
    heads["WEBP"] = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return next((kind for kind, fits in heads.items() if fits), None)


def _record(place: str, record: Record, data: bytes, pixels: Stored | None) -> Iterator[Finding]:
    """Whether record and file are as they were."""
    if checked.checksum(record) != record["checksum"]:
        yield Finding("record", False, f"{place}: the record itself was changed")
    else:
        yield Finding("record", True, f"{place}, written {record['written']}")
    said = record["picture"]
    if pixels is not None and pixels.sha256 != said["pixels"]:
        yield Finding("pixels", False, "the pixels are not those that were checked")
    elif pixels is not None:
        yield Finding("pixels", True, f"as they were checked ({pixels.width} x {pixels.height})")
    if "file" in said:
        same = hashlib.sha256(data).hexdigest() == said["file"]
        other = "the file was changed" + ("" if pixels is None else ", if only in its metadata")
        yield Finding("file", same, "every byte as it was" if same else other)


def _again(place: str, old: Record, new: Record, matcher: Matcher) -> Iterator[Finding]:
    """What a new check says, compared with the record."""
    answer, now = old["answer"]["recreates"], new["answer"]["recreates"]
    if old["index"]["hash"] != matcher.index.hash:
        yield Finding(
            "index",
            False,
            f"{matcher.index.name} is another index than that of the record {place}, or was changed "
            f"since (hash {matcher.index.hash[:12]}, not {str(old['index']['hash'])[:12]}). Against it the "
            f"answer is {now}, and the record says {answer}",
        )
        return
    yield Finding(
        "index", True, f"{matcher.index.name}, as it was ({matcher.index.count} pictures)"
    )
    if old["descriptor"] != new["descriptor"]:
        yield Finding("descriptor", False, "the pictures are compared in another way")
    yield from _neighbours(old["nearest"], new["nearest"])
    said = f"{answer}: {old['answer']['reason']}"
    yield Finding("answer", answer == now, said if answer == now else f"now {now}, not {answer}")


def _neighbours(old: list[Mapping[str, Any]], new: list[Mapping[str, Any]]) -> Iterator[Finding]:
    """Same rows and same scores? Rows whose scores are equal may change places."""
    again = {near["row"]: near for near in new}
    missing = [near["row"] for near in old if near["row"] not in again]
    lowest = min((near["score"] for near in new), default=0.0)
    missing = [
        near["row"] for near in old if near["row"] in missing and near["score"] > lowest + CLOSE
    ]
    if missing:
        yield Finding("neighbours", False, f"no longer among the nearest: {_rows(missing)}")
    else:
        yield Finding("neighbours", True, f"the same {len(old)} nearest pictures")
    differences = [
        (f"row {near['row']}, {key}: {near[key]} then, {again[near['row']][key]} now")
        for near in old
        if near["row"] in again
        for key in ("similarity", "score", "composition")
        if not _same(near[key], again[near["row"]][key])
    ]
    if differences:
        yield Finding("scores", False, brief("; ".join(differences), 300))
    else:
        yield Finding("scores", True, "the same scores of both checks")


def _same(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else abs(a - b) <= CLOSE


def _rows(rows: list[int]) -> str:
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows))


def _decisions(path: Path, pixels: Stored | None) -> Iterator[Finding]:
    try:
        made = decided.decisions(path)
    except AMGError as error:
        yield Finding("decision", False, str(error))
        return
    if made:
        last = made[-1]
        same = pixels is not None and pixels.sha256 == last.pixels
        words = f"{last.answer}, by {last.by}, {last.at}" + (f": {last.note}" if last.note else "")
        yield Finding("decision", same, words if same else f"{words} (of other pixels)")
