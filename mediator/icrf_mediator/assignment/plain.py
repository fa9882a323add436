"""The strategies that do not look at the graph: what a person would do by hand, and the yardsticks for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from icrf.protocol import ClusterInfo
from icrf.seeds import stable_random_state
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import (
    ASSIGNMENTS,
    Assignment,
    Hints,
    Pins,
    cluster_slots,
    fair_shares,
    place_pinned,
    room_for,
)
from icrf_mediator.assignment.starts import contiguous


@ASSIGNMENTS.register("round_robin")
class RoundRobinAssignment:
    """Node by node to the next cluster whose share is not used up."""

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        slots = cluster_slots(clusters)
        placed, counts = place_pinned(pins, adj.num_nodes, slots)
        shares = fair_shares(adj.num_nodes, slots, counts)
        turn = 0
        for node in range(adj.num_nodes):
            if placed[node] >= 0:
                continue
            while counts[turn] >= shares.target[turn]:
                turn = (turn + 1) % len(clusters)
            placed[node] = turn
            counts[turn] += 1
            turn = (turn + 1) % len(clusters)
        return _assignment(placed, clusters, pins, "dealt in turn to {}")


@ASSIGNMENTS.register("capacity")
class CapacityAssignment:
    """In the order of the nodes, one cluster filled to its share of the slots after the other."""

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        return _assignment(_filled(range(adj.num_nodes), clusters, pins), clusters, pins, "in the share of {} by slots")


@ASSIGNMENTS.register("random")
class RandomAssignment:
    """Shares in proportion to slots, filled in an order drawn from the federation's seed."""

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        order = stable_random_state(hints.seed, "assignment").permutation(adj.num_nodes).tolist()
        return _assignment(_filled(order, clusters, pins), clusters, pins, "drawn for {}")


def _filled(order: Sequence[int], clusters: Sequence[ClusterInfo], pins: Pins) -> list[int]:
    placed, shares = room_for(len(order), clusters, pins)
    return contiguous(placed, shares, order)


def _assignment(placed: Iterable[int], clusters: Sequence[ClusterInfo], pins: Pins, reason: str) -> Assignment:
    owners = tuple(placed)
    return Assignment(
        owners,
        tuple(
            ("pinned to {}" if node in pins else reason).format(clusters[cluster].name)
            for node, cluster in enumerate(owners)
        ),
    )
