"""Time, multiply-accumulates and peak memory of sampling runs."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import host

CFG = 7.5
LADDER = 30  # steps of the run whose noise levels are taken


@dataclass
class Taken:
    """What one run took: seconds, MACs and branches of each evaluation, and seconds of the whole run.

    branches : pictures that went through the model, for each one drawn; plain guidance has two.
    peak : bytes, on a GPU all that was allocated at once, else 0.
    """

    seconds: list[float] = field(default_factory=list)
    macs: list[int] = field(default_factory=list)
    branches: list[float] = field(default_factory=list)
    whole: float = 0.0
    peak: int = 0


def run(model, size: int, batch: int, steps: int, count: bool = False) -> Taken:
    """Sample by the host's own entry; Euler, at `steps` of the noise levels of a run of `LADDER`.

    Parameters
    ----------
    model : ModelPatcher
    size, batch : int, side in pixels, pictures
    count : bool
        Count MACs, about 10 µs a kernel: on a GPU `seconds` then mean nothing.
    """
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    model, taken = model.clone(), Taken()
    cuda, clock = model.load_device.type == "cuda", Clock(model.load_device)

    class Guider:
        """The host's guider as the sampler asks it, around all that nodes have put around it."""

        def __init__(self, guider):
            self.guider = guider

        def __getattr__(self, name: str):
            return getattr(self.guider, name)

        def __call__(self, *args, **kwargs):
            """One evaluation: both branches, guidance, and the guard."""
            taken.branches.append(0)
            start = clock()
            if count:
                with Macs() as counter:
                    out = self.guider(*args, **kwargs)
                taken.macs.append(counter.total)
            else:
                out = self.guider(*args, **kwargs)
            taken.seconds.append(clock() - start)
            return out

    def sampler(executor, guider, *args, **kwargs):
        return executor(Guider(guider), *args, **kwargs)

    def network(executor, x, *args, **kwargs):
        taken.branches[-1] += len(x) / batch
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "cost", sampler)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "cost", network)
    side = size // 8
    noise = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(3))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    with torch.inference_mode():
        positive, negative = host.prompts("cpu")
        comfy.sample.sample(
            model, noise, steps, CFG, "euler", "normal", positive, negative,
            torch.zeros_like(noise), sigmas=levels(model, steps), disable_pbar=True, seed=3,
        )  # fmt: skip
    taken.whole = clock() - start
    taken.peak = torch.cuda.max_memory_allocated() if cuda else 0
    return taken


def levels(model, steps: int) -> torch.Tensor:
    """(steps + 1,) noise levels spread evenly over those of a run of `LADDER` steps, then 0.

    The resolution that the guard compares at, and so its cost, depends on the noise level.
    """
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    every = comfy.samplers.calculate_sigmas(sampling, "normal", max(LADDER, steps))
    places = (torch.arange(steps) + 0.5) / steps * (len(every) - 1)
    return torch.cat([every[places.long()], torch.zeros(1)])


def branch_macs(model, size: int) -> int:
    """Of one branch of the model for one picture of that side, by its shapes alone."""
    kind, config = type(model.model.diffusion_model), model.model.model_config.unet_config
    return network_macs(kind, config, size, host.CONTEXT)


def network_macs(kind: type, config: dict, size: int, context: int) -> int:
    """Of a UNet of the host made from `config`, for one picture of that side, by its shapes alone."""
    import comfy.ldm.modules.attention as attention
    import comfy.ops

    side = size // 8
    with torch.inference_mode(False), torch.no_grad():
        shape = {"device": "meta", "dtype": torch.float32}
        network = kind(**config | shape, operations=comfy.ops.disable_weight_init)
        x, t = torch.empty(1, 4, side, side, **shape), torch.zeros(1, **shape)
        pooled = config.get("adm_in_channels")
        y = torch.empty(1, pooled, **shape) if pooled else None
        # The others ask how much memory is free, which means nothing where there is none.
        whole = patch.object(attention, "optimized_attention", attention.attention_pytorch)
        with whole, Macs() as counter:
            network(x, t, context=torch.empty(1, host.TOKENS, context, **shape), y=y)
    return counter.total


class Macs(TorchDispatchMode):
    """Counts multiply-accumulates of convolutions and products, forwards and backwards.

    By torch's own formulas. Its `FlopCounterMode` also follows modules, which fails where
    `torch.autograd.grad` asks for single inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._leaves: set = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func not in self._leaves:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            self._leaves.add(func)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out) // 2
        return out


class Clock:
    """Seconds. On a CPU those of the processor, which other programs disturb less than the clock's.

    On an accelerator after all that was launched has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        getattr(torch, self.device.type).synchronize()
        return time.perf_counter()


def peak_resident() -> int:
    """The most memory this process ever held, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
