"""ICRF as in :mod:`benchmarks.systems.fabric`, over two local Ray clusters whose gateways reach each other directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import Case
from benchmarks.runner import Finished, Rounds, run
from benchmarks.systems.fabric import fabric


def two_clusters(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Run the federation."""
    return fabric(case, rounds, options, clusters=2)


if __name__ == "__main__":
    run(two_clusters, "icrf", "ray", "torch", "numpy")
