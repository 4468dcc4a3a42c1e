"""Reads and replaces the result of the host's guiders.

The host's hooks are called inside the guider, before its last arithmetic. After them some guiders add
another prompt, and caches can replace the whole guider. So the guard only records at the hooks, and acts on
the guider's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..amg_core import guidance
from ..amg_core.errors import AMGError

KEY = "amg"  # name of the run's data in its own model_options
HOOKS = "sampler_post_cfg_function"
OF_THE_HOST = {
    "CFGGuider": "comfy", "Guider_DualCFG": "comfy_extras", "Guider_PerpNeg": "comfy_extras",
}  # fmt: skip


@dataclass
class Heard:
    """The data recorded at the hooks while a guider makes one prediction.

    `guided` is the argument of the post-CFG hook. `batches` has (prompts, predictions) of every evaluation
    of the model. `open` says whether the guider is running, and `asked` counts its predictions so far.
    """

    guided: list[dict] = field(default_factory=list)
    batches: list[tuple[list, list[Tensor]]] = field(default_factory=list)
    open: bool = False
    asked: int = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.guided, self.batches, self.open = [], [], True
        try:
            yield
        finally:
            self.open = False


@contextmanager
def listening(
    guider, step: Callable[[dict], Tensor], suspicious: Callable[[dict], Tensor]
) -> Iterator[Heard]:
    """A context in which `step` replaces the result of the guider.

    The guard wraps all that other nodes have put around the guider, so it also gets predictions from a
    cache. If there are suspicious samples, such a step is computed after all, because the guard cannot
    steer without the model's real predictions.

    Parameters
    ----------
    step : callable
        A prediction, as in `understood` -> the prediction for the sampler (B, C, H, W).
    suspicious : callable
        The same argument -> samples (B,) bool that the guard steers.
    """
    heard, model_options = Heard(), guider.model_options

    def hear(args: dict) -> Tensor:
        if heard.open:
            heard.guided.append(args)
        return args["denoised"]

    def batch(executor, model, conds, *rest, **named):
        out = executor(model, conds, *rest, **named)
        if heard.open:
            heard.batches.append((conds, list(out)))
        return out

    def predict(executor, x, timestep, model_options={}, seed=None):  # noqa: B006 - as the host's
        with heard.listening():
            out = executor(x, timestep, model_options, seed)
        first, heard.asked = heard.asked == 0, heard.asked + 1
        if heard.guided or first:
            return step(understood(guider, heard, out))
        made_up = {
            "denoised": out, "cond": None, "uncond": None, "cond_denoised": None,
            "uncond_denoised": None, "cond_scale": 1.0, "model": guider.inner_model, "input": x,
            "sigma": timestep, "model_options": model_options,
        }  # fmt: skip
        rows = suspicious(made_up)
        if not rows.any():
            return step(made_up)
        with heard.listening():
            computed = guider.predict_noise(x, timestep, model_options, seed)
        args = understood(guider, heard, computed)
        chosen = guidance.expand(rows, out) > 0
        seen = {key: torch.where(chosen, args[key], out) for key in ("denoised", "cond_denoised")}
        return step(args | seen)

    wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    before = {
        kind: wrappers.get(kind, {})
        for kind in (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)
    }
    hooks = model_options.get(HOOKS, [])
    mine = [hook for hook in hooks if getattr(hook, "amg", False)]
    model_options[KEY] = hear
    model_options[HOOKS] = [hook for hook in hooks if hook not in mine] + mine
    for kind, mine_too in zip(before, (predict, batch), strict=True):
        wrappers[kind] = {KEY: [mine_too]} | before[kind]
    try:
        yield heard
    finally:
        model_options.pop(KEY, None)
        model_options[HOOKS] = hooks
        wrappers |= before


def understood(guider, heard: Heard, out: Tensor) -> dict:
    """The guider's result `out` in the form of a post-CFG hook's argument.

    "denoised" is `out`. "cond" and "uncond" are the prompt and the conditioning for no prompt, each with
    its prediction. "cond_scale" is the weight of the prompt's prediction in `out`.

    Raises
    ------
    AMGError
        The guider combines its predictions in an unknown way. The message names it.
    """
    kind = _kind(guider)
    if not heard.guided:
        raise AMGError(_refused(guider, "never guides by the prompt as the guiders of ComfyUI do"))
    args = heard.guided[-1] | {"denoised": out}
    if kind == "Guider_DualCFG":
        return args | _dual(guider, heard.batches)
    if not kind:
        inside = heard.guided[-1]["denoised"]
        if out is not inside and not torch.equal(out, inside):
            raise AMGError(_refused(guider, "goes on calculating after the usual guidance"))
    if kind == "Guider_PerpNeg":  # there the negative prompt is not what stands for no prompt
        args |= {"uncond": args["empty_cond"], "uncond_denoised": args["empty_cond_denoised"]}
    return args


def _kind(guider) -> str:
    """The class of the host whose arithmetic this guider uses, or "" for other arithmetic.

    It is recognised by name and folder, because the host loads its extras under names that depend on
    where it is installed.
    """
    code = getattr(type(guider).predict_noise, "__code__", None)
    name = getattr(type(guider).predict_noise, "__qualname__", "").partition(".")[0]
    folder = Path(code.co_filename).parent.name if code is not None else ""
    return name if folder and OF_THE_HOST.get(name) == folder else ""


def _dual(guider, batches: list[tuple[list, list[Tensor]]]) -> dict:
    """DualCFGGuider: D_neg + cfg2·(D_mid − D_neg) + cfg1·(D_c − D_mid), or its nested style."""
    conds, predictions = next(  # other nodes may have evaluated the model as well
        asked for asked in batches if asked[0][-1] is guider.conds["positive"]
    )
    negative, middle, positive = conds
    weight = guider.cfg1 * guider.cfg2 if guider.nested else guider.cfg1
    without = (negative, predictions[0]) if negative else (middle, predictions[1])
    return {
        "cond": positive, "cond_denoised": predictions[2], "cond_scale": weight,
        "uncond": without[0], "uncond_denoised": without[1],
    }  # fmt: skip


def bypassed(guider) -> str:
    """The error for a run in which the sampler never called the guider's prediction."""
    return _refused(guider, "was never called as ComfyUI calls a guider")


def _refused(guider, why: str) -> str:
    return (
        f"The guard cannot work with the guider {type(guider).__name__}: it {why}, so the guard "
        "cannot steer its result. Use CFGGuider, BasicGuider, DualCFGGuider or PerpNegGuider, or "
        "take Apply AMG out of this graph and check the pictures with Similarity Probe."
    )
