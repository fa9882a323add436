"""What slots have and nodes need: which clusters are candidates for whom, and how large their shares are. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from icrf.errors import ConfigError, ConfigErrors
from icrf.gangs import slots_that_fit
from icrf.protocol import ClusterInfo
from icrf_mediator.assignment import Pins, matching
from icrf_mediator.assignment.base import cluster_slots
from icrf_mediator.feasibility import slot_resources

_MB = 1_000_000
_SLACK = 1e-6


@dataclass(frozen=True)
class Amounts:
    """What a slot has, or a node needs."""

    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_mb: float = 0.0

    def lacks(self, need: Amounts) -> bool:
        """Whether this is less than what is needed of anything."""
        pairs = (
            (self.num_cpus, need.num_cpus),
            (self.num_gpus, need.num_gpus),
            (self.memory_mb, need.memory_mb),
        )
        return any(wanted > has + _SLACK for has, wanted in pairs)

    def __str__(self) -> str:
        parts = ((self.num_cpus, "CPU"), (self.num_gpus, "GPU"), (self.memory_mb, "MB"))
        return ", ".join(f"{amount:.6g} {unit}" for amount, unit in parts if amount and isfinite(amount)) or "nothing"


def offered(config: Mapping[str, Any], clusters: Sequence[ClusterInfo]) -> list[ClusterInfo]:
    """The clusters as strategies shall see them: with the slots that the federation can have there at once.

    Of what its agent allows a cluster counts what a federation may hold (the agent's quota, the configuration's
    ``max_slots_per_cluster``) and what its machines have room for. Where that is nothing on any cluster, all count with
    what they have: then the plan says what is lacking.
    """
    counts = [_num_slots(config, cluster) for cluster in clusters]
    if not any(counts):
        return list(clusters)
    pairs = zip(clusters, counts, strict=True)
    return [replace(cluster, capacity=replace(cluster.capacity, num_slots=count)) for cluster, count in pairs]


def candidates(
    config: Mapping[str, Any], node_ids: Sequence[str], clusters: Sequence[ClusterInfo], pins: Pins
) -> tuple[list[ClusterInfo], Pins]:
    """Leave nodes those clusters only whose slots have what they need.

    Args:
        pins: node index -> clusters that the placement allows.

    Returns:
        The clusters as :func:`offered` shows them, those that no node may live on without a slot, and the pins.

    Raises:
        ConfigErrors: every C014, for a node that does not exist, and C019, for those that no cluster has room for.
    """
    shown, needs = offered(config, clusters), _needs(config, node_ids)
    if not needs:
        return shown, pins
    slots = [_slot(config, cluster) for cluster in clusters]
    present = frozenset(c for c, cluster in enumerate(shown) if cluster.capacity.num_slots > 0)
    left: dict[int, frozenset[int]] = {node: frozenset(allowed) for node, allowed in pins.items()}
    refused: dict[tuple[Amounts, bool], list[str]] = {}
    for node, need in needs.items():
        fits = frozenset(c for c in present if not slots[c].lacks(need))
        left[node] = left.get(node, present) & fits
        if not left[node]:
            refused.setdefault((need, bool(fits)), []).append(node_ids[node])
    if refused:
        has = "; ".join(f"{cluster.name}: {slot}" for cluster, slot in zip(clusters, slots, strict=True))
        raise ConfigErrors([_refusal(nodes, *why, has) for why, nodes in refused.items()])
    # A share of a cluster where nobody may be would only be taken from the others.
    wanted = present if len(left) < len(node_ids) else frozenset[int]().union(*left.values())
    shown = [
        cluster if c in wanted else replace(cluster, capacity=replace(cluster.capacity, num_slots=0))
        for c, cluster in enumerate(shown)
    ]
    usable = frozenset(c for c, count in enumerate(cluster_slots(shown)) if count > 0)
    # Who may be wherever there is a share is no concern of the strategies.
    return shown, {n: allowed for n, allowed in left.items() if n in pins or not usable or not usable <= allowed}


def explained(config: Mapping[str, Any], node_ids: Sequence[str], explanation: Sequence[str]) -> tuple[str, ...]:
    """Why nodes live where they live, with what they need."""
    needs = _needs(config, node_ids)
    return tuple(f"{text}; it needs {needs[n]}" if n in needs else text for n, text in enumerate(explanation))


def _num_slots(config: Mapping[str, Any], cluster: ClusterInfo) -> int:
    capacity = cluster.capacity
    if config.get("device") == "cuda" and capacity.num_gpus <= 0:
        return 0
    strategy = config.get("placement_group_strategy") or "PACK"
    room = slots_that_fit(capacity.machines, slot_resources(config, cluster, 1), strategy)
    return min(capacity.most_slots, config.get("max_slots_per_cluster") or room, room)


def _slot(config: Mapping[str, Any], cluster: ClusterInfo) -> Amounts:
    """What each slot has; of memory, which Ray does not divide, an equal share among all that the agent offers."""
    each = slot_resources(config, cluster, 1)
    memory_bytes = cluster.capacity.memory_bytes / max(1, cluster.capacity.num_slots)
    # Clusters that do not tell how much memory they have say 0.
    return Amounts(each.num_cpus, each.num_gpus, memory_bytes / _MB if memory_bytes else float("inf"))


def _needs(config: Mapping[str, Any], node_ids: Sequence[str]) -> dict[int, Amounts]:
    """What each node needs that needs anything: the most of what is said of it."""
    index = {node_id: i for i, node_id in enumerate(node_ids)}
    found: dict[int, Amounts] = {}
    errors = []
    for pattern, amounts in (config.get("node_resources") or {}).items():
        try:
            nodes = matching(pattern, index, f"node_resources.{pattern}")
        except ConfigError as error:
            errors.append(error)
            continue
        for node in nodes:
            known = found.get(node, Amounts())
            found[node] = Amounts(
                max(known.num_cpus, float(amounts.get("num_cpus") or 0)),
                max(known.num_gpus, float(amounts.get("num_gpus") or 0)),
                max(known.memory_mb, float(amounts.get("memory_mb") or 0)),
            )
    if errors:
        raise ConfigErrors(errors)
    return found


def _refusal(nodes: Sequence[str], need: Amounts, elsewhere: bool, has: str) -> ConfigError:
    who = f"node {nodes[0]} needs" if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} other nodes need"
    where = "of the clusters that the placement allows" if elsewhere else "of any cluster"
    return ConfigError(
        "C019",
        f"{who} {need}: no slot {where} has that",
        place="node_resources",
        allowed=f"what a slot has ({has})",
        hint="`resources` says what a slot takes; an agent that offers fewer slots has larger ones",
    )
