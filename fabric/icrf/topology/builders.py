"""Named topologies: functions that return the adjacency matrix of a federation.

A builder declares what it needs as parameters; they are injected by name: ``num_nodes``, ``seed`` and any key of the
configuration. Whoever wants another topology registers it::

    @register_topology("two_stars")
    def two_stars(num_nodes: int, k_value: int) -> np.ndarray: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from icrf.errors import ConfigError, TopologyError
from icrf.registry import Registry
from icrf.topology.csv_matrix import read_adjacency_csv
from icrf.topology.hybrid import MAX_DENSE_NODES, SHOWN, HybridAdjacencyMatrix

TopologyBuilder = Callable[..., "np.ndarray[Any, Any] | HybridAdjacencyMatrix"]

Builder = TypeVar("Builder", bound=TopologyBuilder)

TOPOLOGIES: Registry[TopologyBuilder] = Registry("topology")


def register_topology(name: str) -> Callable[[Builder], Builder]:
    """Register a builder under `name`; it returns a dense 0/1 matrix or a :class:`HybridAdjacencyMatrix`."""

    def decorate(builder: Builder) -> Builder:
        TOPOLOGIES.add(name, builder)
        return builder

    return decorate


def build_topology(
    name: str, num_nodes: int, parameters: Mapping[str, Any], *, connected: bool = True
) -> HybridAdjacencyMatrix:
    """Build a registered topology.

    Args:
        name: a name of :data:`TOPOLOGIES`.
        parameters: what may be injected, normally every key of the configuration, and ``node_ids`` for ``custom``.
        connected: refuse a graph of several components; gossip on one would never agree.

    Raises:
        ConfigError: C010 unknown name, C016 a key that the topology needs is not set, C017 a builder asks for a
            parameter that does not exist.
        TopologyError: T0xx, see :data:`icrf.errors.CATALOGUE`.
    """
    if num_nodes < 1:
        raise TopologyError("T008", "a topology needs a node", value=num_nodes, allowed="at least 1 node")
    builder = TOPOLOGIES.get(name)
    result = builder(**_inject(name, builder, {**parameters, "num_nodes": num_nodes}))
    matrix = result if isinstance(result, HybridAdjacencyMatrix) else HybridAdjacencyMatrix.from_dense(result)
    if matrix.num_nodes != num_nodes:
        raise TopologyError(
            "T010",
            f"matrix {matrix.num_nodes}×{matrix.num_nodes}, configuration has {num_nodes} nodes",
            place=f"topology {name!r}",
        )
    if connected:
        file = parameters.get("adjacency_matrix_file_name") if name == "custom" else None
        require_connected(matrix, place=file or f"topology {name!r}")
    return matrix


def require_connected(matrix: HybridAdjacencyMatrix, place: str = "") -> None:
    """Raise T006, naming the components and the `place` of the graph, unless it is (weakly) connected."""
    components = matrix.components()
    if len(components) <= 1:
        return
    shown = " ".join(_braces(part) for part in components[:SHOWN])
    raise TopologyError(
        "T006",
        f"{len(components)} components: {shown}{' ...' if len(components) > SHOWN else ''}",
        place=place,
        allowed="a connected graph",
        hint="add an edge between the components; nodes of different components never learn from each other",
    )


def _braces(nodes: list[int]) -> str:
    more = f",... {len(nodes)} nodes" if len(nodes) > SHOWN else ""
    return "{" + ",".join(str(node) for node in nodes[:SHOWN]) + more + "}"


def _inject(name: str, builder: TopologyBuilder, available: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for parameter in inspect.signature(builder).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in available:
            arguments[parameter.name] = available[parameter.name]
        elif parameter.default is parameter.empty:
            raise ConfigError(
                "C017",
                f"topology {name!r} asks for parameter {parameter.name!r}, which does not exist",
                place="federated_learning_topology",
                allowed=", ".join(sorted(available)),
            )
    return arguments


# ---------------------------------------------------------------- built-in topologies


@register_topology("star")
def star(num_nodes: int) -> HybridAdjacencyMatrix:
    """Node 0 is the hub; every other node talks only to it."""
    leaves = np.arange(1, num_nodes)
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.stack([np.zeros_like(leaves), leaves], axis=1))


@register_topology("line")
def line(num_nodes: int) -> HybridAdjacencyMatrix:
    """A path: node i talks to i-1 and i+1."""
    first = np.arange(num_nodes - 1)
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.stack([first, first + 1], axis=1))


@register_topology("ring")
def ring(num_nodes: int) -> HybridAdjacencyMatrix:
    """A cycle; one node has no edge, two nodes have one."""
    if num_nodes < 3:
        return line(num_nodes)
    first = np.arange(num_nodes)
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.stack([first, (first + 1) % num_nodes], axis=1))


@register_topology("mesh")
def mesh(num_nodes: int) -> HybridAdjacencyMatrix:
    """The complete graph; T008 above 20,000 nodes."""
    if num_nodes > MAX_DENSE_NODES:
        raise TopologyError(
            "T008",
            f"a mesh of {num_nodes} nodes has {num_nodes * (num_nodes - 1)} directed edges",
            allowed=f"at most {MAX_DENSE_NODES} nodes",
            hint="take k_connected",
        )
    return HybridAdjacencyMatrix.from_dense(1 - np.eye(num_nodes, dtype=np.int8))


@register_topology("k_connected")
def k_connected(num_nodes: int, k_value: int) -> HybridAdjacencyMatrix:
    """A circulant graph: the k/2 nearest nodes on either side of the cycle; an odd k adds the opposite node.

    Raises:
        TopologyError: T011 if no such graph exists: k outside [1, num_nodes - 1], or k and num_nodes both odd.
    """
    if not 1 <= k_value < num_nodes:
        raise TopologyError(
            "T011",
            f"{num_nodes} nodes cannot have {k_value} neighbours each",
            place="k_value",
            allowed=f"1 to {num_nodes - 1}",
        )
    if k_value % 2 and num_nodes % 2:
        raise TopologyError(
            "T011",
            f"no graph of {num_nodes} nodes has {k_value} neighbours each: {num_nodes} x {k_value} is odd",
            place="k_value",
            allowed="an even k_value, or an even number of nodes",
        )
    offsets = list(range(1, k_value // 2 + 1)) + ([num_nodes // 2] if k_value % 2 else [])
    first = np.arange(num_nodes)
    pairs = [np.stack([first, (first + offset) % num_nodes], axis=1) for offset in offsets]
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.concatenate(pairs))


@register_topology("custom")
def custom(
    num_nodes: int, adjacency_matrix_file_name: str | None = None, node_ids: tuple[str, ...] = ()
) -> HybridAdjacencyMatrix:
    """The symmetric matrix in a CSV file; see :func:`icrf.topology.csv_matrix.read_adjacency_csv`."""
    if not adjacency_matrix_file_name:
        raise ConfigError(
            "C016",
            "topology 'custom' needs a matrix",
            place="adjacency_matrix_file_name",
            allowed="the path of a CSV file",
        )
    return read_adjacency_csv(adjacency_matrix_file_name, node_ids or [f"client_{i}" for i in range(num_nodes)])
