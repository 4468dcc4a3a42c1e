"""The name under which a host shows our errors."""

from __future__ import annotations

import traceback

import pytest

from amg_core.errors import AMGError
from amg_core.mitigation.differentiation import BudgetExceeded


@pytest.mark.parametrize("kind", [AMGError, BudgetExceeded])
def test_the_name_is_short_and_the_same_on_every_machine(kind):
    """ComfyUI shows module and name, and the module's name has the path of the pack in it."""
    assert f"{kind.__module__}.{kind.__qualname__}" == f"amg.{kind.__name__}"
    (line,) = traceback.format_exception_only(kind("name: it is empty."))
    assert line == f"amg.{kind.__name__}: name: it is empty.\n"
