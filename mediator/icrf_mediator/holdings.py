"""What runs hold on a cluster, what another one needs there, and why that is not free. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from icrf.protocol import Capacity, Resources

_SLACK = 1e-6
SHORT_ID = 8


@dataclass(frozen=True)
class Holding:
    """What a run holds on one cluster; `since_wall_s` is for display."""

    federation: str
    slots: int
    each: Resources
    since_wall_s: float


@dataclass(frozen=True)
class Lack:
    """Why a run does not get what it needs.

    Attributes:
        text: what it waits for, and who has it.
        aside: what is free is of no use to it: nobody has to wait behind it, wherever else it would have to wait. Its
            federation has all that it may have, or a cluster is not there, and nobody knows for how long.
    """

    text: str
    aside: bool = False


def lack_on(cluster: str, capacity: Capacity, holdings: Mapping[str, Holding], need: Holding) -> Lack | None:
    """Why `need` is not free on a cluster where runs hold this, by run id; None if it is."""
    mine = {run: held for run, held in holdings.items() if held.federation == need.federation}
    slots = sum(held.slots for held in mine.values())
    if capacity.quota and slots + need.slots > capacity.quota:
        has = f"it has {slots} by {_holders(mine)}"
        text = f"{need.slots} slots on {cluster}, where a federation may hold {capacity.quota}: {has}"
        return Lack(text, aside=True)
    held = _holders(holdings)
    free = capacity.num_slots - sum(held.slots for held in holdings.values())
    if free < need.slots:
        return Lack(f"{need.slots} slots on {cluster} ({free} of {capacity.num_slots} free; held by {held})")
    for unit, each, total, taken in (
        ("CPU", need.each.num_cpus, capacity.num_cpus, _sum(h.slots * h.each.num_cpus for h in holdings.values())),
        ("GPU", need.each.num_gpus, capacity.num_gpus, _sum(h.slots * h.each.num_gpus for h in holdings.values())),
    ):
        if need.slots * each > total - taken + _SLACK:
            left = f"{total - taken:g} of {total:g} {unit} free"
            return Lack(f"{need.slots} slots x {each:g} {unit} on {cluster} ({left}; held by {held})")
    return None


def known_as(federation: str, run_id: str) -> str:
    """How people are told of a run."""
    return f"{federation} (run {run_id[:SHORT_ID]})"


def _holders(holdings: Mapping[str, Holding]) -> str:
    earliest_first = sorted(holdings.items(), key=lambda item: (item[1].since_wall_s, item[0]))
    return ", ".join(
        f"{known_as(held.federation, run_id)} since {_spelled(held.since_wall_s)}" for run_id, held in earliest_first
    )


def _spelled(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _sum(amounts: Iterable[float]) -> float:
    # Ray's units: a sum of thirds must not exceed the whole by its last bit.
    return round(sum(amounts), 4)
