"""How the command line does on real pictures. Installs nothing, and downloads nothing.

    python -m benchmarks.real_pictures FOLDER… [--most 4000] [--sources 200] [--out DIR]

It copies pictures of the folders, holds some out, and plants 14 edits of each of `--sources` of them. Then
it runs the verbs `build`, `search`, `eval` and `dedup` as a person would, in processes of their own, and
prints for each the time of the CPU, pictures a second, and peak memory. Beside them it prints recall and
false alarms:

- `search`: is the source of an edited picture found at rank 1?
- `eval`: which edits are called copies, and which pictures that are not in the index?
- `dedup`: which edits are called duplicates of their source, at which share of false alarms? Beside the
  descriptor alone, pHash, and the public programs that are installed (imagededup, SSCD).

It draws contact sheets of the false alarms of `dedup` and of ten missed copies into `--out`.

`compact` was trained on drawings of openclipart and half of tuxpaint's stamps, so look at the lines of each
folder, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from amg_core.index import Index

from .. import harness
from ..eye.rivals import RIVALS
from . import duplicates, sheets
from .planting import EDITS, Planted, plant


@dataclass(frozen=True)
class Run:
    """One command: seconds of the clock and of the CPU, peak memory in MiB, what it printed."""

    verb: str
    seconds: float
    cpu: float
    peak: float
    printed: str


def command(verb: str, *arguments: object) -> Run:
    """Run a command of the command line with one thread. RuntimeError if it fails."""
    words = [sys.executable, "-m", "index_tools", verb, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as out,
        subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL, env=environment) as process,
    ):
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        printed = out.read().decode()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return Run(verb, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, printed)


def searched(run: Run, planted: Planted) -> list[str]:
    """The share of each edit whose source is at rank 1, and that is called a copy."""
    found: dict[str, list[tuple[bool, bool]]] = {edit: [] for edit in EDITS}
    for line in run.printed.splitlines():
        answer = json.loads(line)
        name = Path(answer["picture"]).name
        first = answer["nearest"][0]["source"] == planted.source[name]
        found[planted.edit[name]].append((first, answer["verdict"]["copy"]))
    lines = ["| edit | source at rank 1 | called a copy |", "|---|---|---|"]
    for edit, seen in found.items():
        if seen:
            shares = [f"{100 * np.mean([one[k] for one in seen]):.0f} %" for k in range(2)]
            lines.append(f"| {edit} | " + " | ".join(shares) + " |")
    return lines


def copies(run: Run) -> str:
    """The share that `eval` calls copies, with its interval, and how many it does not."""
    (one,) = json.loads(run.printed)["sets"]
    figure, count = one["figures"]["copies"], one["figures"]["count"]["value"]
    missed = round(count * (1 - figure["value"] / 100))
    return f"{figure['value']:.1f} % [{figure['low']:.1f}, {figure['high']:.1f}], {missed} of {count} not"


def chosen(planted: Planted, folder: Path, most: int) -> Path:
    """A folder with links to the edited pictures of so many sources that there are at most `most`."""
    folder.mkdir(exist_ok=True)
    sources = sorted(set(planted.source.values()))
    taken = sources[:: max(1, len(planted.source) // max(1, most))]
    for name, source in planted.source.items():
        if source in taken and not (folder / name).exists():
            os.link(planted.copies / name, folder / name)
    return folder


def main() -> None:
    parser = harness.parser("benchmarks.real_pictures", __doc__ or "", out="real_pictures", seed=0)
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    parser.add_argument("--most", type=int, default=4000, help="pictures to index")
    parser.add_argument("--sources", type=int, default=200, help="pictures to edit")
    parser.add_argument("--strangers", type=int, default=200, help="pictures to hold out")
    parser.add_argument("--asked", type=int, default=4000, help="pictures asked for false alarms")
    parser.add_argument("--checked", type=int, default=400, help="edits for search and eval")
    parser.add_argument("--descriptor", default="compact")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    options = harness.parse(parser)
    raise SystemExit(harness.status(lambda: measure(options)))


def measure(options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        planted = plant(
            options.folders, work, most=options.most, sources=options.sources,
            strangers=options.strangers, seed=options.seed, processes=os.cpu_count() or 1,
        )  # fmt: skip
        made = ["--descriptor", options.descriptor]
        weights = ["--weights", options.weights] if options.weights else []
        base, edited = work / "index", work / "edited"
        runs = [
            command("build", planted.pictures, base, *made, *weights),
            command("build", planted.copies, edited, *made, *weights),
        ]
        few = chosen(planted, work / "few", options.checked)
        runs.append(command("search", base, few, "--json", *weights))
        lines = ["### search", "", *searched(runs[-1], planted), ""]
        runs.append(command("eval", few, "--index", base, "--json", *weights))
        lines += ["### eval", "", f"Edits called copies: {copies(runs[-1])}.", ""]
        strangers = command("eval", planted.strangers, "--index", base, "--json", *weights)
        lines += [f"Pictures that are not in the index: {copies(strangers)}.", ""]
        runs.append(command("dedup", base, "--json", "--no-complexity"))
        summary = json.loads(runs[-1].printed)
        with Index.open(base) as index, Index.open(edited) as copied:
            given = duplicates.setting(index, copied, planted, options.asked)
            found = list(duplicates.measures(given, options.rivals))
            sheets.draw(options.out, given, found[1])
            counts = [index.count, copied.count, *[len(list(few.iterdir()))] * 2, index.count]
        lines += ["### dedup", "", duplicates.text(given, found)]
        lines += [
            f"The set itself: {summary['clusters']} clusters, {summary['drop']} to drop. The most certain:",
            "",
            *(f"- {a} = {b} ({value:.2f})" for a, b, value in found[1].worst[:20]),
            "",
        ]
        lines += _costs(runs, counts, found[1].pairs_per_second)
    text = "\n".join(lines)
    figures = {
        "measures": [{**asdict(one), "own": one.own.tolist(), "alarms": one.alarms.tolist()}
                     for one in found],
        "edits": given.edits.tolist(), "kinds": given.kinds.tolist(),
        "runs": [asdict(run) for run in runs],
    }  # fmt: skip
    harness.write(options.out, figures, text)
    print(text)


def _costs(runs: list[Run], counts: list[int], pairs: float) -> list[str]:
    lines = [
        "### Time and memory, one thread",
        "",
        "| verb | pictures | s | s of the CPU | pictures/s of the CPU | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for run, count in zip(runs, counts, strict=True):
        rate = count / max(run.cpu, 1e-9)
        lines.append(
            f"| {run.verb} | {count} | {run.seconds:.0f} | {run.cpu:.0f} | {rate:.1f} | {run.peak:.0f} |"
        )
    return [*lines, "", f"{pairs:.0f} pairs verified a second of the CPU."]


if __name__ == "__main__":
    main()
