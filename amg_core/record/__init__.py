"""Records: what a check of one finished picture found, so that it stands on its own.

A record is an `amg-report/2` (`amg_core.report`, `amg_core/report.schema.json`) about one picture, with the
entries `picture`, `nearest`, `limits`, `answer`, `models` and `checksum`.

`checked.py` makes one. `stored.py` finds and writes those of a file. `decided.py` keeps what people
decided. `verified.py` says what has changed. `encoded.py` writes pictures with their metadata, and
`credentials.py` signs them.
"""

from .checked import ANSWERS, NEAREST, check_picture, readable

__all__ = ["ANSWERS", "NEAREST", "check_picture", "readable"]
