"""What a host has to do to use the guard, and code that hosts share.

A host is a program that samples: ComfyUI (`nodes`), Automatic1111 and Forge (`amg_webui`), diffusers
(`amg_diffusers`), the demo (`amg_demo`). For one generation it does the following, in this order:

1. It makes a matcher with a decoder for the model's latents: `Matcher(Searcher(Index.open(folder)),
   descriptor, decoder)`, or `Matcher.through` for another decoder. During sampling the matcher is on the
   model's device (`Matcher.to`, `Matcher.rest`). On it, the host makes a `SamplingRun` for each drawing.
2. At every model evaluation it calls `SamplingRun.step` with the predictions as x̂0, the noise level in
   the units of `noise_level`, and, if it can, predictions for other words (`Texts`).
3. It uses the result of `step` in place of the prediction. If that is the same tensor, nothing may change.
4. It has the finished pictures checked (`verdict`), and copies drawn again: `retry.until_no_copy`
   asks its `Generation` for both.
5. It calls `report.compose`.

In the demo, `amg_demo.__main__.run` makes the matcher, and `amg_demo.sample.closed_loop` makes the runs and
the retries (1 and 4). `amg_demo.sample.euler` calls `step` and uses its result (2 and 3). The demo only
prints figures, so it composes no report (5). docs/architecture.md follows one evaluation through these
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from .run import Drawn, Settings
    from .similarity.verdict import Verdict

Caption = TypeVar("Caption")  # a text, or several that are used together
FLOW_SIGMA_MAX = 0.999  # σ/(1 − σ) of pure noise is infinite


class Texts(Protocol):
    """The model's predictions for other words than the prompt's, at one evaluation of B samples.

    A host passes them to `SamplingRun.step`. Without them, and with the preset main, only repulsion acts.
    Each call of `reduced` or `neighbor` costs at least one more evaluation of the model for the batch.
    """

    @property
    def words(self) -> Tensor:
        """For each sample the number of parts of its prompt that can be left out, (B,) int64.

        A part is a word, or a group of neighbouring words. 0 if the prompt cannot be reduced.
        """
        ...

    @property
    def separable(self) -> bool:
        """Whether the text is known, so that any part can be left out and the rest encoded anew.

        Otherwise only the last parts can: then a part is a token of the encoded prompt, and each token
        carries the meaning of those before it.
        """
        ...

    @property
    def captions(self) -> bool:
        """Whether there is a prediction for a caption: it takes a text encoder, and D_u."""
        ...

    def reduced(self, kept: Tensor) -> Tensor:
        """The parts to keep, (B, W) bool with W = max(words) -> D_s (B, C, H, W).

        Entries beyond a sample's own number of parts are ignored. With no part kept, D_s is the
        prediction for the empty text.
        """
        ...

    def left_out(self, kept: Tensor) -> list[str]:
        """The words of each prompt that are not `kept`, (B, W) bool, or "" where the text is not known."""
        ...

    def neighbor(self, captions: list[str]) -> Tensor:
        """Captions of the B samples -> D_n (B, C, H, W). A sample without a caption gets D_u."""
        ...


@runtime_checkable
class Generation(Protocol):
    """One generation of a batch by a host: it draws, as often as it is asked, and judges what it drew."""

    def restarts(self) -> bool:
        """Whether samples can start from other noise, and then become other pictures."""
        ...

    def draw(self, settings: Settings, suspects: Tensor, anew: Tensor) -> Drawn:
        """The whole batch, each time from the same noise.

        Parameters
        ----------
        suspects : Tensor (B,) bool
            Samples that came out as copies before: the `SamplingRun` steers them from the first step.
        anew : Tensor (B,) bool
            Samples that start from other noise than before. None of them if not `restarts()`.
        """
        ...

    def judge(
        self, latents: Tensor, named: Sequence[Collection[int]], samples: list[int]
    ) -> Sequence[Verdict]:
        """A verdict on each of some drawn latents (b, C, H, W), decoded with the model's own VAE.

        Parameters
        ----------
        named : b collections of row ids
            Pictures of the index that are compared in any case.
        samples : list of int
            Which samples of the batch they are.
        """
        ...

    def stopped(self) -> bool:
        """Whether the artist has interrupted, in hosts that then hand over what there is."""
        ...


def noise_level(sigma: Tensor, table: Tensor | None) -> tuple[Tensor, float]:
    """Convert the host's σ (B,) to k-diffusion σ (B,) and diffusion time t in [0, 1], 1 = pure noise.

    Parameters
    ----------
    sigma : Tensor (B,)
    table : Tensor (T,), ascending, or None
        σ of every training step. Then σ stays as it is, and t is its place in the table: timestep/999
        for discrete models, the share of the log-σ range for continuous ones. None for flow models,
        with σ/(1 − σ) and t = σ.
    """
    if table is None:
        part = sigma.float().clamp(0, 1)
        inner = part.clamp(max=FLOW_SIGMA_MAX)
        return inner / (1 - inner), float(part[0])
    levels = table.float().clamp_min(1e-10).log()
    nearest = (levels - sigma.float().clamp_min(1e-10).log()[0].to(levels.device)).abs().argmin()
    return sigma.float(), float(nearest) / max(1, len(table) - 1)


SAME_TEXT = (
    0.05  # largest `apart` of two encodings of one text, by different devices and precisions
)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of a token in two encodings (T, C), relative to the tokens' mean length.

    Infinite if the encodings differ in shape.
    """
    if one.shape != other.shape:
        return float("inf")
    one, other = one.float(), other.to(one.device).float()
    mean = one.norm(dim=-1).mean().clamp_min(1e-9)
    return float((one - other).norm(dim=-1).amax() / mean)


def of_one_shape(
    captions: Sequence[Caption], shape: Callable[[Caption], Hashable]
) -> Iterator[tuple[list[int], list[Caption]]]:
    """Group the captions of the B samples by the shape of their conditioning.

    Padding a conditioning would change its meaning, so captions of different shapes are evaluated
    separately. Yields for each group its samples, and B captions of that shape, one for every sample of
    the batch. Samples without a caption are in no group.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, caption in enumerate(captions):
        if caption:
            groups.setdefault(shape(caption), []).append(row)
    for rows in groups.values():
        yield rows, [captions[row if row in rows else rows[0]] for row in range(len(captions))]


def composited(mask: Tensor | None, known: Tensor | None) -> Callable[[Tensor], Tensor]:
    """For inpainting: a function from a prediction to the whole latent, with the given part put in.

    Where `mask` is 1 the prediction stays. `known` is the given latent times 1 − mask. Without a mask,
    the function returns the same tensor.
    """
    if mask is None or known is None:
        return lambda prediction: prediction
    return lambda prediction: prediction * mask + known
