"""The model's predictions for other texts: shorter prompts, and the captions of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from amg_core import hosts, prompt
from amg_core.guidance import without

from .evaluations import Encoded, Evaluation

Words = tuple[str, ...]  # one text for each text encoder that is given its own, or one for all


@dataclass
class Encoder:
    """The text encoders of a pipeline.

    Attributes
    ----------
    encode : callable
        Texts -> Encoded, with a row for each.
    known : list of lists
        The prompts that the pipeline encoded lately, the latest last. Each list is for one batch, or has
        one text for several neighbouring pictures of it.
    """

    encode: Callable[[list[Words]], Encoded]
    known: list[list[Words]] = field(default_factory=list)
    _made: dict[Words, Encoded] = field(default_factory=dict)

    def __call__(self, texts: Sequence[Words]) -> Encoded:
        """B texts -> Encoded of B rows. No text is encoded twice."""
        new = [text for text in dict.fromkeys(texts) if text not in self._made]
        if new:
            with torch.no_grad():
                made = self.encode(new)
            self._made |= {text: made[i : i + 1] for i, text in enumerate(new)}
        rows = [self._made[text] for text in texts]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return Encoded(
            torch.cat([row.tokens for row in rows]), torch.cat(pooled) if pooled else None
        )

    def written(self, text: Encoded) -> list[Words] | None:
        """The B texts that are encoded to `text`, or None if they are not known."""
        batch = len(text.tokens)
        for words in reversed(self.known):
            each = [one for one in words for _ in range(batch // len(words))]
            if len(each) == batch:
                pairs = zip(self(each).tokens, text.tokens, strict=True)
                if all(hosts.apart(one, other) <= hosts.SAME_TEXT for one, other in pairs):
                    return each
        return None


class OtherTexts:
    """`hosts.Texts` at one evaluation.

    Parameters
    ----------
    cond : Evaluation of B rows
        The call of the model for the prompts.
    text : Encoded
        Its texts.
    uncond : Tensor (B, C, H, W) or None
        D_u.
    denoised : callable
        The output of the model -> x̂0.
    encoder : Encoder
    """

    def __init__(
        self, cond: Evaluation, text: Encoded, uncond: Tensor | None,
        denoised: Callable[[Tensor], Tensor], encoder: Encoder,
    ):  # fmt: skip
        self.cond, self.text, self.uncond, self.denoised = cond, text, uncond, denoised
        self.encoder = encoder

    @property
    def captions(self) -> bool:
        return self.uncond is not None

    @cached_property
    def _prompts(self) -> list[prompt.Prompts] | None:
        written = self.encoder.written(self.text)
        return None if written is None else [prompt.split_together(words) for words in written]

    @property
    def separable(self) -> bool:
        return self._prompts is not None

    @property
    def words(self) -> Tensor:
        """The number of words of each prompt (B,), or else of its tokens with padding."""
        if self._prompts is not None:
            return torch.tensor([len(each.words) for each in self._prompts])
        return torch.full((len(self.text.tokens),), self.text.tokens.shape[1])

    def reduced(self, kept: Tensor) -> Tensor:
        """D_s (B, C, H, W) for the words `kept` (B, W) bool of the prompt, encoded anew.

        If its text is not known, for its first tokens, followed by those of the empty text.
        """
        if self._prompts is not None:
            pairs = zip(self._prompts, kept.tolist(), strict=True)
            return self._drawn(self.encoder([each.keep(row) for each, row in pairs]))
        nothing = self.encoder([("",)]).like(self.text)
        length, rows = self.text.tokens.shape[1], len(kept)
        times = -(-length // nothing.tokens.shape[1])
        rest = nothing.tokens.repeat(rows, times, 1)[:, :length]
        pooled = self.text.pooled
        if pooled is not None and nothing.pooled is not None:
            share = kept.float().mean(dim=1).to(pooled)[:, None]
            pooled = torch.lerp(nothing.pooled.expand_as(pooled), pooled, share)
        return self._drawn(Encoded(without(self.text.tokens, rest, kept), pooled))

    def left_out(self, kept: Tensor) -> list[str]:
        if self._prompts is None:
            return [""] * len(kept)
        return [each.missing(row) for each, row in zip(self._prompts, kept.tolist(), strict=True)]

    def neighbor(self, captions: list[str]) -> Tensor:
        """Captions of the B samples -> D_n (B, C, H, W). A sample without a caption gets D_u."""
        assert self.uncond is not None, "asked only if there are `captions`"
        drawn = self._drawn(self.encoder([(caption,) for caption in captions]))
        asked = torch.tensor([bool(caption) for caption in captions], device=drawn.device)
        return torch.where(asked[:, None, None, None], drawn, self.uncond)

    def _drawn(self, text: Encoded) -> Tensor:
        return self.denoised(self.cond.again(text.like(self.text)))
