"""Where a search for a good assignment begins: contiguous ids, regions, communities, and METIS."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import networkx as nx
import numpy as np
import pymetis
from scipy.sparse import csr_matrix

from icrf.errors import InternalError
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import Shares
from icrf_mediator.assignment.crossing import Crossing, Neighbours

# How often METIS improves a level on its way back from the coarse graph; its own 10 leave one per cent more cut.
_METIS_ITERATIONS = 30
# METIS is for graphs; with parts of a few nodes it complains on the standard output and leaves some of them empty.
_METIS_LEAST_PART = 10
# One per mille over the ideal size, the least that METIS takes. What is left is mended.
_METIS_UFACTOR = 1


def contiguous(pinned: Sequence[int], shares: Shares, order: Sequence[int]) -> list[int]:
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


def community_order(adj: HybridAdjacencyMatrix) -> list[int]:
    """Nodes community by community, each community after the one it has most edges to."""
    graph = nx.Graph()
    graph.add_nodes_from(range(adj.num_nodes))
    graph.add_edges_from(zip(*(ends.tolist() for ends in adj.edges()), strict=True))
    communities = sorted(sorted(part) for part in nx.community.louvain_communities(graph, seed=0))
    member = np.empty(adj.num_nodes, dtype=np.int64)
    for number, part in enumerate(communities):
        member[part] = number
    senders, receivers = adj.edges()
    ones = np.ones(len(senders), dtype=np.int64)
    between = csr_matrix((ones, (member[senders], member[receivers])), shape=(len(communities), len(communities)))
    between.sum_duplicates()
    left = dict.fromkeys(range(len(communities)))
    order: list[int] = []
    current = 0
    while left:
        del left[current]
        order += communities[current]
        row = slice(between.indptr[current], between.indptr[current + 1])
        near = zip(between.data[row].tolist(), between.indices[row].tolist(), strict=True)
        best = max(((edges, -other) for edges, other in near if other in left), default=None)
        current = -best[1] if best else next(iter(left), -1)
    return order


def grow(graph: Neighbours, pinned: Sequence[int], shares: Shares, seed: int) -> list[int]:
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


def metis(crossing: Crossing, shares: Shares, count: int) -> Iterator[list[int]]:
    """Partitions by METIS (Karypis and Kumar 1998): by k-way refinement, as METIS is by default, then with other seeds.

    Sizes are near the shares and may miss them by a little; pins are not looked at. The seeds are fixed and METIS keeps
    the interpreter's lock, so that equal arguments give equal partitions.

    Args:
        count: how many.
    """
    parts = [c for c, target in enumerate(shares.target) if target > 0]
    sizes = [shares.target[c] for c in parts]
    if len(parts) < 2 or min(sizes) < _METIS_LEAST_PART:
        return
    graph = pymetis.CSRAdjacency(crossing.both.indptr, crossing.both.indices)
    weights = None if max(sizes) - min(sizes) <= 1 else [size / sum(sizes) for size in sizes]
    for number in range(count):
        options = pymetis.Options()
        if number != 1:
            options = pymetis.Options(seed=number, niter=_METIS_ITERATIONS, ufactor=_METIS_UFACTOR)
        recursive = None if number == 1 else bool(number % 2)
        found = pymetis.part_graph(len(parts), graph, tpwgts=weights, recursive=recursive, options=options)
        yield np.array(parts)[np.asarray(found.vertex_part)].tolist()
