"""Settings of aggregation rules: which rule reads which of them, and the complaint about one that nobody would read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from icrf.preconditions import WITH_NUM_BYZANTINE
from icrf.spec.choices import CHOICES
from icrf.spec.problems import Problem

_ADAPTIVE = ("FedAdagrad", "FedAdam", "FedYogi")

# key -> (its default, the built-in rules that read it). A rule of one's own may read any of them.
READ_BY: Mapping[str, tuple[float | None, tuple[str, ...]]] = {
    "mu": (None, ("FedProx",)),
    "server_learning_rate": (None, ("FedAvgM", "SCAFFOLD", "FedNova", "DiLoCo", *_ADAPTIVE)),
    "server_momentum": (0.9, ("FedAvgM", "DiLoCo")),
    "server_beta1": (0.9, ("FedAdam", "FedYogi")),
    "server_beta2": (0.99, ("FedAdam", "FedYogi")),
    "tau": (1e-3, _ADAPTIVE),
    "num_byzantine": (None, WITH_NUM_BYZANTINE),
    "num_selected": (None, ("MultiKrum",)),
}


def unread_settings(values: Mapping[str, Any]) -> Iterator[Problem]:
    """C008 for every setting of a rule that the chosen one does not read; defaults are nobody's choice."""
    rule = values["aggregation_strategy"]
    if rule not in CHOICES["aggregation_strategy"].built:
        return
    for key, (default, readers) in READ_BY.items():
        if rule not in readers and values[key] != default:
            text = f"{key} {values[key]} contradicts aggregation_strategy {rule}, which does not read it"
            allowed = "null" if default is None else str(default)
            yield Problem("C008", (key,), text, allowed=allowed, hint=f"Leave it out, or use {' or '.join(readers)}.")
