"""Finds pictures that are already there by the SHA-256 of their files."""

from __future__ import annotations

import numpy as np

KEY = 16  # bytes of a digest that are kept: 128 bits, in all 24 bytes a picture with its place


class Digests:
    """A map from digests to places for millions of pictures, in sorted arrays that are merged.

    A place is (shard, row), two numbers that the caller chooses. Of equal digests the first one added is
    found. `find` may be called from other threads while `add` runs.
    """

    def __init__(self) -> None:
        self._levels: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._levels)

    def add(self, digests: np.ndarray, shard: int) -> None:
        """Add (n, 32) uint8 digests as rows 0 .. n-1 of `shard`."""
        if not len(digests):
            return
        places = (np.int64(shard) << 32) | np.arange(len(digests), dtype=np.int64)
        levels = [*self._levels, _sorted(_keys(digests), places)]
        # Each level is at least twice as long as the next, so levels are few and merges rare.
        while len(levels) > 1 and len(levels[-2][0]) < 2 * len(levels[-1][0]):
            newer, older = levels.pop(), levels.pop()
            levels.append(_sorted(*map(np.concatenate, zip(older, newer, strict=True))))
        self._levels = tuple(levels)

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """The place of the picture with that digest (32 bytes), or None."""
        key = np.frombuffer(digest[:KEY], f"S{KEY}")[0]
        for keys, places in self._levels:
            at = int(np.searchsorted(keys, key))
            if at < len(keys) and keys[at] == key:
                place = int(places[at])
                return place >> 32, place & 0xFFFFFFFF
        return None

    def find_all(self, digests: np.ndarray) -> np.ndarray:
        """Which of the digests (n, 32) have been added, (n,) bool."""
        wanted = _keys(digests)
        found = np.zeros(len(wanted), bool)
        for keys, _ in self._levels:
            at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            found |= keys[at] == wanted
        return found


def _keys(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests[:, :KEY]).view(f"S{KEY}").ravel()


def _sorted(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")  # stable: of equal digests the older is found
    return keys[order], places[order]
