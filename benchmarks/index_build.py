"""How fast an index is built, beside how fast its descriptor alone is, in one run.

    python -m benchmarks.index_build PICTURES [--descriptor sscd --weights FILE] [--device cuda]

Prints pictures a second of (a) the descriptor on pictures that are decoded and in memory already,
in the same batches; (b) reading, hashing and decoding alone; (c) the build, with everything; the
ratio of (c) to (a); and peak memory for a half and for all of the pictures.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from amg_core.descriptors import create
from amg_core.index import build
from amg_core.index.embedding import Embedder, read_ahead
from amg_core.index.sources import open_source

from . import harness


def main() -> None:
    parser = harness.parser("benchmarks.index_build", __doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--descriptor", default="pixel")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--most", type=int, default=1000, help="pictures to take")
    parser.add_argument("--memory", action="store_true", help="only build, and print peak memory")
    options = harness.parse(parser)
    descriptor = create(options.descriptor, options.weights)
    measure(descriptor, options)


class First:
    """The first `most` pictures of a source."""

    def __init__(self, source, most: int) -> None:
        self.source, self.most = source, most
        self.name, self.notes, self.skipped = source.name, source.notes, source.skipped

    def __len__(self) -> int:
        return min(len(self.source) or self.most, self.most)

    def __iter__(self):
        return islice(self.source, self.most)


def measure(descriptor, options) -> None:
    source = First(open_source(options.pictures), options.most)
    if not options.memory:
        pictures = [seen.picture for seen in islice(read_ahead(source, lambda _: False), 256)]
        groups = [pictures[i : i + options.batch] for i in range(0, len(pictures), options.batch)]
        groups = [group for group in groups if len(group) == options.batch] or groups
        bare = [alone(descriptor, groups, options)]
        started = time.perf_counter()
        count = sum(1 for _ in read_ahead(source, lambda _: False))
        reading = count / (time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        report = build(
            source, Path(folder) / "index", descriptor, device=options.device, batch=options.batch
        )
    if options.memory:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{report.count} {peak:.0f}")
        return
    bare.append(alone(descriptor, groups, options))  # before and after: machines are noisy
    building = (report.embedded + report.reused) / report.seconds
    print(f"{report.count} pictures, {descriptor.spec.id}, batches of {options.batch}")
    print(f"descriptor alone     {bare[0]:8.1f} and {bare[1]:.1f} pictures/s, before and after")
    print(f"reading alone        {reading:8.1f} pictures/s")
    print(f"build                {building:8.1f} pictures/s")
    print(f"build / descriptor   {2 * building / sum(bare):8.2f}")
    for most in (options.most // 4, options.most // 2, options.most):
        arguments = [str(options.pictures), "--most", str(most), "--memory"]
        arguments += ["--descriptor", options.descriptor, "--device", options.device]
        arguments += ["--weights", str(options.weights)] if options.weights else []
        command = [sys.executable, "-m", "benchmarks.index_build", *arguments]
        count, peak = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()
        print(f"peak memory of a build of {count:>6} pictures {peak:>6} MiB")


def alone(descriptor, groups, options) -> float:
    """Pictures a second of the descriptor, on decoded pictures in full batches."""
    embedder = Embedder(descriptor, options.device, options.batch)
    embedder(groups[0])
    started = time.perf_counter()
    for group in groups:
        embedder(group)
    return sum(map(len, groups)) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
