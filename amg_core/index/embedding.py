"""Embeds the pictures of a source: reads ahead in parallel, and embeds in batches of one fixed shape."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch

from ..arithmetic import plain_arithmetic
from ..descriptors.base import Descriptor, Shrinking, embed_scales
from ..images import to_tensor
from . import format as fmt
from .picture import Picture, Unreadable, decode, pixel_hash
from .sources import Item

BATCH_PIXELS = 1 << 25  # a batch holds no more than this many pixels (or one larger picture)


@dataclass(frozen=True)
class Seen:
    """An item that was read.

    `picture` and `thumbnail` are None if the picture is in the index already or cannot be used. In the
    second case `problem` says why, and `sha256` may be "".
    """

    source: str
    caption: str
    sha256: str = ""
    picture: Picture | None = None
    thumbnail: bytes | None = None
    problem: str = ""


def read_ahead(
    items: Iterable[Item], known: Callable[[str], bool], workers: int | None = None
) -> Iterator[Seen]:
    """Read, hash and decode the items in `workers` threads. The results come in order.

    A picture for which `known(sha256)` is true is not decoded. At most two items for each thread are in
    memory. Decoding, hashing, resizing and file access all release Python's global lock.
    """
    workers = workers or min(32, max(2, os.cpu_count() or 1))
    waiting: deque[Future[Seen]] = deque()
    with ThreadPoolExecutor(workers, "amg-read") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_read, item, known))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(item: Item, known: Callable[[str], bool]) -> Seen:
    sha256 = ""
    try:
        data = item.read()
        sha256 = (
            pixel_hash(data) if isinstance(data, np.ndarray) else hashlib.sha256(data).hexdigest()
        )
        if known(sha256):
            return Seen(item.source, item.caption, sha256)
        picture = decode(data, item.source)
        return Seen(item.source, item.caption, sha256, picture, encode_thumbnail(picture.pixels))
    except Unreadable as error:
        return Seen(item.source, item.caption, sha256, problem=str(error))


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

    def full(self, pictures: list[Picture]) -> bool:
        """Whether `pictures` fill a batch."""
        area = sum(picture.pixels.shape[0] * picture.pixels.shape[1] for picture in pictures)
        return len(pictures) >= self.batch or area >= BATCH_PIXELS

    def __call__(self, pictures: list[Picture]) -> dict[int, np.ndarray]:
        """Embed at most `batch` pictures: {scale: (n, D) float16}."""
        with plain_arithmetic(self.device):
            tensors = [to_tensor(picture.pixels, self.device) for picture in pictures]
            descriptor = self.descriptor
            if isinstance(descriptor, Shrinking):
                found = {s: self._rows(descriptor, tensors, s) for s in descriptor.spec.scales}
            else:  # its input size depends on the picture
                each = [embed_scales(descriptor, tensor) for tensor in tensors]
                found = {scale: torch.cat([rows[scale] for rows in each]) for scale in each[0]}
            with np.errstate(over="ignore"):
                return {s: rows.float().cpu().numpy().astype("<f2") for s, rows in found.items()}

    def _rows(self, descriptor: Shrinking, tensors: list[torch.Tensor], scale: int) -> torch.Tensor:
        small = [descriptor.shrink(tensor, scale) for tensor in tensors]
        small += [torch.zeros_like(small[0])] * (self.batch - len(small))
        return descriptor.embed(torch.cat(small), scale)[: len(tensors)]


def encode_thumbnail(pixels: np.ndarray) -> bytes:
    """A thumbnail as WebP, or as JPEG if there is no WebP. Its longest side is at most THUMBNAIL_SIDE
    pixels. Small pictures are not enlarged."""
    from PIL import Image, features

    image = Image.fromarray(pixels)
    image.thumbnail((fmt.THUMBNAIL_SIDE, fmt.THUMBNAIL_SIDE))
    file = BytesIO()
    image.save(file, "WEBP" if features.check("webp") else "JPEG", quality=85)
    return file.getvalue()
