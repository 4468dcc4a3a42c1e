"""From raw statistics to a probability, by comparison with ordinary prompts on the same model.

Norms and cosines differ between models by factors of ten, so a raw score says nothing. A calibration
stores the statistics of a list of ordinary prompts, for every number of noises up to the one it was made
with. It is a JSON file, one for each model (`Calibration.model`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AMGError
from ..files import brief, read_bounded
from ..messages import Message, message
from . import statistics

FORMAT = "amg-prompt-calibration/1"
MOST_BYTES = 1 << 26
FEWEST = 16  # ordinary prompts
TAIL = 0.2  # share of the ordinary prompts to which the upper tail is fitted
# Each score and the statistics that it adds up, in spreads of the ordinary prompts. Up to a constant
# "anisotropy" is the paper's γ1·norm + γ2·alignment with γ = 1/spread.
SCORES = {
    "combined": ("norm", "alignment", "low_norm", "agreement"),
    "anisotropy": ("norm", "alignment"),
    "anisotropy (authors' code)": ("norm", "alignment_pixelwise"),
    "norm": ("norm",),
    "agreement": ("agreement",),
}

Measured = Sequence[dict[str, float]]  # of one prompt, as `statistics.measure` gives it
Columns = dict[
    str, list[list[float | None]]
]  # statistic -> number of noises -> prompts: see `_columns`


@dataclass(frozen=True)
class Suspicion:
    """The result for one prompt.

    Attributes
    ----------
    score : float
        In spreads of the ordinary prompts. 0 is their median.
    chance : float in (0, 1]
        The probability that an ordinary prompt scores as high (one-sided p-value).
    probability : float in [0, 1)
        If the calibration has no memorised prompts, 1 − chance: the share of ordinary prompts that
        score lower. Otherwise the probability of a memorised prompt, with equal prior odds.
    suspicious : bool
        Whether `chance` is below the requested share of false alarms.
    ordinary : int
        The number of ordinary prompts in the calibration.
    """

    score: float
    chance: float
    probability: float
    suspicious: bool
    kind: str
    ordinary: int

    def messages(self) -> list[Message]:
        """The result as messages for the artist."""
        rarest = 10 * self.ordinary  # rarer than this cannot be stated with so few prompts
        if self.chance >= 0.01:
            share = message("ordinary_of_100", count=round(100 * self.chance))
        elif self.chance * rarest >= 1:
            share = message("ordinary_one_in", count=round(1 / self.chance))
        else:
            share = message("ordinary_fewer", count=rarest)
        what = message("suspicious" if self.suspicious else "not_suspicious")
        return [what, message("score", kind=self.kind, score=self.score), share]


@dataclass(frozen=True)
class Calibration:
    """The statistics of ordinary prompts on one model.

    Attributes
    ----------
    model : str
        Identifier of the model, made by the host.
    shape : tuple of int
        (C, H, W) of the latents. A prompt has to be tested with the same shape.
    seeds : int
        Noises for each prompt. A test may use fewer.
    low : float
        The low noise level, as a share of the schedule.
    ordinary, memorised : list of Measured
        One list of length `seeds` for each prompt. `memorised` may be empty.
    """

    model: str
    shape: tuple[int, ...]
    seeds: int
    low: float
    ordinary: list[Measured]
    memorised: list[Measured]

    def __post_init__(self) -> None:
        if len(self.ordinary) < FEWEST:
            raise AMGError(
                f"prompts: {len(self.ordinary)} ordinary prompts cannot show what is ordinary. "
                f"Give at least {FEWEST}, one a line; 60 or more are better."
            )

    def scale(self, kind: str, seeds: int | None = None) -> Scale:
        """The scale for one of `SCORES`, from the first `seeds` noises of a prompt (None: all).

        AMGError if the score is unknown, if `seeds` is larger than in the calibration, or too small for
        this score.
        """
        n = self.seeds if seeds is None else seeds
        if not 1 <= n <= self.seeds:
            raise AMGError(
                f"seeds: this model was calibrated with {self.seeds}, and {n} were asked for. Use at "
                f"most {self.seeds}, or run Calibrate Prompt Probe again with more."
            )
        if kind not in SCORES:
            raise AMGError(f"score: {kind!r} is unknown. Choose one of {', '.join(SCORES)}.")
        names = [name for name in SCORES[kind] if n > 1 or name != "agreement"]
        if not names:
            raise AMGError(f"score: {kind!r} compares noises. Set seeds to 2 or more.")
        return Scale(kind, n, names, self.ordinary, self.memorised)


class Scale:
    """One score of one calibration, computed from n noises."""

    def __init__(
        self,
        kind: str,
        n: int,
        names: Sequence[str],
        ordinary: Sequence[Measured],
        memorised: Sequence[Measured],
    ) -> None:
        self.kind, self.n = kind, n
        self._laws = [(name, *robust([each[n - 1][name] for each in ordinary])) for name in names]
        self._middle, self._spread = 0.0, 1.0
        self._middle, self._spread = robust([self.score(each) for each in ordinary])
        self.ordinary = [self.score(each) for each in ordinary]
        self._logistic: tuple[float, float] | None = None
        if memorised:
            self._logistic = logistic(self.ordinary, [self.score(each) for each in memorised])

    def score(self, measured: Measured) -> float:
        """The sum of the statistics as robust z = (value − median)/spread, itself as a robust z."""
        values = measured[self.n - 1]
        total = sum((values[name] - middle) / spread for name, middle, spread in self._laws)
        return (total - self._middle) / self._spread

    def threshold(self, false_alarms: float = 0.01) -> float:
        """The score above which a prompt is suspicious."""
        return tail_threshold(false_alarms, self.ordinary)

    def judge(self, measured: Measured, false_alarms: float = 0.01) -> Suspicion:
        score = self.score(measured)
        chance = tail_probability(score, self.ordinary)
        probability = 1 - chance
        if self._logistic is not None:
            slope, offset = self._logistic
            probability = _sigmoid(slope * score + offset)
        return Suspicion(
            score, chance, probability, chance < false_alarms, self.kind, len(self.ordinary)
        )


def median(values: Iterable[float]) -> float:
    """The median of at least one number. For an even count, the mean of the middle two."""
    ranked = sorted(values)
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def robust(values: Sequence[float]) -> tuple[float, float]:
    """Median and 1.4826·MAD: robust estimates of the mean and deviation of a normal distribution."""
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return middle, max(spread, 1e-9 * max(1.0, abs(middle)))


def tail_probability(score: float, ordinary: Sequence[float]) -> float:
    """The probability, in (0, 1], that an ordinary prompt scores at least `score`.

    Peaks over a threshold: below the upper fifth of the ordinary scores it is the share of them that
    score as high. Above, it is an exponential tail. Its scale is the median of the excesses / log 2, so
    that a memorised prompt in the list does not hide others.
    """
    ranked, edge, scale, share = _tail(ordinary)
    if score <= edge:
        return (sum(each >= score for each in ranked) + 1) / (len(ranked) + 1)
    return max(share * math.exp(-(score - edge) / scale), 1e-300)


def tail_threshold(chance: float, ordinary: Sequence[float]) -> float:
    """The inverse of `tail_probability`, for `chance` in (0, 1)."""
    ranked, edge, scale, share = _tail(ordinary)
    if chance < share:
        return edge + scale * math.log(share / chance)
    return ranked[-min(len(ranked), max(1, math.ceil(chance * (len(ranked) + 1)) - 1))]


def _tail(ordinary: Sequence[float]) -> tuple[list[float], float, float, float]:
    """The sorted scores, the score at which the upper tail begins, its scale, and its share."""
    ranked = sorted(ordinary)
    count = max(FEWEST // 2, round(TAIL * len(ranked)))  # fewer are not enough for a scale
    edge = ranked[-count - 1]
    scale = median(each - edge for each in ranked[-count:]) / math.log(2)
    return ranked, edge, max(scale, 1e-9), (count + 1) / (len(ranked) + 1)


def logistic(negatives: Sequence[float], positives: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of P(positive | score), fitted by Newton's method with equal group weights.

    A weak ridge penalty keeps the slope finite for groups that do not overlap. The slope is never
    negative.
    """
    weights = [0.5 / len(negatives)] * len(negatives) + [0.5 / len(positives)] * len(positives)
    targets = [0.0] * len(negatives) + [1.0] * len(positives)
    points = [*negatives, *positives]
    ridge, slope = 1e-3, 0.0
    centre = (sum(negatives) / len(negatives) + sum(positives) / len(positives)) / 2
    offset = 0.0  # at the centre
    for _ in range(100):
        g0 = g1 = h00 = h01 = 0.0
        h11 = ridge
        g1 += ridge * slope
        for x, y, w in zip(points, targets, weights, strict=True):
            x -= centre
            p = _sigmoid(slope * x + offset)
            g0, g1 = g0 + w * (p - y), g1 + w * (p - y) * x
            v = max(w * p * (1 - p), 1e-12)
            h00, h01, h11 = h00 + v, h01 + v * x, h11 + v * x * x
        determinant = h00 * h11 - h01 * h01
        d0, d1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        step = min(1.0, 2.0 / max(abs(d0), abs(d1), 1e-12))
        offset, slope = offset - step * d0, slope - step * d1
        if max(abs(d0), abs(d1)) < 1e-10:
            break
    if slope < 0:
        return 0.0, 0.0
    return slope, offset - slope * centre


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-min(value, 700)))
    e = math.exp(max(value, -700))
    return e / (1 + e)


def save(calibration: Calibration, path: Path) -> None:
    """Write the calibration as JSON. On a crash the file is either the old one or the new one, complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "format": FORMAT,
        "model": calibration.model,
        "shape": list(calibration.shape),
        "seeds": calibration.seeds,
        "low": calibration.low,
        "ordinary": _columns(calibration.ordinary),
        "memorised": _columns(calibration.memorised),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(body), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise AMGError(f"The calibration cannot be written to {path}: {error}.") from error


def load(path: Path) -> Calibration:
    """Read a file that `save` wrote.

    Raises
    ------
    AMGError
        The file is missing or is no calibration. The message names the file and the next step.
    """
    again = "Run a Calibrate Prompt Probe node with this model"
    try:
        body = json.loads(read_bounded(path, MOST_BYTES))
    except FileNotFoundError as error:
        raise AMGError(f"There is no calibration at {path}. {again}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AMGError(
            f"The calibration {path} cannot be read: {brief(error)}. {again} again."
        ) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise AMGError(f"{path} is not a calibration of format {FORMAT}. {again} again.")
    try:
        seeds = int(body["seeds"])
        return Calibration(
            str(body["model"]), tuple(int(side) for side in body["shape"]), seeds,
            float(body["low"]), _prompts(body["ordinary"], seeds),
            _prompts(body["memorised"], seeds),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise AMGError(
            f"The calibration {path} is damaged ({brief(error)}). {again} again."
        ) from error


def _columns(prompts: Sequence[Measured]) -> Columns:
    """Statistic -> for each number of noises, the values of all prompts (null for a missing one)."""
    if not prompts:
        return {}
    return {
        name: [[each[i].get(name) for each in prompts] for i in range(len(prompts[0]))]
        for name in statistics.NAMES
    }


def _prompts(columns: Columns, seeds: int) -> list[Measured]:
    """The inverse of `_columns`. ValueError if a number is missing or not finite."""
    if not columns:
        return []
    if any(len(columns[name]) != seeds for name in statistics.NAMES):
        raise ValueError(f"not {seeds} noises a prompt")
    count = len(columns[statistics.NAMES[0]][0])
    prompts: list[Measured] = [[{} for _ in range(seeds)] for _ in range(count)]
    for name in statistics.NAMES:
        for i in range(seeds):
            row = columns[name][i]
            if len(row) != count:
                raise ValueError(f"{name} has {len(row)} of {count} prompts")
            if name == "agreement" and i == 0:
                continue
            for prompt, value in zip(prompts, row, strict=True):
                if value is None or not math.isfinite(value):
                    raise ValueError(f"{name} holds {value}")
                prompt[i][name] = float(value)
    return prompts
