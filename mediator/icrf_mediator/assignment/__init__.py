"""Where nodes live: strategies that map the nodes of a federation to the clusters of the fabric."""

from collections.abc import Sequence

from icrf.protocol import ClusterInfo
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import ASSIGNMENTS, Assignment, AssignmentStrategy, Pins, resolve_pins
from icrf_mediator.assignment.groups import assign_groups
from icrf_mediator.assignment.locality import LocalityAwareAssignment
from icrf_mediator.assignment.round_robin import RoundRobinAssignment

__all__ = [
    "ASSIGNMENTS",
    "Assignment",
    "AssignmentStrategy",
    "LocalityAwareAssignment",
    "Pins",
    "RoundRobinAssignment",
    "assign",
    "assign_groups",
    "resolve_pins",
]


def assign(strategy: str, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins) -> Assignment:
    """Assign with the strategy registered under this name; C010 for an unknown one, C017 for one that raises."""
    kind = ASSIGNMENTS.get(strategy)
    with ASSIGNMENTS.calling(strategy):
        return kind().assign(adj, clusters, pins)
