"""Build, look at and search an index from a terminal. Results go to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from amg_core.errors import AMGError

ABOUT = """\
An index holds the pictures that a generation must not copy. Make one from a folder of pictures,
then choose it in the AMG nodes."""

STEPS = """\
a first index, step by step:
  python -m index_tools build  my_pictures  my_index
  python -m index_tools info   my_index
  python -m index_tools search my_index  some_picture.png

captions (used to steer away from a picture's prompt; best the very prompts it was trained with):
  a .txt beside the picture, or metadata.jsonl (file_name, text), or a .csv (file_name, text)

exit codes: 0 done, 1 it did not work (one line says why), 2 wrong command line, 130 interrupted"""

BUILD = """\
Index all pictures below FOLDER (png, jpg, webp, bmp, tiff) into the folder OUT. An index that is
already there is replaced in one step, at the end; until then it stays as it is."""

DESCRIPTOR = """\
how pictures are compared. pixel: needs nothing, finds copies that are alike pixel by pixel.
sscd: finds copies that are cropped, recoloured or recomposed; needs its weights file"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may be beyond the terminal's alphabet
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders' remarks on odd files; reasons are reported
            options.run(options)
        sys.stdout.flush()
        return 0
    except AMGError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; an index that was there is unchanged", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        detail = " ".join(str(error).split())
        print(f"error: unexpected {type(error).__name__}: {detail}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m index_tools",
        description=ABOUT,
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    build = commands.add_parser("build", help="make an index of a folder", description=BUILD)
    build.add_argument("folder", metavar="FOLDER", type=Path, help="pictures, with their captions")
    build.add_argument("out", metavar="OUT", type=Path, help="index folder to make or replace")
    build.add_argument(
        "--descriptor",
        choices=("pixel", "sscd"),
        default="pixel",
        help=DESCRIPTOR + " (%(default)s)",
    )
    build.add_argument("--batch", type=_count, default=16, help="pictures at once (%(default)s)")
    _shared(build)
    build.set_defaults(run=_build)

    info = commands.add_parser(
        "info", help="what an index holds", description="Verify an index and say what it holds."
    )
    info.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    info.add_argument("--json", action="store_true", help="one JSON object on stdout")
    info.set_defaults(run=_info)

    search = commands.add_parser(
        "search",
        help="nearest pictures of a picture",
        description="Find the pictures of an index that are nearest to a picture.",
    )
    search.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    search.add_argument("picture", metavar="PICTURE", type=Path, help="picture file")
    search.add_argument("-k", type=_count, default=5, help="how many (%(default)s)")
    search.add_argument("--scale", type=int, help="compare at this side in pixels (full detail)")
    _shared(search)
    search.set_defaults(run=_search)
    return parser


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights file of sscd")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, … (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


_count.__name__ = "number above 0"  # argparse names the type in its message


def _build(options: argparse.Namespace) -> None:
    from amg_core.descriptors import create
    from amg_core.index import build

    report = build(
        options.folder,
        options.out,
        create(options.descriptor, options.weights),
        progress=progress_printer(sys.stderr),
        batch=options.batch,
        device=_device(options.device),
    )
    if options.json:
        _print_json(
            path=str(report.path),
            count=report.count,
            skipped=[{"source": source, "reason": reason} for source, reason in report.skipped],
            notes=report.notes,
            seconds=round(report.seconds, 3),
            hash=report.hash,
        )
        return
    print(f"{report.path}: {report.count} pictures in {report.seconds:.1f} s")
    if report.skipped:
        print(f"{len(report.skipped)} pictures are NOT in the index:")
        for source, reason in report.skipped:
            print(f"  {source}: {reason}")
    for note in report.notes:
        print(f"captions: {note}")


def _info(options: argparse.Namespace) -> None:
    from amg_core.index import Index
    from amg_core.index.format import describe

    with Index.open(options.index) as index:
        captions = sum(bool(index.caption(i)) for i in range(index.count))
        size = sum(path.stat().st_size for path in index.path.iterdir() if path.is_file())
        if options.json:
            _print_json(
                path=str(index.path),
                name=index.name,
                count=index.count,
                captions=captions,
                descriptor=index.spec.to_json(),
                created=index.created,
                bytes=size,
                hash=index.hash,
            )
            return
        print(f"{index.path}: a sound index")
        print(f"  pictures    {index.count}, {captions} with a caption")
        print(f"  descriptor  {describe(index.spec)}")
        print(f"  created     {index.created}, {size / 1e6:.1f} MB")
        print(f"  hash        {index.hash}")


def _search(options: argparse.Namespace) -> None:
    import torch

    from amg_core.descriptors import create
    from amg_core.index import Index
    from amg_core.index.picture import Unreadable, load_picture
    from amg_core.index.search import Searcher

    device = _device(options.device)
    with Index.open(options.index) as index:
        scale = options.scale or index.spec.scales[-1]
        if scale not in index.spec.scales:
            scales = ", ".join(map(str, index.spec.scales))
            raise AMGError(f"Index {index.name} has no scale {scale}: choose one of {scales}.")
        name = "sscd" if index.spec.id.startswith("sscd") else index.spec.id
        descriptor = create(name, options.weights)
        index.check_descriptor(descriptor.spec)
        try:
            pixels = load_picture(options.picture).pixels
        except Unreadable as error:
            raise AMGError(f"Cannot read {options.picture} ({error}): give another one.") from None
        picture = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            query = descriptor.to(device).embed(picture, scale)
        values, ids = Searcher(index, device).nearest(query, scale, options.k)
        measure = "similarity" if index.spec.metric == "cosine" else "distance"
        found = [
            {"id": i, measure: value, "source": index.source(i), "caption": index.caption(i)}
            for value, i in zip(values[0].tolist(), ids[0].tolist(), strict=True)
        ]
    if options.json:
        _print_json(picture=str(options.picture), scale=scale, nearest=found)
        return
    meaning = "1 = identical" if measure == "similarity" else "0 = identical"
    print(f"{measure} at scale {scale} ({meaning})")
    for entry in found:
        caption = f"  {' '.join(entry['caption'].split())}" if entry["caption"] else ""
        print(f"{entry[measure]:10.4f}  #{entry['id']}  {entry['source']}{caption}")


def _device(name: str):
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AMGError(f"Device {name!r} cannot be used ({reason}): try --device cpu.") from None


def _print_json(**fields: object) -> None:
    print(json.dumps(fields, indent=1))


def progress_printer(stream: TextIO) -> Callable[[int, int, str], None]:
    """A `progress` callback: one line kept up to date on a terminal, else a line every 5 s."""
    started = time.monotonic()
    live = stream.isatty()
    last = started if not live else 0.0

    def show(done: int, total: int, source: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < (0.2 if live else 5.0):
            return
        last = now
        rate = done / max(now - started, 1e-6)
        line = f"{done}/{total} pictures, {rate:.1f}/s, {_clock((total - done) / rate)} left"
        if live:
            print(f"\r{line:<60}", end="\n" if done == total else "", file=stream, flush=True)
        else:
            print(line, file=stream, flush=True)

    return show


def _clock(seconds: float) -> str:
    """90 -> '1:30'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
