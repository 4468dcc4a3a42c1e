"""Changes of an index in processes that are killed, and what is left of it. Needs a POSIX system."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from amg_core.errors import AMGError
from amg_core.index import Index, writer
from amg_core.index import format as fmt
from tests.index.helpers import content

KILLED = -signal.SIGKILL


def make_small_shards() -> None:
    """In this process and those that it forks: so that a few pictures take many steps."""
    import PIL.features  # what every child would import anew
    import PIL.PngImagePlugin
    import PIL.WebPImagePlugin

    PIL.Image.init()
    writer.ROWS_PER_SHARD, writer.PART_ROWS = 4, 3


def child(task: Callable[[], object]) -> int:
    """The id of a process that runs `task` and ends: with 0, or with 1 and its error printed."""
    pid = os.fork()
    if pid == 0:
        try:
            task()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def end(pid: int) -> int:
    """How a process ended: its exit code, minus the signal where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole(out: Path) -> dict | None:
    """The content of a sound index, None where there is none; AssertionError where it is damaged."""
    try:
        with Index.open(out) as index:
            index.verify()
        return content(out)
    except AMGError as error:
        assert "no index" in str(error) or "interrupted" in str(error), error
        return None


class Change:
    """One change of an index, and what it makes of it undisturbed.

    Parameters
    ----------
    change : callable
        Changes the index in the folder that it is given.
    before, after : Path
        The index before it (or no folder: the change makes one), and a place for it afterwards.
    drafts : bool
        Run again it may have nothing to do: then what was half written stays until the next change.
    """

    def __init__(
        self, change: Callable[[Path], object], before: Path, after: Path, drafts: bool = False
    ) -> None:
        self.change, self.before = change, before
        self.usual = {fmt.MANIFEST, fmt.SHARDS, fmt.CACHE} | ({fmt.BUILD} if drafts else set())
        self._begin(after)
        assert end(child(lambda: change(after))) == 0
        self.old, self.new = whole(before), whole(after)
        assert self.old != self.new

    def _begin(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if self.before.exists():
            shutil.copytree(self.before, out)

    def attempt(self, out: Path, kill: Callable[[Path], object]) -> bool:
        """Let `kill` begin the change at `out` and kill it; whether the index is the new one then.

        AssertionError where it is neither the old one nor the new one, or where the same change
        does not succeed afterwards, or leaves anything lying about.
        """
        self._begin(out)
        kill(out)
        found = whole(out)
        assert found in (self.old, self.new), "neither the old index nor the new one"
        assert end(child(lambda: self.change(out))) == 0, "the same change again failed"
        assert whole(out) == self.new, "the same change again made another index"
        left = {path.name for path in out.iterdir()} - self.usual
        assert not left, f"{left} was left lying about"
        return found == self.new
