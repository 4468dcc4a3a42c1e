"""The command `search`: the nearest pictures of an index, and whether a picture is a copy.

Verdict, likeness and similarities come from the same calls as in the node Similarity Probe, so they agree
with it and with each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amg_core.descriptors.registry import guarding
from amg_core.errors import AMGError
from amg_core.limits import COPY
from amg_core.similarity.metrics import likeness

from . import terminal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from amg_core.index import Index
    from amg_core.index.search import Searcher
    from amg_core.index.two_stage import TwoStage
    from amg_core.sheet import Group
    from amg_core.similarity.matcher import Matcher

STDIN = "-"  # paths, one a line


@dataclass(frozen=True)
class Nearest:
    """A picture of the index, and its similarity to the query, in the unit of the descriptor."""

    id: int
    similarity: float
    source: str
    caption: str


@dataclass(frozen=True)
class Answer:
    """What was found for one picture.

    Attributes
    ----------
    nearest : the rows most like the picture or its mirror image, most similar first
    score : likeness of the verdict, or of the first of `nearest` at another scale; None after --rerank
    verdict : `Verdict.to_json`, None at another scale than the finest and after --rerank
    not_compared : candidates of --rerank whose picture is missing
    """

    picture: str
    scale: int
    nearest: list[Nearest]
    score: float | None = None
    verdict: dict[str, object] | None = None
    not_compared: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places", metavar="INDEX… PICTURE…", type=Path, nargs="+",
        help="index folder(s), then pictures, folders, archives or lists of them; - reads paths from "
        "the standard input",
    )  # fmt: skip
    parser.add_argument(
        "-k", type=terminal.count, default=5, help="how many pictures (%(default)s)"
    )
    parser.add_argument("--scale", type=int, help="compare at this side in pixels (full detail)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the pictures found")
    parser.add_argument(
        "--engine", choices=("auto", "exact", "pq4"), default="auto",
        help="the fastest, every row, or 4-bit codes first (%(default)s)",
    )  # fmt: skip
    again = parser.add_argument_group(
        "two stages",
        "rank the 1,000 nearest of a clip index again by a finer descriptor (AMG, LAION)",
    )
    again.add_argument(
        "--rerank", choices=[kind.name for kind in guarding()], help="by this descriptor"
    )
    again.add_argument("--rerank-weights", type=Path, metavar="FILE", help="its weights")
    again.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="folder of the pictures (that of the index)"
    )
    terminal.add_weights(parser)
    terminal.add_device(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object a line for each picture")


def run(options: argparse.Namespace) -> int | None:
    from amg_core.images import to_tensor
    from amg_core.index import Index
    from amg_core.index.search import Searcher
    from amg_core.similarity.matcher import Matcher

    indexes, places = split(options.places)
    device = terminal.device(options.device)
    with Index.combine([Index.open(path) for path in indexes]) as index:
        scale = terminal.scale(index, options.scale)
        descriptor = terminal.descriptor_of(index.spec, options.weights).to(device)
        searcher = Searcher(index, device, options.engine)
        matcher = Matcher(searcher, descriptor)
        stages = _two_stages(options, searcher, matcher) if options.rerank else None
        drawn: list[Group] = []
        done = 0
        for name, pixels in pictures(places):
            picture = to_tensor(pixels, device)
            if stages is not None:
                answer = _reranked(options, index, stages, name, picture)
            else:
                whole = scale == index.spec.scales[-1]
                answer = ask(matcher, name, picture, options.k, None if whole else scale)
            done += 1
            _print(answer, options)
            if options.sheet:
                drawn.append(_group(index, pixels, answer))
        if not done:
            raise AMGError("No picture could be read: give other ones.")
        if options.sheet:
            from amg_core import sheet

            heading = f"the pictures of {index.name} that are nearest"
            terminal.save(sheet.draw(drawn, heading=heading), options.sheet)
            if not options.json:
                print(f"written: {options.sheet}")
    return None


def split(places: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The indexes at the beginning, and the pictures after them. AMGError if one of them is missing.

    The first place is an index in any case, so that a wrong one is named as such.
    """
    from amg_core.index.format import MANIFEST

    count = 1
    while count < len(places) and (places[count] / MANIFEST).is_file():
        count += 1
    if count == len(places):
        raise AMGError(
            "No picture was given: name pictures or folders after the index, or - for stdin."
        )
    return list(places[:count]), list(places[count:])


def pictures(places: Sequence[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels (H, W, 3) uint8 of every picture. Unreadable ones are named on stderr.

    AMGError if the only picture that was given cannot be read.
    """
    from amg_core.index.picture import Unreadable, decode, load_picture
    from amg_core.index.sources import open_source
    from amg_core.index.sources.base import TARS
    from amg_core.index.sources.table import LISTS

    for place in places:
        if str(place) == STDIN:
            lines = (line.rstrip("\n") for line in sys.stdin)
            yield from pictures([Path(line) for line in lines if line])
        elif place.is_dir() or place.name.lower().endswith((".zip", *TARS, *LISTS)):
            source = open_source(place)
            for item in source:
                try:
                    yield f"{place}/{item.source}", decode(item.read(), item.source).pixels
                except Unreadable as error:
                    terminal.warn(f"NOT compared: {place}/{item.source}: {error}")
            for name, reason in source.skipped:
                terminal.warn(f"NOT compared: {place}/{name}: {reason}")
        else:
            try:
                yield str(place), load_picture(place).pixels
            except Unreadable as error:
                if len(places) == 1:
                    step = f"Cannot read {place} ({error}): give another one."
                    raise AMGError(step) from None
                terminal.warn(f"NOT compared: {place}: {error}")


def ask(matcher: Matcher, name: str, picture: Tensor, k: int, scale: int | None = None) -> Answer:
    """The `k` nearest rows of a picture (1, 3, H, W), and its verdict.

    At another `scale` than the finest there is no verdict, because the checks compare in full detail.
    """
    from amg_core.similarity.verdict import verdict

    index = matcher.index
    found = matcher.nearest(picture, k, scale)
    rows = [Nearest(i, value, index.source(i), index.caption(i)) for i, value in found]
    if scale is not None:
        score = float(matcher.match_pictures(picture, scale).score[0])
        return Answer(name, scale, rows, score)
    (one,) = verdict(matcher, picture)
    return Answer(name, matcher.scale_of(picture), rows, one.score, one.to_json())


def _print(answer: Answer, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(asdict(answer), ensure_ascii=False), flush=True)
        return
    print(f"{answer.picture}{_summary(answer)}")
    for one in answer.nearest:
        caption = f"  {terminal.short(one.caption)}" if one.caption else ""
        print(f"{one.similarity:10.4f}  #{one.id}  {one.source}{caption}")
    if answer.not_compared:
        print(
            f"{answer.not_compared} candidates were not compared: their pictures are not in "
            f"{options.pictures}"
        )


def _summary(answer: Answer) -> str:
    """Likeness and verdict, as the node Similarity Probe shows them."""
    if answer.score is None:
        return ""
    if answer.verdict is None:
        return (
            f": likeness {likeness(answer.score):.2f} (copy above {COPY}), at scale {answer.scale}"
        )
    both = "likeness {likeness:.2f}, composition {composition:.2f} (copy above {limit})"
    return f": {both.format(**answer.verdict, limit=COPY)}. {answer.verdict['words']}"


def _two_stages(options: argparse.Namespace, searcher: Searcher, matcher: Matcher) -> TwoStage:
    """Ranks the candidates of a clip index again by a finer descriptor."""
    from amg_core.descriptors import create
    from amg_core.images import to_tensor
    from amg_core.index.picture import load_picture
    from amg_core.index.two_stage import TwoStage

    index, folder = searcher.index, options.pictures or Path()

    def original(i: int) -> Tensor | None:
        path = folder / index.source(i)
        if not path.is_file():
            return None
        return to_tensor(load_picture(path).pixels)[0]

    fine = create(options.rerank, options.rerank_weights).to(searcher.device)
    return TwoStage(searcher, matcher.descriptor, fine, original)


def _reranked(
    options: argparse.Namespace, index: Index, stages: TwoStage, name: str, picture: Tensor
) -> Answer:
    (ranked,) = stages.search(picture, options.k)
    if not len(ranked.ids):
        folder = options.pictures or Path()
        raise AMGError(
            f"None of the {len(ranked.missing)} candidates has its picture in {folder.absolute()}: "
            f"give the folder of the pictures with --pictures."
        )
    sign = 1 if stages.fine.spec.metric == "cosine" else -1
    rows = [
        Nearest(i, sign * value, index.source(i), index.caption(i))
        for value, i in zip(ranked.values.tolist(), ranked.ids.tolist(), strict=True)
    ]
    return Answer(name, stages.scale, rows, not_compared=len(ranked.missing))


def _group(index: Index, pixels: np.ndarray, answer: Answer) -> Group:
    from PIL import Image

    from amg_core import sheet

    tiles = [sheet.Tile(Image.fromarray(pixels), ["query"], sheet.ASKED)]
    for one in answer.nearest:
        lines = [f"{one.similarity:.4f}", one.source, one.caption]
        tiles.append(sheet.Tile(index.thumbnail(one.id), lines))
    return sheet.Group(tiles, f"{answer.picture}{_summary(answer)}")
