"""The model's predictions for other texts: the neighbour's caption, and a shorter prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from amg_core.errors import AMGError


@dataclass(frozen=True)
class Text:
    """A text encoded by the host: `tokens` (B, T, C), and `vector` (B, P) for SDXL, or None."""

    tokens: Tensor
    vector: Tensor | None = None

    @classmethod
    def of(cls, cond) -> Text:
        """From a tensor (B, T, C), or a mapping with "crossattn" and "vector"."""
        if isinstance(cond, Tensor):
            return cls(cond)
        return cls(cond["crossattn"], cond.get("vector"))

    def host(self) -> Tensor | dict[str, Tensor]:
        """The encoded text in the host's form."""
        if self.vector is None:
            return self.tokens
        return {"crossattn": self.tokens, "vector": self.vector}

    def __getitem__(self, rows) -> Text:
        return Text(self.tokens[rows], None if self.vector is None else self.vector[rows])

    def batch(self, rows: int) -> Text:
        """The text with `rows` rows. One row is repeated."""
        return self if len(self.tokens) == rows else self[[0] * rows]


def literally(caption: str) -> str:
    """The caption with escapes, so that the host reads brackets as plain text, not as emphasis."""
    for sign in "\\()[]":
        caption = caption.replace(sign, "\\" + sign)
    return caption


class OtherTexts:
    """Predictions of one step for other texts than the prompt. Each costs an evaluation of the model.

    Parameters
    ----------
    prompt : Text of B rows
    uncond : Tensor (B, C, H, W) or None
        D_u, without which no caption is drawn.
    encode : callable
        A text -> Text of one row, by the host's own encoder.
    evaluate : callable
        Text of B rows -> the prediction (B, C, H, W) at this step.
    texts : list of B str, optional
        The prompts as the artist wrote them. They are used where `prompt` is nothing but their encoding:
        not with AND, and not with words that change over the steps.
    """

    def __init__(
        self, prompt: Text, uncond: Tensor | None, encode: Callable[[str], Text],
        evaluate: Callable[[Text], Tensor], texts: Sequence[str] | None = None,
    ):  # fmt: skip
        self._given = texts
        self.prompt, self.uncond, self.encode, self.evaluate = prompt, uncond, encode, evaluate

    @property
    def captions(self) -> bool:
        return self.uncond is not None

    @cached_property
    def texts(self) -> list[str] | None:
        """The texts of the prompts, or None if the host has made more of them than an encoded text."""
        from amg_core.hosts import SAME_TEXT, apart

        if self._given is None or len(self._given) != len(self.prompt.tokens):
            return None
        for text, row in zip(self._given, self.prompt.tokens, strict=True):
            if apart(row, self._fitting(text).tokens[0]) > SAME_TEXT:
                return None
        return list(self._given)

    @property
    def separable(self) -> bool:
        return self.texts is not None

    @property
    def words(self) -> Tensor:
        """The number of words of each prompt (B,), or else of its tokens with padding."""
        from amg_core.prompt import counts

        if self.texts is not None:
            return torch.tensor(counts(self.texts))
        rows, tokens, _ = self.prompt.tokens.shape
        return torch.full((rows,), tokens)

    def reduced(self, kept: Tensor) -> Tensor:
        """D_s (B, C, H, W) for the words `kept` (B, W) bool of the prompt, encoded anew.

        If its text is not known, for its first tokens, followed by those of the empty text.
        """
        from amg_core.guidance import without
        from amg_core.prompt import keep

        if self.texts is not None:
            return self._drawn([(text,) for text in keep(self.texts, kept.tolist())])
        prompt, nothing = self.prompt, self._fitting("")
        length = prompt.tokens.shape[1]
        times = -(-length // nothing.tokens.shape[1])
        rest = nothing.tokens.to(prompt.tokens).repeat(1, times, 1)[:, :length]
        tokens = without(prompt.tokens, rest.expand(len(kept), -1, -1), kept)
        vector = prompt.vector
        if vector is not None:
            share = kept.float().mean(dim=1).to(vector)[:, None]
            vector = torch.lerp(nothing.vector.to(vector).expand_as(vector), vector, share)
        return self.evaluate(Text(tokens, vector))

    def left_out(self, kept: Tensor) -> list[str]:
        """The words of each prompt that are not `kept`, (B, W) bool, or "" where texts are not known."""
        from amg_core.prompt import missing

        return [""] * len(kept) if self.texts is None else missing(self.texts, kept.tolist())

    def neighbor(self, captions: list[str]) -> Tensor:
        """Captions of the B samples -> D_n (B, C, H, W). A sample without a caption gets D_u."""
        asked = [(literally(each),) if each else None for each in captions]
        return self._drawn(asked, self.uncond.clone())

    def _drawn(self, asked: Sequence[tuple[str] | None], out: Tensor | None = None) -> Tensor:
        """The predictions (B, C, H, W) for texts. Samples without one stay as in `out`."""
        from amg_core.hosts import of_one_shape

        texts = {each: self._fitting(*each) for each in asked if each}
        for rows, filled in of_one_shape(asked, lambda each: texts[each].tokens.shape[1]):
            chosen = [texts[each] for each in filled]
            vectors = [text.vector for text in chosen if text.vector is not None]
            tokens = torch.cat([text.tokens for text in chosen])
            drawn = self.evaluate(Text(tokens, torch.cat(vectors) if vectors else None))
            out = drawn.clone() if out is None else out
            out[rows] = drawn[rows]
        return out

    def _fitting(self, words: str) -> Text:
        text, prompt = self.encode(words), self.prompt
        if text.tokens.shape[-1] != prompt.tokens.shape[-1] or (text.vector is None) != (
            prompt.vector is None
        ):
            raise AMGError(
                f"The text encoder gives {text.tokens.shape[-1]} values a token and the prompt "
                f"has {prompt.tokens.shape[-1]}: another extension changes the prompt. Turn that "
                "extension off, or choose the preset paper with deduplication 0."
            )
        device, dtype = prompt.tokens.device, prompt.tokens.dtype
        vector = None if text.vector is None else text.vector.to(device, prompt.vector.dtype)
        return Text(text.tokens.to(device, dtype), vector)
