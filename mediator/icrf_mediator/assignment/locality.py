"""The locality-aware assignment: neighbours on the same cluster as far as capacities and pins allow.

Balanced graph partitioning is NP-hard, so several deterministic starts are refined and the best one is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import networkx as nx
import numpy as np

from icrf.errors import InternalError
from icrf.protocol import ClusterInfo
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import (
    ASSIGNMENTS,
    Assignment,
    Pins,
    Shares,
    cluster_slots,
    fair_shares,
    place_pinned,
)
from icrf_mediator.assignment.refine import MAX_PASSES, Neighbours, refine

# What all starts together may cost, in directed edges looked at; it keeps an assignment within seconds.
_EDGE_BUDGET = 600_000
# Up to here a start is refined until nothing improves.
_REFINE_FULLY_EDGES, _FEW_PASSES = 200_000, 3
# Communities by modularity cost more than everything else together on large graphs.
_SMALL_NODES, _MAX_COMMUNITY_EDGES = 2_000, 50_000
# A start of a large graph that cuts so many times the best cut so far is not worth the refinement.
_HOPELESS = 1.5
# Larger graphs keep the order of their indices.
_MAX_EDGES = 1_500_000


@ASSIGNMENTS.register("locality")
class LocalityAwareAssignment:
    """Fewest cut edges within balanced shares.

    Every cluster takes a share of the nodes in proportion to its slots; pins may exceed the share. Starts: contiguous
    by index, regions grown from several seeds, and communities (Blondel et al. 2008) packed onto the shares. Each is
    refined by moves and swaps. Of equal cuts the contiguous start wins, then the lexicographically smallest.
    """

    def assign(self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins) -> Assignment:
        """See :class:`icrf_mediator.assignment.base.AssignmentStrategy`."""
        slots = cluster_slots(clusters)
        pinned, counts = place_pinned(pins, adj.num_nodes, slots)
        shares = fair_shares(adj.num_nodes, slots, counts)
        contiguous = _contiguous(pinned, shares, range(adj.num_nodes))
        best = contiguous
        # In a complete graph every assignment of these sizes cuts the same.
        complete = adj.num_edges == adj.num_nodes * (adj.num_nodes - 1)
        if len(clusters) > 1 and 0 < adj.num_edges <= _MAX_EDGES and not complete:
            best = _best_of(adj, _starts(adj, pinned, shares, contiguous), shares, pins, contiguous)
        return Assignment(tuple(best), _explain(adj, best, clusters, pins))


def _best_of(
    adj: HybridAdjacencyMatrix, starts: Iterator[list[int]], shares: Shares, pins: Pins, contiguous: list[int]
) -> list[int]:
    graph = _undirected(adj)
    passes = MAX_PASSES if adj.num_edges <= _REFINE_FULLY_EDGES else _FEW_PASSES
    best, best_cut = contiguous, adj.cut_edges(contiguous)
    for start in starts:
        if graph.num_nodes > _SMALL_NODES and adj.cut_edges(start) > _HOPELESS * best_cut:
            continue
        refined = refine(graph, start, shares.low, shares.high, pins, passes)
        cut = adj.cut_edges(refined)
        if cut < best_cut or (cut == best_cut and best is not contiguous and refined < best):
            best, best_cut = refined, cut
    return best


def _starts(
    adj: HybridAdjacencyMatrix, pinned: list[int], shares: Shares, contiguous: list[int]
) -> Iterator[list[int]]:
    graph = _undirected(adj)
    seeds = _seeds(adj)
    for seed in seeds[: max(1, _EDGE_BUDGET // adj.num_edges)]:
        yield _grow(graph, pinned, shares, seed)
    if adj.num_nodes <= _SMALL_NODES and adj.num_edges <= _MAX_COMMUNITY_EDGES:
        yield _contiguous(pinned, shares, _community_order(adj))
    yield contiguous


def _undirected(adj: HybridAdjacencyMatrix) -> Neighbours:
    senders, receivers = adj.edges()
    both = HybridAdjacencyMatrix.from_edges(adj.num_nodes, np.stack([senders, receivers], axis=1))
    return Neighbours(both.indptr.tolist(), both.indices.tolist())


def _seeds(adj: HybridAdjacencyMatrix) -> list[int]:
    """Where regions begin: the first node, the node with fewest neighbours, and spread over the indices."""
    n = adj.num_nodes
    lowest = int(np.argmin(adj.degree))
    return list(dict.fromkeys([lowest, 0, n // 4, n // 2, 3 * n // 4, n - 1]))


def _contiguous(pinned: list[int], shares: Shares, order: Sequence[int]) -> list[int]:
    """Fill one cluster after the other with the nodes in `order`."""
    clusters = list(pinned)
    counts = [0] * len(shares.target)
    for cluster in pinned:
        if cluster >= 0:
            counts[cluster] += 1
    current = 0
    for node in order:
        if clusters[node] >= 0:
            continue
        while counts[current] >= shares.target[current]:
            current += 1
        clusters[node] = current
        counts[current] += 1
    return clusters


def _community_order(adj: HybridAdjacencyMatrix) -> list[int]:
    """Nodes community by community, each community after the one it has most edges to."""
    graph = nx.Graph()
    graph.add_nodes_from(range(adj.num_nodes))
    graph.add_edges_from(zip(*(ends.tolist() for ends in adj.edges()), strict=True))
    communities = sorted(sorted(part) for part in nx.community.louvain_communities(graph, seed=0))
    member = np.empty(adj.num_nodes, dtype=np.int64)
    for number, part in enumerate(communities):
        member[part] = number
    senders, receivers = adj.edges()
    between = np.zeros((len(communities), len(communities)), dtype=np.int64)
    np.add.at(between, (member[senders], member[receivers]), 1)
    left = set(range(len(communities)))
    order, current = [], 0
    while left:
        left.discard(current)
        order += communities[current]
        current = max(left, key=lambda other: (between[current, other], -other)) if left else -1
    return order


def _grow(graph: Neighbours, pinned: list[int], shares: Shares, seed: int) -> list[int]:
    """Grow one region after the other until its share is full.

    The next node is the one with most edges into the region, then fewest free neighbours; a region begins at the
    border of the one before, at the node with fewest free neighbours, so that what is left stays in one piece.
    """
    clusters = list(pinned)
    free_neighbours = [sum(clusters[other] < 0 for other in graph.of(node)) for node in range(graph.num_nodes)]
    members: list[list[int]] = [[] for _ in shares.target]
    for node, cluster in enumerate(clusters):
        if cluster >= 0:
            members[cluster].append(node)
    # All free nodes by free neighbours, for a region that has no border to begin at.
    anywhere = [(free_neighbours[node], node) for node in range(graph.num_nodes) if clusters[node] < 0]
    heapq.heapify(anywhere)
    border = [(free_neighbours[seed], seed)]
    for cluster, target in enumerate(shares.target):
        near = dict.fromkeys(other for node in members[cluster] for other in graph.of(node))
        inside = {node: sum(clusters[other] == cluster for other in graph.of(node)) for node in near}
        frontier = [(-edges, free_neighbours[node], node) for node, edges in inside.items() if clusters[node] < 0]
        heapq.heapify(frontier)
        for _ in range(target - len(members[cluster])):
            node = _next(frontier, inside, clusters, free_neighbours)
            if node < 0:
                node = _begin(border, anywhere, clusters, free_neighbours)
            clusters[node] = cluster
            for other in graph.of(node):
                free_neighbours[other] -= 1
                if clusters[other] < 0:
                    inside[other] = inside.get(other, 0) + 1
                    heapq.heappush(frontier, (-inside[other], free_neighbours[other], other))
                    heapq.heappush(anywhere, (free_neighbours[other], other))
        border = [(free_neighbours[node], node) for _, _, node in frontier if clusters[node] < 0]
        heapq.heapify(border)
    return clusters


def _next(
    frontier: list[tuple[int, int, int]], inside: dict[int, int], clusters: list[int], free_neighbours: list[int]
) -> int:
    while frontier:
        edges, free, node = heapq.heappop(frontier)
        if clusters[node] < 0 and -edges == inside[node]:
            if free == free_neighbours[node]:
                return node
            # Its neighbours were taken by another region since; it stands in the queue with its present count.
            heapq.heappush(frontier, (edges, free_neighbours[node], node))
    return -1


def _begin(
    border: list[tuple[int, int]], anywhere: list[tuple[int, int]], clusters: list[int], free_neighbours: list[int]
) -> int:
    for heap in (border, anywhere):
        while heap:
            free, node = heapq.heappop(heap)
            if clusters[node] >= 0:
                continue
            if free == free_neighbours[node]:
                return node
            heapq.heappush(heap, (free_neighbours[node], node))
    raise InternalError("X001", "shares add up to more nodes than there are")


def _explain(
    adj: HybridAdjacencyMatrix, clusters: list[int], infos: Sequence[ClusterInfo], pins: Pins
) -> tuple[str, ...]:
    owners = np.array(clusters, dtype=np.int64)
    senders, receivers = adj.edges()
    here = np.bincount(senders[owners[senders] == owners[receivers]], minlength=adj.num_nodes).tolist()
    degree = adj.degree.tolist()
    sentences = []
    for node, cluster in enumerate(clusters):
        name = infos[cluster].name
        if node in pins:
            reason = f"pinned to {name}" if len(pins[node]) == 1 else f"{name} matches its placement labels"
        elif degree[node] == 0:
            reason = f"balance: {name} had a share left"
        elif here[node] == 0:
            reason = f"balance: none of its {degree[node]} neighbours fits on {name}"
        else:
            reason = f"{here[node]} of its {degree[node]} neighbours are on {name}"
        sentences.append(reason)
    return tuple(sentences)
