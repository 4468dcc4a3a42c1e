"""Packages that this plugin can do without: absent, or installed and broken, they are no crash."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

from .errors import AMGError

log = logging.getLogger(__name__)


def optional(name: str) -> ModuleType | None:
    """The module; None where it is absent or cannot be imported, of which the log says why, once.

    A package that is there may still fail in any way: a missing library of the system (OSError), a
    numpy it was not built for (AttributeError, ImportError), a clash of two libraries (RuntimeError).
    """
    return _found(name)[0]


def needed(name: str, purpose: str, step: str, parts: Sequence[str] = ()) -> ModuleType:
    """The module.

    Parameters
    ----------
    name : str
        "pyarrow.parquet".
    purpose : str
        What needs it, for the message: "Reading a.parquet".
    step : str
        What to do where it is absent: "pip install pyarrow".
    parts : sequence of str
        What is used of it, for modules that import their parts when they are asked for.

    Raises
    ------
    AMGError
        It is absent or broken; says which, and the next step.
    """
    module, problem = _found(name, parts)
    if module is None:
        package = name.partition(".")[0]
        if problem:
            raise AMGError(
                f"{purpose} needs {package}, which is installed and cannot be used ({problem}): "
                f"install it anew ({step})."
            )
        raise AMGError(f"{purpose} needs {package}: {step}.")
    return module


_broken: dict[str, str] = {}  # what is wrong with modules that were tried: they are not tried again


def _found(name: str, parts: Sequence[str] = ()) -> tuple[ModuleType | None, str]:
    """(module or None, what is wrong with it: "" where it is simply not there)."""
    if name in _broken:
        return None, _broken[name]
    try:
        module = importlib.import_module(name)
        for part in parts:
            getattr(module, part)
        return module, ""
    except ModuleNotFoundError as error:
        if error.name in (name, name.partition(".")[0]):
            return None, ""
        problem = _reason(error)
    except Exception as error:  # broken packages raise nearly everything
        problem = _reason(error)
    _broken[name] = problem
    log.warning("%s is installed and cannot be used: %s", name, problem)
    return None, problem


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
