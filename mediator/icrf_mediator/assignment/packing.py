"""Communities by data on clusters: whole as far as shares allow, and within that with as few cut edges as can be."""

from __future__ import annotations

from collections.abc import Sequence

from icrf_mediator.assignment.base import Pins, Shares
from icrf_mediator.assignment.crossing import Costs, Neighbours
from icrf_mediator.assignment.refine import refine


def pack(
    graph: Neighbours,
    communities: Sequence[int],
    pinned: Sequence[int],
    shares: Shares,
    pins: Pins,
    costs: Costs | None = None,
) -> list[int]:
    """Whole communities, the largest first, each where it fits with least room to spare.

    One that fits nowhere fills the cluster with most room, and what is left of it is placed like a community. Nodes
    then change places as long as no community comes to lie on more clusters than before.

    Args:
        communities: community per node, -1 for nodes in none, which fill what is left.
        pinned: cluster per node that has to be somewhere, -1 for the others.

    Returns:
        cluster per node.
    """
    clusters = list(pinned)
    room = list(shares.target)
    members: dict[int, list[int]] = {}
    for node, community in enumerate(communities):
        if clusters[node] >= 0:
            room[clusters[node]] -= 1
        else:
            members.setdefault(community, []).append(node)
    loose = members.pop(-1, [])
    waiting = sorted(members.values(), key=lambda nodes: (-len(nodes), nodes))
    while waiting:
        nodes = waiting.pop(0)
        fitting = [c for c, left in enumerate(room) if left >= len(nodes)]
        best = (
            min(fitting, key=lambda c: (room[c], c)) if fitting else max(range(len(room)), key=lambda c: (room[c], -c))
        )
        taken, rest = nodes[: room[best]], nodes[room[best] :]
        for node in taken:
            clusters[node] = best
        room[best] -= len(taken)
        if rest:
            waiting = sorted([*waiting, rest], key=lambda nodes: (-len(nodes), nodes))
    for node in loose:
        clusters[node] = next(c for c, left in enumerate(room) if left > 0)
        room[clusters[node]] -= 1
    held = held_together(clusters, communities, pins)
    return refine(graph, clusters, shares.low, shares.high, {**pins, **held}, costs=costs)


def held_together(clusters: Sequence[int], communities: Sequence[int], pins: Pins) -> Pins:
    """Where the nodes of communities may be, so that none comes to lie on more clusters than it does."""
    spans: dict[int, set[int]] = {}
    for node, community in enumerate(communities):
        spans.setdefault(community, set()).add(clusters[node])
    allowed = {node: spans[community] for node, community in enumerate(communities) if community >= 0}
    return {node: span & set(pins.get(node, span)) for node, span in allowed.items()}
