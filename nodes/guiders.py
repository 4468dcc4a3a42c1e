"""What leaves a guider of the host, and what it was made of.

The host's hooks lie inside of the guider, before its last arithmetic: some guiders add a prompt there,
and caches answer in their place. So the guard only listens at the hooks, and looks at what leaves.
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

KEY = "amg"  # of what a run leaves on its own model_options
HOOKS = "sampler_post_cfg_function"
OF_THE_HOST = {
    "CFGGuider": "comfy", "Guider_DualCFG": "comfy_extras", "Guider_PerpNeg": "comfy_extras",
}  # fmt: skip


@dataclass
class Heard:
    """What came by the hooks while a guider made one prediction.

    guided : as the host hands it to a post-CFG hook; batches : (prompts, a prediction each) of every
    batch that the model was asked. open : whether the guider is at work; asked : its predictions so far.
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
    """While a drawing runs, let `step` decide what leaves the guider.

    Parameters
    ----------
    step : callable
        A prediction, as `understood` describes it -> what the sampler gets for it (B, C, H, W).
    suspicious : callable
        The same -> which samples (B,) bool the guard is or will be steering.

    The guard's place is around all that others put around the guider, so that it sees what a cache
    makes up, too. For suspicious samples such a step is computed after all: the guard cannot lead away
    by predictions that nobody made.
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
    """`out`, which leaves the guider, as the host hands a prediction to a post-CFG hook.

    "denoised" is `out`; "cond" and "uncond" are the prompt and what stands for no prompt, with
    their predictions beside them; "cond_scale" is the weight of the prompt's prediction in `out`.

    Raises
    ------
    AMGError
        Names a guider of which it is not known how it puts its predictions together.
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
    """The class of the host whose arithmetic this guider has, "" if it has one of its own.

    By name and folder: the host loads its extras under names that depend on where it lies.
    """
    code = getattr(type(guider).predict_noise, "__code__", None)
    name = getattr(type(guider).predict_noise, "__qualname__", "").partition(".")[0]
    folder = Path(code.co_filename).parent.name if code is not None else ""
    return name if folder and OF_THE_HOST.get(name) == folder else ""


def _dual(guider, batches: list[tuple[list, list[Tensor]]]) -> dict:
    """DualCFGGuider: D_neg + cfg2·(D_mid − D_neg) + cfg1·(D_c − D_mid), or one in the other."""
    conds, predictions = next(  # other nodes may have asked the model beside it
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
    """What to say of a run in which nothing came out of the guider where the host's guiders answer."""
    return _refused(guider, "was never called as ComfyUI calls a guider")


def _refused(guider, why: str) -> str:
    return (
        f"The guard cannot work with the guider {type(guider).__name__}: it {why}, so the guard "
        "cannot steer its result. Use CFGGuider, BasicGuider, DualCFGGuider or PerpNegGuider, or "
        "take Apply AMG out of this graph and check the pictures with Similarity Probe."
    )
