"""The assignment of a hierarchy: whole groups on one cluster, so that the rounds within them cross to no other."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.protocol import ClusterInfo
from icrf.topology import Hierarchy
from icrf_mediator.assignment.base import Assignment, Pins, cluster_slots, fair_shares


def assign_groups(
    hierarchy: Hierarchy,
    node_ids: Sequence[str],
    clusters: Sequence[ClusterInfo],
    pins: Pins,
    previous: Sequence[int] = (),
) -> Assignment | None:
    """Whole groups, the largest first, each to the cluster with most of its share of the nodes left.

    A group goes where most of its pinned nodes may be; those that may not be there go where they are pinned, alone.

    Args:
        previous: cluster per node until now, -1 where it is gone: a group stays where its aggregator was as long as
            that has any of its share left.

    Returns:
        None where there are fewer groups than clusters: groups have to be divided for all clusters to get nodes.
    """
    slots = cluster_slots(clusters)
    usable = [c for c, number in enumerate(slots) if number > 0] or list(range(len(slots)))
    if len(hierarchy.aggregators) < len(usable):
        return None
    left = list(fair_shares(len(node_ids), slots, [0] * len(slots)).target)
    owners: dict[int, tuple[int, str]] = {}

    def choose(among: Sequence[int]) -> int:
        return max(among, key=lambda c: (left[c], -c))

    def put(node: int, cluster: int, reason: str) -> None:
        owners[node] = cluster, reason
        left[cluster] -= 1

    for aggregator, nodes in sorted(_units(hierarchy, len(node_ids)), key=lambda unit: (-len(unit[1]), unit[0])):
        pinned = [node for node in nodes if node in pins]
        votes = {c: sum(c in pins[node] for node in pinned) for c in range(len(slots))}
        most = max(votes.values())
        allowed = [c for c in (votes if most else usable) if votes[c] == most]
        stays = [c for c in allowed if previous and c == previous[aggregator] and left[c] > 0]
        home = choose(stays or allowed)
        for node in nodes:
            if node in pins and home not in pins[node]:
                cluster = choose(sorted(pins[node]))
                put(node, cluster, f"pinned to {clusters[cluster].name}, away from its group")
            elif node in pins:
                put(node, home, f"{clusters[home].name} is one that it may be on")
            else:
                put(node, home, f"the group of {node_ids[aggregator]} is on {clusters[home].name}")
    found = [owners[node] for node in range(len(node_ids))]
    return Assignment(tuple(cluster for cluster, _ in found), tuple(reason for _, reason in found))


def _units(hierarchy: Hierarchy, num_nodes: int) -> list[tuple[int, list[int]]]:
    """Every aggregator with its group; what is in no group is with the root's."""
    units = {aggregator: [aggregator, *members] for aggregator, members in hierarchy.members.items()}
    grouped = {node for nodes in units.values() for node in nodes}
    units[hierarchy.root] += [node for node in range(num_nodes) if node not in grouped]
    return list(units.items())
