"""Mixing matrices: what a decentralized round applies to the states of a node and its neighbours.

One round of gossip replaces the state x_i by sum_j W_ij x_j, where j may send to i. A symmetric, doubly stochastic W
preserves the mean over all nodes, and the disagreement shrinks at least by the second-largest eigenvalue modulus (SLEM)
of W in every round (Xiao and Boyd, "Fast linear iterations for distributed averaging", 2004; Lian et al., arXiv
1705.09056). A W whose columns sum to 1 and whose rows do not preserves it with push-sum, see ``gossip.py``; one whose
rows only do leads to a weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import csr_matrix, issparse

from icrf.errors import ConfigError, TopologyError
from icrf.protocol import Graph
from icrf.registry import Registry
from icrf.topology.builders import inject, numbers_of, parameters_of
from icrf.topology.csv_matrix import read_weights_csv
from icrf.topology.hybrid import SHOWN, HybridAdjacencyMatrix

# Sums of rows and columns may differ from 1 by this much.
STOCHASTIC_TOLERANCE = 1e-9

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
# Returns a square matrix, dense or sparse.
MixingRule = Callable[..., Any]
Rule = TypeVar("Rule", bound=MixingRule)

MIXINGS: Registry[MixingRule] = Registry("mixing")


def register_mixing(name: str) -> Callable[[Rule], Rule]:
    """Register a rule under `name`: a function that returns W, of shape (num_nodes, num_nodes).

    Its parameters are injected by name: ``adjacency`` (a :class:`HybridAdjacencyMatrix`; ``np.asarray`` makes a dense
    one of it), ``num_samples`` (training samples per node, int64) and any key of the configuration.
    """

    def decorate(rule: Rule) -> Rule:
        MIXINGS.add(name, rule)
        return rule

    return decorate


def wants_samples(rule: str) -> bool:
    """Whether a rule looks at the sample counts."""
    return "num_samples" in parameters_of(MIXINGS, rule)


# ---------------------------------------------------------------- rules


@register_mixing("metropolis_hastings")
def metropolis_hastings(adjacency: HybridAdjacencyMatrix) -> csr_matrix:
    """Metropolis-Hastings weights: W_ij = 1 / (1 + max(d_i, d_j)) on edges, W_ii = 1 - sum_j W_ij.

    Every entry of the built-in rules is one float64 formula of the graph alone, so that all clusters compute the same
    bits.

    Returns:
        float64 CSR matrix, shape (num_nodes, num_nodes), indices ascending per row, the diagonal always stored.

    Raises:
        TopologyError: T004 if the graph is directed.
    """
    senders, receivers, degree = _undirected(adjacency)
    return _with_rest(adjacency, 1.0 / (1.0 + np.maximum(degree[senders], degree[receivers])))


@register_mixing("lazy_metropolis")
def lazy_metropolis(adjacency: HybridAdjacencyMatrix) -> csr_matrix:
    """W_ij = 1 / (2 max(d_i, d_j)): at least half of a node's weight stays, so that no eigenvalue is negative.

    Olshevsky, "Linear time average consensus on fixed graphs", 2014 (arXiv 1411.4186). T004 if the graph is directed.
    """
    senders, receivers, degree = _undirected(adjacency)
    return _with_rest(adjacency, 0.5 / np.maximum(degree[senders], degree[receivers]))


@register_mixing("max_degree")
def max_degree(adjacency: HybridAdjacencyMatrix) -> csr_matrix:
    """W_ij = 1 / (1 + largest degree) on every edge; T004 if the graph is directed."""
    senders, _, degree = _undirected(adjacency)
    return _with_rest(adjacency, np.full(len(senders), 1.0 / (1.0 + float(degree.max(initial=0.0)))))


@register_mixing("uniform")
def uniform(adjacency: HybridAdjacencyMatrix) -> csr_matrix:
    """W_ij = 1 / (1 + d_i): every node takes the plain average of itself and its neighbours.

    Rows sum to 1, columns only where all degrees are equal: the limit is the mean weighted by 1 + d_i. T004 if the
    graph is directed.
    """
    _, receivers, degree = _undirected(adjacency)
    return assemble(adjacency, 1.0 / (1.0 + degree[receivers]), 1.0 / (1.0 + degree))


@register_mixing("push_sum")
def push_sum(adjacency: HybridAdjacencyMatrix) -> csr_matrix:
    """W_ij = 1 / (1 + out-degree of j): every node sends equal shares, itself included, along its edges.

    Columns sum to 1 on every graph, directed or not (Kempe, Dobra and Gehrke 2003; Assran et al., arXiv 1811.10792).
    """
    senders, _ = adjacency.edges()
    share = 1.0 / (1.0 + adjacency.degree.astype(np.float64))
    return assemble(adjacency, share[senders], share)


@register_mixing("sample_weighted")
def sample_weighted(adjacency: HybridAdjacencyMatrix, num_samples: np.ndarray[Any, Any]) -> csr_matrix:
    """W_ij = min(1 / (1 + d_i), (n_j / n_i) / (1 + d_j)) on edges: the limit is the mean weighted by sample counts n.

    The Metropolis-Hastings chain (Hastings 1970) whose stationary distribution is n_i / sum n; rows sum to 1, and
    n_i W_ij = n_j W_ji.

    Raises:
        TopologyError: T004 if the graph is directed.
        ConfigError: C008 if a node has no samples.
    """
    senders, receivers, degree = _undirected(adjacency)
    samples = np.asarray(num_samples, dtype=np.float64)
    if not (samples > 0).all():
        raise ConfigError("C008", "mixing 'sample_weighted' needs training samples on every node", place="mixing")
    share = 1.0 / (1.0 + degree)
    return _with_rest(adjacency, np.minimum(share[receivers], samples[senders] / samples[receivers] * share[senders]))


@register_mixing("custom")
def custom(adjacency: HybridAdjacencyMatrix, mixing_matrix_file_name: str, node_ids: Sequence[str] = ()) -> csr_matrix:
    """The weights in a CSV file; see :func:`icrf.topology.csv_matrix.read_weights_csv`."""
    names = node_ids or [f"client_{i}" for i in range(adjacency.num_nodes)]
    return read_weights_csv(mixing_matrix_file_name, names)


# What every mediator and every host computes from the graph alone; all others travel with the graph.
FROM_GRAPH: dict[str, Callable[[HybridAdjacencyMatrix], csr_matrix]] = {
    rule.__name__: rule for rule in (metropolis_hastings, lazy_metropolis, max_degree, uniform, push_sum)
}


# ---------------------------------------------------------------- how they travel


def weigh(adjacency: HybridAdjacencyMatrix, rule: str, parameters: Mapping[str, Any]) -> Graph:
    """The graph as a control message, with its weights where a mediator cannot compute them from the graph.

    Args:
        rule: a name of :data:`MIXINGS` or ``module:attr``.
        parameters: what may be injected into the rule.

    Raises:
        ConfigError: C010 unknown rule, C016 or C017 about its parameters, C017 for one that raises, C018 for one that
            returns no matrix.
        TopologyError: T010 a matrix of the wrong size, T013 a weight that is negative, not finite or has no edge;
            others from the rule itself.
    """
    graph = adjacency.to_graph()
    if rule in FROM_GRAPH:
        return graph
    arguments = inject(MIXINGS, rule, {**parameters, "adjacency": adjacency})
    with MIXINGS.calling(rule):
        found = MIXINGS.get(rule)(**arguments)
    if not issparse(found):
        found = numbers_of(MIXINGS, rule, found, "a square matrix, dense or sparse")
    per_edge, own = _along_edges(adjacency, found, f"mixing {rule!r}")
    return Graph(graph.num_nodes, graph.indptr, graph.indices, tuple(per_edge.tolist()), tuple(own.tolist()))


def mixing_matrix(graph: Graph, rule: str) -> csr_matrix:
    """W of a graph that :func:`weigh` made: its own weights, else those of a built-in rule. Runs no user code.

    Raises:
        ConfigError: C010 for a rule that is not built in.
        TopologyError: T004 a rule for undirected graphs, T010 or T013 malformed weights.
    """
    adjacency = HybridAdjacencyMatrix.from_graph(graph)
    if graph.self_weights:
        if len(graph.weights) != adjacency.num_edges or len(graph.self_weights) != adjacency.num_nodes:
            raise TopologyError("T010", "weights do not describe the graph's edges", place="graph.weights")
        per_edge, own = (_sound(np.array(part, dtype=np.float64)) for part in (graph.weights, graph.self_weights))
        return assemble(adjacency, per_edge, own)
    if rule not in FROM_GRAPH:
        raise ConfigError("C010", f"mixing '{rule}' unknown", place="mixing", allowed=", ".join(FROM_GRAPH))
    return FROM_GRAPH[rule](adjacency)


def assemble(adjacency: HybridAdjacencyMatrix, per_edge: FloatArray, own: FloatArray) -> csr_matrix:
    """W from the weight of each edge and each node's own.

    Args:
        per_edge: what the receiver multiplies the sender's state with, in the order of ``adjacency.edges()``.
        own: the diagonal.
    """
    num_nodes = adjacency.num_nodes
    senders, receivers = adjacency.edges()
    nodes = np.arange(num_nodes, dtype=np.int32)
    rows, columns = np.concatenate([receivers, nodes]), np.concatenate([senders, nodes])
    order = np.lexsort((columns, rows))
    indptr = np.zeros(num_nodes + 1, dtype=np.int32)
    np.cumsum(np.bincount(rows, minlength=num_nodes), out=indptr[1:])
    data = np.concatenate([per_edge, own])[order]
    return csr_matrix((data, columns[order], indptr), shape=(num_nodes, num_nodes))


def mixing_row(weights: csr_matrix, node: int) -> tuple[np.ndarray[Any, Any], FloatArray]:
    """What `node` averages: (node indices ascending, itself included, int32; their weights, float64)."""
    start, end = weights.indptr[node], weights.indptr[node + 1]
    return weights.indices[start:end], weights.data[start:end]


def stochastic(weights: csr_matrix) -> tuple[bool, bool]:
    """Whether the rows and whether the columns of a matrix without negative weights sum to 1."""
    ones = [abs(np.asarray(weights.sum(axis=axis)).ravel() - 1.0) <= STOCHASTIC_TOLERANCE for axis in (1, 0)]
    return bool(ones[0].all()), bool(ones[1].all())


# ---------------------------------------------------------------- helpers


def _undirected(adjacency: HybridAdjacencyMatrix) -> tuple[Any, Any, FloatArray]:
    """(senders, receivers, degrees); T004 if the graph is directed."""
    if not adjacency.is_symmetric():
        shown = "; ".join(f"A[{i},{j}]=1 but A[{j},{i}]=0" for i, j in adjacency.one_way_edges(SHOWN))
        hint = "for edges in one direction set mixing: push_sum, which keeps the mean"
        raise TopologyError("T004", shown, allowed="an undirected graph", hint=hint)
    return (*adjacency.edges(), adjacency.degree.astype(np.float64))


def _with_rest(adjacency: HybridAdjacencyMatrix, per_edge: FloatArray) -> csr_matrix:
    """What a node's neighbours leave of 1 is its own."""
    # bincount adds one after the other in index order, whatever the machine's vector width.
    taken = np.bincount(adjacency.edges()[1], weights=per_edge, minlength=adjacency.num_nodes)
    return assemble(adjacency, per_edge, np.subtract(1.0, taken, dtype=np.float64))


def _along_edges(adjacency: HybridAdjacencyMatrix, found: Any, place: str) -> tuple[FloatArray, FloatArray]:
    """(weight per edge, diagonal) of a user's matrix."""
    matrix = csr_matrix(found, dtype=np.float64)
    num_nodes = adjacency.num_nodes
    if matrix.shape != (num_nodes, num_nodes):
        raise TopologyError("T010", f"mixing matrix of shape {matrix.shape} for {num_nodes} nodes", place=place)
    matrix.sum_duplicates()
    _sound(matrix.data, place)
    rows = np.repeat(np.arange(num_nodes), np.diff(matrix.indptr))
    columns = matrix.indices.astype(np.int64)
    used = (matrix.data != 0) & (rows != columns)
    senders, receivers = adjacency.edges()
    edges = senders.astype(np.int64) * num_nodes + receivers
    keys = columns * num_nodes + rows
    without = np.flatnonzero(used & ~np.isin(keys, edges))
    if len(without):
        shown = ", ".join(f"W[{rows[k]},{columns[k]}]={matrix.data[k]:g}" for k in without[:SHOWN])
        raise TopologyError(
            "T013",
            f"{len(without)} weights have no edge: {shown}",
            place=place,
            allowed="W[i,j] > 0 only where j may send to i",
            hint="indices count from 0; add the edge to the topology or set the weight to 0",
        )
    per_edge = np.zeros(len(edges))
    per_edge[np.searchsorted(edges, keys[used])] = matrix.data[used]
    own: FloatArray = matrix.diagonal()
    return per_edge, own


def _sound(values: FloatArray, place: str = "graph.weights") -> FloatArray:
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        raise TopologyError(
            "T013",
            f"{len(wrong)} mixing weights are negative or not finite",
            place=place,
            value=float(values[wrong[0]]),
            allowed="finite numbers from 0",
        )
    return values
