"""The papers' two-stage search: CLIP finds candidates, a finer descriptor ranks them.

AMG takes 1,000 neighbours from a CLIP index of LAION and compares them by SSCD. This is for collections
that exist only as CLIP embeddings (`clip_retrieval`). If the pictures are available, an index of the fine
descriptor is cheaper to search and misses nothing. This search cannot find a picture that is not among
CLIP's candidates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arithmetic import plain_arithmetic
from ..descriptors.base import Descriptor, Shrinking
from ..errors import AMGError
from .picture import Unreadable
from .search import Searcher

CANDIDATES = 1000  # as in the paper
CACHED = 1 << 14  # embeddings kept: 32 MiB of SSCD


@dataclass(frozen=True)
class Ranked:
    """The answer for one picture.

    values : Tensor (k',) float32
        Exact values of the fine descriptor: descending cosines, or for "nl2" ascending Euclidean
        distances.
    ids : Tensor (k',) int64
        Rows of the coarse index. Among equal values the lowest comes first.
    missing : tuple of int
        Candidates that were not compared because their picture could not be loaded.
    """

    values: Tensor
    ids: Tensor
    missing: tuple[int, ...]


class TwoStage:
    """Searches a CLIP index, and embeds the candidates as they are needed.

    Parameters
    ----------
    coarse : Searcher
        On an index made with `clip`.
    clip, fine : Descriptor
        Both on the device of `coarse`.
    pictures : callable
        Row id -> its picture (3, H, W) in [0, 1]. If it cannot be loaded, it returns None or raises
        `Unreadable` or OSError. It is called once for each candidate that is not cached.
    candidates : int
        Number of candidates.
    scale : int, optional
        Scale of `fine`, by default its finest.
    batch : int
        Candidates embedded at once.
    cached : int
        Number of embeddings that are cached. The least recently used ones are dropped.

    Raises
    ------
    AMGError
        The index was not made with `clip`.
    """

    def __init__(
        self,
        coarse: Searcher,
        clip: Descriptor,
        fine: Descriptor,
        pictures: Callable[[int], Tensor | None],
        candidates: int = CANDIDATES,
        *,
        scale: int | None = None,
        batch: int = 16,
        cached: int = CACHED,
    ) -> None:
        if coarse.index.spec != clip.spec:
            raise AMGError(
                f"The index {coarse.index.name} was made with {coarse.index.spec.id} "
                f"({coarse.index.spec.preprocessing}), not with the CLIP given: choose the weights it was "
                f"made with."
            )
        if min(candidates, batch, cached) < 1:
            raise ValueError("candidates, batch and cached must be at least 1")
        self.coarse, self.clip, self.fine, self.pictures = coarse, clip, fine, pictures
        self.candidates, self.batch, self.cached = candidates, batch, cached
        self.scale = fine.spec.scales[-1] if scale is None else scale
        self._cache: OrderedDict[int, Tensor | None] = OrderedDict()

    def search(self, pictures: Tensor, k: int) -> list[Ranked]:
        """The k nearest candidates of each picture (B, 3, H, W) in [0, 1], processed one by one."""
        return [self._search(picture[None], k) for picture in pictures]

    def _search(self, picture: Tensor, k: int) -> Ranked:
        with plain_arithmetic(self.coarse.device):
            picture = picture.to(self.coarse.device)
            about = self.clip.embed(picture, self.clip.spec.scales[-1])
            _, found = self.coarse.nearest(
                about, self.coarse.index.spec.scales[-1], self.candidates
            )
            rows = self.rows(found[0].tolist())
            known = {i: row for i, row in rows.items() if row is not None}
            ids, missing = sorted(known), tuple(sorted(rows.keys() - known))
            if not ids:
                return Ranked(torch.empty(0), torch.empty(0, dtype=torch.int64), missing)
            query = self.fine.embed(picture, self.scale)[0]
            near = torch.stack([known[i] for i in ids]).to(query)
            cosine = self.fine.spec.metric == "cosine"
            values = (near * query).sum(1) if cosine else (near - query).square().sum(1).sqrt()
            values, order = torch.sort(values, descending=cosine, stable=True)
            return Ranked(values[:k], torch.tensor(ids)[order[:k].cpu()], missing)

    def rows(self, ids: list[int]) -> dict[int, Tensor | None]:
        """Fine embeddings (D,) float32 on the CPU, by row id. None for a row without picture."""
        wanted = dict.fromkeys(ids)
        rows = {i: self._cache[i] for i in wanted if i in self._cache}
        unknown = [i for i in wanted if i not in rows]
        with plain_arithmetic(self.coarse.device):
            for start in range(0, len(unknown), self.batch):
                rows |= self._embed(unknown[start : start + self.batch])
        for i in wanted:
            self._cache[i] = rows[i]
            self._cache.move_to_end(i)
        while len(self._cache) > self.cached:
            self._cache.popitem(last=False)
        return rows

    def _embed(self, ids: list[int]) -> dict[int, Tensor | None]:
        """Embed at most `batch` rows so that a row depends only on its picture.

        Networks round differently for different batch sizes, so every batch is padded.
        """
        rows: dict[int, Tensor | None] = dict.fromkeys(ids)
        loaded = dict(self._load(ids))
        if not loaded:
            return rows
        fine = self.fine
        made: Sequence[Tensor]
        if isinstance(fine, Shrinking):
            small = [fine.shrink(picture[None], self.scale) for picture in loaded.values()]
            small += [torch.zeros_like(small[0])] * (self.batch - len(small))
            made = fine.embed(torch.cat(small), self.scale)[: len(loaded)].unbind()
        else:
            made = [fine.embed(p[None], self.scale)[0] for p in loaded.values()]
        return rows | {i: row.float().cpu().clone() for i, row in zip(loaded, made, strict=True)}

    def _load(self, ids: list[int]) -> Iterator[tuple[int, Tensor]]:
        for i in ids:
            try:
                picture = self.pictures(i)
            except (Unreadable, OSError):
                continue
            if picture is not None:
                yield i, picture.to(self.coarse.device)
