"""What a run will take, by count of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import harness

from .methods import Method

PICTURE_BYTES = 400_000  # of a PNG of 512 x 512 pixels, about


class Cost(NamedTuple):
    """Of one method: pictures, and the least and the most rows of the denoiser."""

    pictures: int
    least: int
    most: int


def of(method: Method, prompts: int, seeds: int, steps: int, per_step: int) -> Cost:
    least, most = method.rows(steps, per_step, seeds)
    pictures, once = prompts * seeds, prompts * method.once * per_step * steps
    return Cost(pictures, once + pictures * least, once + pictures * most)


def table(
    methods: Sequence[Method], lists: Mapping[str, int], seeds: int, steps: int, cfg_scale: float,
    detect: bool, rate: float | None = None, shards: int = 1,
) -> str:  # fmt: skip
    """Counts of operations in words and in Markdown.

    Parameters
    ----------
    lists : {name: number of prompts}
    detect : bool
        Whether the detectors are asked.
    rate : float, optional
        Rows of the denoiser in a second, for hours.
    """
    prompts, per_step = sum(lists.values()), 2 if cfg_scale > 1 else 1
    costs = {one.name: of(one, prompts, seeds, steps, per_step) for one in methods}
    if detect:
        rows = 2 * 2 * prompts * seeds
        costs["detectors"] = Cost(0, rows, rows)
    costs["all"] = Cost(*(sum(column) for column in zip(*costs.values(), strict=True)))
    heading = ["", "pictures", "rows of the denoiser, least", "most"]
    if rate is not None:
        heading += [f"hours at {rate:g} rows/s, least", "most"]
    lines = []
    for name, one in costs.items():
        hours = [] if rate is None else [f"{rows / rate / 3600 / shards:.2f}" for rows in one[1:]]
        lines.append([name, f"{one.pictures:,}", f"{one.least:,}", f"{one.most:,}", *hours])
    sizes = ", ".join(f"{count} {name}" for name, count in lists.items())
    disk = costs["all"].pictures * PICTURE_BYTES / 2**30
    return (
        f"{prompts} prompts ({sizes}), {seeds} seeds, {steps} steps, {shards} shards. About "
        f"{disk:.1f} GiB of pictures at 512 x 512.\n\n{harness.markdown(heading, lines)}\n"
        "The least is drawn if the guard never acts, the most if it acts at each step of all drawings. A "
        "guard decodes and compares once a step besides, and for the preset paper and reference it takes a "
        "gradient through the decoder.\n"
    )
