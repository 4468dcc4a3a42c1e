"""The commands for records of finished pictures: record write, verify, sheet, decide."""

from __future__ import annotations

import argparse
import base64
import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amg_core import report as reports
from amg_core.errors import AMGError
from amg_core.files import brief, open_regular
from amg_core.limits import COPY
from amg_core.optional import needed
from amg_core.similarity.metrics import likeness

from . import terminal

if TYPE_CHECKING:
    from amg_core.index import Index
    from amg_core.record.checked import Record
    from amg_core.record.decided import Decision
    from amg_core.similarity.matcher import Matcher

ABOUT = """\
A record says what a check of one finished picture found: the hash of its pixels, the index, the nearest
pictures with the scores of both checks, and an answer (yes, no, unsure). See docs/records.md."""

WRITE = """\
Check every picture of a folder, drawn by any program, and write a record beside each:
PICTURE.amg.json. The pictures are not touched. Pictures that have a record already are left as they are."""

VERIFY = """\
Compare pictures with their records: the signature of Content Credentials, the pixels, and with --index
also the neighbours, scores and answer. The exit code is 1 if anything has changed."""

SHEET = """\
Make a clearance sheet of a folder: every picture beside its nearest one, with scores, answer and what
people decided. It writes clearance.html, to read and to print, and clearance.csv, for a spreadsheet.
Decisions that you typed into the spreadsheet are taken over first."""

DECIDE = """\
Enter what a person decided about a picture: does it recreate protected material? It is kept beside it,
in PICTURE.amg-decision.json, with earlier decisions."""

HTML, CSV = "clearance.html", "clearance.csv"
MARK = '<meta name="generator" content="amg clearance sheet">'
SIDE = 320  # pixels of a picture on the sheet
COLUMNS = (
    "picture", "checks say", "reason", "likeness", "composition",
    "copy above", "nearest", "nearest caption", "index", "index hash", "pixels", "checked",
    "decision", "reviewed by", "note", "decided",
)  # fmt: skip
TYPED = COLUMNS[-4:-1]  # what people fill in
FIRST = {"yes": 0, "unsure": 1, "": 2, "no": 3}  # order of the answers on the sheet


def register(commands: terminal.Commands) -> None:
    record = terminal.add_command(commands, "record", description=ABOUT)
    verbs = record.add_subparsers(
        title="commands", metavar="COMMAND", required=True, help="what to do with records"
    )

    write = verbs.add_parser("write", help="check a folder of pictures", description=WRITE)
    write.add_argument("folder", metavar="FOLDER", type=Path, help="finished pictures")
    _add_index(write, required=True)
    write.add_argument(
        "--privacy", choices=(reports.ANONYMOUS, reports.FULL), default=reports.ANONYMOUS,
        help="full: with names and captions from the index (%(default)s)",
    )  # fmt: skip
    write.add_argument(
        "--model", type=Path, action="append", default=[], metavar="FILE",
        help="a model that drew them; its hash is recorded (may be repeated)",
    )  # fmt: skip
    write.add_argument(
        "--lora", type=Path, action="append", default=[], metavar="FILE",
        help="the same for a LoRA",
    )  # fmt: skip
    write.add_argument("--again", action="store_true", help="check all pictures anew")
    terminal.add_json(write)
    write.set_defaults(run=_write)

    verify = verbs.add_parser("verify", help="what has changed?", description=VERIFY)
    verify.add_argument(
        "files", metavar="FILE", type=Path, nargs="+", help="pictures, or folders of them"
    )
    _add_index(verify)
    terminal.add_json(verify)
    verify.set_defaults(run=_verify)

    sheet = verbs.add_parser("sheet", help="make a clearance sheet", description=SHEET)
    sheet.add_argument("folder", metavar="FOLDER", type=Path, help="pictures with records")
    _add_index(sheet)
    sheet.add_argument("--out", type=Path, metavar="DIR", help="where to write it (FOLDER)")
    sheet.set_defaults(run=_sheet)

    decide = verbs.add_parser("decide", help="enter a person's decision", description=DECIDE)
    decide.add_argument("picture", metavar="FILE", type=Path, help="the picture")
    decide.add_argument("answer", choices=("yes", "no", "unsure"), help="does it recreate one?")
    decide.add_argument("--by", required=True, metavar="NAME", help="who decided")
    decide.add_argument("--note", default="", metavar="TEXT", help="why")
    decide.set_defaults(run=_decide)


def _add_index(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--index", type=Path, nargs="+", required=required, default=[], metavar="INDEX",
        help="index folder(s) to compare with",
    )  # fmt: skip
    terminal.add_weights(parser)
    terminal.add_device(parser)


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[Matcher | None]:
    """The matcher of the index that the options name, or None."""
    from amg_core.index import Index
    from amg_core.index.search import Searcher
    from amg_core.similarity.matcher import Matcher

    if not options.index:
        yield None
        return
    device = terminal.device(options.device)
    with Index.combine([Index.open(path) for path in options.index]) as index:
        descriptor = terminal.descriptor_of(index.spec, options.weights).to(device)
        yield Matcher(Searcher(index, device), descriptor)


# ------------------------------------------------------------------------------------ write


def _write(options: argparse.Namespace) -> None:
    from amg_core.record import folder

    models = [_model("checkpoints", path) for path in options.model]
    models += [_model("loras", path) for path in options.lora]
    with _opened(options) as matcher:
        assert matcher is not None  # --index is required
        written = list(
            folder.write_folder(
                matcher, options.folder, privacy=options.privacy, models=models,
                again=options.again, progress=terminal.progress_printer(sys.stderr),
            )
        )  # fmt: skip
    if options.json:
        found = [
            {"picture": one.picture, "answer": one.answer, "problem": one.problem, "kept": one.kept}
            for one in written
        ]
        terminal.print_json(folder=str(options.folder), pictures=found)
        return
    for one in written:
        if one.record and one.answer != "no":
            print(f"{one.answer:7} {one.picture}: {one.record['answer']['reason']}")
        if one.problem:
            print(f"NOT checked: {one.picture}: {one.problem}")
    print(folder.summary(written))


def _model(kind: str, path: Path) -> dict[str, str]:
    from amg_core.index.format import digest

    try:
        return {"kind": kind, "name": path.name, "sha256": digest(path).sha256}
    except OSError as error:
        raise AMGError(f"{path} cannot be read ({brief(error)}): check the path.") from None


# ----------------------------------------------------------------------------------- verify


def _verify(options: argparse.Namespace) -> int:
    from amg_core.record import verified

    found = {}
    with _opened(options) as matcher:
        for path in _pictures(options.files):
            found[path] = verified.verify(path, matcher)
    changed = [
        path for path, findings in found.items() if any(each.good is False for each in findings)
    ]
    if options.json:
        files = [
            {"picture": str(path), "findings": [asdict(each) for each in findings]}
            for path, findings in found.items()
        ]
        terminal.print_json(changed=len(changed), files=files)
        return 1 if changed else 0
    signs = {True: "same   ", False: "CHANGED", None: "?      "}
    for path, findings in found.items():
        print(path)
        for each in findings:
            print(f"  {signs[each.good]} {each.what:11} {each.words}")
    print(f"{len(found)} pictures: {len(changed)} with something changed or missing")
    if not options.index:
        print("Without --index, neighbours, scores and answers were not checked again.")
    if changed:
        terminal.warn(f"error: {len(changed)} of {len(found)} pictures: see the lines CHANGED")
    return 1 if changed else 0


def _pictures(given: list[Path]) -> Iterator[Path]:
    from amg_core.record.folder import pictures

    for path in given:
        yield from (path / name for name in pictures(path)) if path.is_dir() else (path,)


# ----------------------------------------------------------------------------------- decide


def _decide(options: argparse.Namespace) -> None:
    from amg_core.record import decided

    made = decided.decide(
        options.picture, _pixels(options.picture), options.answer, options.by, options.note
    )
    print(f"{options.picture}: {made.answer}, by {made.by}, {made.at}")


def _pixels(picture: Path) -> str:
    """The hash of a picture's pixels. AMGError if it cannot be read."""
    from amg_core.index.picture import Unreadable, read_file, stored_pixels

    try:
        return stored_pixels(read_file(picture)).sha256
    except Unreadable as error:
        raise AMGError(f"{picture} cannot be read ({error}): give a picture.") from None


# ------------------------------------------------------------------------------------ sheet


@dataclass(frozen=True)
class Near:
    """The nearest picture, as far as record and index have it: index, name, caption, small picture."""

    index: str = ""
    source: str = ""
    caption: str = ""
    jpeg: bytes | None = None


@dataclass(frozen=True)
class Row:
    """One picture on the sheet.

    `jpeg` is a small picture, None if there is none. `problem` says why there is no record, or what is
    wrong with it. `pixels` is the hash of the picture as it is now, "" if unreadable.
    """

    picture: str
    pixels: str
    record: Record | None
    problem: str
    decision: Decision | None
    jpeg: bytes | None
    near: Near = Near()

    @property
    def right(self) -> Record | None:
        """The record, if it is about the picture as it is now."""
        return None if self.problem else self.record

    @property
    def answer(self) -> str:
        return str(self.right["answer"]["recreates"]) if self.right else ""

    @property
    def outdated(self) -> bool:
        """Whether the decision is about other pixels than those of the picture now."""
        return self.decision is not None and self.decision.pixels != self.pixels

    @property
    def verdict(self) -> dict[str, Any]:
        """The verdict of the checks. {} without a `right` record."""
        found: dict[str, Any] = self.right["verdicts"][0] if self.right else {}
        return found

    @property
    def scores(self) -> list[tuple[str, float | None]]:
        """Both checks on the one scale, with a copy above `COPY`. None if the second was not made."""
        if self.right is None:
            return []
        second = self.right["limits"]["composition"]["limit"]
        composition = likeness(self.verdict["zncc"], second)
        made = self.verdict["reason"] != "no_pictures"
        return [
            ("likeness", likeness(self.verdict["score"])),
            ("composition", composition if made else None),
        ]

    def cells(self) -> list[str]:
        """The row of the CSV."""
        record = self.right
        said = [""] * 9
        if record is not None:
            scores = ["" if score is None else f"{score:.2f}" for _, score in self.scores]
            said = [
                record["answer"]["reason"], *scores, f"{COPY}", self.near.source, self.near.caption,
                self.near.index, record["index"]["hash"], record["written"],
            ]  # fmt: skip
        *first, written = said
        first[0] = self.problem or first[0]
        decision = self.decision if self.decision and not self.outdated else None
        decided = ["", "", "", ""]
        if decision:
            decided = [decision.answer, decision.by, decision.note, decision.at]
        return [self.picture, self.answer, *first, self.pixels, written, *decided]


def _sheet(options: argparse.Namespace) -> None:
    from amg_core.record import folder, stored

    out = options.out or options.folder
    template = _template()  # to report a missing package before the work
    names = folder.pictures(options.folder)
    taken = _take_over(out / CSV, options.folder)
    with _opened(options) as matcher:
        index = matcher.index if matcher else None
        rows = [_row(options.folder, name, index) for name in names]
    rows.sort(key=lambda row: (FIRST[row.answer], -row.verdict.get("score", 0.0), row.picture))
    page = template.render(
        rows=rows, mark=MARK, copy_above=COPY, folder=options.folder.resolve().name
    )
    if (out / HTML).exists() and MARK not in _head(out / HTML):
        raise AMGError(f"{out / HTML} is no clearance sheet: move it, or give another --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AMGError(f"Cannot write to {out} ({brief(error)}): give another --out.") from None
    stored.write_bytes(out / HTML, page.encode())
    stored.write_bytes(out / CSV, _csv(rows))
    if taken:
        print(f"taken over from {CSV}: {taken} decisions")
    decided = sum(row.decision is not None and not row.outdated for row in rows)
    open_ = sum(row.answer != "no" and (row.decision is None or row.outdated) for row in rows)
    print(f"{len(rows)} pictures, {decided} decided, {open_} open (yes, unsure or not checked)")
    print(f"written: {out / HTML} and {CSV}")


def _template() -> Any:
    jinja2 = needed("jinja2", "The sheet", "pip install jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.from_string(Path(__file__).with_name("clearance.html").read_text("utf-8"))


def _row(folder: Path, name: str, index: Index | None) -> Row:
    from amg_core.index.picture import Unreadable, decode, read_file, stored_pixels
    from amg_core.record import decided, stored

    path, pixels, jpeg, problem = folder / name, "", None, ""
    record: Record | None = None
    try:
        data = read_file(path)
        pixels = stored_pixels(data).sha256
        jpeg = _jpeg(decode(data, name).pixels)
        record = stored.read_beside(path) or stored.read_inside(data, name)
        if record is None:
            problem = "not checked: there is no record"
        elif record["picture"]["pixels"] != pixels:
            problem = "the picture was changed after it was checked"
    except (Unreadable, AMGError) as error:
        problem = str(error)
    made = decided.decisions(path)
    decision = made[-1] if made else None
    return Row(name, pixels, record, problem, decision, jpeg, _near(record, index))


def _near(record: Record | None, index: Index | None) -> Near:
    if record is None:
        return Near()
    verdict = record["verdicts"][0]
    row = verdict["neighbor"]
    if index is not None and index.hash == record["index"]["hash"] and 0 <= row < index.count:
        try:
            jpeg = _jpeg(index.thumbnail(row))
        except AMGError:  # an index of embeddings
            jpeg = None
        return Near(index.name, index.source(row), index.caption(row), jpeg)
    source = str(verdict["source"]) or f"number {row} of the index"
    return Near(str(record["index"].get("name", "")), source, str(verdict["caption"]))


def _jpeg(picture: Any) -> bytes:
    """A JPEG of at most SIDE pixels a side, of a PIL picture or (H, W, 3) uint8."""
    from PIL import Image

    small = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).convert(
        "RGB"
    )
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return file.getvalue()


def _csv(rows: list[Row]) -> bytes:
    """The table, as spreadsheets read it: UTF-8 with a mark. A text that looks like a formula is a text."""
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(COLUMNS)
    for row in rows:
        table.writerow([_plain(cell) for cell in row.cells()])
    return file.getvalue().encode("utf-8-sig")


def _plain(cell: str) -> str:
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _head(path: Path) -> str:
    with open_regular(path) as file:
        return file.read(4096).decode("utf-8", "replace")


def _take_over(path: Path, folder: Path) -> int:
    """Enter decisions that were typed into an older CSV. Returns how many.

    AMGError if the file is no such table, or if a typed decision is incomplete. Nothing is entered then.
    """
    from amg_core.record import decided
    from amg_core.record.checked import ANSWERS

    if not path.exists():
        return 0
    typed: list[tuple[Path, str, str, str, str]] = []
    for number, row in enumerate(_table(path), 2):
        answer, by, note = (row[column].strip() for column in TYPED)
        answer = answer.lower()
        by, note = by.removeprefix("'"), note.removeprefix("'")
        picture = folder / row["picture"].removeprefix("'")
        if not (answer or by or note) or not picture.is_file() or _is_outside(picture, folder):
            continue
        last = decided.decisions(picture)[-1:]
        if last and (last[0].answer, last[0].by, last[0].note) == (answer, by, note):
            continue
        if answer not in ANSWERS.values() or not by:
            raise AMGError(
                f"{path}, line {number}: a decision needs yes, no or unsure, and a name in the "
                f"column '{TYPED[1]}'. Complete it; nothing was changed."
            )
        typed.append((picture, row["pixels"], answer, by, note))
    for picture, pixels, answer, by, note in typed:
        decided.decide(picture, pixels, answer, by, note)
    return len(typed)


def _is_outside(picture: Path, folder: Path) -> bool:
    return not picture.resolve().is_relative_to(folder.resolve())


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a clearance.csv, with commas, semicolons or tabs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise AMGError(
            f"{path} cannot be read ({brief(error)}): save it as CSV in UTF-8, or move it."
        ) from None
    first = text.partition("\n")[0]
    mark = max(",;\t", key=first.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, restval=""))
    needed_here = {"picture", "pixels", *TYPED}
    if text and not needed_here <= set(next(csv.reader([first], delimiter=mark))):
        raise AMGError(f"{path} is no clearance sheet: move it, or give another --out.")
    return rows
