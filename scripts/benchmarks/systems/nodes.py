"""ICRF with any number of nodes, as in :mod:`benchmarks.systems.fabric`, profiled: what the mediator took is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import MOST_TINY, Case
from benchmarks.runner import Finished, Rounds, run
from benchmarks.systems.fabric import fabric


def keys_of(case: Case, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration has besides the case, by the number of nodes."""
    many = {"dataset_type": "benchmarks.icrf_parts:tiny_many"} if case.clients > MOST_TINY else {}
    return {**many, **options}


def nodes(case: Case, rounds: Rounds, options: Mapping[str, Any]) -> Finished:
    """Run the federation."""
    return fabric(case, rounds, keys_of(case, options), profile=True)


if __name__ == "__main__":
    run(nodes, "icrf", "ray", "torch", "numpy")
