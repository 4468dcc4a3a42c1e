"""Kill programs while they change an index, and look at what is left of it.

    python -m benchmarks.kill --moments 100 --seed 0

Each verb (build, build again with more pictures, add, mute, remove, merge over an older index) runs in a
process that is killed (SIGKILL) at a random moment of the time that it takes. Then the index has to open,
with every hash right, and be the old one or the new one to the last byte; and the same verb, run again,
has to end in the new one. Prints how often it was which; ends with 1 where anything else came of it. Needs
a POSIX system. What a power cut does to unflushed files is not tried here.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from amg_core.descriptors import create
from amg_core.index import add, build, merge, mute, remove
from tests.index.helpers import fill
from tests.index.killing import KILLED, Change, child, end, make_small_shards


def verbs(work: Path) -> dict[str, Change]:
    """Every verb on a small index of several shards."""
    pixel = create("pixel")
    few, many = fill(work / "few", 9), fill(work / "many", 15, first=2)
    other, old = work / "other index", work / "old index"

    def second(entry) -> bool:
        return entry.source == "p001.png"

    tasks: dict[str, Callable[[Path], object]] = {
        "build": lambda out: build(few, out, pixel, batch=2),
        "build again": lambda out: build(many, out, pixel, batch=2),
        "add": lambda out: add(many, out, pixel, batch=2),
        "mute": lambda out: mute(out, second, "mine"),
        "remove": lambda out: remove(out, second),
        "merge": lambda out: merge([old, other], out, replace=True),
    }
    for pictures, index in ((few, old), (many, other)):
        assert end(child(lambda p=pictures, i=index: build(p, i, pixel))) == 0
    absent = work / "absent"
    return {
        verb: Change(
            task, absent if verb == "build" else old, work / f"after {verb}",
            drafts=verb in ("mute", "remove"),
        )
        for verb, task in tasks.items()
    }  # fmt: skip


def seconds(change: Change, out: Path) -> float:
    """How long it takes undisturbed: the median of three."""
    taken = []

    def timed(at: Path) -> None:
        started = time.perf_counter()
        end(child(lambda: change.change(at)))
        taken.append(time.perf_counter() - started)

    for _ in range(3):
        change.attempt(out, timed)
    return statistics.median(taken)


def tried(change: Change, out: Path, moments: int, rng: random.Random) -> list[str]:
    """What was found after each killing: "old", "new", or what is wrong.

    And "ended" where it was too late: that does not count as a moment.
    """
    takes = seconds(change, out)
    found: list[str] = []
    while len(found) - found.count("ended") < moments:
        moment, codes = rng.uniform(0, 1.05) * takes, []

        def kill(at: Path, moment: float = moment, codes: list[int] = codes) -> None:
            pid = child(lambda: change.change(at))
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            codes.append(end(pid))
            assert codes[0] in (0, KILLED), "it failed by itself"

        try:
            new = change.attempt(out, kill)
        except Exception as error:
            found.append(f"after {moment * 1000:.1f} ms: {type(error).__name__}: {error}")
        else:
            found.append(("new" if new else "old") if codes[0] == KILLED else "ended")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=100, help="killings of each verb")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_small_shards()
    wrong = killed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for verb, change in verbs(work).items():
            found = tried(change, work / "out", options.moments, random.Random(options.seed))
            bad = [words for words in found if words not in ("old", "new", "ended")]
            for words in bad:
                print(f"{verb}: {words}")
            counts = ", ".join(f"{found.count(word)} {word}" for word in ("old", "new", "ended"))
            print(f"{verb:12}{counts}, {len(bad)} wrong", flush=True)
            wrong, killed = wrong + len(bad), killed + len(found) - found.count("ended")
    print(f"{killed} killed, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
