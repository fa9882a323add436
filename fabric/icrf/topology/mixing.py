"""Mixing matrices: what a decentralized round applies to the states of a node and its neighbours.

One round of gossip replaces the state x_i by sum_j W_ij x_j. A symmetric, doubly stochastic W preserves the mean over
all nodes, and the disagreement shrinks at least by the second-largest eigenvalue modulus (SLEM) of W in every round
(Xiao and Boyd, "Fast linear iterations for distributed averaging", 2004; Lian et al., arXiv 1705.09056).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from icrf.errors import TopologyError
from icrf.registry import Registry
from icrf.topology.hybrid import SHOWN, HybridAdjacencyMatrix

EXACT, CLOSED_FORM, ESTIMATE = "exact", "closed-form", "estimate"

# Dense eigenvalues of more nodes take minutes.
MAX_EXACT_NODES = 2_000
# Lanczos converges slowly on long thin graphs; these bound it to seconds at 100,000 nodes.
_LANCZOS_VECTORS = 40
_LANCZOS_MIN_RESTARTS = 20
_LANCZOS_NODE_RESTARTS = 2_000_000
_LANCZOS_TOLERANCE = 1e-9
_POWER_STEPS = 1_000
# Eigenvalues below this are zeros that rounding left behind.
_ZERO = 1e-12

MixingRule = Callable[[HybridAdjacencyMatrix], csr_matrix]

MIXINGS: Registry[MixingRule] = Registry("mixing")


@MIXINGS.register("metropolis_hastings")
def metropolis_hastings(adjacency: HybridAdjacencyMatrix) -> csr_matrix:
    """Metropolis-Hastings weights: W_ij = 1 / (1 + max(d_i, d_j)) on edges, W_ii = 1 - sum_j W_ij.

    Every entry is one float64 formula of the graph alone, so that all clusters compute the same bits.

    Returns:
        float64 CSR matrix, shape (num_nodes, num_nodes), indices ascending per row, the diagonal always stored.

    Raises:
        TopologyError: T004 if the graph is directed.
    """
    if not adjacency.is_symmetric():
        shown = "; ".join(f"A[{i},{j}]=1 but A[{j},{i}]=0" for i, j in adjacency.one_way_edges(SHOWN))
        raise TopologyError("T004", shown, allowed="an undirected graph", hint="gossip needs edges both ways")
    num_nodes = adjacency.num_nodes
    rows, columns = adjacency.edges()
    degree = adjacency.degree.astype(np.float64)
    values = 1.0 / (1.0 + np.maximum(degree[rows], degree[columns]))
    # bincount adds one after the other in index order, whatever the machine's vector width.
    diagonal = 1.0 - np.bincount(rows, weights=values, minlength=num_nodes)
    nodes = np.arange(num_nodes, dtype=np.int32)
    all_rows, all_columns = np.concatenate([rows, nodes]), np.concatenate([columns, nodes])
    order = np.lexsort((all_columns, all_rows))
    indptr = adjacency.indptr + np.arange(num_nodes + 1, dtype=np.int32)
    data = np.concatenate([values, diagonal])[order]
    return csr_matrix((data, all_columns[order], indptr), shape=(num_nodes, num_nodes))


def mixing_row(weights: csr_matrix, node: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What `node` averages: (node indices ascending, itself included, int32; their weights, float64)."""
    start, end = weights.indptr[node], weights.indptr[node + 1]
    return weights.indices[start:end], weights.data[start:end]


def mixing_rows(
    weights: csr_matrix, nodes: Sequence[int] | None = None
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """:func:`mixing_row` for each of `nodes`, by default for all."""
    return [mixing_row(weights, node) for node in (range(weights.shape[0]) if nodes is None else nodes)]


def spectrum(weights: csr_matrix) -> tuple[float, str]:
    """The second-largest eigenvalue modulus of a symmetric mixing matrix and how it was found.

    Returns:
        (slem, kind): ``exact`` from dense eigenvalues up to 2,000 nodes, ``closed-form`` for a larger ring,
        complete, k-connected or disconnected graph, else ``estimate`` by Lanczos iteration, which is at most the true
        value.

    Raises:
        TopologyError: T007 if W is not symmetric or its rows do not sum to 1.
    """
    _require_doubly_stochastic(weights)
    num_nodes = weights.shape[0]
    if num_nodes <= 1:
        return 0.0, EXACT
    if connected_components(weights, directed=False, return_labels=False) > 1:
        return 1.0, EXACT if num_nodes <= MAX_EXACT_NODES else CLOSED_FORM
    if num_nodes <= MAX_EXACT_NODES:
        values = np.linalg.eigvalsh(weights.toarray())
        return _clean(max(abs(float(values[0])), abs(float(values[-2])))), EXACT
    known = _closed_form(weights)
    if known is not None:
        return known, CLOSED_FORM
    return _lanczos(weights), ESTIMATE


def rounds_to_consensus(slem: float, tolerance: float = 1e-6) -> int:
    """Rounds until the disagreement of any start falls below `tolerance` of itself; -1 if it never does."""
    if not 0 <= slem < 1:
        return -1
    if slem < _ZERO:
        return 1
    return max(1, math.ceil(math.log(tolerance) / math.log(slem)))


def _require_doubly_stochastic(weights: csr_matrix) -> None:
    sums = np.asarray(weights.sum(axis=1)).ravel()
    wrong = np.flatnonzero(~(np.abs(sums - 1.0) <= 1e-9))
    if len(wrong):
        raise TopologyError("T007", f"row {wrong[0]} sums to {sums[wrong[0]]:.9g}", allowed="1 within 1e-9")
    if abs(weights - weights.T).max() > 1e-9:
        raise TopologyError("T007", "the matrix is not symmetric, so its columns do not sum to 1")


def _closed_form(weights: csr_matrix) -> float | None:
    """The SLEM of a connected W that is recognisably that of a ring or of a circulant graph; else None."""
    num_nodes = weights.shape[0]
    stored = np.diff(weights.indptr)
    if (stored != stored[0]).any():
        return None
    # Connected and two neighbours everywhere: only a cycle is that, whatever the numbering.
    if stored[0] == 3 and np.allclose(weights.data, 1.0 / 3.0, rtol=1e-12, atol=0.0):
        return (1.0 + 2.0 * math.cos(2.0 * math.pi / num_nodes)) / 3.0
    return _circulant(weights, int(stored[0]))


def _circulant(weights: csr_matrix, stored: int) -> float | None:
    """Every row is the first one shifted (complete and k-connected graphs): the eigenvalues are its Fourier transform.

    Davis, "Circulant Matrices", 1979, section 3.2.
    """
    num_nodes = weights.shape[0]
    rows = np.repeat(np.arange(num_nodes), stored)
    offsets = ((weights.indices - rows) % num_nodes).reshape(num_nodes, stored)
    order = np.argsort(offsets, axis=1)
    offsets = np.take_along_axis(offsets, order, axis=1)
    values = np.take_along_axis(weights.data.reshape(num_nodes, stored), order, axis=1)
    if (offsets != offsets[0]).any() or not np.allclose(values, values[0], rtol=1e-12, atol=0.0):
        return None
    first = np.zeros(num_nodes)
    first[offsets[0]] = values[0]
    # Entry 0 is the row sum, the eigenvalue 1.
    return _clean(float(np.abs(np.fft.fft(first)[1:]).max()))


def _lanczos(weights: csr_matrix) -> float:
    """The largest |eigenvalue| of W without its eigenvalue 1, from a fixed start vector."""
    num_nodes = weights.shape[0]
    start = np.random.default_rng(0).standard_normal(num_nodes)
    start -= start.mean()

    def deflated(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x = np.asarray(x).ravel()
        result: np.ndarray[Any, Any] = weights @ x - x.mean()
        return result

    operator = LinearOperator((num_nodes, num_nodes), matvec=deflated, dtype=np.float64)
    try:
        values = eigsh(
            operator,
            k=1,
            v0=start,
            ncv=_LANCZOS_VECTORS,
            maxiter=max(_LANCZOS_MIN_RESTARTS, _LANCZOS_NODE_RESTARTS // num_nodes),
            tol=_LANCZOS_TOLERANCE,
            return_eigenvectors=False,
        )
        return _clean(min(abs(float(values[0])), 1.0))
    except ArpackNoConvergence:
        return _power_iteration(deflated, start)


def _power_iteration(apply: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], x: np.ndarray[Any, Any]) -> float:
    """A lower bound that always ends, for graphs whose eigenvalues lie too close together for Lanczos."""
    for _ in range(_POWER_STEPS):
        x = apply(x)
        x /= np.linalg.norm(x)
    return _clean(min(float(np.linalg.norm(apply(x))), 1.0))


def _clean(slem: float) -> float:
    return 0.0 if slem < _ZERO else slem
