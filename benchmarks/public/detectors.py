"""Is a prompt memorised? The scores of the papers, from predictions for pure noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from amg_core.detection import predictions as of
from amg_core.detection import statistics
from amg_core.errors import AMGError
from amg_core.hosts import noise_level
from amg_diffusers.noise import level, sigmas
from benchmarks.detection import roc

from .model import Model

KINDS = {"epsilon": of.EPSILON, "v_prediction": of.V}


@torch.no_grad()
def scores(model: Model, text: str, seeds: Sequence[int]) -> dict[str, float]:
    """`statistics.measure` of a prompt, means over a noise of each seed.

    AMGError for a flow, and for a pipeline that takes more than tokens.
    """
    tokens, empty = (part[:1] for part in model.encode([text]))
    noise = model.noise(seeds)
    high, low = (
        predictions(model, noise, at, tokens, empty)
        for at in (last(model), round(statistics.LOW * last(model)))
    )
    return statistics.measure(high, low)[-1]


def last(model: Model) -> int:
    """The timestep of the highest noise in training."""
    return int(model.pipe.scheduler.config.num_train_timesteps) - 1


def kind(model: Model) -> str:
    """What the network predicts, one of `predictions.KINDS`. AMGError for a flow."""
    found = KINDS.get(model.pipe.scheduler.config.get("prediction_type", ""))
    if found is None:
        raise AMGError(
            "Detectors and Wen's remedy are for models that predict ε or v: leave them out "
            "(--no-detectors, --methods)."
        )
    return found


def predictions(
    model: Model, noise: Tensor, timestep: int, tokens: Tensor, empty: Tensor
) -> of.Predictions:
    """For the noises z (n, C, H, W) as the model's input, at a timestep of its training.

    `tokens` and `empty` are (1, T, C). Gradients pass from the result to them.
    """
    at, count = level(model.pipe.scheduler, timestep), len(noise)
    given = noise.to(model.device, empty.dtype)
    texts = torch.cat([each.to(empty).expand(count, -1, -1) for each in (tokens, empty)])
    times = torch.tensor([timestep], device=model.device)
    out = model.denoiser(torch.cat([given, given]), times, encoder_hidden_states=texts)
    output = (out[0] if isinstance(out, tuple) else out.sample).float().cpu()
    cond, uncond = (at.denoised(noise, each) for each in output.chunk(2))
    table = sigmas(model.pipe.scheduler.alphas_cumprod)
    sigma, _ = noise_level(table[timestep][None], table)
    x = of.unrescaled(noise, float((1 + sigma**2) ** -0.5))
    return of.Predictions(x, float(sigma), cond, uncond, kind(model))


def figures(
    found: Sequence[dict[str, float]], memorised: Sequence[bool]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """{detector: {"AUC", "TPR at 1 % FPR"}} with 95 % intervals, over prompts.

    "norm" is Wen et al.'s, "alignment" the other part of the anisotropy, "anisotropy" with the paper's
    weights for Stable Diffusion 1.4, and "combined" with weights that each half of the prompts learns for
    the other. "agreement" is this program's own (`statistics`), for two seeds or more.
    """
    labels = np.array(memorised)
    norm, alignment = (np.array([one[name] for one in found]) for name in ("norm", "alignment"))
    columns = {
        "norm": norm,
        "alignment": alignment,
        "anisotropy": norm + statistics.WEIGHT * alignment,
    }
    if min(labels.sum(), (~labels).sum()) >= 4:
        columns["combined"], _ = roc.crossed(norm, alignment, labels)
    if all("agreement" in one for one in found):
        columns["agreement"] = np.array([one["agreement"] for one in found])
    made = {}
    for name, values in columns.items():
        positives, negatives = values[labels], values[~labels]
        made[name] = {
            title: (figure(positives, negatives), *roc.interval(figure, positives, negatives))
            for title, figure in (("AUC", roc.auc), ("TPR at 1 % FPR", roc.tpr_at))
        }
    return made
