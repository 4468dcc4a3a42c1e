"""The way out of a copy's basin: with fewer of the prompt's words, or, without words, off the picture.

A prompt whose prediction is a copy has proved to be a key to a stored picture, and draws it at any
guidance scale. What leads elsewhere is a prompt that says less: its first words name the subject, and
the later ones make the key. So as many of the first words are kept as draw nothing stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import guidance
from .probe import Match, Probe

REPULSION = 3.0  # first strength of the push off the picture, in lengths of what D shares with it
REPULSION_GROWTH, REPULSION_MOST = 2.0, 3.0  # a step; times the first strength
REPULSION_UNTIL = 0.1  # t below which it would only leave marks


@dataclass(frozen=True)
class Shortened:
    """The prompt with only its first words kept, the rest as if nothing were said.

    words : int
        How many words (tokens, rows of the conditioning) the whole prompt has.
    denoised : callable
        Words kept (B,) int64 in [0, words] -> the prediction for them (B, C, H, W).
    """

    words: int
    denoised: Callable[[Tensor], Tensor]


def shorten(prompt: Tensor, nothing: Tensor, kept: Tensor) -> Tensor:
    """The first `kept` (B,) tokens of a prompt's conditioning, the rest from that of no prompt.

    prompt, nothing : Tensor (B, T, C) -> (B, T, C). Under a causal text encoder the kept tokens are
    exactly those of the shorter text.
    """
    place = torch.arange(prompt.shape[1], device=prompt.device)
    return torch.where((place < kept.to(prompt.device)[:, None])[..., None], prompt, nothing)


class Leaving:
    """What one sampling run remembers of its ways out. Everything is per sample.

    exit : float
        First strength r of the push away from what the left-out words add; grows by `growth` with
        each step that is still too close, up to `most`.
    unrelated : float
        Closeness up to which a prediction counts as nothing stored; 0 = no closer than the most
        alike different pictures of the index.
    """

    def __init__(
        self, probe: Probe, batch: int, exit: float, growth: float, most: float, unrelated: float
    ):
        self.probe, self.growth, self.most, self.unrelated = probe, growth, most, unrelated
        self.kept = torch.full((batch,), -1)  # words; −1 = not looked for yet
        self.away = torch.full((batch,), float(exit))
        self.repulsion = torch.full((batch,), REPULSION)

    def by_words(
        self,
        shortened: Shortened,
        cond: Tensor,
        uncond: Tensor,
        cfg_scale: float,
        level: float,
        steered: Tensor,
        active: Tensor,
        composite: Callable[[Tensor], Tensor],
    ) -> tuple[dict[str, Tensor], Match | None, Tensor]:
        """Changes of D by term, and who found no way out.

            D ← D + s0·(D_s − D_c) − r·(D_c − D_s)°

        D_s is the prediction for the shortened prompt, or D_u where even few words draw something
        stored; ° takes away each channel's mean (`guidance.away`).

        Returns
        -------
        dict of Tensor (B, C, H, W), meant for the rows of `steered` (B,) bool; the match of D_u and
        the samples (B,) bool whose D_u is something stored as well: None and all False if none.
        """
        drawn, usable = self._draw(shortened, steered, level, composite)
        base = torch.where(guidance.expand(usable, drawn) > 0, drawn, uncond)
        lost, match = steered & ~usable, None
        if lost.any():
            match = self.probe.look(composite(uncond), level)
            lost = lost & (match.closeness > self.unrelated)
        change = {
            "despecification": cfg_scale * (base - cond),
            "away": guidance.away(cond, base, torch.where(active, self.away, 0.0)),
        }
        self.away = torch.where(active, (self.away * self.growth).clamp(max=self.most), self.away)
        return change, match, lost

    def off_the_picture(
        self, prediction: Tensor, match: Match, rows: Tensor, strength: float
    ) -> Tensor:
        """The change of D that leads off the matched picture, for `rows` (B,) bool.

        −r·a·‖D°‖·n: n is the unit direction in which the prediction becomes more like the picture
        (`Probe.towards`), a in [0, 1] how much of it there is, r doubles with every step. Unlike
        the gradient of a distance, which ends at the edge of a ball around the picture and finds
        the cheapest way there, it stays one direction in low frequencies and does not stop there.
        """
        change = torch.zeros_like(prediction)
        for i in rows.nonzero()[:, 0].tolist():
            direction, share = self.probe.towards(prediction[i : i + 1], match[i])
            spread = prediction[i] - prediction[i].mean(dim=(1, 2), keepdim=True)
            length = strength * float(self.repulsion[i]) * share * float(spread.norm())
            change[i] = -length * direction[0]
        grown = (self.repulsion * REPULSION_GROWTH).clamp(max=REPULSION * REPULSION_MOST)
        self.repulsion = torch.where(rows, grown, self.repulsion)
        return change

    def _draw(
        self, shortened: Shortened, steered: Tensor, level: float, composite
    ) -> tuple[Tensor, Tensor]:
        """D_s for the words that each sample keeps, and where it is nothing stored."""

        def draw(kept: Tensor) -> tuple[Tensor, Tensor]:
            drawn = shortened.denoised(kept.clamp_min(0))
            return drawn, self.probe.look(composite(drawn), level).closeness <= self.unrelated

        self._search(draw, steered & (self.kept < 0), shortened.words)
        drawn, usable = draw(self.kept)
        again = steered & ~usable & (self.kept > 0)
        if again.any():  # what was new at first may lead back later: one word less
            self.kept = torch.where(again, self.kept - 1, self.kept)
            fewer, good = draw(self.kept)
            drawn = torch.where(guidance.expand(again, drawn) > 0, fewer, drawn)
            usable = torch.where(again, good, usable)
        return drawn, usable

    def _search(self, draw, new: Tensor, words: int) -> None:
        """By bisection, the most first words that draw nothing stored; 0 where one is too many."""
        if not new.any():
            return
        low, high = torch.zeros_like(self.kept), torch.full_like(self.kept, words)
        while bool((high - low > 1)[new].any()):
            middle = (low + high) // 2
            usable = draw(middle)[1]
            low, high = torch.where(usable, middle, low), torch.where(usable, high, middle)
        self.kept = torch.where(new, low, self.kept)
