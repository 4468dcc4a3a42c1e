"""Imports of optional packages. A missing or broken package causes no crash."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

from .errors import AMGError

log = logging.getLogger(__name__)


def optional(name: str) -> ModuleType | None:
    """The module, or None if it is missing or cannot be imported. The reason is logged once.

    An installed package can still fail in many ways: a missing system library (OSError), a numpy that it
    was not built for (AttributeError, ImportError), a conflict of two libraries (RuntimeError).
    """
    return _found(name)[0]


def needed(name: str, purpose: str, step: str, parts: Sequence[str] = ()) -> ModuleType:
    """Import a package that is needed now.

    Parameters
    ----------
    name : str
        For instance "pyarrow.parquet".
    purpose : str
        What needs it, for the message: "Reading a.parquet".
    step : str
        How to install it: "pip install pyarrow".
    parts : sequence of str
        Attributes that will be used, for modules that import them lazily.

    Raises
    ------
    AMGError
        It is missing or broken. The message says which, and the next step.
    """
    module, problem = _found(name, parts)
    if module is None:
        package = name.partition(".")[0]
        if problem:
            raise AMGError(
                f"{purpose} needs {package}, which is installed but cannot be used ({problem}): "
                f"install it again ({step})."
            )
        raise AMGError(f"{purpose} needs {package}: {step}.")
    return module


_broken: dict[
    str, str
] = {}  # errors of modules that could not be imported, so that they are not tried again


def _found(name: str, parts: Sequence[str] = ()) -> tuple[ModuleType | None, str]:
    """The module or None, and what is wrong with it ("" if it is just not installed)."""
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
    log.warning("%s is installed but cannot be used: %s", name, problem)
    return None, problem


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
