"""How fast an index is built, beside how fast its files are decoded at all, in one run.

    python -m benchmarks.index_build PICTURES… [--descriptor sscd --weights FILE] [--device cuda]

Takes --most pictures, evenly among all. Prints pictures a second of (a) the descriptor on pictures that are
decoded and shrunk already, in the same batches; (b) a loop that only decodes the same files with Pillow,
over as many threads; (c) a build with a descriptor that computes nothing, so everything else: reading,
hashing, decoding, thumbnails, writing; (d) the build. The ratios are those of (c) and (b), in turns: of
wall time, and of processor time, which other programs disturb less. Where imagededup is installed, the rate
of its perceptual hash on the same files is printed, over as many processes. Peak memory of a build is that
above a process which has loaded everything and read nothing.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from amg_core.descriptors import create
from amg_core.descriptors.pixel import PixelDescriptor
from amg_core.index import build
from amg_core.index.embedding import Embedder, read_ahead
from amg_core.index.picture import Unreadable
from amg_core.index.sources import open_sources

from . import harness


def main() -> None:
    parser = harness.parser("benchmarks.index_build", __doc__)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--descriptor", default="compact")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--most", type=int, default=1000, help="pictures to take")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="only build, and print peak memory")
    options = harness.parse(parser)
    descriptor = create(options.descriptor, options.weights)
    source = Evenly(open_sources(options.pictures), options.most)
    if options.memory:
        memory(source, descriptor, options)
    else:
        speed(source, descriptor, options)


class Evenly:
    """`most` pictures of a source, evenly among all."""

    def __init__(self, source, most: int) -> None:
        self.source, self.most, self.step = source, most, max(1, len(source) // most)
        self.name, self.notes, self.skipped = source.name, source.notes, source.skipped

    def __len__(self) -> int:
        return min(len(self.source) // self.step or self.most, self.most)

    def __iter__(self):
        return islice(self.source, 0, self.step * self.most, self.step)


def speed(source, descriptor, options) -> None:
    embedder = Embedder(descriptor, options.device, options.batch)
    some = islice(read_ahead(source, lambda _: False, embedder.prepare), 256)
    ready = [seen.prepared for seen in some if seen.prepared is not None]
    groups = [ready[i : i + options.batch] for i in range(0, len(ready), options.batch)]
    bare = [alone(embedder, groups)]
    count, megapixels, largest = decoded(source, options.workers)  # and the files are in the cache
    loops, rests = [], []
    for _ in range(options.rounds):
        loops.append(timed(lambda: decoded(source, options.workers)))
        rests.append(timed(lambda: built(source, Nothing(), options)))
    report = built(source, descriptor, options)
    bare.append(alone(embedder, groups))  # before and after: machines are noisy
    loop, rest = (tuple(map(min, zip(*times, strict=True))) for times in (loops, rests))
    print(f"{count} pictures of {megapixels:.0f} megapixels in sum, the largest {largest:.1f};")
    print(f"{report.count} in the index, {len(report.skipped)} not; {descriptor.spec.id}, "
          f"batches of {options.batch}, {options.workers} workers")  # fmt: skip
    rates = [1 / one for one in bare]
    print(f"descriptor alone      {rates[0]:8.1f} and {rates[1]:.1f} pictures/s, before and after")
    print(f"build                 {count / report.seconds:8.1f} pictures/s, {report.seconds:.1f} s")
    for name, (wall, cpu) in (("decode loop", loop), ("all but descriptor", rest)):
        print(f"{name:20}  {count / wall:8.1f} pictures/s, {wall:.1f} s, {cpu:.1f} s of processor")
    print(f"all but descriptor / decode loop      {rest[0] / loop[0]:.2f} of wall time, "
          f"{rest[1] / loop[1]:.2f} of processor time", flush=True)  # fmt: skip
    with suppress(ImportError):
        hashed, wall = perceptual_hash(source, options.workers)
        print(
            f"imagededup's PHash    {count / wall:8.1f} pictures/s, {wall:.1f} s, {hashed} hashes"
        )
    for most in (options.most // 4, options.most):
        arguments = [*map(str, options.pictures), "--most", str(most), "--memory"]
        arguments += ["--descriptor", options.descriptor, "--device", options.device]
        arguments += ["--workers", str(options.workers)]
        arguments += ["--weights", str(options.weights)] if options.weights else []
        command = [sys.executable, "-m", "benchmarks.index_build", *arguments]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


class Nothing(PixelDescriptor):
    """A descriptor that costs no time."""

    def __init__(self) -> None:
        super().__init__((16,))

    def shrink(self, pictures, scale):
        return torch.zeros(1, 3, scale, scale)

    def embed(self, pictures, scale):
        return pictures.flatten(1)


def built(source, descriptor, options):
    with tempfile.TemporaryDirectory() as folder:
        return build(
            source, Path(folder) / "index", descriptor, device=options.device,
            batch=options.batch, workers=options.workers,
        )  # fmt: skip


def alone(embedder: Embedder, groups) -> float:
    """Seconds a picture of the descriptor, on pictures that are ready, in full batches."""
    embedder(groups[0])
    watch = harness.Watch()
    for group in groups:
        embedder(group)
    return watch.seconds / sum(map(len, groups))


def perceptual_hash(source, workers: int) -> tuple[int, float]:
    """Hash the same files by imagededup: number of hashes, seconds. ImportError where it is missing."""
    from imagededup.methods import PHash

    with tempfile.TemporaryDirectory() as folder:
        for number, item in enumerate(source):
            name = f"{number:06}{Path(item.source).suffix}"
            (Path(folder) / name).write_bytes(item.read())
        watch = harness.Watch()
        found = PHash(verbose=False).encode_images(folder, num_enc_workers=workers)
        return len(found), watch.seconds


def timed(work) -> tuple[float, float]:
    """Seconds of wall and of processor time."""
    started, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - busy


def decoded(source, workers: int) -> tuple[int, float, float]:
    """Decode every picture as a whole with Pillow: number, megapixels, those of the largest."""
    Image.MAX_IMAGE_PIXELS = None
    sizes: list[float] = []
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in source:
            waiting.append(pool.submit(decode, item))
            if len(waiting) >= 2 * workers:
                sizes.append(waiting.popleft().result())
        sizes += [one.result() for one in waiting]
    return len(sizes), sum(sizes), max(sizes)


def decode(item) -> float:
    """Megapixels; 0 where it cannot be read."""
    try:
        with Image.open(BytesIO(item.read())) as image:
            image.convert("RGB")
            return image.width * image.height / 1e6
    except (OSError, Unreadable):
        return 0.0


def memory(source, descriptor, options) -> None:
    before = peak()
    report = built(source, descriptor, options)
    print(f"peak memory of a build of {report.count:>6} pictures   {peak() - before:>6.0f} MiB "
          f"above the {before:.0f} of a process that has read nothing")  # fmt: skip


def peak() -> float:
    """Peak memory of this process in MiB. Linux: what `getrusage` gives may be that of its parent."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
