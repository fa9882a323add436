"""Whether the slots of a federation fit on a cluster: the same rule for its plan and for the agent that reserves.

A gang is all slots of a federation on one cluster: one placement group of equal bundles. For equal bundles, what fits
can be counted machine by machine, exactly; no search is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from icrf.protocol import Resources

SPREAD, STRICT_PACK, STRICT_SPREAD = "SPREAD", "STRICT_PACK", "STRICT_SPREAD"

# Ray counts resources in units of 1/10,000; more digits would round up and no longer fit.
RAY_UNITS = 10_000
_SLACK = 1e-6
_WHERE = {STRICT_PACK: "on one Ray node", STRICT_SPREAD: "on a Ray node each"}


def slots_that_fit(machines: Sequence[Resources], each: Resources, strategy: str) -> int:
    """How many slots of `each` a cluster of these machines takes when nobody else uses it.

    Args:
        strategy: of the placement group. ``STRICT_PACK`` wants all slots on one machine, ``STRICT_SPREAD`` every slot
            on another; ``PACK`` and ``SPREAD`` are wishes, which refuse nothing.
    """
    found = [_fit_on(machine, each) for machine in machines]
    if strategy == STRICT_PACK:
        return max(found, default=0)
    return sum(min(1, fit) for fit in found) if strategy == STRICT_SPREAD else sum(found)


def shortages(num_slots: int, each: Resources, machines: Sequence[Resources], strategy: str) -> list[str]:
    """Why so many slots can never fit on these machines, a sentence each, with the numbers; empty if they can."""
    found = []
    for unit, per_slot, total in (
        ("CPU", each.num_cpus, sum(m.num_cpus for m in machines)),
        ("GPU", each.num_gpus, sum(m.num_gpus for m in machines)),
    ):
        needed = num_slots * per_slot
        if needed > total + _SLACK:
            slots = f"{num_slots} slots x {per_slot:g} {unit}"
            found.append(f"{slots} = {needed:g} {unit} needed, {total:g} {unit} in total")
    fit = slots_that_fit(machines, each, strategy)
    if not found and fit < num_slots:
        where = _WHERE.get(strategy, "each whole on a Ray node")
        largest = max(machines, key=lambda machine: (machine.num_cpus, machine.num_gpus))
        have = f"{len(machines)} Ray nodes in total, the largest has {_spell(largest)}"
        found.append(f"{strategy} needs {num_slots} slots of {_spell(each)} {where}, {fit} fit; {have}")
    return found


def cpu_share(machines: Sequence[Resources], num_slots: int) -> float:
    """The most CPUs that each of `num_slots` equal slots can have so that all fit: a multiple of 0.0001, at most 1."""
    low, high = 0, RAY_UNITS
    while low < high:
        middle = (low + high + 1) // 2
        share = Resources(middle / RAY_UNITS, 0.0)
        low, high = (middle, high) if slots_that_fit(machines, share, SPREAD) >= num_slots else (low, middle - 1)
    return low / RAY_UNITS


def _fit_on(machine: Resources, each: Resources) -> int:
    pairs = ((machine.num_cpus, each.num_cpus), (machine.num_gpus, each.num_gpus))
    limits = [math.floor(total / per_slot + _SLACK) for total, per_slot in pairs if per_slot > 0]
    return min(limits, default=1 << 30)


def _spell(resources: Resources) -> str:
    gpus = f", {resources.num_gpus:g} GPU" if resources.num_gpus else ""
    return f"{resources.num_cpus:g} CPU{gpus}"
