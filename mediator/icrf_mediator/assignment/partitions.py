"""One way of dividing a graph alone, by name: what ``locality`` takes the best of."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.protocol import ClusterInfo
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import (
    ASSIGNMENTS,
    Assignment,
    Hints,
    Pins,
    room_for,
)
from icrf_mediator.assignment.crossing import Crossing
from icrf_mediator.assignment.explain import explain
from icrf_mediator.assignment.refine import mend
from icrf_mediator.assignment.starts import community_order, contiguous, metis


@ASSIGNMENTS.register("metis")
class MetisAssignment:
    """Balanced k-way partitioning by METIS; graphs too small for it are divided in the order of their indices."""

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        pinned, shares = room_for(adj.num_nodes, clusters, pins)
        crossing = Crossing(adj)
        fixed = {node: (cluster,) for node, cluster in enumerate(pinned) if cluster >= 0}
        tried = [
            mend(
                crossing.neighbours(),
                [c if own < 0 else own for c, own in zip(parts, pinned, strict=True)],
                shares.low,
                shares.high,
                fixed,
            )
            for parts in metis(crossing, shares, 2)
        ]
        found = min(tried, key=crossing.cost) if tried else contiguous(pinned, shares, range(adj.num_nodes))
        return Assignment(tuple(found), explain(adj, found, [cluster.name for cluster in clusters], pins))


@ASSIGNMENTS.register("louvain")
class LouvainAssignment:
    """Communities by modularity (Blondel et al. 2008), packed onto the shares one after the other."""

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        pinned, shares = room_for(adj.num_nodes, clusters, pins)
        found = contiguous(pinned, shares, community_order(adj))
        return Assignment(tuple(found), explain(adj, found, [cluster.name for cluster in clusters], pins))
