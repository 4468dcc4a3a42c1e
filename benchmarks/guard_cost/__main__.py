"""What the guard costs, as ratios to plain sampling of the same network in the same run.

    COMFYUI_PATH=… python -m benchmarks.guard_cost
    COMFYUI_PATH=… python -m benchmarks.guard_cost --sizes 256 512 768 --batches 1 4

Random weights in the sizes of Stable Diffusion 1.5, drawn through the host's own sampler with the plugin's
own hook (see `host`). All rows are sampled in turn, `--rounds` times, so that what disturbs the machine
disturbs all alike; on a GPU after one round to warm up and to count multiply-accumulates, which takes
too much time there (on a CPU about half a per cent, of every row). A step is one
evaluation as the sampler sees it: both branches, the guidance scale and the guard. Few steps are
taken at noise levels spread evenly over those of a run of 30, for the guard's cost depends on them.
On a CPU seconds are processor time, and the peak is the resident memory of a process of its own.

Rows:
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .. import harness
from . import host, measure, parts, rows

GIB, GIGA = 1 << 30, 1e9


def main(arguments: list[str] | None = None) -> dict:
    options = _parse(arguments)
    host.load(options.device)
    with tempfile.TemporaryDirectory() as folder:
        scene = rows.Shared(Path(folder), options.small, options.pictures)
        if options.peak_of:
            return _tell_peak(scene, options)
        made = {"machine": _machine(options), "parts": [], "tables": []}
        print(f"{made['machine']}\n")
        made["parts"] = parts.table(scene, options.sizes, options.rows)
        _print_parts(made["parts"])
        for size in options.sizes:
            for batch in options.batches:
                table = _table(scene, size, batch, options)
                made["tables"].append(table)
                _print_table(table)
        print("\nMultiply-accumulates a step as ratios to plain, at any batch:")
        made["growth"] = _growth(scene, made["tables"][0])
        _print_growth(made["growth"])
    if options.json:
        options.json.write_text(json.dumps(made, indent=1))
    return made


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("benchmarks.guard_cost", __doc__ + rows.WORDS)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int, help="of a run; 30 on a GPU, else 2")
    parser.add_argument("--rounds", type=int, help="timed ones; 3 on a GPU, else 1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="side in pixels")
    parser.add_argument("--batches", type=int, nargs="+", help="pictures; 1 4 on a GPU, else 1")
    parser.add_argument(
        "--descriptors", nargs="+", choices=rows.DESCRIPTORS, default=list(rows.DESCRIPTORS)
    )
    parser.add_argument("--rows", nargs="+", help="only rows that contain one of these words")
    parser.add_argument("--pictures", type=int, default=5000, help="rows of the index")
    parser.add_argument("--small", action="store_true", help="narrow networks: does it run?")
    parser.add_argument(
        "--no-memory", action="store_true", help="on a CPU memory takes a process a row"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = harness.parse(parser, arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = options.device == "cuda"
    options.steps = options.steps or (30 if gpu else 2)
    options.rounds = options.rounds or (3 if gpu else 1)
    options.batches = options.batches or ([1, 4] if gpu else [1])
    known = rows.names(options.descriptors)
    wanted = options.rows or [""]
    options.rows = [r for r in known if r == rows.PLAIN or any(w in r for w in wanted)]
    return options


def _machine(options: argparse.Namespace) -> str:
    where = f"{platform.processor() or platform.machine()}, {options.threads} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name()
    kind = "narrow" if options.small else "SD1.5-sized"
    return (
        f"{where} · torch {torch.__version__} · {kind} network · {options.steps} steps, "
        f"{options.rounds} timed rounds · index of {options.pictures}"
    )


def _table(scene: rows.Shared, size: int, batch: int, options: argparse.Namespace) -> dict:
    """Measure every row at one size and batch."""
    models = {row: rows.patched(row, scene) for row in options.rows}
    shape = size, batch, options.steps
    apart = options.device != "cpu"
    counted = {row: measure.run(m, *shape, count=True) for row, m in models.items() if apart}
    timed: dict[str, list[measure.Taken]] = {row: [] for row in models}
    for _ in range(options.rounds):
        for row, model in models.items():
            timed[row].append(measure.run(model, *shape, count=not apart))
    found = []
    for row, runs in timed.items():
        by_step = list(zip(*(run.seconds for run in runs), strict=True))
        alone = options.device == "cpu" and not options.no_memory
        resident = _peak(row, size, batch, options) if alone else 0
        found.append(
            {
                "row": row,
                "macs": statistics.mean(counted.get(row, runs[0]).macs),
                "macs_by_step": counted.get(row, runs[0]).macs,
                "branches": statistics.mean(runs[0].branches),
                "seconds": statistics.mean(map(min, by_step)),
                "median": statistics.mean(map(statistics.median, by_step)),
                "once": min(run.whole - sum(run.seconds) for run in runs),
                "peak": resident or max(run.peak for run in runs),
            }
        )
    plain = found[0]
    for one in found:
        for name in ("macs", "seconds", "median", "peak"):
            one[f"{name}_ratio"] = one[name] / plain[name] if plain[name] else 0.0
    return {"size": size, "batch": batch, "rows": found}


def _peak(row: str, size: int, batch: int, options: argparse.Namespace) -> int:
    """Most memory that a process of its own holds which samples one step of that row."""
    command = [
        sys.executable, "-m", "benchmarks.guard_cost", "--peak-of", row, "--device", "cpu",
        "--steps", "1", "--sizes", str(size), "--batches", str(batch),
        "--threads", str(options.threads), "--pictures", str(options.pictures),
    ]  # fmt: skip
    command += ["--small"] * options.small
    done = subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def _tell_peak(scene: rows.Shared, options: argparse.Namespace) -> dict:
    """What `_peak` reads. The text encoder is loaded in every row, as it is in every graph."""
    _ = scene.clip
    model = rows.patched(options.peak_of, scene)
    measure.run(model, options.sizes[0], options.batches[0], options.steps)
    print(measure.peak_resident())
    return {}


def _growth(scene: rows.Shared, table: dict) -> list[dict]:
    """MACs a step at other sizes, as ratios, by what was counted at one of 288 px or more.

    From there on what the guard adds for a picture is always the same, for it decodes no more than its
    descriptor can use; branches of the model that a row draws besides grow with the model's own.
    """
    base = measure.branch_macs(scene.model, table["size"])
    plain = table["rows"][0]["macs"] / table["batch"]
    found = []
    for size in (384, 512, 768, 1024):
        branch, ratios = measure.branch_macs(scene.model, size), {}
        for one in table["rows"]:
            if one["row"] in (rows.PLAIN, rows.AUTHORS):
                continue
            guard = one["macs"] / table["batch"] - plain - (one["branches"] - 2) * base
            ratios[one["row"]] = one["branches"] / 2 + guard / (2 * branch)
        found.append({"size": size, "branch": branch, "ratios": ratios})
    return found


def _print_parts(found: list[dict]) -> None:
    print(f"{'part, for one picture':34}{'GMAC':>9}{'ms':>9}{'GMAC/s':>8}")
    for one in found:
        speed = one["macs"] / GIGA / one["seconds"] if one["seconds"] else 0
        print(
            f"{one['part']:34}{one['macs'] / GIGA:9.2f}{one['seconds'] * 1e3:9.1f}{speed:8.1f}",
            flush=True,
        )


def _print_table(table: dict) -> None:
    print(f"\n{table['size']}², batch {table['batch']}")
    heads = "ratio median s/step branches GMAC/step ratio once/s peak/GiB ratio".split()
    print(f"{'row':24}" + "".join(f"{head:>10}" for head in heads))
    for one in table["rows"]:
        figures = (
            one["seconds_ratio"], one["median_ratio"], one["seconds"], one["branches"],
            one["macs"] / GIGA, one["macs_ratio"], one["once"], one["peak"] / GIB, one["peak_ratio"],
        )  # fmt: skip
        print(f"{one['row']:24}" + "".join(f"{figure:10.3f}" for figure in figures), flush=True)


def _print_growth(found: list[dict]) -> None:
    print(f"{'row':24}" + "".join(f"{one['size']:>8}²" for one in found))
    for row in found[0]["ratios"]:
        print(f"{row:24}" + "".join(f"{one['ratios'][row]:9.3f}" for one in found))


if __name__ == "__main__":
    main()
