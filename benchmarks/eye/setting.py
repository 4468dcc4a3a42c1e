"""What all tables of this program are measured with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .eyes import Eye
from .pictures import Library


@dataclass(frozen=True)
class Setting:
    """For table 3 the eyes have learnt the rows of the library."""

    collection: Library
    eyes: list[Eye]
    out: Path
    seed: int
    autoencoder: Path | None  # folder of taef2_encoder.pth and taef2_decoder.pth
    full: bool  # all sizes in table 1
