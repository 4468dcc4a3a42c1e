"""The guard in diffusers: `guard` for its pipelines, `AMGGuidance` for Modular Diffusers.

docs/diffusers.md shows both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amg_core.optional import needed

from .pipeline import Guard, guard

if TYPE_CHECKING:
    from .guider import AMGGuidance

__all__ = ["AMGGuidance", "Guard", "guard"]


def __getattr__(name: str) -> Any:
    """AMGGuidance, which is a class of diffusers and so is made only when it is asked for."""
    if name != "AMGGuidance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed("diffusers", "AMGGuidance", "pip install diffusers transformers", ["BaseGuidance"])
    from .guider import AMGGuidance

    return AMGGuidance
