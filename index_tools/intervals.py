"""Figures for sets of pictures, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amg_core.optional import needed

RESAMPLES = 2000  # for the bootstrap

Interval = tuple[float, float, float]  # value, low, high


def share(hits: int, n: int) -> Interval:
    """A percentage with its interval (Wilson 1927). AMGError if SciPy is missing.

    It is not by bootstrap, which would give [0, 0] for 0 hits, even of very few pictures.
    """
    stats = needed("scipy.stats", "An interval", "pip install scipy")
    low, high = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return 100 * hits / n, 100 * float(low), 100 * float(high)


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of a statistic by bootstrap, from pictures resampled with replacement.

    It has its own generator and seed, so the same values give the same interval. SciPy's function is not
    used because it refuses a single picture.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    n = len(values)
    drawn = [statistic(values[rng.integers(n, size=n)]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def mean(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean with its interval by bootstrap."""
    return float(values.mean()), *bootstrap(values, lambda part: float(part.mean()), seed)


def percentile(values: np.ndarray, percent: float, seed: int = 0) -> Interval:
    """A percentile, interpolated linearly, with its interval by bootstrap.

    AMG's "Top 5%" is the 95th percentile of the similarities. It is also what Somepalli et al. report.
    """

    def statistic(part: np.ndarray) -> float:
        return float(np.percentile(part, percent))

    return statistic(values), *bootstrap(values, statistic, seed)
