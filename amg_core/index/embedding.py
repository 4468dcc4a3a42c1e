"""Embeds the pictures of a source: reads ahead in parallel, and embeds in batches of one fixed shape."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TypeAlias

import numpy as np
import torch

from ..arithmetic import plain_arithmetic
from ..descriptors.base import Descriptor, Shrinking, embed_scales
from ..images import to_tensor
from ..threads import one_thread
from . import format as fmt
from .picture import Picture, Unreadable, decode, pixel_hash, room
from .sources import Item

BATCH_BYTES = 1 << 26  # a batch holds no more bytes of pictures than this (or one larger picture)
FLOAT_BYTES = 16  # about what a pixel takes while a picture is shrunk

Prepared: TypeAlias = "dict[int, torch.Tensor] | torch.Tensor"


@dataclass(frozen=True)
class Seen:
    """An item that was read.

    `prepared` (`Embedder.prepare`) and `thumbnail` are None if the picture is in the index already or
    cannot be used. In the second case `problem` says why, and `sha256` may be "". `width`, `height` and
    `flaw` are those of the `Picture`.
    """

    source: str
    caption: str
    sha256: str = ""
    prepared: Prepared | None = None
    width: int = 0
    height: int = 0
    flaw: str = ""
    thumbnail: bytes | None = None
    problem: str = ""


def read_ahead(
    items: Iterable[Item],
    known: Callable[[str], bool],
    prepare: Callable[[Picture], Prepared],
    workers: int | None = None,
) -> Iterator[Seen]:
    """Read, hash, decode and `prepare` the items in `workers` threads. The results come in order.

    A picture for which `known(sha256)` is true is not decoded. At most two items for each thread are in
    memory. Decoding, hashing, resizing and file access all release Python's global lock.
    """
    workers = workers or min(32, max(2, os.cpu_count() or 1))
    waiting: deque[Future[Seen]] = deque()
    with ThreadPoolExecutor(workers, "amg-read") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_read, item, known, prepare))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(item: Item, known: Callable[[str], bool], prepare: Callable[[Picture], Prepared]) -> Seen:
    sha256 = ""
    try:
        data = item.read()
        sha256 = (
            pixel_hash(data) if isinstance(data, np.ndarray) else hashlib.sha256(data).hexdigest()
        )
        if known(sha256):
            return Seen(item.source, item.caption, sha256)
        one = decode(data, item.source)
    except Unreadable as error:
        return Seen(item.source, item.caption, sha256, problem=str(error))
    return Seen(
        item.source, item.caption, sha256, prepare(one), one.width, one.height, one.flaw,
        encode_thumbnail(one.pixels),
    )  # fmt: skip


class Embedder:
    """Embeds pictures of any size so that a row depends only on its picture.

    Networks round differently for different batch sizes. So every batch is padded to `batch` pictures
    of the descriptor's input size, and a build that was interrupted ends with the same rows as one that
    was not. Moves the descriptor to `device`.
    """

    def __init__(self, descriptor: Descriptor, device: torch.device | str, batch: int) -> None:
        with torch.inference_mode(False):
            self.descriptor = descriptor.to(device)
        self.device, self.batch = torch.device(device), batch

    def prepare(self, picture: Picture) -> Prepared:
        """What is kept of a picture until its batch is full. For any thread.

        It is the picture at the size of each scale, {scale: (1, 3, s, s)}, so that no batch of large
        pictures is ever held. If the descriptor's input size depends on the picture, it is the pixels,
        (H, W, 3) uint8.
        """
        descriptor = self.descriptor
        if not isinstance(descriptor, Shrinking):
            return torch.from_numpy(picture.pixels.copy())
        height, width = picture.pixels.shape[:2]
        with room.taken(FLOAT_BYTES * height * width), one_thread(), plain_arithmetic("cpu"):
            tensor = to_tensor(picture.pixels)
            return {scale: descriptor.shrink(tensor, scale) for scale in descriptor.spec.scales}

    def full(self, prepared: list[Prepared]) -> bool:
        """Whether pictures fill a batch."""
        return len(prepared) >= self.batch or sum(map(_bytes, prepared)) >= BATCH_BYTES

    def __call__(self, prepared: list[Prepared]) -> dict[int, np.ndarray]:
        """Embed at most `batch` pictures: {scale: (n, D) float16}."""
        with plain_arithmetic(self.device):
            descriptor = self.descriptor
            if isinstance(descriptor, Shrinking):
                small = [one for one in prepared if isinstance(one, dict)]
                found = {s: self._rows(descriptor, small, s) for s in descriptor.spec.scales}
            else:
                whole = [one for one in prepared if isinstance(one, torch.Tensor)]
                each = [
                    embed_scales(descriptor, to_tensor(one.numpy(), self.device)) for one in whole
                ]
                found = {scale: torch.cat([rows[scale] for rows in each]) for scale in each[0]}
            with np.errstate(over="ignore"):
                return {s: rows.float().cpu().numpy().astype("<f2") for s, rows in found.items()}

    def _rows(
        self, descriptor: Shrinking, prepared: list[dict[int, torch.Tensor]], scale: int
    ) -> torch.Tensor:
        small = [one[scale] for one in prepared]
        small += [torch.zeros_like(small[0])] * (self.batch - len(small))
        return descriptor.embed(torch.cat(small).to(self.device), scale)[: len(prepared)]


def _bytes(prepared: Prepared) -> int:
    parts = prepared.values() if isinstance(prepared, dict) else [prepared]
    return sum(part.nbytes for part in parts)


def encode_thumbnail(pixels: np.ndarray) -> bytes:
    """A thumbnail as WebP, or as JPEG if there is no WebP. Its longest side is at most THUMBNAIL_SIDE
    pixels. Small pictures are not enlarged."""
    from PIL import Image, features

    image = Image.fromarray(pixels)
    image.thumbnail((fmt.THUMBNAIL_SIDE, fmt.THUMBNAIL_SIDE), reducing_gap=1.0)
    file = BytesIO()
    if features.check("webp"):
        image.save(file, "WEBP", quality=85, method=2)  # half the time of the usual 4, 3 % larger
    else:
        image.save(file, "JPEG", quality=85)
    return file.getvalue()
