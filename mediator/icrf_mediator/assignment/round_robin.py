"""Nodes dealt to clusters in turn: the plain strategy that ignores the graph, and the yardstick for the others."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.protocol import ClusterInfo
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import ASSIGNMENTS, Assignment, Pins, cluster_slots, fair_shares, place_pinned


@ASSIGNMENTS.register("round_robin")
class RoundRobinAssignment:
    """Node by node to the next cluster whose share is not used up."""

    def assign(self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        slots = cluster_slots(clusters)
        placed, counts = place_pinned(pins, adj.num_nodes, slots)
        shares = fair_shares(adj.num_nodes, slots, counts)
        explanation = []
        turn = 0
        for node in range(adj.num_nodes):
            if placed[node] >= 0:
                explanation.append(f"pinned to {clusters[placed[node]].name}")
                continue
            while counts[turn] >= shares.target[turn]:
                turn = (turn + 1) % len(clusters)
            placed[node] = turn
            counts[turn] += 1
            explanation.append(f"dealt in turn to {clusters[turn].name}")
            turn = (turn + 1) % len(clusters)
        return Assignment(tuple(placed), tuple(explanation))
