"""How much slower each command is on a busy machine, beside the same command on one thread.

    python -m benchmarks.contention PICTURES [--busy 4] [--rounds 3]

Copies of a busy loop compete for the cores. Each command of the command line then runs in turn as it is,
and with OMP_NUM_THREADS=1, and the smallest wall time of each is taken. A ratio of 1 means that threads
cost nothing. The commands start after --settle seconds of load, because they look at the mean of the last
minute: by default as on a machine that has been busy for a while.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amg_core.index.picture import EXTENSIONS

from . import harness

LOOP = "while True: pass"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contention", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("--most", type=int, default=100, help="pictures to build from")
    parser.add_argument("--some", type=int, default=12, help="pictures to evaluate")
    parser.add_argument("--busy", type=int, default=4, help="competing processes")
    parser.add_argument("--settle", type=float, default=60, help="seconds of load before")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    return harness.status(lambda: measure(options))


def measure(options: argparse.Namespace) -> None:
    files = [p for p in sorted(options.pictures.rglob("*")) if p.suffix.lower() in EXTENSIONS]
    files = [p for p in files if p.is_file()][: options.most]
    if len(files) < options.some:
        raise ValueError(f"{options.pictures} has fewer than {options.some} pictures")
    with tempfile.TemporaryDirectory() as folder, busy(options.busy):
        time.sleep(options.settle)
        lines = compare(files, Path(folder), options)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{len(files)} pictures, {options.busy} competing processes, {os.cpu_count()} cores,")
    print(f"load {load:.1f} at the end, best of {options.rounds} rounds, wall seconds\n")
    print(harness.markdown(["command", "as it is", "one thread", "ratio"], lines))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare(files: list[Path], folder: Path, options: argparse.Namespace) -> list[list[str]]:
    inside, outside = folder / "in", folder / "out"
    for name, some in ((inside, files), (outside, files[-options.some :])):
        name.mkdir()
        for number, file in enumerate(some):
            shutil.copy(file, name / f"{number:06}{file.suffix}")
    index, spare = folder / "index", folder / "spare"
    new = ["--threshold", "0.9", "--out", folder / "duplicates"]
    commands = {
        "build": ["build", inside, spare],
        "add": ["add", outside, index],
        "info": ["info", index],
        "search": ["search", index, files[0]],
        "verify": ["verify", index],
        "eval": ["eval", outside, "--index", index],
        "dedup": ["dedup", index, *new],
        "mute": ["mute", index, "*0.*"],
        "remove": ["remove", index, "*1.*", "--dry-run"],
        "export": ["export", index, folder / "exported", "--metadata", "jsonl"],
    }
    seconds(["build", inside, index], folder, {})
    lines = []
    for name, arguments in commands.items():
        best = {"as it is": float("inf"), "one thread": float("inf")}
        for _ in range(options.rounds):
            best["as it is"] = min(best["as it is"], seconds(arguments, folder, {}))
            one = seconds(arguments, folder, {"OMP_NUM_THREADS": "1"})
            best["one thread"] = min(best["one thread"], one)
        first, second = best.values()
        lines.append([name, f"{first:.1f}", f"{second:.1f}", f"{first / second:.2f}"])
        print(*lines[-1], file=sys.stderr, flush=True)
    return lines


def seconds(arguments: list, folder: Path, settings: dict[str, str]) -> float:
    """Wall seconds of one command, in an environment without settings of threads but these."""
    for name in ("spare", "duplicates", "exported"):
        shutil.rmtree(folder / name, ignore_errors=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_"))}
    command = [sys.executable, "-m", "index_tools", *map(str, arguments)]
    started = time.perf_counter()
    done = subprocess.run(command, env=kept | settings, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr}")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
