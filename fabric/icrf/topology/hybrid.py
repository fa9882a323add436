"""The adjacency matrix of a federation: sparse, immutable, and aware of clusters when asked with an assignment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from icrf.errors import TopologyError
from icrf.protocol import Graph

INTRA_CLUSTER, INTER_CLUSTER = "INTRA_CLUSTER", "INTER_CLUSTER"

# A dense matrix of more nodes would take over 400 MB even with one byte a cell.
MAX_DENSE_NODES = 20_000

# How many offending cells or components an error names before it only counts them.
SHOWN = 5

IntArray = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, eq=False)
class HybridAdjacencyMatrix:
    """A directed graph without self loops in CSR form: node i may send to ``indices[indptr[i]:indptr[i+1]]``.

    Build it with one of the ``from_`` constructors; they validate. The arrays are read-only.

    Attributes:
        indptr: int32, shape (num_nodes + 1,).
        indices: int32, shape (num_edges,), ascending and without duplicates within a row.
    """

    indptr: IntArray
    indices: IntArray

    def __post_init__(self) -> None:
        self.indptr.setflags(write=False)
        self.indices.setflags(write=False)

    # ------------------------------------------------------------ constructors

    @classmethod
    def from_dense(cls, matrix: np.ndarray[Any, Any]) -> HybridAdjacencyMatrix:
        """Read a square 0/1 matrix; ``matrix[i][j] = 1`` means that i may send to j.

        Raises:
            TopologyError: T001 not square, T002 a cell that is neither 0 nor 1, T005 a self loop, T008 too large.
        """
        matrix = np.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise TopologyError(
                "T001", "adjacency matrix is not square", value=matrix.shape, allowed="shape (num_nodes, num_nodes)"
            )
        _require_dense_size(matrix.shape[0])
        edges = matrix == 1
        bad = np.argwhere(~(edges | (matrix == 0)))
        if len(bad):
            row, column = (int(x) for x in bad[0])
            raise TopologyError(
                "T002",
                f"{len(bad)} cells are neither 0 nor 1",
                place=f"A[{row},{column}]",
                value=matrix[row, column],
                allowed="0 or 1",
            )
        rows, columns = np.nonzero(edges)
        return cls._from_arrays(matrix.shape[0], rows, columns)

    @classmethod
    def from_edges(
        cls, num_nodes: int, pairs: Iterable[tuple[int, int]] | np.ndarray[Any, Any], symmetric: bool = True
    ) -> HybridAdjacencyMatrix:
        """Build from pairs (i, j): i may send to j, and with `symmetric` j to i too. Duplicates count once.

        Raises:
            TopologyError: T005 a self loop, T010 an index outside [0, num_nodes).
        """
        edges = pairs if isinstance(pairs, np.ndarray) else np.array(list(pairs), dtype=np.int64)
        edges = edges.reshape(-1, 2).astype(np.int64, copy=False)
        outside = edges[((edges < 0) | (edges >= num_nodes)).any(axis=1)]
        if len(outside):
            raise TopologyError(
                "T010",
                f"edge {outside[0, 0]}->{outside[0, 1]} names a node that does not exist",
                allowed=f"node indices 0 to {num_nodes - 1}",
            )
        rows, columns = edges[:, 0], edges[:, 1]
        if symmetric:
            rows, columns = np.concatenate([rows, columns]), np.concatenate([columns, rows])
        keys = np.unique(rows * num_nodes + columns)
        return cls._from_arrays(num_nodes, keys // max(num_nodes, 1), keys % max(num_nodes, 1))

    @classmethod
    def from_graph(cls, graph: Graph) -> HybridAdjacencyMatrix:
        """The inverse of :meth:`to_graph`; checks what comes from outside.

        Raises:
            TopologyError: T010 inconsistent arrays, T005 a self loop.
        """
        indptr = np.array(graph.indptr, dtype=np.int64)
        columns = np.array(graph.indices, dtype=np.int64)
        counts = np.diff(indptr)
        if len(indptr) != graph.num_nodes + 1 or indptr[0] != 0 or indptr[-1] != len(columns) or (counts < 0).any():
            raise TopologyError("T010", f"row pointers do not describe {graph.num_nodes} rows", place="graph.indptr")
        if len(columns) and (columns.min() < 0 or columns.max() >= graph.num_nodes):
            raise TopologyError("T010", f"an edge leaves the {graph.num_nodes} nodes", place="graph.indices")
        rows = np.repeat(np.arange(graph.num_nodes), counts)
        keys = rows * graph.num_nodes + columns
        if (np.diff(keys) <= 0).any():
            raise TopologyError("T010", "neighbours are not ascending within a row", place="graph.indices")
        return cls._from_arrays(graph.num_nodes, rows, columns)

    @classmethod
    def _from_arrays(
        cls, num_nodes: int, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]
    ) -> HybridAdjacencyMatrix:
        """Edges sorted by (row, column) without duplicates; refuses self loops."""
        loops = rows[rows == columns]
        if len(loops):
            shown = ", ".join(f"A[{i},{i}]" for i in loops[:SHOWN])
            raise TopologyError(
                "T005",
                f"{len(loops)} self loops: {shown}{', ...' if len(loops) > SHOWN else ''}",
                allowed="a diagonal of zeros",
                hint="a node always keeps its own state; the mixing matrix adds the diagonal",
            )
        indptr = np.zeros(num_nodes + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows, minlength=num_nodes), out=indptr[1:])
        return cls(indptr, columns.astype(np.int32))

    # ------------------------------------------------------------ conversions

    def to_graph(self) -> Graph:
        """As a control message."""
        return Graph(self.num_nodes, tuple(self.indptr.tolist()), tuple(self.indices.tolist()))

    def to_dense(self) -> np.ndarray[Any, np.dtype[np.int8]]:
        """As an int8 matrix of shape (num_nodes, num_nodes); T008 above 20,000 nodes."""
        _require_dense_size(self.num_nodes)
        dense = np.zeros((self.num_nodes, self.num_nodes), dtype=np.int8)
        dense[self._rows, self.indices] = 1
        return dense

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """What ``np.asarray`` makes of it: :meth:`to_dense`, always a copy."""
        if copy is False:
            raise ValueError("a sparse matrix becomes a dense one by a copy only")
        return self.to_dense() if dtype is None else self.to_dense().astype(dtype)

    def to_scipy(self) -> csr_matrix:
        """As a SciPy matrix of ones (int8), sharing no memory that could be written."""
        values = np.ones(self.num_edges, dtype=np.int8)
        return csr_matrix((values, self.indices.copy(), self.indptr.copy()), shape=(self.num_nodes, self.num_nodes))

    def edges(self) -> tuple[IntArray, IntArray]:
        """(senders, receivers) of all directed edges, ordered by sender, then receiver."""
        return self._rows, self.indices

    # ------------------------------------------------------------ questions

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        """Directed edges; an undirected one counts twice."""
        return len(self.indices)

    @cached_property
    def degree(self) -> IntArray:
        """Out-degree per node, int32, shape (num_nodes,)."""
        degree = np.diff(self.indptr)
        degree.setflags(write=False)
        return degree

    def out_neighbors(self, node: int) -> IntArray:
        """The nodes that `node` may send to, ascending."""
        self._require_node(node)
        return self.indices[self.indptr[node] : self.indptr[node + 1]]

    def in_neighbors(self, node: int) -> IntArray:
        """The nodes that may send to `node`, ascending."""
        self._require_node(node)
        return self._transposed.out_neighbors(node)

    def has_edge(self, source: int, target: int) -> bool:
        """Whether `source` may send to `target`; a node outside the graph has no edges."""
        if not (0 <= source < self.num_nodes and 0 <= target < self.num_nodes):
            return False
        row = self.indices[self.indptr[source] : self.indptr[source + 1]]
        position = int(np.searchsorted(row, target))
        return position < len(row) and int(row[position]) == target

    def is_symmetric(self) -> bool:
        return self == self._transposed

    def one_way_edges(self, limit: int = SHOWN) -> list[tuple[int, int]]:
        """The first `limit` edges without an edge back."""
        missing = np.setdiff1d(self._keys, self._transposed._keys, assume_unique=True)[:limit]
        return [(int(key) // self.num_nodes, int(key) % self.num_nodes) for key in missing]

    def components(self) -> list[list[int]]:
        """Weakly connected components, each ascending, ordered by their smallest node."""
        if self.num_nodes == 0:
            return []
        count, labels = connected_components(self.to_scipy(), directed=True, connection="weak")
        order = np.argsort(labels, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(labels, minlength=count))[:-1])
        return sorted((part.tolist() for part in parts), key=lambda part: part[0])

    def is_strongly_connected(self) -> bool:
        """Whether every node can reach every other along edges in their direction."""
        found = connected_components(self.to_scipy(), directed=True, connection="strong", return_labels=False)
        return self.num_nodes < 2 or int(found) == 1

    def cut_edges(self, assignment: Sequence[int] | np.ndarray[Any, Any]) -> int:
        """How many connected pairs of nodes live on different clusters; a pair counts once however many directions.

        Args:
            assignment: cluster index per node.
        """
        clusters = self._require_assignment(assignment)
        crossing = clusters[self._rows] != clusters[self.indices]
        low = np.minimum(self._rows[crossing], self.indices[crossing]).astype(np.int64)
        high = np.maximum(self._rows[crossing], self.indices[crossing]).astype(np.int64)
        return len(np.unique(low * self.num_nodes + high))

    def channel(self, source: int, target: int, assignment: Sequence[int] | np.ndarray[Any, Any]) -> str:
        """``INTRA_CLUSTER`` or ``INTER_CLUSTER``: how a message between these nodes travels under `assignment`."""
        return INTRA_CLUSTER if assignment[source] == assignment[target] else INTER_CLUSTER

    # ------------------------------------------------------------ identity

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HybridAdjacencyMatrix):
            return NotImplemented
        return np.array_equal(self.indptr, other.indptr) and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.indptr.tobytes(), self.indices.tobytes()))

    def __len__(self) -> int:
        """The number of nodes, as of a dense matrix."""
        return self.num_nodes

    def __repr__(self) -> str:
        return f"HybridAdjacencyMatrix({self.num_nodes} nodes, {self.num_edges} directed edges)"

    # ------------------------------------------------------------ helpers

    @cached_property
    def _rows(self) -> IntArray:
        rows = np.repeat(np.arange(self.num_nodes, dtype=np.int32), np.diff(self.indptr))
        rows.setflags(write=False)
        return rows

    @property
    def _keys(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._rows.astype(np.int64) * self.num_nodes + self.indices

    @cached_property
    def _transposed(self) -> HybridAdjacencyMatrix:
        order = np.argsort(self.indices, kind="stable")
        return HybridAdjacencyMatrix._from_arrays(self.num_nodes, self.indices[order], self._rows[order])

    def _require_node(self, node: int) -> None:
        if not 0 <= node < self.num_nodes:
            raise TopologyError("T010", f"node {node} does not exist", allowed=f"0 to {self.num_nodes - 1}")

    def _require_assignment(self, assignment: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        clusters = np.asarray(assignment, dtype=np.int64)
        if clusters.shape != (self.num_nodes,):
            raise TopologyError(
                "T010",
                f"assignment of {clusters.size} nodes for a graph of {self.num_nodes}",
                allowed=f"{self.num_nodes} cluster indices",
            )
        return clusters


def _require_dense_size(num_nodes: int) -> None:
    if num_nodes > MAX_DENSE_NODES:
        raise TopologyError(
            "T008",
            f"a dense matrix of {num_nodes} nodes is too large",
            allowed=f"at most {MAX_DENSE_NODES} nodes",
            hint="build it from edges instead",
        )
