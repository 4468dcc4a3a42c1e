"""Pictures that are already in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ...errors import AMGError
from ..picture import pixel_hash
from .base import Item, Names, clean


class Pictures:
    """A batch of pictures, as ComfyUI's IMAGE sockets carry them.

    A picture is named by the hash of its pixels, so that adding the same batch again changes nothing.

    Parameters
    ----------
    images : (B, H, W, C) or (H, W, C) tensor or array
        Float in [0, 1] (values outside are clipped) or uint8 in 0..255; C is 3, 1 (grey) or 4
        (RGB with alpha, which is composited on white).
    captions : sequence of str, str or None
        One for each picture, one for all of them, or none.
    name : str
        For messages, and the folder of the pictures' names.

    Raises
    ------
    AMGError
        Another shape, or captions that do not fit it.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        captions: Sequence[str] | str | None = None,
        name: str = "pictures",
    ) -> None:
        shape = tuple(images.shape)
        images = images[None] if len(shape) == 3 else images
        if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or 0 in images.shape[1:]:
            raise AMGError(
                f"{name}: pictures of shape {shape} cannot be used: give (batch, height, width, "
                f"channels) with 1, 3 or 4 channels."
            )
        texts = [captions or ""] if isinstance(captions, str | None) else list(captions)
        if len(texts) == 1:
            texts *= len(images)
        if len(texts) != len(images):
            raise AMGError(
                f"{name}: {len(texts)} captions for {len(images)} pictures: give one for each, "
                f"one for all, or none."
            )
        self.name = name
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._images, self._captions = images, texts

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Item]:
        self.skipped.clear()
        names = Names()
        for number, (image, caption) in enumerate(zip(self._images, self._captions, strict=True)):
            pixels = _eight_bits(image)
            if pixels is None:
                reason = "has values that are not finite"
                self.skipped.append((f"{self.name}/{number}", reason))
                continue
            source = names(f"{self.name}/{pixel_hash(pixels)[:16]}")
            yield Item(source, clean(caption), partial(np.asarray, pixels))


def _eight_bits(image: Tensor | np.ndarray) -> np.ndarray | None:
    """(H, W, C) -> (H, W, 3) uint8, None where values are not finite."""
    if isinstance(image, Tensor):  # bfloat16 has no numpy counterpart
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    image = np.asarray(image)
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image.copy()
    values = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    if not np.isfinite(values).all():
        return None
    if values.shape[2] == 4:
        alpha = values[..., 3:].clip(0, 1)
        values = values[..., :3] * alpha + (1 - alpha)
    values = np.broadcast_to(values, (*values.shape[:2], 3))
    return (values.clip(0, 1) * 255).round().astype(np.uint8)
