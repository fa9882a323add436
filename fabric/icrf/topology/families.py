"""Regular families of graphs: torus, hypercube, tree and the exponential graph."""

from __future__ import annotations

import math

import numpy as np

from icrf.errors import TopologyError
from icrf.topology.builders import circulant, register_topology
from icrf.topology.hybrid import HybridAdjacencyMatrix


@register_topology("torus")
def torus(num_nodes: int, torus_rows: int | None = None) -> HybridAdjacencyMatrix:
    """A grid whose rows and columns are cycles: node r*columns + c talks to the four beside it.

    A side of two nodes has one edge where a longer one has two. By default the grid is as square as possible.

    Raises:
        TopologyError: T011 if the nodes do not fill a grid of at least two rows and two columns.
    """
    rows = torus_rows or next(r for r in range(math.isqrt(num_nodes), 0, -1) if num_nodes % r == 0)
    columns = num_nodes // rows
    if rows < 2 or columns < 2 or rows * columns != num_nodes:
        given = f"{torus_rows} rows" if torus_rows else "at least 2 rows"
        fitting = [str(r) for r in range(2, num_nodes // 2 + 1) if num_nodes % r == 0]
        raise TopologyError(
            "T011",
            f"{num_nodes} nodes do not fill a torus of {given} and at least 2 columns",
            place="torus_rows" if torus_rows else "number_of_clients",
            allowed=", ".join(fitting) if torus_rows and fitting else "rows x columns nodes",
            hint="" if fitting else f"no number of rows divides {num_nodes}: take another number_of_clients",
        )
    node = np.arange(num_nodes)
    row, column = node // columns, node % columns
    beside = row * columns + (column + 1) % columns
    below = (row + 1) % rows * columns + column
    pairs = np.concatenate([np.stack([node, beside], axis=1), np.stack([node, below], axis=1)])
    return HybridAdjacencyMatrix.from_edges(num_nodes, pairs)


@register_topology("hypercube")
def hypercube(num_nodes: int) -> HybridAdjacencyMatrix:
    """Nodes whose indices differ in one binary digit talk to each other.

    Raises:
        TopologyError: T011 if the number of nodes is no power of two.
    """
    dimension = num_nodes.bit_length() - 1
    if num_nodes != 1 << dimension:
        raise TopologyError(
            "T011",
            f"a hypercube of {num_nodes} nodes does not exist",
            place="number_of_clients",
            allowed=f"a power of two, for instance {1 << dimension} or {2 << dimension}",
        )
    node = np.arange(num_nodes)
    pairs = [np.stack([node, node ^ (1 << bit)], axis=1) for bit in range(dimension)]
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.concatenate([np.empty((0, 2), int), *pairs]))


@register_topology("tree")
def tree(num_nodes: int, branching_factor: int = 2) -> HybridAdjacencyMatrix:
    """Every node has up to `branching_factor` children: node i talks to its parent (i-1) // branching_factor."""
    child = np.arange(1, num_nodes)
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.stack([(child - 1) // branching_factor, child], axis=1))


@register_topology("exponential")
def exponential(num_nodes: int) -> HybridAdjacencyMatrix:
    """The static exponential graph: node i sends to i+1, i+2, i+4, ... (modulo n); directed.

    Assran et al. 2019 (arXiv 1811.10792), Ying et al. 2021 (arXiv 2110.13363).
    """
    return circulant(num_nodes, [1 << bit for bit in range((num_nodes - 1).bit_length())], symmetric=False)
