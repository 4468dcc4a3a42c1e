"""Adapting a prompt inside ComfyUI: gradients of a score with respect to the conditioning.

The host's own sampling code loads the model, applies its patches and prepares the prompts. The "sampler"
here then evaluates one noise level instead of drawing. `amg_core.mitigation.differentiation` says how
gradients pass through weights that were loaded for inference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..amg_core.detection import statistics
from ..amg_core.detection.predictions import Predictions
from ..amg_core.errors import AMGError
from ..amg_core.mitigation import differentiation
from ..amg_core.mitigation.adaptation import ANISOTROPY, NORM, Adapted, Score, adapt
from ..amg_core.mitigation.differentiation import GIB, BudgetExceeded, Ledger
from ..amg_core.mitigation.transition import guidance_norm
from . import hook, probing

SHARE_OF_FREE = 0.8  # share of the free memory that is used if no limit is given
REFUSED = {
    "control": "a ControlNet. Connect Adapt Prompt before Apply ControlNet",
    "gligen": "GLIGEN boxes. Connect Adapt Prompt before them",
    "hooks": "LoRA or model hooks. Connect Adapt Prompt before them",
    "area": "an area. Adapt the prompt first and set its area afterwards",
    "mask": "a mask. Adapt the prompt first and set its mask afterwards",
}
log = logging.getLogger(__name__)


@dataclass
class AdaptedPrompts:
    """The adapted prompt of each picture, and its cost.

    `peak` is the largest memory of the backward pass and `budget` its limit, in bytes. `twice` says whether
    the network had to be recomputed to stay within the limit.
    """

    adapted: list[Adapted]
    peak: int = 0
    budget: int = 0
    twice: bool = False


def adapt_prompt(
    model, positive, negative, latent: dict, seed: int, target: float, iterations: int, rate: float,
    memory: int = 0, metric: str = NORM, weight: float = statistics.WEIGHT,
) -> tuple[list, AdaptedPrompts]:  # fmt: skip
    """CONDITIONING whose score is at most `target` for the noise of `seed`, one row for each picture.

    Parameters
    ----------
    latent : LATENT
        Gives shape and batch. The noise is the same as KSampler's for this seed.
    memory : int
        Limit for the backward pass in bytes. 0 means most of the free memory.
    metric : one of `adaptation.METRICS`
        The score: Wen et al.'s ‖ε_c − ε_u‖ at the first step, or `statistics.anisotropy`.
    weight : float
        Of the alignment, for *anisotropy*.

    Returns
    -------
    CONDITIONING, `positive` itself if every picture's score was at most the target already.

    Raises
    ------
    AMGError
        The prompt has several parts, or carries something that the score would not include; there is not
        enough memory; or no gradient can be taken through the model.
    """
    check(positive, "positive")
    check(negative, "negative")
    shape = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    guider = comfy.samplers.CFGGuider(hook.detach(model.clone()))  # nothing is drawn to be guarded
    guider.set_conds(positive, negative)
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.sigma_max), 0.0])
    if metric == ANISOTROPY:
        sigmas = probing.levels(sampling, statistics.LOW)
    asking = _Asking(target, iterations, rate, memory, metric, weight)
    guider.sample(
        noise(shape, seed, latent.get("batch_index")), shape, asking, sigmas, disable_pbar=True,
        seed=seed,
    )  # fmt: skip
    outcome = asking.outcome
    if all(one.steps == 0 for one in outcome.adapted):
        return positive, outcome
    embedding, more = positive[0]
    rows = torch.cat([one.embedding.to(embedding) for one in outcome.adapted])
    return [[rows, dict(more)]], outcome


def check(conditioning, name: str) -> None:
    """Raise AMGError unless `conditioning` is one text that acts everywhere and at all times."""
    if len(conditioning) != 1:
        raise AMGError(
            f"{name}: this prompt has {len(conditioning)} parts. Adapt each part by itself and "
            "combine them afterwards."
        )
    (embedding, more), *_ = conditioning
    if embedding is None or embedding.ndim != 3:
        raise AMGError(
            f"{name}: this is not an encoded text. Connect the output of a CLIP Text Encode node."
        )
    for key, what in REFUSED.items():
        if more.get(key) is not None:
            raise AMGError(f"{name}: this prompt carries {what}.")


def noise(latent: Tensor, seed: int, batch_index=None) -> Tensor:
    """The noise that KSampler draws for this latent from `seed`, without the global generator."""
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(latent.shape, dtype=latent.dtype, generator=generator)
    one = (1, *latent.shape[1:])
    every = [
        torch.randn(one, dtype=latent.dtype, generator=generator)
        for _ in range(max(batch_index) + 1)
    ]
    return torch.cat([every[i] for i in batch_index])


class _Asking(comfy.samplers.Sampler):
    """A sampler that only adapts the prompt, at the noise levels that the metric needs."""

    def __init__(
        self, target: float, iterations: int, rate: float, memory: int, metric: str, weight: float
    ):
        self.target, self.iterations, self.rate, self.memory = target, iterations, rate, memory
        self.metric, self.weight = metric, weight
        self.outcome = AdaptedPrompts([])

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
               denoise_mask=None, disable_pbar=False):  # fmt: skip
        model, options = model_wrap.inner_model, _options(extra_args["model_options"])
        network = model.diffusion_model
        device = noise.device
        budget = self.memory or int(SHARE_OF_FREE * comfy.model_management.get_free_memory(device))
        self.outcome.budget = budget
        conds = {name: model_wrap.conds[name][0] for name in ("positive", "negative")}
        bar = comfy.utils.ProgressBar(len(noise) * (self.iterations + 1))
        with torch.inference_mode(False), differentiation.ordinary_weights(network):
            given = latent_image.clone()
            points = self._points(model.model_sampling, sigmas.clone(), noise.clone(), given)
            for i in range(len(given)):
                one = slice(i, i + 1)
                score = _score(
                    model, conds, [(x[one], sigma) for x, sigma in points], given[one], options, i,
                    extra_args["seed"], self._measured,
                )  # fmt: skip
                self.outcome.adapted.append(
                    self._within(network, budget, score, _row(conds["positive"], i, device))
                )
                bar.update_absolute((i + 1) * (self.iterations + 1))
        return noise

    def _points(self, sampling, sigmas: Tensor, noise: Tensor, latent: Tensor) -> list:
        """Noisy latents (B, C, …) and their noise level (1,), for each evaluation of the metric."""
        if self.metric == ANISOTROPY:
            return [(probing.same_input(sampling, noise, s), s[None]) for s in sigmas]
        return [(sampling.noise_scaling(sigmas[0], noise, latent, True), sigmas[:1])]

    def _measured(self, seen: list[Predictions]) -> Tensor:
        """The score of one picture from its predictions, a scalar."""
        if self.metric == ANISOTROPY:
            high, low = seen
            return statistics.anisotropy(high, low, self.weight)[0]
        (first,) = seen
        return guidance_norm(first.cond, first.uncond, torch.tensor([first.sigma]))[0]

    def _within(self, network, budget: int, score, embedding: Tensor) -> Adapted:
        """Adapt one prompt. If the backward pass needs too much memory, recompute the blocks."""
        for twice in (self.outcome.twice, True):
            ledger = Ledger(budget, network)

            def counted(prompt: Tensor, ledger=ledger) -> Tensor:
                ledger.restart()
                return score(prompt)

            try:
                with ExitStack() as stack:
                    if twice:
                        stack.enter_context(differentiation.blocks_run_twice(network, ledger))
                    stack.enter_context(ledger.counting())
                    adapted = adapt(
                        embedding, counted, self.target, iterations=self.iterations, rate=self.rate,
                        on_step=_interruptible,
                    )  # fmt: skip
                self.outcome.twice |= twice
                self.outcome.peak = max(self.outcome.peak, ledger.peak)
                return adapted
            except (BudgetExceeded, torch.OutOfMemoryError) as error:
                if twice:
                    raise AMGError(
                        "memory_gb: one step of Adapt Prompt needs more than the "
                        f"{budget / GIB:.1f} GiB that "
                        f"{('were given' if self.memory else 'are free')}. Allow more, use a "
                        "smaller latent, or use Randomise Prompt or Delayed Guidance: they need "
                        "no extra memory."
                    ) from error
                comfy.model_management.soft_empty_cache()
            except RuntimeError as error:
                raise _explained(error) from error
        raise AssertionError("unreachable")


def _score(
    model, conds: dict, points: list[tuple[Tensor, Tensor]], latent: Tensor, options: dict,
    row: int, seed, measured: Callable[[list[Predictions]], Tensor],
) -> Score:  # fmt: skip
    """A function: embedding (1, T, C) -> score, for one picture's (x, σ). D_u is computed once."""

    def predict(name: str, embedding: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        cond = _plain(conds[name], row) | {"cross_attn": embedding, "model_conds": {}}
        (cond,) = comfy.samplers.encode_model_conds(
            model.extra_conds, [cond], x, x.device, name, latent_image=latent, denoise_mask=None,
            seed=seed,
        )  # fmt: skip
        return comfy.samplers.calc_cond_batch(model, [[cond]], x, sigma, options)[0]

    nothing, kind = _row(conds["negative"], row, latent.device), probing.kind(model.model_sampling)
    with torch.no_grad():
        unconds = [predict("negative", nothing, x, sigma) for x, sigma in points]

    def score(embedding: Tensor) -> Tensor:
        seen = [
            Predictions(x, float(sigma), predict("positive", embedding, x, sigma), uncond, kind)
            for (x, sigma), uncond in zip(points, unconds, strict=True)
        ]
        return measured(seen)

    return score


def _row(cond: dict, row: int, device) -> Tensor:
    """The embedding for one picture, (1, T, C), as an ordinary tensor."""
    every = cond["cross_attn"]
    return every[row % len(every)][None].clone().to(device)


def _plain(cond: dict, row: int) -> dict:
    """The other data of the prompt (pooled output, sizes, guidance) for one picture."""
    out = {}
    for key, value in cond.items():
        if key in ("model_conds", "cross_attn"):
            continue
        if isinstance(value, Tensor):
            value = value.clone()
            if key == "pooled_output" and len(value) > 1:
                value = value[row % len(value)][None]
        out[key] = value
    return out


def _options(options: dict) -> dict:
    """The run's options with an attention that supports gradients. The fastest ones do not."""
    transformer = dict(options.get("transformer_options", {}))
    transformer.setdefault("optimized_attention_override", _attention)
    return {**options, "transformer_options": transformer}


def _attention(chosen, *args, **kwargs):
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _interruptible(step: int, score: float) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _explained(error: RuntimeError) -> Exception:
    """An AMGError if the cause is that no gradient can be taken, or else the error itself."""
    text = str(error)
    signs = ("Inference tensors", "derivative for", "does not require grad", "not have been used")
    if isinstance(error, AMGError) or not any(sign in text for sign in signs):
        return error
    return AMGError(
        "model: Adapt Prompt cannot compute gradients through this model, or through a patch "
        f"that another node put on it ({text.splitlines()[0][:160]}). Connect the model directly "
        "from its loader, or use Randomise Prompt or Delayed Guidance, which need no gradients."
    )
