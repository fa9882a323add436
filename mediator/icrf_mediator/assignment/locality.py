"""The locality-aware assignment: neighbours on the same cluster as far as capacities and pins allow.

Balanced graph partitioning is NP-hard, so several deterministic starts are refined and the best one is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from icrf.protocol import ClusterInfo
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import (
    ASSIGNMENTS,
    Assignment,
    Hints,
    Pins,
    Shares,
    room_for,
)
from icrf_mediator.assignment.crossing import Costs, Crossing, Neighbours
from icrf_mediator.assignment.explain import explain, explain_communities
from icrf_mediator.assignment.mapping import map_parts
from icrf_mediator.assignment.packing import pack
from icrf_mediator.assignment.reassign import keep_most
from icrf_mediator.assignment.refine import MAX_PASSES, mend, refine
from icrf_mediator.assignment.starts import community_order, contiguous, grow, metis

# What all starts of a kind together may cost, in nodes and directed edges; it keeps an assignment within seconds.
_GROWN, _METIS, _REFINED = 600_000, 800_000, 600_000
_MAX_METIS = 8
# Larger graphs are left as METIS refines them, and so are those of which each move is chosen among too many clusters.
_MAX_REFINED, _MAX_MOVE_CHOICES = 1_500_000, 10_000_000
# Up to here a start is refined until nothing improves.
_REFINE_FULLY, _FEW_PASSES = 200_000, 3
# Communities by modularity cost more than everything else together on large graphs.
_SMALL_NODES, _SMALL_SIZE = 2_000, 50_000
# A start that costs so many times the best one is not worth the refinement on a large graph.
_HOPELESS = 1.5
# Larger graphs keep the order of their indices.
_MAX_EDGES = 20_000_000


@ASSIGNMENTS.register("locality")
class LocalityAwareAssignment:
    """Fewest cut edges within balanced shares; of equal cuts, the one with fewest payloads between clusters.

    Every cluster takes a share of the nodes in proportion to its slots; pins may exceed the share. Starts: contiguous
    by index, regions grown from several seeds, communities (Blondel et al. 2008) packed onto the shares, and METIS. The
    best are refined by moves and swaps. Where links are known to differ, a cut edge counts as much as its link costs.
    With an assignment before, as few nodes as possible move, and those where it costs least. Communities by data, where
    there are any, come before the cut: they are kept whole as far as shares allow.
    """

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        pinned, shares = room_for(adj.num_nodes, clusters, pins)
        names = [cluster.name for cluster in clusters]
        if hints.previous:
            kept = keep_most(Crossing(adj, hints.costs).neighbours(), pinned, shares, pins, hints)
            return Assignment(tuple(kept), explain(adj, kept, names, pins, hints.previous))
        if hints.communities:
            graph = Crossing(adj, hints.costs).neighbours()
            packed = pack(graph, hints.communities, pinned, shares, pins, hints.costs)
            return Assignment(tuple(packed), explain_communities(packed, names, pins, hints.communities))
        best = contiguous(pinned, shares, range(adj.num_nodes))
        # In a complete graph every assignment of these sizes cuts the same.
        complete = adj.num_edges == adj.num_nodes * (adj.num_nodes - 1) and hints.costs is None
        if len(clusters) > 1 and 0 < adj.num_edges <= _MAX_EDGES and not complete:
            best = _Search(adj, shares, pins, pinned, hints.costs).best(best)
        return Assignment(tuple(best), explain(adj, best, names, pins))


class _Search:
    """The search for the best assignment within shares."""

    def __init__(
        self, adj: HybridAdjacencyMatrix, shares: Shares, pins: Pins, pinned: list[int], costs: Costs | None
    ) -> None:
        self._adj, self._shares, self._pins, self._pinned, self._costs = adj, shares, pins, pinned, costs
        self._crossing = Crossing(adj, costs)
        self._size = adj.num_edges + adj.num_nodes
        self._graph: Neighbours = self._crossing.neighbours()
        # Where a pinned node has a choice, it is made already while sizes are mended.
        self._fixed = {node: (cluster,) for node, cluster in enumerate(pinned) if cluster >= 0}

    def best(self, first: list[int]) -> list[int]:
        """The best of all starts after refinement; of equal ones `first`, then the lexicographically smallest."""
        starts = [(self._crossing.cost(start), number, start) for number, start in enumerate(self._starts(first))]
        starts.sort(key=lambda entry: entry[:2])
        size = self._size
        # A move is chosen among all pairs of clusters.
        choices = self._graph.num_nodes * len(self._shares.target) ** 2
        passes = MAX_PASSES if size <= _REFINE_FULLY else _FEW_PASSES
        low, high = self._shares.low, self._shares.high
        found = [first]
        for number, (cost, _, start) in enumerate(starts[: max(1, _REFINED // (size + choices // 2))]):
            if self._graph.num_nodes > _SMALL_NODES and number and cost > _HOPELESS * starts[0][0]:
                break
            found.append(self._fitted(start))
            if size <= _MAX_REFINED and choices <= _MAX_MOVE_CHOICES:
                found.append(refine(self._graph, found[-1], low, high, self._pins, passes, self._costs))
        costs = [self._crossing.cost(each) for each in found]
        least = [each for each, cost in zip(found, costs, strict=True) if cost == min(costs)]
        least = [each for number, each in enumerate(least) if each not in least[:number]]
        return min(least, key=lambda each: (self._crossing.pairs(each), each is not first, each))

    def _starts(self, first: list[int]) -> Iterator[list[int]]:
        """All starts; METIS may miss the shares by a little, and pins."""
        size = self._size
        yield first
        for seed in self._seeds()[: _GROWN // size or int(size <= _MAX_REFINED)]:
            yield self._mapped(grow(self._graph, self._pinned, self._shares, seed))
        if self._adj.num_nodes <= _SMALL_NODES and size <= _SMALL_SIZE:
            yield self._mapped(contiguous(self._pinned, self._shares, community_order(self._adj)))
        for parts in metis(self._crossing, self._shares, max(2, min(_MAX_METIS, _METIS // size))):
            yield self._mapped(parts)

    def _seeds(self) -> list[int]:
        """Where regions begin: the node with fewest neighbours, the first node, and spread over the indices."""
        n = self._adj.num_nodes
        lowest = int(np.argmin(self._adj.degree))
        return list(dict.fromkeys([lowest, 0, n // 4, n // 2, 3 * n // 4, n - 1]))

    def _mapped(self, parts: list[int]) -> list[int]:
        return map_parts(self._crossing, parts, self._pinned, self._shares, self._costs)

    def _fitted(self, parts: list[int]) -> list[int]:
        """The same with pinned nodes where they belong and sizes within the shares."""
        placed = [c if own < 0 else own for c, own in zip(parts, self._pinned, strict=True)]
        return mend(self._graph, placed, self._shares.low, self._shares.high, self._fixed, self._costs)
