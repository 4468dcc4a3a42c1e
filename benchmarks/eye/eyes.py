"""Descriptors of the product, asked as the guard asks them: through an index, both ways round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from amg_core.descriptors import create
from amg_core.images import parts
from amg_core.index.sources.base import Item
from amg_core.similarity import verifier
from amg_core.similarity.metrics import NEIGHBORS

from .. import harness
from .pictures import Picture

Found = tuple[float, int]  # similarity and row of the nearest picture


class Eye(Protocol):
    """A way to recognise pictures."""

    name: str

    def learn(self, rows: list[Picture], folder: Path) -> None:
        """Index `rows`; what has to be stored goes into `folder`, which is temporary."""
        ...

    def look(self, image: Image.Image) -> object:
        """What is searched with: the picture and its mirror image as this eye sees them."""
        ...

    def nearest(self, seen: object, without: list[frozenset[int]]) -> list[Found]:
        """The nearest row, either way round, for each set of rows that are out of the index."""
        ...


IN_PARTS = "+parts"


class ProductEye:
    """A descriptor in full detail, matched as `Matcher` matches.

    name : "kind" or "kind@note"; with "+parts" behind it the parts of a picture are looked at as well,
    as a verdict does.
    """

    def __init__(self, name: str, weights: Path | None = None):
        self.name, self.weights, self.in_parts = name, weights, name.endswith(IN_PARTS)
        self.kind = name.removesuffix(IN_PARTS).partition("@")[0]
        finest = create(self.kind, weights).spec.scales[-1]
        self.descriptor, self.scale = create(self.kind, weights, scales=(finest,)), finest

    def learn(self, rows: list[Picture], folder: Path) -> None:
        self.matcher = harness.matcher(NumberedRows(rows), folder / self.name, self.descriptor)
        self.searcher = self.matcher.searcher
        self.numbers = [int(record.source) for record in self.matcher.index.records()]

    @torch.no_grad()
    def look(self, image: Image.Image) -> torch.Tensor:
        picture = harness.to_tensor(image)
        seen = [picture]
        if self.in_parts:
            seen += [part for part in parts(picture) if not verifier.flat(part)]
        views = [view for one in seen for view in self.matcher._views(one)]
        return torch.cat([self.matcher._embed(view, self.scale) for view in views])

    @torch.no_grad()
    def nearest(self, seen: torch.Tensor, without: list[frozenset[int]]) -> list[Found]:
        wanted = 1 if self.matcher.metric == "cosine" else NEIGHBORS
        most = wanted + max(len(rows) for rows in without)
        values, ids = self.searcher.nearest(seen, self.scale, most)
        rows = [[self.numbers[i] for i in line] for line in ids.tolist()]
        return [self._nearest(seen, values, ids, rows, hidden, wanted) for hidden in without]

    def _nearest(self, seen, values, ids, rows, hidden: frozenset[int], wanted: int) -> Found:
        """The best of all views, as `Matcher._match` takes it, without the hidden rows."""
        found = []
        for view in range(len(seen)):
            kept = [k for k, row in enumerate(rows[view]) if row not in hidden][:wanted]
            similarity, _ = self.matcher._similarities(
                seen[view : view + 1], values[view][kept][None], ids[view][kept], self.scale
            )
            best = int(similarity.argmax())
            found.append((float(similarity[best]), rows[view][kept[best]]))
        return max(found, key=lambda one: one[0])


class NumberedRows:
    """Pictures as a source of `amg_core.index.build`, named by their numbers."""

    def __init__(self, rows: list[Picture]):
        self.name, self.rows = "rows", rows
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Item]:
        for number, picture in enumerate(self.rows):
            yield Item(str(number), "", lambda picture=picture: np.array(picture.load()))


def whole(eyes: list[Eye]) -> list[ProductEye]:
    """The descriptors of the product among them, each once."""
    return [eye for eye in eyes if isinstance(eye, ProductEye) and not eye.in_parts]
