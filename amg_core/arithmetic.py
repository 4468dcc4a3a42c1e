"""Ordinary float arithmetic, whatever the host has switched on (inference mode, autocast, gradients)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def plain_arithmetic(device: torch.device | str) -> Iterator[None]:
    """A context without inference mode, gradient graph or autocast on `device`."""
    kind = torch.device(device).type
    known = getattr(torch.amp, "is_autocast_available", lambda kind: kind in ("cpu", "cuda"))
    autocast = torch.autocast(kind, enabled=False) if known(kind) else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield
