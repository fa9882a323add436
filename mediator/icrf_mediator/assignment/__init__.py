"""Where nodes live: strategies that map the nodes of a federation to the clusters of the fabric."""

from collections.abc import Sequence
from dataclasses import replace

from icrf.protocol import ClusterInfo
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import ASSIGNMENTS, Assignment, AssignmentStrategy, Hints, Pins
from icrf_mediator.assignment.groups import assign_groups
from icrf_mediator.assignment.links import link_costs, link_seconds
from icrf_mediator.assignment.locality import LocalityAwareAssignment
from icrf_mediator.assignment.partitions import LouvainAssignment, MetisAssignment
from icrf_mediator.assignment.pins import matching, resolve_pins
from icrf_mediator.assignment.plain import CapacityAssignment, RandomAssignment, RoundRobinAssignment

__all__ = [
    "ASSIGNMENTS",
    "Assignment",
    "AssignmentStrategy",
    "CapacityAssignment",
    "Hints",
    "LocalityAwareAssignment",
    "LouvainAssignment",
    "MetisAssignment",
    "Pins",
    "RandomAssignment",
    "RoundRobinAssignment",
    "assign",
    "assign_groups",
    "link_costs",
    "link_seconds",
    "matching",
    "resolve_pins",
]

_BY_GRAPH = (LocalityAwareAssignment, MetisAssignment, LouvainAssignment)
_OWN = (*_BY_GRAPH, CapacityAssignment, RandomAssignment, RoundRobinAssignment)


def assign(
    strategy: str,
    adj: HybridAdjacencyMatrix,
    clusters: Sequence[ClusterInfo],
    pins: Pins,
    hints: Hints = Hints(),
) -> Assignment:
    """Assign with the strategy registered under this name; C010 for an unknown one, C017 for one that raises.

    With an assignment before, those that come with the fabric move as few nodes as possible; for ones of the user's
    own it is theirs to decide.
    """
    kind = ASSIGNMENTS.get(strategy)
    if hints.previous and kind in _OWN:
        # Those that do not look at the graph move nothing for its sake either.
        hints = replace(hints, improve=hints.improve and kind in _BY_GRAPH)
        kind = LocalityAwareAssignment
    with ASSIGNMENTS.calling(strategy):
        return kind().assign(adj, clusters, pins, hints)
