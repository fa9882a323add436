"""A new assignment out of the one before: as few nodes as possible move, and those where it costs least."""

from __future__ import annotations

from collections.abc import Sequence

from icrf_mediator.assignment.base import Hints, Pins, Shares
from icrf_mediator.assignment.crossing import Neighbours
from icrf_mediator.assignment.packing import held_together
from icrf_mediator.assignment.refine import mend, refine


def keep_most(graph: Neighbours, pinned: Sequence[int], shares: Shares, pins: Pins, hints: Hints) -> list[int]:
    """Move only what has to: nodes without a cluster, nodes away from their pins, and what shares no longer hold.

    With ``hints.improve`` nodes also move, or change places, as long as each step makes less cross; of communities by
    data only to clusters that have some of the community.

    Args:
        pinned: where a node with pins goes if it may not stay, -1 for the others.

    Returns:
        cluster per node. Where the nodes that move may go to several clusters, they are where they cut least.
    """
    # Nodes without a cluster wait on one that holds none, from which they are moved like all others.
    nowhere = len(shares.target)
    start = [nowhere if cluster < 0 else cluster for cluster in hints.previous]
    for node, allowed in pins.items():
        if start[node] not in allowed:
            start[node] = pinned[node]
    costs = hints.costs
    wide = None if costs is None else [*([*row, 0] for row in costs), [0] * (nowhere + 1)]
    found = mend(graph, start, [*shares.low, 0], [*shares.high, 0], pins, wide)
    stays = {node: (cluster,) for node, cluster in enumerate(found) if cluster == start[node]}
    found = refine(graph, found, shares.low, shares.high, {**pins, **stays}, costs=costs)
    if not hints.improve:
        return found
    held = held_together(found, hints.communities, pins)
    return refine(graph, found, shares.low, shares.high, {**pins, **held}, costs=costs)
