"""How fast a mixing matrix brings its nodes together: the second-largest eigenvalue modulus, exact where it can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, diags
from scipy.sparse.csgraph import breadth_first_order
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs, eigsh

from icrf.errors import TopologyError
from icrf.topology.mixing import stochastic
from icrf.topology.structure import Structure, structure_of

EXACT, CLOSED_FORM, ESTIMATE = "exact", "closed-form", "estimate"

# Dense eigenvalues of more nodes take minutes; those of a matrix that is not symmetric take ten times as long.
MAX_EXACT_NODES, MAX_EXACT_NONSYMMETRIC = 2_000, 1_000
# Lanczos converges slowly on long thin graphs; these bound it to seconds at 100,000 nodes.
_LANCZOS_VECTORS = 40
_LANCZOS_MIN_RESTARTS = 20
_LANCZOS_NODE_RESTARTS = 2_000_000
_LANCZOS_TOLERANCE = 1e-9
_POWER_STEPS = 1_000
# Eigenvalues below this are zeros that rounding left behind.
_ZERO = 1e-12

Array = np.ndarray[Any, Any]


def spectrum(weights: csr_matrix, structure: Structure | None = None) -> tuple[float, str]:
    """The second-largest eigenvalue modulus of a mixing matrix and how it was found.

    Args:
        structure: that of `weights`, where it is known already.

    Returns:
        (slem, kind): ``exact`` from dense eigenvalues up to 2,000 nodes (1,000 for a matrix that is not similar to a
        symmetric one), ``closed-form`` for a larger ring, complete, k-connected or other circulant graph and for what
        never agrees, else ``estimate`` by Lanczos or Arnoldi iteration.

    Raises:
        TopologyError: T007 if neither rows nor columns of W sum to 1.
    """
    rows, columns = stochastic(weights)
    if not (rows or columns):
        sums = np.asarray(weights.sum(axis=1)).ravel()
        worst = int(np.argmax(np.abs(sums - 1.0)))
        raise TopologyError("T007", f"row {worst} sums to {sums[worst]:.9g}", allowed="rows or columns that sum to 1")
    num_nodes = weights.shape[0]
    if num_nodes <= 1:
        return 0.0, EXACT
    structure = structure or structure_of(weights)
    if structure.closed_classes > 1 or not structure.aperiodic:
        return 1.0, EXACT if num_nodes <= MAX_EXACT_NODES else CLOSED_FORM
    if num_nodes <= MAX_EXACT_NODES:
        symmetric = _symmetrised(weights, structure)
        if symmetric is not None:
            values = np.linalg.eigvalsh(symmetric.toarray())
            return _clean(max(abs(float(values[0])), abs(float(values[-2])))), EXACT
        if num_nodes <= MAX_EXACT_NONSYMMETRIC:
            moduli = np.sort(np.abs(np.linalg.eigvals(weights.toarray())))
            return _clean(float(moduli[-2])), EXACT
    known = _closed_form(weights)
    if known is not None:
        return known, CLOSED_FORM
    # Vectors that sum to 0 stay such under a matrix whose columns sum to 1.
    return _iterate(weights if columns else weights.T.tocsr(), structure.symmetric), ESTIMATE


def rounds_to_consensus(slem: float, tolerance: float = 1e-6) -> int:
    """Rounds until the disagreement of any start falls below `tolerance` of itself; -1 if it never does.

    For a matrix that is not symmetric this is the rate in the long run, which the first rounds may miss.
    """
    if not 0 <= slem < 1:
        return -1
    if slem < _ZERO:
        return 1
    return max(1, math.ceil(math.log(tolerance) / math.log(slem)))


def _symmetrised(weights: csr_matrix, structure: Structure) -> csr_matrix | None:
    """A symmetric matrix with the same eigenvalues, where W is that of a reversible chain; else None.

    If p_i W_ij = p_j W_ji for some p > 0, then D W D^-1 with D = diag(sqrt(p)) is symmetric (Levin, Peres and Wilmer,
    "Markov Chains and Mixing Times", section 12.1).
    """
    if structure.symmetric:
        return weights
    if not structure.strongly_connected:
        return None
    plain = weights.copy()
    plain.eliminate_zeros()
    back = plain.T.tocsr()
    back.sort_indices()
    plain.sort_indices()
    if not (np.array_equal(plain.indptr, back.indptr) and np.array_equal(plain.indices, back.indices)):
        return None
    order, parents = breadth_first_order(plain, 0, directed=True)
    # back[i, j] is W_ji: ratio p_j / p_i along an edge is W_ij / W_ji.
    ratio = csr_matrix((plain.data / back.data, plain.indices, plain.indptr), shape=plain.shape)
    logs = np.zeros(plain.shape[0])
    steps = np.log(np.asarray(ratio[parents[order[1:]], order[1:]]).ravel())
    for node, step in zip(order[1:].tolist(), steps.tolist(), strict=True):
        logs[node] = logs[parents[node]] + step
    with np.errstate(all="ignore"):  # p may leave the range of floats: not similar to anything that could be computed
        roots = np.exp((logs - logs.mean()) / 2)
        similar = (diags(roots) @ plain @ diags(1.0 / roots)).tocsr()
    return similar if abs(similar - similar.T).max() <= 1e-9 else None


def _closed_form(weights: csr_matrix) -> float | None:
    """The SLEM of a connected W that is recognisably that of a ring or of a circulant graph; else None."""
    num_nodes = weights.shape[0]
    stored = np.diff(weights.indptr)
    if (stored != stored[0]).any():
        return None
    # Connected and two neighbours everywhere, both ways: only a cycle is that, whatever the numbering.
    thirds = stored[0] == 3 and np.allclose(weights.data, 1.0 / 3.0, rtol=1e-12, atol=0.0)
    if thirds and abs(weights - weights.T).max() == 0:
        return (1.0 + 2.0 * math.cos(2.0 * math.pi / num_nodes)) / 3.0
    return _circulant(weights, int(stored[0]))


def _circulant(weights: csr_matrix, stored: int) -> float | None:
    """Every row is the first one shifted (complete, k-connected, exponential graphs): its Fourier transform.

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


def _iterate(weights: csr_matrix, is_symmetric: bool) -> float:
    """The largest |eigenvalue| of W, whose columns sum to 1, without its eigenvalue 1; from a fixed start vector."""
    num_nodes = weights.shape[0]
    start = np.random.default_rng(0).standard_normal(num_nodes)
    start -= start.mean()

    def deflated(x: Array) -> Array:
        x = np.asarray(x).ravel()
        result: Array = weights @ (x - x.mean())
        result -= result.mean()
        return result

    operator = LinearOperator((num_nodes, num_nodes), matvec=deflated, dtype=np.float64)
    options: dict[str, Any] = {
        "v0": start,
        "ncv": _LANCZOS_VECTORS,
        "maxiter": max(_LANCZOS_MIN_RESTARTS, _LANCZOS_NODE_RESTARTS // num_nodes),
        "tol": _LANCZOS_TOLERANCE,
        "return_eigenvectors": False,
    }
    try:
        values = eigsh(operator, k=1, **options) if is_symmetric else eigs(operator, k=1, **options)
        return _clean(min(abs(complex(values[0])), 1.0))
    except ArpackNoConvergence:
        return _power_iteration(deflated, start)


def _power_iteration(apply: Callable[[Array], Array], x: Array) -> float:
    """A rate that is always found, for graphs whose eigenvalues lie too close together for Lanczos.

    The mean over the second half of the steps: complex pairs of eigenvalues make single steps swing.
    """
    rates = []
    for _ in range(_POWER_STEPS):
        x = apply(x / np.linalg.norm(x))
        rates.append(math.log(max(float(np.linalg.norm(x)), _ZERO)))
    return _clean(min(math.exp(math.fsum(rates[_POWER_STEPS // 2 :]) / (_POWER_STEPS // 2)), 1.0))


def _clean(slem: float) -> float:
    return 0.0 if slem < _ZERO else slem
