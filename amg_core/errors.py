"""The exception whose message is shown to users."""

from __future__ import annotations

from typing import Any

SHOWN_AS = "amg"  # in place of the module


class AMGError(RuntimeError):
    """An error that the user can fix. The message names the file or widget and the next step.

    Hosts show its full name before the message. The true one begins with the folder of the pack, which
    differs from machine to machine, so it is "amg.AMGError". The same goes for derived classes.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__module__ = SHOWN_AS


AMGError.__module__ = SHOWN_AS
