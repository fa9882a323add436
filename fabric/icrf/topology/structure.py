"""What the zeros of a mixing matrix decide: who reaches whom, and whether agreement is possible at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from icrf.topology.mixing import STOCHASTIC_TOLERANCE, stochastic


@dataclass(frozen=True)
class Structure:
    """The shape of a mixing matrix.

    Attributes:
        symmetric: W_ij = W_ji within 1e-9.
        connected: every node reaches every other if directions are ignored.
        strongly_connected: every node's state reaches every other node.
        closed_classes: groups of nodes that agree among themselves whatever the others say; agreement needs just one.
        transient: nodes that belong to no such group: their own states have no part in the limit.
        aperiodic: no group of nodes swaps its states in a cycle for ever.
    """

    symmetric: bool
    connected: bool
    strongly_connected: bool
    closed_classes: int
    transient: int
    aperiodic: bool


def structure_of(weights: csr_matrix) -> Structure:
    """The structure of a mixing matrix whose rows or columns sum to 1 (Seneta, "Non-negative Matrices", chapter 1)."""
    used = weights.copy()
    used.eliminate_zeros()
    # As a Markov chain: the matrix whose rows sum to 1.
    chain = used if stochastic(weights)[0] else used.T.tocsr()
    num_nodes = chain.shape[0]
    weak = connected_components(chain, directed=True, connection="weak", return_labels=False)
    count, labels = connected_components(chain, directed=True, connection="strong")
    rows = np.repeat(np.arange(num_nodes), np.diff(chain.indptr))
    leaving = labels[rows] != labels[chain.indices]
    is_closed = np.ones(count, dtype=bool)
    is_closed[labels[rows[leaving]]] = False
    return Structure(
        symmetric=bool(num_nodes == 0 or abs(weights - weights.T).max() <= STOCHASTIC_TOLERANCE),
        connected=int(weak) <= 1,
        strongly_connected=int(count) <= 1,
        closed_classes=int(is_closed.sum()),
        transient=int(num_nodes - np.isin(labels, np.flatnonzero(is_closed)).sum()),
        aperiodic=_aperiodic(chain, labels, is_closed, rows, leaving),
    )


def _aperiodic(
    chain: csr_matrix, labels: Any, is_closed: Any, rows: np.ndarray[Any, Any], leaving: np.ndarray[Any, Any]
) -> bool:
    """Whether the lengths of the cycles in every closed class have no common divisor.

    With d(v) steps from a class's first node to v, that divisor is the one of all d(u) + 1 - d(v) over its edges u->v
    (Denardo, "Periods of connected networks and powers of nonnegative matrices", 1977).
    """
    inside = ~leaving & is_closed[labels[rows]]
    within = csr_matrix((np.ones(int(inside.sum())), (rows[inside], chain.indices[inside])), shape=chain.shape)
    _, first = np.unique(labels, return_index=True)
    steps = dijkstra(within, unweighted=True, indices=first[is_closed], min_only=True)
    senders, receivers = rows[inside], chain.indices[inside]
    excess = np.abs(steps[senders] + 1 - steps[receivers]).astype(np.int64)
    order = np.argsort(labels[senders], kind="stable")
    _, starts = np.unique(labels[senders][order], return_index=True)
    return not len(starts) or bool((np.gcd.reduceat(excess[order], starts) == 1).all())
