"""Table 2: how often a picture that is not in the index passes the limits, by the size of the index.

Asked for are held-out photographs, their quarters, and held-out stamps; in the index are drawings, stamps
and many cuts of other photographs, never one of the same family, nor one that the second check finds to
be a copy. How similar the nearest of more rows would be than there are pictures here is continued
from each query's own nearest rows: distances below the TAIL-th smallest fall off as a power (Hill's
estimator, of all queries of a kind together). Photographs are only compared with cuts of photographs,
and drawn pictures with drawn ones: an index is mostly of one kind, and there the nearest is nearer.

What is measured is then the share above the limit of `amg_core.limits`, with rows of real pictures as far
as they go and made-up rows of the same covariance beyond, and with a share of near-duplicates among the
rows. What these pictures say of the limits themselves is printed below the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from amg_core import limits
from amg_core.descriptors import create
from amg_core.descriptors.base import Descriptor
from amg_core.similarity import background, metrics, verifier

from ..harness import Table, between, markdown
from .eyes import whole
from .pictures import PHOTOGRAPH, Library
from .setting import Setting

CUTS = 12  # of each photograph among the rows, 30 to 60 % of the side
CHECKED = 4  # rows of each query that the second check looks at, to find relations
TAIL = 20  # nearest rows of a query that its tail is continued from
SHARES = (0.5, 0.99, 0.9975)  # quantiles: what is typical, 1 in 100, 1 in 400
COUNTS = (30, 1_000, 20_000, 1_000_000)
DUPLICATES = (0.0, 0.01, 0.1, 0.5)
ALIKE = 0.95  # cosine of a near-duplicate with its row
BLOCK = 50_000
SMALL = 192  # px a side that pictures are kept at


@dataclass(frozen=True)
class Squares:
    """Squares (N, 3, SMALL, SMALL) uint8, the family of each, and which are cuts or photographs."""

    squares: Tensor
    family: np.ndarray
    photographic: np.ndarray


def run(setting: Setting) -> Table:
    queries, rows = gather(setting.collection, setting.seed)
    same = related(queries, rows)
    figures: dict = {"queries": len(queries.family), "rows": len(rows.family)}
    lines, fitted = [], {}
    for eye in whole(setting.eyes):
        descriptor = create(eye.kind, eye.weights)
        for scale in descriptor.spec.scales:
            found = Similarities(descriptor, scale, queries, rows, same)
            fitted[f"{eye.name} {scale}"] = found.levels()
            if scale == descriptor.spec.scales[-1] and descriptor.spec.metric == "cosine":
                figures[eye.name] = found.measured(setting.seed)
                lines += [_line(eye.name, count, one) for count, one in figures[eye.name].items()]
    figures["levels"] = fitted
    report = "\n".join(
        f"    {name}: {', '.join(str(tuple(round(v, 3) for v in level)) for level in each)}"
        for name, each in fitted.items()
    )
    note = (
        f"Share of {figures['queries']} pictures that are not in the index and pass its limit, "
        f"intended 1 %, in % (95 % interval).\n\n"
    )
    heading = ["descriptor, rows", *(f"{100 * d:.0f} % near-duplicates" for d in DUPLICATES)]
    text = (
        "### Table 2: false alarms by the size of the index\n\n" + note + markdown(heading, lines)
    )
    return Table(
        f"{text}\nLevels (median, passed by 1 in 100, by 1 in 400) for {limits.ROWS} rows:\n\n{report}\n",
        figures,
    )


def gather(library: Library, seed: int) -> tuple[Squares, Squares]:
    """What is asked for, and the rows."""
    rng = np.random.default_rng(seed)
    names = {row: min(library.families[row]) for row in library.families}
    asked: list[tuple] = []
    held: list[tuple] = []
    for row in library.sources:
        picture = library.rows[row]
        photographic = picture.kind == PHOTOGRAPH
        image = picture.load()
        asked.append((_square(image), names[row], photographic))
        if photographic:
            asked += [(_square(part), names[row], True) for part in _quarters(image)]
            held += [(_square(_cut(image, rng)), names[row], True) for _ in range(CUTS)]
    for row, picture in enumerate(library.rows):
        family = names.get(row, -1 - row)
        held.append((_square(picture.load()), family, picture.kind == PHOTOGRAPH))
    return _packed(asked), _packed(held)


def _packed(parts: list[tuple]) -> Squares:
    squares, families, photographic = zip(*parts, strict=True)
    stack = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    return Squares(stack, np.array(families), np.array(photographic))


def _square(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BILINEAR, reducing_gap=3))


def _quarters(image: Image.Image) -> list[Image.Image]:
    w, h = image.size
    boxes = [
        (x * w // 2, y * h // 2, (x + 1) * w // 2, (y + 1) * h // 2) for x in (0, 1) for y in (0, 1)
    ]
    return [image.crop(box) for box in boxes]


def _cut(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    share = rng.uniform(0.3, 0.6)
    w, h = (round(share * side) for side in image.size)
    x, y = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
    return image.crop((x, y, x + w, y + h))


def related(queries: Squares, rows: Squares) -> Tensor:
    """Which rows are no strangers to which queries, (Q, R) bool: family, or copies by the second check.

    The second check looks at the rows that are nearest by `pixel`.
    """
    same = torch.from_numpy(queries.family[:, None] == rows.family[None])
    small = create("pixel")
    mine, theirs = (_embedded(small, p.squares, 16) for p in (queries, rows))
    near = (
        torch.cdist(mine, theirs).masked_fill(same, torch.inf).topk(CHECKED, largest=False).indices
    )
    for i, ids in enumerate(near):
        picture = queries.squares[i : i + 1].float() / 255
        score = verifier.registered(picture, rows.squares[ids].float() / 255).score
        same[i, ids[score > limits.REGISTERED]] = True
    return same


class Similarities:
    """Similarity of every query that is not flat to every stranger of its kind.

    values : list of Tensor, a query each, descending; shift : list of float, by how much score
    normalisation moves the levels of each.
    """

    @torch.no_grad()
    def __init__(
        self, descriptor: Descriptor, scale: int, queries: Squares, rows: Squares, same: Tensor
    ):
        self.descriptor, self.scale, self.same = descriptor, scale, same
        self.cosine = descriptor.spec.metric == "cosine"
        self.perfect = metrics.PERFECT[descriptor.spec.metric]
        self.rows = _embedded(descriptor, rows.squares, scale)
        both = (queries.squares, queries.squares.flip(-1))
        self.views = [_embedded(descriptor, squares, scale) for squares in both]
        self.kinds = {
            kind: torch.from_numpy(np.flatnonzero(rows.photographic == kind))
            for kind in (True, False)
        }
        self.shift = torch.zeros(len(self.views[0]))
        others = background.rows(descriptor.spec, scale)
        if self.cosine and others is not None:
            usual = (self.views[0] @ others.T).topk(limits.BACKGROUND_NEAREST, dim=1).values
            self.shift = limits.shift(descriptor.spec, scale, usual.mean(dim=1))
        self.asked = [
            i for i in range(len(same)) if not verifier.flat(queries.squares[i : i + 1] / 255)
        ]
        self.kind = [bool(queries.photographic[i]) for i in self.asked]
        self.values = []
        for i, kind in zip(self.asked, self.kind, strict=True):
            ids = self.kinds[kind][~same[i, self.kinds[kind]]]
            best = torch.stack([self._to(view[i], self.rows[ids]) for view in self.views])
            self.values.append(best.amax(dim=0).sort(descending=True).values)
        self.power = {kind: self._power(kind) for kind in (True, False)}

    def _to(self, query: Tensor, rows: Tensor) -> Tensor:
        if self.cosine:
            return rows @ query
        near = (rows - query).norm(dim=1).topk(min(300, len(rows)), largest=False).indices
        chosen = rows[near]
        spread = metrics.structure(chosen).clamp_min(1e-6)
        value = -metrics.nl2(metrics.matched(query, chosen), chosen, spread)
        found = torch.full((len(rows),), -2.0)
        found[near] = torch.where(metrics.is_flat(chosen), -2.0, value)
        return found

    def _power(self, kind: bool) -> float:
        """Hill's estimator: distances below the TAIL-th smallest fall off with this power."""
        steps = [
            (self.perfect - v[: TAIL + 1]).clamp_min(1e-4).log()
            for v, k in self._each()
            if k == kind
        ]
        return 1 / float(np.mean([float((d[TAIL] - d[:TAIL]).mean()) for d in steps]))

    def _each(self):
        return zip(self.values, self.kind, strict=True)

    def passing(self, level: float, count: int) -> float:
        """Mean chance that the nearest of `count` rows passes `level`, of the kind where it is larger."""
        chances: dict[bool, list[float]] = {True: [], False: []}
        for (values, kind), i in zip(self._each(), self.asked, strict=True):
            own = level + float(self.shift[i])
            share = float((values > own).float().mean())
            edge = self.perfect - float(values[TAIL])
            if own > values[TAIL] and count > len(values) / 4:
                left = max(0.0, self.perfect - own)
                share = TAIL / len(values) * (left / max(edge, 1e-6)) ** self.power[kind]
            chances[kind].append(1 - (1 - min(share, 1.0)) ** count)
        return max(float(np.mean(each)) for each in chances.values() if each)

    def levels(self) -> list[tuple[float, ...]]:
        """One for each of SHARES, for each of `limits.ROWS`, by bisection."""
        return [tuple(self._level(count, share) for share in SHARES) for count in limits.ROWS]

    def _level(self, count: int, share: float) -> float:
        low, high = -2.0, self.perfect
        for _ in range(24):
            middle = (low + high) / 2
            above = self.passing(middle, count) > 1 - share
            low, high = (middle, high) if above else (low, middle)
        return high

    @torch.no_grad()
    def measured(self, seed: int) -> dict:
        """{count: {share of duplicates: {"alarms", "count"}}} on real rows, made-up ones beyond."""
        generator = torch.Generator().manual_seed(seed)
        report: dict = {}
        for count in COUNTS:
            report[count] = {}
            for share in DUPLICATES:
                hits, asked = 0, 0
                for kind, ids in self.kinds.items():
                    pairs = zip(self.asked, self.kind, strict=True)
                    wanted = torch.tensor([i for i, other in pairs if other == kind])
                    if not len(wanted):
                        continue
                    best = self._nearest(ids, wanted, count, share, generator)
                    _, limit = limits.levels(self.descriptor.spec, self.scale, count)
                    hits += int((best > limit + self.shift[wanted]).sum())
                    asked += len(wanted)
                report[count][share] = {"alarms": hits, "count": asked}
        return report

    def _nearest(self, ids: Tensor, wanted: Tensor, count: int, share: float, generator) -> Tensor:
        """Similarity (Q,) of the nearest of `count` rows, to the queries `wanted`."""
        queries = torch.cat([view[wanted] for view in self.views])
        best = torch.full((len(wanted),), -1.0)
        for rows, of in self._index(ids, count, share, generator):
            scores = (queries @ rows.T).reshape(2, len(wanted), -1).amax(dim=0)
            if of is not None:
                scores[self.same[wanted][:, of]] = -1
            best = torch.maximum(best, scores.amax(dim=1))
        return best

    def _index(self, ids: Tensor, count: int, share: float, generator) -> Iterator[tuple]:
        """Rows in blocks, and which they are or are near-duplicates of: real, made-up, near-duplicates."""
        copies = round(count * share)
        own = ids[torch.randperm(len(ids), generator=generator)[: count - copies]]
        real = self.rows[own]
        yield real, own
        covariance = torch.cov(real.T) + 1e-6 * torch.eye(real.shape[1])
        spread, mean = torch.linalg.cholesky(covariance), real.mean(dim=0)
        for size in _blocks(count - copies - len(own)):
            noise = torch.randn((size, real.shape[1]), generator=generator)
            yield F.normalize(noise @ spread.T + mean), None
        for size in _blocks(copies):
            of = torch.randint(len(own), (size,), generator=generator)
            noise = F.normalize(torch.randn((size, real.shape[1]), generator=generator))
            yield F.normalize(ALIKE * real[of] + (1 - ALIKE**2) ** 0.5 * noise), own[of]


def _blocks(count: int) -> list[int]:
    return [min(BLOCK, count - i) for i in range(0, count, BLOCK)]


def _embedded(descriptor: Descriptor, squares: Tensor, scale: int) -> Tensor:
    return torch.cat([descriptor.embed(part.float() / 255, scale) for part in squares.split(100)])


def _line(name: str, count: int, one: dict) -> list[str]:
    cells = []
    for each in one.values():
        share = 100 * each["alarms"] / each["count"]
        cells.append(f"{share:.1f} ({between(each['alarms'], each['count'], 1)})")
    return [f"{name}, {count:,}", *cells]
