"""What crosses between clusters under an assignment, as the strategies that look at the graph count it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.topology import HybridAdjacencyMatrix

# What an edge between two clusters costs, as whole numbers, so that sums are exact: symmetric, zeros on the diagonal.
Costs = Sequence[Sequence[int]]

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Neighbours:
    """An undirected graph as CSR lists; plain lists, because the loops of the strategies read single entries."""

    indptr: list[int]
    indices: list[int]

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1

    def of(self, node: int) -> list[int]:
        return self.indices[self.indptr[node] : self.indptr[node + 1]]


class Crossing:
    """Counts what crosses.

    Args:
        adj: the graph; an edge in one direction or in both counts as one.
        costs: what an edge between two clusters costs; None: all the same, so that the cost is the cut.

    Attributes:
        both: the graph with every edge in both directions.
    """

    def __init__(self, adj: HybridAdjacencyMatrix, costs: Costs | None = None) -> None:
        if adj.is_symmetric():
            self.both = adj
        else:
            self.both = HybridAdjacencyMatrix.from_edges(adj.num_nodes, np.stack(adj.edges(), axis=1))
        self._adj = adj
        self._costs = None if costs is None else np.array(costs, dtype=np.int64)
        rows, columns = self.both.edges()
        once = rows < columns
        self._ends = rows[once], columns[once]

    def neighbours(self) -> Neighbours:
        """The undirected graph for loops."""
        return Neighbours(self.both.indptr.tolist(), self.both.indices.tolist())

    def cost(self, clusters: Sequence[int]) -> int:
        """What the cut edges cost together."""
        owners = np.asarray(clusters)
        one, other = (owners[ends] for ends in self._ends)
        if self._costs is None:
            return int(np.count_nonzero(one != other))
        return int(self._costs[one, other].sum())

    def pairs(self, clusters: Sequence[int]) -> int:
        """Distinct (sender, remote cluster) pairs: the payloads of a round of peers."""
        owners = np.asarray(clusters, dtype=np.int64)
        senders, receivers = self._adj.edges()
        away = owners[senders] != owners[receivers]
        return len(np.unique(senders[away] * (int(owners.max(initial=0)) + 1) + owners[receivers[away]]))

    def between(self, clusters: Sequence[int], num_clusters: int) -> IntArray:
        """Edges between every two clusters, symmetric, shape (num_clusters, num_clusters)."""
        owners = np.asarray(clusters, dtype=np.int64)
        one, other = (owners[ends] for ends in self._ends)
        counted = np.bincount(one * num_clusters + other, minlength=num_clusters**2).reshape(num_clusters, -1)
        found: IntArray = counted + counted.T
        return found
