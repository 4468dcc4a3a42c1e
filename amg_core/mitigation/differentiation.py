"""Gradients through a network that a host has loaded for inference, within a limit of memory.

Tensors made in inference mode cannot take part in a gradient, and a second copy of the weights would be
as large as the model. So ordinary tensors that share their memory take their place: nothing is copied,
and the weights are never written to. The tensors that autograd keeps for the backward pass are counted
against a limit. If they would not fit, the blocks of the network are recomputed instead (gradient
checkpointing, Chen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import AMGError

Forward = Callable[..., Any]  # the forward of a block, with the host's own arguments and result
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
GIB = 2**30


class BudgetExceeded(AMGError):
    """The backward pass needs more memory than the limit."""


class Ledger:
    """Counts the bytes that autograd keeps, without the weights of `network`.

    Attributes
    ----------
    limit : int
        In bytes. `BudgetExceeded` is raised as soon as one more tensor would not fit.
    peak : int
        The most that was kept at one time, in bytes. This is an upper bound, because memory that the
        backward pass frees is not subtracted.
    """

    def __init__(self, limit: int, network: nn.Module):
        self.limit, self.peak = limit, 0
        self._own = {
            t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]
        }
        self._kept: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which kept tensors are counted. At its end the count is reset. May be nested."""
        before = self._kept
        self._kept = dict(before)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept):
                yield
        finally:
            self._kept = before

    def restart(self) -> None:
        """Reset the count. To be called before each new forward and backward pass."""
        self._kept = {}

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._own and place not in self._kept:
            self._kept[place] = storage.nbytes()
            held = sum(self._kept.values())
            if held > self.limit:
                raise BudgetExceeded(f"more than {self.limit / GIB:.2f} GiB")
            self.peak = max(self.peak, held)
        return tensor


@contextmanager
def ordinary_weights(network: nn.Module) -> Iterator[None]:
    """A context in which parameters and buffers of `network` are ordinary tensors on the same memory.

    At its end the original ones are put back. Inside, parameters do not require gradients.

    Raises
    ------
    AMGError
        The weights are of a special kind, such as quantised ones, without plain memory to share.
    """
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for part in network.modules():
            for name, weight in [*part.named_parameters(recurse=False)]:
                if weight.is_inference() or weight.requires_grad:
                    view = nn.Parameter(_shared(weight), requires_grad=False)
                    swapped.append((part, name, weight))
                    setattr(part, name, view)
            for name, buffer in [*part.named_buffers(recurse=False)]:
                if buffer.is_inference():
                    swapped.append((part, name, buffer))
                    setattr(part, name, _shared(buffer))
        yield
    finally:
        for part, name, own in swapped:
            setattr(part, name, own)


def _shared(tensor: Tensor) -> Tensor:
    """An ordinary tensor on the memory of `tensor`. To be called outside inference mode."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise AMGError(
            f"model: its weights are {type(tensor).__name__}s, through which no gradient can be "
            f"taken. Use a version of the model that is not quantised (fp16, bf16, fp8 or fp32)."
        )
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage = tensor.untyped_storage()
    return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


@contextmanager
def blocks_run_twice(network: nn.Module, ledger: Ledger) -> Iterator[None]:
    """A context in which blocks of `network` keep only their inputs, and run again in the backward pass.

    A block is an outermost module that is not merely a list of modules. Blocks whose inputs need no
    gradient run normally.
    """
    changed = []
    try:
        for block in blocks(network):
            changed.append(block)
            block.forward = _twice(block.forward, ledger)
        yield
    finally:
        for block in changed:
            del block.forward  # uncovers the method of the class


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost modules within `network` that are not lists of others."""
    out: list[nn.Module] = []
    for child in network.children():
        out += blocks(child) if isinstance(child, CONTAINERS) else [child]
    return [block for block in out if "forward" not in vars(block)]


def _twice(forward: Forward, ledger: Ledger) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        tensors = [args[i] for i in places] + [kwargs[name] for name in names]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return forward(*args, **kwargs)
        # Hosts note the current block in dictionaries, so the second run gets the state of the first.
        rest = [dict(v) if isinstance(v, dict) else v for v in args]
        more = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}

        def again(*values: Tensor) -> Any:
            a = [dict(v) if isinstance(v, dict) else v for v in rest]
            k = {n: dict(v) if isinstance(v, dict) else v for n, v in more.items()}
            for i, value in zip(places, values, strict=False):
                a[i] = value
            k |= dict(zip(names, values[len(places) :], strict=True))
            return forward(*a, **k)

        twice: Forward = _Twice.apply  # torch has no types for it
        return twice(again, ledger, *tensors)

    return run


class _Context(Protocol):
    """What autograd keeps between the forward and the backward pass."""

    run: Forward
    ledger: Ledger
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Twice(torch.autograd.Function):
    """A function of tensors whose intermediate results are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: _Context, run: Forward, ledger: Ledger, *tensors: Tensor) -> Any:
        ctx.run, ctx.ledger = run, ledger
        ctx.save_for_backward(*tensors)
        # Blocks may write into their inputs, and the second run needs the original values.
        return run(*(t.clone() for t in tensors))

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        tensors = [
            t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), ctx.ledger.counting():
            made = ctx.run(*(t.clone() for t in tensors))
            outputs = [made] if isinstance(made, Tensor) else list(made)
            pairs = [
                (o, g) for o, g in zip(outputs, gradients, strict=True)
                if g is not None and o.requires_grad
            ]  # fmt: skip
            wanted = [t for t in tensors if t.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
                )
            )
        return (None, None, *(next(found) if need else None for need in needed))
