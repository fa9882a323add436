"""The systems that ``scripts/bench one-cluster`` compares: which module runs each, where, with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case

REFERENCE = "loop"


@dataclass(frozen=True)
class System:
    """A measured system.

    Attributes:
        title: for the table.
        module: which of :mod:`benchmarks.systems` runs it.
        environment: the peer's own environment; empty: the project's.
        options: what the module gets besides the case.
        most_clients: by task, where it cannot take any number of clients.
        tasks: those that it has.
    """

    title: str
    module: str
    environment: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    most_clients: int = 9999
    tasks: tuple[str, ...] = ("digits", "tiny", "heavy")

    def takes(self, case: Case) -> bool:
        """Whether the system can do the case at all."""
        return case.task in self.tasks and case.clients <= self.most_clients


SYSTEMS = {
    REFERENCE: System("plain PyTorch loop, one process", "loop"),
    "pool": System("pool of two processes", "pool"),
    "icrf": System("**ICRF**", "fabric"),
    "icrf-vmap": System("**ICRF**, vectorised", "fabric", options={"vectorize": "auto"}, tasks=("digits", "tiny")),
    "pfl": System("pfl", "pfl_simulation", "pfl"),
    "flower": System("Flower simulation", "flower", "flower"),
    "actors": System("a Ray actor per client", "actors", most_clients=20),
    "flare": System("NVIDIA FLARE simulator", "flare", "flare", most_clients=20),
}
DEFAULT_SYSTEMS = ("loop", "pool", "icrf", "icrf-vmap", "pfl", "flower")
DEFAULT_CASES = ("digits10", "digits100", "tiny1000", "heavy10")
