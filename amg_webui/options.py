"""The guard's options, and their names in the infotext below a picture.

It imports no large modules, because the host loads it at its start.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from amg_core.errors import AMGError

AS_PRESET, CUSTOM = THRESHOLDS = ("preset", "custom")
SAY, BLANK = POLICIES = ("say so", "blank")
ANONYMOUS, FULL, OFF = TELLS = ("anonymous", "full", "off")  # as in amg_core.report
PRESETS = ("main", "strong", "gentle", "paper", "reference")


@dataclass(frozen=True)
class Options:
    """The values of the accordion, in the order of its widgets and of an API's `args`."""

    enabled: bool = False
    preset: str = PRESETS[0]
    despecification: float = 1.0
    deduplication: float = 1.0
    dissimilarity: float = 1.0
    index: str = ""
    thresholds: str = AS_PRESET
    threshold_start: float = 0.2
    threshold_end: float = 0.4
    if_still_copied: str = SAY
    retries: int = 0
    report_in_picture: str = ANONYMOUS

    @classmethod
    def read(cls, p, args: tuple) -> Options:
        """The options from the arguments of a script's callback. `p.amg_…` (X/Y/Z plot) has priority.

        Instead of the list, an API may send one object with the names of the fields.
        """
        names = [field.name for field in fields(cls)]
        if args and isinstance(args[0], dict):
            values = dict(args[0])
            if unknown := sorted(set(values) - set(names)):
                raise AMGError(
                    f"{unknown[0]} is no setting of the guard. Its settings are {', '.join(names)}."
                )
        else:
            values = dict(zip(names, args))  # noqa: B905 - an older API call sends fewer
        axes = {name: getattr(p, f"amg_{name}") for name in names if hasattr(p, f"amg_{name}")}
        if {"threshold_start", "threshold_end"} & set(axes):
            axes.setdefault("thresholds", CUSTOM)
        chosen = cls(**values | axes)
        choices = {
            "thresholds": THRESHOLDS, "if_still_copied": POLICIES, "report_in_picture": TELLS,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(chosen, name) not in allowed:
                raise AMGError(
                    f"{name}: this value is not one of the choices. Choose one of "
                    f"{', '.join(allowed)}."
                )
        return chosen

    def settings(self, metric: str):
        """`run.Settings` for a descriptor of that metric. AMGError for invalid values."""
        from amg_core import presets
        from amg_core.schedule import Schedule

        changes = {}
        if self.thresholds == CUSTOM:
            for name in ("threshold_start", "threshold_end"):
                if not 0 <= getattr(self, name) <= 1:
                    raise AMGError(
                        f"{name}: this value is out of range. Give a number from 0 to 1."
                    )
            changes["schedule"] = Schedule("parabolic", self.threshold_start, self.threshold_end)
        return presets.settings(
            self.preset, metric, despecification=self.despecification,
            deduplication=self.deduplication, dissimilarity=self.dissimilarity, **changes,
        )  # fmt: skip

    def infotext(self) -> dict[str, Any]:
        """The entries of the infotext below a picture, which can be pasted (`PASTE`)."""
        written = {label: getattr(self, name) for name, label in LABELS.items()}
        if self.thresholds == AS_PRESET:
            del written[LABELS["threshold_start"]], written[LABELS["threshold_end"]]
        return written


LABELS = {field.name: "AMG " + field.name.replace("_", " ") for field in fields(Options)[1:]}
HASH, LARGEST, VERDICT = "AMG index hash", "AMG largest similarity", "AMG verdict"
