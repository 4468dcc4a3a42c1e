"""How many cores a computation uses: one for small work, so that a busy machine does not slow it down.

torch divides even a tiny operation among all cores, and each waits for the slowest. Where another program
has one of these cores, the wait is many times longer than the work.

`torch.set_num_threads` is no remedy inside a host: a thread that computes for the first time while it is
set keeps that number for good. So only the number of the calling thread is changed, in the OpenMP library
that torch uses. Every OpenMP thread has a number of its own (OpenMP API 5.0, §2.5, nthreads-var).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

# torch's own copy of the library, already loaded: by name where names of libraries are apart.
LIBRARIES = {"win32": "libiomp5md.dll", "darwin": "libomp.dylib"}


@contextmanager
def one_thread() -> Iterator[None]:
    """A context, and a decorator, whose CPU work runs on the calling thread alone.

    Other threads are not affected, and the number is restored at the end. Where it cannot be changed for
    one thread alone, such as in a torch without OpenMP, nothing happens.
    """
    before, limit = torch.get_num_threads(), _limit()
    if limit is None or before == 1:
        yield
        return
    limit(1)
    try:
        yield
    finally:
        limit(before)


@cache
def _limit() -> Callable[[int], object] | None:
    """Sets the number of the calling thread, or None if that does not work here."""
    name = LIBRARIES.get(sys.platform)
    path = name and os.path.join(os.path.dirname(torch.__file__), "lib", name)
    try:
        limit = ctypes.CDLL(path).omp_set_num_threads
        limit.argtypes, limit.restype = [ctypes.c_int], None
    except (OSError, AttributeError):
        return None
    before = torch.get_num_threads()
    limit(before + 1)
    works = torch.get_num_threads() == before + 1  # else it is the library of somebody else
    limit(before)
    found: Callable[[int], object] | None = limit if works else None
    return found
