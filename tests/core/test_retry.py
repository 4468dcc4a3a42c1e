"""What is finished is measured, and drawn again while it is a copy."""

from __future__ import annotations

import math

import torch

from amg_core import presets
from amg_core.retry import Outcome, escalated, excess, until_no_copy
from amg_core.run import Drawn
from amg_core.similarity.verdict import Verdict


def judged(latents: torch.Tensor, named, samples) -> list[Verdict]:
    """A copy where the mean of the latent is above 1; the other judge never minds."""
    assert len(latents) == len(named) == len(samples)
    return [
        Verdict(m, 1.0, m, 0.0, 0.8, 0, "a.png", "", "copy" if m > 1 else "no_copy")
        for m in latents.flatten(1).mean(1).tolist()
    ]


class Drawing:
    """Draws sample i with the mean `means[i][attempt]`, and pushes it off where `pushed[i][attempt]`."""

    def __init__(self, *means: list[float], calls: float = math.inf, pushed=None) -> None:
        self.means, self.calls, self.most = means, [], calls
        self.named, self.anew = [], []
        self.other_noise, self.pushed = pushed is not None, pushed or [[False]] * len(means)

    def draw(self, settings, suspects, anew):
        number = len(self.calls)
        self.calls.append((settings, suspects.tolist()))
        self.anew.append(anew.tolist())
        drawn = [torch.full((1, 2, 3), row[min(number, len(row) - 1)]) for row in self.means]
        pushed = [row[min(number, len(row) - 1)] for row in self.pushed]
        return Drawn(torch.stack(drawn), {"number": number}, [{number}] * len(drawn), pushed)

    def restarts(self):
        return self.other_noise

    def judge(self, latents, named, samples):
        self.named.append([set(rows) for rows in named])
        return judged(latents, named, samples)

    def stopped(self):
        return len(self.calls) >= self.most


def loop(*means, retries=3, settings=None) -> tuple[Outcome, Drawing]:
    drawing = Drawing(*means)
    settings = settings or presets.settings("main", "nl2")
    return until_no_copy(drawing, settings, len(means), retries), drawing


def test_nothing_is_drawn_twice_where_nothing_is_a_copy():
    outcome, drawing = loop([0.5], [0.9])
    assert len(drawing.calls) == 1 and outcome.kept == [0, 0] and outcome.copies == []
    assert drawing.calls[0][1] == [False, False]


def test_only_copies_are_drawn_again_and_the_others_kept():
    outcome, drawing = loop([0.5, 9.0], [3.0, 2.0, 0.7, 9.0], [1.5, 0.2])
    assert [call[1] for call in drawing.calls] == [
        [False, False, False], [False, True, True], [False, True, False],
    ]  # fmt: skip
    assert outcome.kept == [0, 2, 1] and outcome.copies == []
    assert torch.allclose(outcome.latents.flatten(1).mean(1), torch.tensor([0.5, 0.7, 0.2]))
    assert [attempt.samples for attempt in outcome.attempts] == [[0, 1, 2], [1, 2], [1]]
    assert [verdict.copy for verdict in outcome.verdicts] == [False] * 3


def test_a_picture_that_was_pushed_off_another_starts_from_other_noise():
    """It is no suspect there; a copy is one, in the same drawing; what is still pushed off is kept."""
    drawing = Drawing(
        [0.5, 0.4], [0.5, 3.0, 0.3], [3.0, 0.2], [0.5, 0.1], [0.5],
        pushed=[[True, False], [True], [False], [True], [False]],
    )  # fmt: skip
    outcome = until_no_copy(drawing, presets.settings("main", "nl2"), 5, 2)
    assert drawing.anew == [
        [False] * 5,
        [True, True, False, True, False],
        [False, True, False, True, False],
    ]
    assert [suspects for _, suspects in drawing.calls] == [
        [False] * 5, [False, False, True, False, False], [False] * 5,
    ]  # fmt: skip
    assert outcome.copies == [] and outcome.kept == [1, 2, 1, 1, 0]
    given, stronger, without_copies = (settings for settings, _ in drawing.calls)
    assert stronger != given and without_copies == given


def test_without_other_noise_it_is_kept_as_it_is():
    drawing = Drawing([0.5, 0.4])
    drawing.pushed = [[True]]
    outcome = until_no_copy(drawing, presets.settings("main", "nl2"), 1, 2)
    assert len(drawing.calls) == 1 and outcome.kept == [0]


def test_a_copy_that_stays_is_told_and_the_least_bad_is_kept():
    outcome, drawing = loop([3.0, 1.2, 2.0, 5.0], retries=3)
    assert len(drawing.calls) == 4
    assert outcome.copies == [0] and outcome.kept == [1]
    assert float(outcome.latents.mean()) > 1.19 and outcome.verdicts[0].score < 1.3


def test_what_a_sample_was_near_is_looked_at_in_all_later_drawings():
    _, drawing = loop([3.0, 2.0, 0.7], [0.5, 9.0])
    assert drawing.named == [[{0}, {0}], [{0, 1}], [{0, 1, 2}]]


def test_no_retries_and_a_guard_that_is_off():
    outcome, drawing = loop([3.0], retries=0)
    assert len(drawing.calls) == 1 and outcome.copies == [0]
    off = presets.settings("main", "nl2", despecification=0, deduplication=0, dissimilarity=0)
    outcome, drawing = loop([3.0], settings=off)
    assert len(drawing.calls) == 1 and outcome.copies == [0]


def test_retries_are_stronger_each_time():
    before = presets.settings("main", "cosine")
    for number in range(1, 5):
        after = escalated(presets.settings("main", "cosine"), number)
        assert after.schedule(0) < before.schedule(0) and after.schedule(1) < before.schedule(1)
        assert after.release < before.release
        way, milder = after.guidance[0], before.guidance[0]
        assert way.first > milder.first and way.most > milder.most
        assert way.safe_score < milder.safe_score and way.until < milder.until
        before = after


def test_excess_is_that_of_the_worse_judge():
    verdict = Verdict(0.3, 0.4, 0.3, 0.9, 0.8, 0, "", "", "copy", ("second",))
    assert abs(excess(verdict) - 0.1) < 1e-6


def test_an_interrupt_ends_the_loop_and_leaves_the_last_whole_drawing():
    settings = presets.settings("main", "nl2")
    for calls, kept in ((1, [0, 0]), (2, [0, 0]), (3, [1, 1])):  # drawings until the interrupt
        drawing = Drawing([3.0, 2.5, 0.1], [3.0, 0.1], calls=calls)
        outcome = until_no_copy(drawing, settings, 2, 3)
        assert len(drawing.calls) == calls and len(outcome.attempts) == max(1, calls - 1)
        assert outcome.kept == kept
