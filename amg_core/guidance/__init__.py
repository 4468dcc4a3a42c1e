"""The ways to steer away from a stored picture, one file each. `base` has their interface."""

from .base import Change, Guidance, Step, StepContext, expand, only
from .paper import Deduplication, Despecification, Dissimilarity, Projection
from .reduction import AwayFromCaption, PromptReduction, without
from .reference import ReferenceDeduplication, ReferenceDespecification, ReferenceDissimilarity
from .repulsion import Repulsion

__all__ = [
    "AwayFromCaption",
    "Change",
    "Deduplication",
    "Despecification",
    "Dissimilarity",
    "Guidance",
    "Projection",
    "PromptReduction",
    "ReferenceDeduplication",
    "ReferenceDespecification",
    "ReferenceDissimilarity",
    "Repulsion",
    "Step",
    "StepContext",
    "expand",
    "only",
    "without",
]
