"""What a host has to do to be guarded, and what hosts share.

A host is a program that samples: ComfyUI (`nodes`), Automatic1111 and Forge (`amg_webui`), the demo
(`amg_demo`). For one generation it needs, in this order:

1. a `SamplingRun` for each drawing, on a `Matcher` that decodes as the host does (`Matcher.through`) and
   is where the model is while it samples (`Matcher.to`, `Matcher.rest`);
2. at every model evaluation one call of `SamplingRun.step`, with the predictions as x̂0, the noise level in
   the units of `noise_level`, and, where the host can, `Texts`: predictions for other words;
3. what leaves `step` handed on in place of the prediction, to the bit where it is the same tensor;
4. the finished pictures judged (`verdict`), and drawn again while they are copies: `retry.until_no_copy`
   asks the host's `Generation` for both;
5. `report.compose` of what was seen.

docs/architecture.md shows the way through it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from .run import Drawn, Settings
    from .similarity.verdict import Verdict

FLOW_SIGMA_MAX = 0.999  # σ/(1 − σ) of pure noise is infinite


class Texts(Protocol):
    """What the model predicts for other words than the prompt's, at one evaluation of B samples.

    Each call is one more evaluation of the model for the whole batch.
    """

    @property
    def words(self) -> int:
        """How many tokens the prompt has, padding included; 0 where it is no sequence of them."""
        ...

    def reduced(self, kept: Tensor) -> Tensor:
        """Words kept (B,) int64 in [0, words] -> D_s (B, C, H, W)."""
        ...

    def neighbor(self, captions: list[str]) -> Tensor:
        """Captions of the B samples -> D_n (B, C, H, W). A sample without a caption gets D_u."""
        ...


@runtime_checkable
class Generation(Protocol):
    """One generation of a batch by a host: it draws, as often as it is asked, and judges what it drew."""

    def draw(self, settings: Settings, suspects: Tensor) -> Drawn:
        """The whole batch, each time from the same noise.

        Parameters
        ----------
        suspects : Tensor (B,) bool
            Samples that came out as copies before: the `SamplingRun` steers them from the first step.
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
    """The host's σ (B,) as k-diffusion σ (B,), and diffusion time t in [0, 1], 1 = pure noise.

    Parameters
    ----------
    table : Tensor (T,), ascending, or None
        σ of every training step: σ stays, t is its place among them: timestep/999 for discrete models,
        the share of the log-σ range for continuous ones. None for flow models: σ/(1 − σ), and t = σ.
    """
    if table is None:
        part = sigma.float().clamp(0, 1)
        inner = part.clamp(max=FLOW_SIGMA_MAX)
        return inner / (1 - inner), float(part[0])
    levels = table.float().clamp_min(1e-10).log()
    nearest = (levels - sigma.float().clamp_min(1e-10).log()[0].to(levels.device)).abs().argmin()
    return sigma.float(), float(nearest) / max(1, len(table) - 1)


def of_one_shape(
    captions: list[str], shape: Callable[[str], Hashable]
) -> Iterator[tuple[list[int], list[str]]]:
    """Captions of the B samples, in groups that can be evaluated together.

    Padding a conditioning would change what it means, so captions of different shapes are evaluated
    apart. Yields the samples that a group is for, and a caption of that shape for every sample; samples
    without a caption are in no group.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, caption in enumerate(captions):
        if caption:
            groups.setdefault(shape(caption), []).append(row)
    for rows in groups.values():
        yield rows, [captions[row if row in rows else rows[0]] for row in range(len(captions))]


def composited(mask: Tensor | None, known: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Inpainting: a prediction -> the picture it stands for, itself where `mask` is 1.

    known : the given latent times 1 − mask. Without a mask, the very same tensor.
    """
    if mask is None or known is None:
        return lambda prediction: prediction
    return lambda prediction: prediction * mask + known
