"""Damage everything that the program reads, at random, thousands of times.

    python -m benchmarks.fuzz --mutations 3000 --seed 0
    python -m benchmarks.fuzz --seed 0 --case 17        one of them again, with its traceback

Indexes, search codes, weights, captions, calibrations and reports are damaged: bytes flipped, cut, grown
or changed places, wild numbers and texts in manifests, databases and headers; half of it as chance would,
half with hashes and checksums made right again, as somebody would who means harm. Allowed are two ends:
an AMGError that is not long, or right reading, which for files that hashes guard means the content that
they had. Each is read in a worker process that may take SECONDS of processor time and MOST_BYTES of
memory. Prints what else came of it; ends with 1 if anything did. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from amg_core.errors import AMGError
from benchmarks.fuzz.targets import TARGETS, Case, Target

SECONDS, LONGEST_WAIT = 5, 120  # of processor time; of waiting, for a pipe say
MOST_BYTES = 1 << 30  # beyond what the program takes before it reads
LONGEST_WORDS = 2000
REFUSED, READ = "refused", "read"


class Bench:
    """Sound files of every target in `folder`, and what reading them gives."""

    def __init__(self, folder: Path, seed: int, targets: Mapping[str, Target]) -> None:
        self.folder, self.seed, self.targets = folder, seed, targets
        for name, target in targets.items():
            (folder / name).mkdir()
            target.make(folder / name)

    def draw(self, number: int) -> tuple[str, Case, Path]:
        """Case `number` of this seed, ready to be read: the target's name, it, and its folder."""
        rng = random.Random(f"{self.seed}:{number}")
        name = rng.choice(list(self.targets))
        place = self.folder / "now"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / name, place)
        return name, self.targets[name].mutate(place, rng), place

    def end(self, name: str, case: Case, place: Path) -> str:
        """What reading a case comes to: REFUSED, READ, or what is wrong with it."""
        read = self.targets[name].read
        try:
            found = read(case.path)
        except AMGError as error:
            return _refusal(error)
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
        if case.guarded and found != read(self.folder / name / case.path.relative_to(place)):
            return "read as something else than it was, without a word"
        return READ


def _refusal(error: AMGError) -> str:
    if len(str(error)) > LONGEST_WORDS:
        return f"AMGError of {len(str(error))} characters: {str(error)[:200]}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"memory ran out: {error}"
        cause = cause.__cause__ or cause.__context__
    return REFUSED


def run(bench: Bench, numbers: Sequence[int]) -> list[tuple[int, str, str, str]]:
    """(number, target, what was done, what came of it) of each case, read in worker processes."""
    ends: list[tuple[int, str, str, str]] = []
    while len(ends) < len(numbers):
        receiving, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(receiving)
            _work(bench, numbers[len(ends) :], sending)
        os.close(sending)
        drawn: tuple[int, str, str] | None = None
        with os.fdopen(receiving) as lines:
            for line in lines:
                if line.endswith("\n"):
                    answer = json.loads(line)
                    if drawn is None:
                        drawn = tuple(answer)
                    else:
                        ends.append((*drawn, answer))
                        drawn = None
        status = os.waitpid(pid, 0)[1]
        if drawn is not None:
            ends.append((*drawn, _death(status)))
        elif status:
            raise RuntimeError(f"a worker could not begin a case: {_death(status)}")
    return ends


def _work(bench: Bench, numbers: Sequence[int], sending: int) -> None:
    """Tell what is to be read, then what came of it, case by case; ends the process."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, held + MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(sending, "w") as out:
            for number in numbers:
                name, case, place = bench.draw(number)
                print(json.dumps([number, name, case.done]), file=out, flush=True)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.alarm(LONGEST_WAIT)
                end = bench.end(name, case, place)
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                print(json.dumps(end), file=out, flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _death(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"took over {SECONDS} s"
    if code == -signal.SIGALRM:
        return f"waited for over {LONGEST_WAIT} s"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, in this process")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seed, TARGETS)
        if options.case is not None:
            name, case, place = bench.draw(options.case)
            print(f"{name}: {case.done}")
            TARGETS[name].read(case.path)
            print(bench.end(name, case, place))
            return 0
        ends = run(bench, range(options.mutations))
    counts = Counter((name, end if end in (REFUSED, READ) else "WRONG") for _, name, _, end in ends)
    for number, name, done, end in ends:
        if end not in (REFUSED, READ):
            print(f"--seed {options.seed} --case {number}: {name}: {done}\n    {end}")
    for name in TARGETS:
        answer = ", ".join(f"{counts[name, end]} {end}" for end in (READ, REFUSED, "WRONG"))
        print(f"{name:12}{answer}")
    wrong = sum(count for (_, end), count in counts.items() if end == "WRONG")
    print(f"{len(ends)} mutations, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
