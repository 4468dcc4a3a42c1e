"""Bytes and JSON trees, damaged at random. Pure: what comes out depends on the generator alone."""

from __future__ import annotations

import copy
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

WILD_NUMBERS = (
    *(0, 1, -1, 2, 127, 255, 256, 32_767, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, -(1 << 63)),
)
WILD_TEXTS = (
    "",
    "\0",
    "../../x",
    "/",
    "a" * 70_000,
    "\u202e",
    "\ufeff",
    "é",
    "'; DROP TABLE pictures",
)
WILD = (
    *(None, True, False, 0.5, -0.0, math.nan, math.inf, -math.inf, 1e308, 10**30, -(10**400)),
    *(*WILD_NUMBERS, *WILD_TEXTS, "\ud800", [], {}, [[]], [1], {"a": 1}),
)  # what JSON can say


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it. Without bytes there is nothing to do but to grow."""
    do = rng.choice(KINDS) if data else _grown
    return do.__name__.strip("_"), do(data, rng)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    """1 to 8 bits."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _written_over(data: bytes, rng: random.Random) -> bytes:
    """Up to 64 bytes by random ones, or by one byte."""
    at, count = rng.randrange(len(data)), rng.randint(1, 64)
    new = rng.choice((rng.randbytes(count), bytes(count), b"\xff" * count))
    return data[:at] + new[: len(data) - at] + data[at + count :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    """At the end, or a piece within."""
    at = rng.randrange(len(data))
    return data[:at] + rng.choice((b"", data[at + rng.randint(1, len(data)) :]))


def _grown(data: bytes, rng: random.Random) -> bytes:
    """By random bytes, zeros or itself, at the end or within."""
    more = rng.choice((rng.randbytes(rng.randint(1, 300)), bytes(rng.randint(1, 5000)), data))
    at = rng.choice((len(data), rng.randint(0, len(data))))
    return data[:at] + more + data[at:]


def _swapped(data: bytes, rng: random.Random) -> bytes:
    """Two pieces of one length."""
    count = rng.randint(1, max(1, len(data) // 4))
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    count = min(count, b - a, len(data) - b)
    return (
        data[:a]
        + data[b : b + count]
        + data[a + count : b]
        + data[a : a + count]
        + data[b + count :]
    )


def _numbered(data: bytes, rng: random.Random) -> bytes:
    """One number of 2, 4 or 8 bytes becomes a wild one, in either byte order."""
    size, layout = rng.choice(((2, "H"), (4, "I"), (8, "Q")))
    number = rng.choice(WILD_NUMBERS) % (1 << 8 * size)
    at = rng.randrange(len(data))
    new = struct.pack(rng.choice("<>") + layout, number)
    return data[:at] + new[: len(data) - at] + data[at + size :]


KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flipped, _written_over, _cut, _grown, _swapped, _numbered),
)


def wild_json(tree: Any, rng: random.Random) -> tuple[str, Any]:
    """A copy of a tree of which one value is another, is gone or is there twice; and which."""
    tree = copy.deepcopy(tree)
    holder, key, where = rng.choice(list(_places(tree)))
    act = rng.random()
    if act < 0.1:
        del holder[key]
        return f"{where} gone", tree
    if act < 0.2 and isinstance(holder, list):
        holder.append(holder[key])
        return f"{where} twice", tree
    if act < 0.3 and type(holder[key]) is int:
        value: Any = holder[key] + rng.choice((-1, 1))
    else:
        value = rng.choice(WILD)
    holder[key] = value
    return f"{where} = {value!r:.60}", tree


def _places(tree: Any, where: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(holder, key, words) of every value below."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key, f"{where}/{key}"
        if isinstance(value, (dict, list)):
            yield from _places(value, f"{where}/{key}")
