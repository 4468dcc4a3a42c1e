"""One evaluation of the denoiser by a pipeline, and the same one again for other texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amg_core.errors import AMGError

SAME = 0.02  # relative difference of two ways to compute one prediction, in half precision
TOKENS = "encoder_hidden_states"


@dataclass(frozen=True)
class Encoded:
    """Encoded texts: `tokens` (B, T, C), and for some models `pooled` (B, P)."""

    tokens: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, rows: Any) -> Encoded:
        return Encoded(self.tokens[rows], None if self.pooled is None else self.pooled[rows])

    def like(self, other: Encoded) -> Encoded:
        """The same values with device and dtype of `other`."""
        pooled = self.pooled if other.pooled is None else _to(self.pooled, other.pooled)
        return Encoded(self.tokens.to(other.tokens), pooled)


def _to(one: Tensor | None, other: Tensor) -> Tensor | None:
    return None if one is None else one.to(other)


@dataclass(frozen=True)
class Evaluation:
    """A call of a denoiser, and its output (R, C, H, W)."""

    denoiser: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @classmethod
    def of(
        cls, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Evaluation:
        """`out` is a tuple, or an output object with `sample`."""
        return cls(denoiser, args, kwargs, out[0] if isinstance(out, tuple) else out.sample)

    @property
    def x(self) -> Tensor:
        """The noisy latents (R, C, H, W), without what a model for inpainting gets beside them."""
        names = ("sample", "hidden_states")
        given = (
            self.args[0] if self.args else next(self.kwargs[n] for n in names if n in self.kwargs)
        )
        x: Tensor = given[:, : self.output.shape[1]]
        return x

    @property
    def text(self) -> Encoded | None:
        """The encoded texts, or None if the model has none."""
        tokens = self.kwargs.get(TOKENS)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            return None
        added = self.kwargs.get("added_cond_kwargs") or {}
        return Encoded(tokens, added.get("text_embeds", self.kwargs.get("pooled_projections")))

    def rows(self, part: slice) -> Evaluation:
        """The same for some rows of the batch."""
        count = len(self.output)
        args, kwargs = (_rows(each, part, count) for each in (self.args, self.kwargs))
        return Evaluation(self.denoiser, args, kwargs, self.output[part])

    def again(self, text: Encoded) -> Tensor:
        """The output (R, C, H, W) of the model for other texts. All else stays."""
        kwargs = self.kwargs | {TOKENS: text.tokens}
        added = kwargs.get("added_cond_kwargs")
        if added and "text_embeds" in added:
            kwargs["added_cond_kwargs"] = added | {"text_embeds": text.pooled}
        if kwargs.get("pooled_projections") is not None:
            kwargs["pooled_projections"] = text.pooled
        with torch.no_grad():
            out = self.denoiser(*self.args, **kwargs)
        return Evaluation.of(self.denoiser, (), {}, out).output


def _rows(value: Any, part: slice, count: int) -> Any:
    """Rows of every tensor of a batch of `count`, in lists and mappings as well."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {key: _rows(each, part, count) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(each, part, count) for each in value)
    return value


class Parts(NamedTuple):
    """What a guided prediction was made of: u + scale·(c − u), or c alone. `cond` has the call for c."""

    cond: Evaluation
    uncond: Tensor | None
    scale: float


def parts(
    calls: Sequence[Evaluation],
    guided: Tensor,
    scales: Sequence[float],
    rescaled: Callable[[Tensor, Tensor], Tensor] | None,
    name: str,
) -> Parts:
    """Find out how a pipeline made its prediction `guided` (B, C, H, W) of its last calls of the model.

    Parameters
    ----------
    scales : sequence of float
        Guidance scales that the pipeline may have used.
    rescaled : callable, optional
        (guided, cond) -> what the pipeline makes of them at last.
    name : str
        That of the pipeline, for the message.

    Raises
    ------
    AMGError
        The prediction was made in another way, so nothing that follows from its parts would be right.
    """
    batch = len(guided)
    pieces = [
        call.rows(slice(i, i + batch)) for call in calls for i in range(0, len(call.output), batch)
    ]
    if any(piece.output.shape != guided.shape for piece in pieces):
        pieces = []
    if len(pieces) == 1 and _same(pieces[0].output, guided):
        return Parts(pieces[0], None, 1.0)
    if len(pieces) == 2:
        for cond, uncond in (pieces[::-1], pieces):
            for scale in scales:
                made = uncond.output + scale * (cond.output - uncond.output)
                made = made if rescaled is None else rescaled(made, cond.output)
                if _same(made, guided):
                    return Parts(cond, uncond.output, scale)
    raise AMGError(
        f"{name} makes its prediction in a way that the guard does not know ({len(calls)} calls of the "
        f"model with {sum(len(call.output) for call in calls)} rows for {batch} pictures). Use a pipeline "
        "with plain classifier-free guidance, and no other guidance."
    )


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= SAME * other.norm() + 1e-6)
