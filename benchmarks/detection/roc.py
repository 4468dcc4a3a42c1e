"""ROC figures of a detector, with intervals. Scores are larger for what is more suspicious."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROUNDS = 1000
Figure = Callable[[np.ndarray, np.ndarray], float]


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(positive > negative) + ½·P(equal): the area under the ROC curve (Mann and Whitney)."""
    ranked = np.sort(negatives)
    below = np.searchsorted(ranked, positives, side="left")
    not_above = np.searchsorted(ranked, positives, side="right")
    return float((below + not_above).mean() / 2 / len(negatives))


def tpr_at(positives: np.ndarray, negatives: np.ndarray, fpr: float = 0.01) -> float:
    """Share of positives found at the last point of the ROC curve with FPR <= `fpr`.

    Never the nearest point, which may have more false alarms than it claims.
    """
    allowed = int(fpr * len(negatives) + 1e-9)  # so many negatives may be at the threshold or above
    return float((positives > np.sort(negatives)[-allowed - 1]).mean())


def interval(
    figure: Figure, positives: np.ndarray, negatives: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval; positives and negatives are drawn anew, each group for itself."""
    rng = np.random.default_rng(seed)
    drawn = [
        figure(rng.choice(positives, len(positives)), rng.choice(negatives, len(negatives)))
        for _ in range(ROUNDS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def standardised(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """(value − median)/(1.4826·MAD) of `by`."""
    middle = np.median(by)
    return (values - middle) / max(1.4826 * float(np.median(np.abs(by - middle))), 1e-12)


def halves(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two halves, each with half of the positives and half of the negatives."""
    rng = np.random.default_rng(seed)
    parts: tuple[list, list] = ([], [])
    for group in (True, False):
        rows = rng.permutation(np.flatnonzero(labels == group))
        parts[0].extend(rows[::2])
        parts[1].extend(rows[1::2])
    return np.sort(parts[0]), np.sort(parts[1])


def crossed(norm: np.ndarray, cosine: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list]:
    """γ1·norm + γ2·cos with γ chosen on one half by its AUC, and given to the other half.

    Returns the scores (N,), comparable over the halves, and the two γ2/γ1 in raw units. The grid is
    in spreads of the negatives of the half that chooses; where several are best, the middle one.
    """
    scores, chosen = np.empty(len(labels)), []
    first, second = halves(labels)
    grid = np.linspace(0, 1, 41)
    for learn, test in ((first, second), (second, first)):
        ordinary = learn[~labels[learn]]
        z = [standardised(each, each[ordinary]) for each in (norm, cosine)]
        mixed = [(1 - w) * z[0] + w * z[1] for w in grid]
        found = [auc(m[learn][labels[learn]], m[ordinary]) for m in mixed]
        best = np.flatnonzero(np.isclose(found, max(found)))
        w = grid[best[len(best) // 2]]
        combined = (1 - w) * z[0] + w * z[1]
        scores[test] = standardised(combined, combined[ordinary])[test]
        spreads = [np.median(np.abs(e[ordinary] - np.median(e[ordinary]))) for e in (norm, cosine)]
        chosen.append(float(w * spreads[0] / max((1 - w) * spreads[1], 1e-12)))
    return scores, chosen


def explained(values: np.ndarray, groups: list[str]) -> float:
    """η²: share of the variance of `values` that the means of `groups` account for."""
    names = np.asarray(groups)
    means = np.array([values[names == name].mean() for name in names])
    return float(means.var() / values.var())
