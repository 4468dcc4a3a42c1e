"""The model's predictions for other texts: the neighbour's caption, and a shorter prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """

    def __init__(
        self, prompt: Text, uncond: Tensor | None, encode: Callable[[str], Text],
        evaluate: Callable[[Text], Tensor],
    ):  # fmt: skip
        self.prompt, self.uncond, self.encode, self.evaluate = prompt, uncond, encode, evaluate

    @property
    def captions(self) -> bool:
        return self.uncond is not None

    @property
    def words(self) -> int:
        """The number of tokens of the prompt with padding."""
        return self.prompt.tokens.shape[1]

    def reduced(self, kept: Tensor) -> Tensor:
        """D_s (B, C, H, W) for the first `kept` (B,) tokens of the prompt, then those of the empty text."""
        from amg_core.guidance import reduced

        prompt, nothing = self.prompt, self._fitting("")
        times = -(-self.words // nothing.tokens.shape[1])
        rest = nothing.tokens.to(prompt.tokens).repeat(1, times, 1)[:, : self.words]
        tokens = reduced(prompt.tokens, rest.expand(len(kept), -1, -1), kept)
        vector = prompt.vector
        if vector is not None:
            share = (kept / self.words).to(vector)[:, None]
            vector = torch.lerp(nothing.vector.to(vector).expand_as(vector), vector, share)
        return self.evaluate(Text(tokens, vector))

    def neighbor(self, captions: list[str]) -> Tensor:
        """Captions of the B samples -> D_n (B, C, H, W). A sample without a caption gets D_u."""
        from amg_core.hosts import of_one_shape

        texts = {each: self._fitting(literally(each)) for each in captions if each}
        out = self.uncond.clone()
        for rows, filled in of_one_shape(captions, lambda each: texts[each].tokens.shape[1]):
            chosen = [texts[caption] for caption in filled]
            vectors = [text.vector for text in chosen if text.vector is not None]
            tokens = torch.cat([text.tokens for text in chosen])
            text = Text(tokens, torch.cat(vectors) if vectors else None)
            out[rows] = self.evaluate(text)[rows]
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
