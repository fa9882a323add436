"""The built-in strategies by which the graph of peers changes between rounds; see ``adaptation.py``.

All of them keep the graph connected, take and return symmetric dense matrices, and are functions of their arguments.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from icrf.topology.adaptation import ADAPTERS

Matrix = np.ndarray[Any, np.dtype[np.int8]]
Edges = np.ndarray[Any, np.dtype[np.int64]]

# A draw that falls apart is repeated so often before the graph stays as it is.
_DRAWS = 100
# Draws of a pair of edges for every swap that is wanted: pairs with a node or an edge in common do not count.
_TRIES = 20
# Cosines are rounded to multiples of about 2^-40 each, so that their sums are exact, in whatever order.
_UNIT = float(1 << 20)


@ADAPTERS.register("random_rewire")
def random_rewire(adjacency_matrix: Matrix, random_state: np.random.RandomState, adaptation_share: float) -> Matrix:
    """A share of the edges is moved, and every node keeps its degree.

    Two edges a-b and c-d become a-d and c-b (Maslov and Sneppen 2002). Where no swap is possible, as in a mesh, or
    every draw falls apart, the graph stays as it is.
    """
    parts = _num_components(adjacency_matrix)
    for _ in range(_DRAWS):
        found = _swapped(adjacency_matrix, random_state, adaptation_share)
        if _num_components(found) <= parts:
            return found
    return adjacency_matrix


@ADAPTERS.register("cosine_similarity")
def cosine_similarity(
    adjacency_matrix: Matrix,
    sketches: np.ndarray[Any, np.dtype[np.float64]],
    available: np.ndarray[Any, np.dtype[np.bool_]],
) -> Matrix:
    """Nodes whose training goes in the same direction become neighbours.

    What training has changed, less its mean over all nodes, is compared by its cosine, as in clustered federated
    learning (Sattler, Müller and Samek, arXiv 1910.01991). The edges are those of the spanning tree of largest
    similarities, and then the most similar pairs, as many as there were before; of equal pairs those that are
    neighbours already, and then those of smaller numbers. It looks at all pairs: up to 5,000 nodes.
    """
    mean = sketches[available].mean(axis=0) if available.any() else 0.0
    away = np.where(available[:, None], sketches - mean, 0.0)
    lengths = np.sqrt((away * away).sum(axis=1))
    whole = np.rint(away / np.where(lengths > 0, lengths, 1.0)[:, None] * _UNIT).astype(np.int64)
    similarity = whole @ whole.T
    first, second = np.triu_indices(len(whole), 1)
    order = np.lexsort((adjacency_matrix[first, second] == 0, -similarity[first, second]))
    pairs = np.stack([first[order], second[order]], axis=1)
    in_tree = _in_tree(pairs, len(whole))
    wanted = len(_edges(adjacency_matrix)) - int(in_tree.sum())
    more = pairs[~in_tree][: max(0, wanted)]
    return _of_edges(np.concatenate([pairs[in_tree], more]), len(whole))


@ADAPTERS.register("prune_unavailable")
def prune_unavailable(initial_matrix: Matrix, available: np.ndarray[Any, np.dtype[np.bool_]]) -> Matrix:
    """Nodes that did not train in the round lose their edges of the initial graph, until they train again.

    The edges that it takes to keep the graph connected stay, as few as can be.
    """
    edges = _edges(initial_matrix)
    usable = available[edges[:, 0]] & available[edges[:, 1]]
    order = np.argsort(~usable, kind="stable")
    edges, usable = edges[order], usable[order]
    return _of_edges(edges[usable | _in_tree(edges, len(initial_matrix))], len(initial_matrix))


@ADAPTERS.register("densify")
def densify(adjacency_matrix: Matrix, random_state: np.random.RandomState, adaptation_share: float) -> Matrix:
    """As many edges are added, by chance, as `adaptation_share` of those that there are, up to a mesh."""
    missing = _edges((adjacency_matrix == 0).astype(np.int8))
    edges = _edges(adjacency_matrix)
    chosen = random_state.permutation(len(missing))[: math.ceil(adaptation_share * len(edges))]
    return _of_edges(np.concatenate([edges, missing[chosen]]), len(adjacency_matrix))


@ADAPTERS.register("sparsify")
def sparsify(adjacency_matrix: Matrix, random_state: np.random.RandomState, adaptation_share: float) -> Matrix:
    """A share of the edges is removed, by chance, down to a random spanning tree."""
    edges = random_state.permutation(_edges(adjacency_matrix))
    in_tree = _in_tree(edges, len(adjacency_matrix))
    spare = np.flatnonzero(~in_tree)
    removed = spare[max(0, len(spare) - math.ceil(adaptation_share * len(edges))) :]
    return _of_edges(np.delete(edges, removed, axis=0), len(adjacency_matrix))


# ---------------------------------------------------------------- helpers


def _edges(matrix: Matrix) -> Edges:
    """The undirected edges (i, j), i < j, in order, shape (num_edges, 2)."""
    return np.argwhere(np.triu(matrix, 1))


def _of_edges(edges: Edges, num_nodes: int) -> Matrix:
    matrix = np.zeros((num_nodes, num_nodes), dtype=np.int8)
    matrix[edges[:, 0], edges[:, 1]] = 1
    matrix[edges[:, 1], edges[:, 0]] = 1
    return matrix


def _in_tree(edges: Edges, num_nodes: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of these edges, the best first, make the spanning tree (or forest) that keeps the best ones."""
    ranks = np.arange(1, len(edges) + 1)
    ranked = csr_matrix((ranks, (edges[:, 0], edges[:, 1])), shape=(num_nodes, num_nodes))
    kept = np.zeros(len(edges), dtype=np.bool_)
    kept[minimum_spanning_tree(ranked).data.astype(np.int64) - 1] = True
    return kept


def _num_components(matrix: Matrix) -> int:
    return int(connected_components(csr_matrix(matrix), directed=False, return_labels=False))


def _swapped(matrix: Matrix, random_state: np.random.RandomState, share: float) -> Matrix:
    found, edges = matrix.copy(), _edges(matrix)
    if len(edges) < 2:
        return found
    wanted = max(1, round(share * len(edges) / 2))
    for _ in range(_TRIES * wanted):
        one, other, turned = random_state.randint(len(edges)), random_state.randint(len(edges)), random_state.randint(2)
        a, b = edges[one]
        c, d = edges[other][::-1] if turned else edges[other]
        if len({a, b, c, d}) < 4 or found[a, d] or found[c, b]:
            continue
        for i, j, value in ((a, b, 0), (c, d, 0), (a, d, 1), (c, b, 1)):
            found[i, j] = found[j, i] = value
        edges[one], edges[other] = (a, d), (c, b)
        wanted -= 1
        if not wanted:
            break
    return found
