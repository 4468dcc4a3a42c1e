"""What all tables share: what they are made of, intervals, Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .eyes import Eye
from .pictures import Library


@dataclass(frozen=True)
class Setting:
    """What a table is measured with. The eyes have learnt the rows of the library."""

    collection: Library
    eyes: list[Eye]
    out: Path
    seed: int
    autoencoder: Path | None = None  # folder of taef2_encoder.pth and taef2_decoder.pth


@dataclass(frozen=True)
class Table:
    """A finished table: its text in Markdown, and all its figures, for JSON."""

    text: str
    figures: dict


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, square = hits / count, z * z / count
    middle = share + square / 2
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def markdown(heading: list[str], lines: list[list[str]]) -> str:
    rows = [heading, ["---"] + ["---:"] * (len(heading) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
