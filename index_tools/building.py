"""The commands that read pictures: build, add, import."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amg_core.descriptors.registry import DEFAULT, Kind, create, described, kinds, named
from amg_core.errors import AMGError
from amg_core.index.format import CAPTION_LENGTH, LINES, LONGEST_CAPTION, CaptionRule

from . import terminal

if TYPE_CHECKING:
    from amg_core.index import BuildReport

BUILD = """\
Make the index OUT from all pictures of SOURCE, or bring OUT up to date. Pictures that are in OUT are
not embedded again. Pictures that SOURCE no longer has are removed. An interrupted build continues
when you give the same command again. Until it is finished, an existing index stays as it is."""

SOURCES = """\
sources: a folder with its subfolders, a .zip, a .tar or a folder of them (WebDataset, img2dataset),
or a list (.parquet, .csv, .tsv, .jsonl) of files and captions. Identical files are stored only once.
Their other names and captions are kept as aliases."""

ADD = """\
Add the pictures of SOURCE to the index INDEX. Pictures that it has already are not added again."""

IMPORT = """\
Make an index from the CLIP embeddings of clip-retrieval or img2dataset (img_emb/*.npy with
metadata/*.parquet, or image.index). Such an index holds no pictures. It can be searched, and it is
the first stage of a two-stage search, but the guard cannot use it."""


def register(commands: terminal.Commands) -> None:
    build = terminal.add_command(
        commands, "build", description=BUILD, epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    build.add_argument("sources", metavar="SOURCE", type=Path, nargs="+", help="pictures")
    build.add_argument("out", metavar="OUT", type=Path, help="index folder to make or update")
    build.add_argument(
        "--descriptor",
        choices=[kind.name for kind in kinds()],
        default=DEFAULT,
        help=f"how pictures are compared (%(default)s). {described(kinds())}",
    )
    build.add_argument("--scales", type=_numbers, metavar="A,B", help="use only these scales (all)")
    for name, takers in _asked().items():
        build.add_argument(f"--{name}", help=takers[0].options[name])
    build.add_argument(
        "--caption-lines", choices=LINES, default=LINES[0],
        help="what is kept of a caption of several lines: all lines, the first that has words, or "
        "all joined by a space (%(default)s); add does the same",
    )  # fmt: skip
    build.add_argument(
        "--caption-length", type=terminal.count, default=CAPTION_LENGTH, metavar="N",
        help="cut captions after this many characters (%(default)s); the build says how many it cut",
    )  # fmt: skip
    _shared(build)
    build.set_defaults(run=_build)

    add = terminal.add_command(
        commands, "add", description=ADD, epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add.add_argument("sources", metavar="SOURCE", type=Path, nargs="+", help="pictures")
    add.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    _shared(add)
    add.set_defaults(run=_add)

    bring = terminal.add_command(commands, "import", description=IMPORT)
    bring.add_argument("folder", metavar="FOLDER", type=Path, help="output of clip-retrieval")
    bring.add_argument("out", metavar="OUT", type=Path, help="index folder to make")
    bring.add_argument(
        "--model", default="ViT-B/32", help="CLIP model that made the embeddings (%(default)s)"
    )
    bring.add_argument("--replace", action="store_true", help="replace OUT if it is an index")
    terminal.add_json(bring)
    bring.set_defaults(run=_import)


def _asked() -> dict[str, list[Kind]]:
    """The options that only some descriptors take -> these descriptors."""
    takers: dict[str, list[Kind]] = {}
    for kind in kinds():
        for name in kind.options:
            takers.setdefault(name, []).append(kind)
    return takers


def _shared(parser: argparse.ArgumentParser) -> None:
    terminal.add_weights(parser)
    terminal.add_device(parser)
    parser.add_argument(
        "--batch", type=terminal.count, default=16, help="pictures embedded at once (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=terminal.count, help="threads that read and decode (one for each core)"
    )
    terminal.add_json(parser)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_numbers.__name__ = "list of numbers"


def _build(options: argparse.Namespace) -> None:
    from amg_core.index import build
    from amg_core.index.sources import open_sources

    chosen = {"scales": options.scales} if options.scales else {}
    for name, takers in _asked().items():
        if value := getattr(options, name):
            if named(options.descriptor) not in takers:
                fit = " or ".join(kind.name for kind in takers)
                raise AMGError(f"--{name} can only be used with --descriptor {fit}.")
            chosen[name] = value
    before = _count(options.out)
    report = build(
        open_sources(options.sources),
        options.out,
        create(options.descriptor, options.weights, **chosen),
        captions=CaptionRule(options.caption_lines, min(options.caption_length, LONGEST_CAPTION)),
        **_how(options),
    )
    _prepare(options.out)
    _tell(options, report)
    if not options.json and before > report.count:
        print(
            f"note: there were {before} pictures before; build keeps only those that SOURCE has now"
        )


def _count(index: Path) -> int:
    """The number of pictures in an existing index, 0 if there is none that can be read."""
    from amg_core.index.format import MANIFEST, parse_manifest

    path = index / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), path).count
    except (OSError, AMGError):
        return 0


def _add(options: argparse.Namespace) -> None:
    from amg_core.index import Index, add
    from amg_core.index.sources import open_sources

    with Index.open(options.index) as index:
        spec = index.spec
    descriptor = terminal.descriptor_of(spec, options.weights)
    report = add(open_sources(options.sources), options.index, descriptor, **_how(options))
    _prepare(options.index)
    _tell(options, report)


def _import(options: argparse.Namespace) -> None:
    from amg_core.index.clip_retrieval import import_clip_retrieval

    show = terminal.progress_printer(sys.stderr)
    _tell(
        options,
        import_clip_retrieval(
            options.folder, options.out, options.model, show, replace_index=options.replace
        ),
    )


def _prepare(path: Path) -> None:
    """Make the search codes of a large index now, and not in the first guarded step."""
    from amg_core.index import Index
    from amg_core.index.search import Searcher

    with Index.open(path) as index:
        for scale in index.spec.scales:
            if len(index.muted) < index.count:
                Searcher(index).prepare(scale)


def _how(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "progress": terminal.progress_printer(sys.stderr),
        "batch": options.batch,
        "device": terminal.device(options.device),
        "workers": options.workers,
    }


def _tell(options: argparse.Namespace, report: BuildReport) -> None:
    if options.json:
        terminal.print_json(
            path=str(report.path),
            count=report.count,
            embedded=report.embedded,
            reused=report.reused,
            duplicates=report.duplicates,
            skipped=[{"source": source, "reason": reason} for source, reason in report.skipped],
            files=report.files,
            captioned=report.captioned,
            notes=report.notes,
            seconds=round(report.seconds, 3),
            hash=report.hash,
        )
        return
    print(f"{report.path}: {report.count} pictures in {report.seconds:.1f} s")
    if report.reused and options.run is not _import:
        print(f"  {report.embedded} files embedded; {report.reused} needed none: pictures it had,"
              " or the same bytes under another name")  # fmt: skip
    why = "" if report.captioned == report.files or report.notes else " (see docs/sources.md)"
    print(f"  {report.captioned} of {report.files} with a caption{why}")
    terminal.print_skipped(report.skipped)
    for note in report.notes:
        print(f"note: {note}")
