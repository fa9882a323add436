"""Named topologies: functions that return the adjacency matrix of a federation.

A builder declares what it needs as parameters; they are injected by name: ``num_nodes``, ``seed`` and any key of the
configuration. Whoever wants another topology registers it::

    @register_topology("two_stars")
    def two_stars(num_nodes: int, k_value: int) -> np.ndarray: ...

    @register_network_builder("caveman")
    def caveman(num_nodes: int, k_value: int) -> networkx.Graph: ...

The built-in ones are here, in ``families.py`` and in ``random_graphs.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import issparse

from icrf.errors import ConfigError, TopologyError
from icrf.registry import Registry
from icrf.topology.csv_matrix import read_adjacency_csv
from icrf.topology.hybrid import MAX_DENSE_NODES, SHOWN, HybridAdjacencyMatrix

# Returns a NumPy matrix, a HybridAdjacencyMatrix or a networkx graph.
TopologyBuilder = Callable[..., Any]

Builder = TypeVar("Builder", bound=TopologyBuilder)

TOPOLOGIES: Registry[TopologyBuilder] = Registry("topology")


def register_topology(name: str) -> Callable[[Builder], Builder]:
    """Register a builder under `name`; it returns a dense 0/1 matrix or a :class:`HybridAdjacencyMatrix`."""

    def decorate(builder: Builder) -> Builder:
        TOPOLOGIES.add(name, builder)
        return builder

    return decorate


def register_network_builder(name: str) -> Callable[[Builder], Builder]:
    """Register a builder that returns a networkx graph, directed or not; see :func:`from_network` for its nodes."""
    return register_topology(name)


def build_topology(
    name: str, num_nodes: int, parameters: Mapping[str, Any], *, connected: bool = True
) -> HybridAdjacencyMatrix:
    """Build a registered topology.

    Args:
        name: a name of :data:`TOPOLOGIES`.
        parameters: what may be injected, normally every key of the configuration, and ``node_ids`` for ``custom``.
        connected: refuse a graph of several components; gossip on one would never agree.

    Raises:
        ConfigError: C010 unknown name, C016 a key that the topology needs is not set, C017 a builder that
            raises or asks for a parameter that does not exist, C018 one that returns something else.
        TopologyError: T0xx, see :data:`icrf.errors.CATALOGUE`.
    """
    if num_nodes < 1:
        raise TopologyError("T008", "a topology needs a node", value=num_nodes, allowed="at least 1 node")
    arguments = inject(TOPOLOGIES, name, {**parameters, "num_nodes": num_nodes})
    with TOPOLOGIES.calling(name):
        result = TOPOLOGIES.get(name)(**arguments)
        with answering(f"topology {name!r}"):
            matrix = as_matrix(TOPOLOGIES, name, result, parameters.get("node_ids", ()))
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


def as_matrix(registry: Registry[Any], name: str, result: Any, node_ids: Sequence[str]) -> HybridAdjacencyMatrix:
    """The graph that a plugged-in function has returned: dense, SciPy, networkx or our own.

    Raises:
        ConfigError: C018 for what is no matrix.
        TopologyError: T0xx for what is no graph.
    """
    if isinstance(result, HybridAdjacencyMatrix):
        return result
    if hasattr(result, "is_directed") and hasattr(result, "edges"):
        return from_network(result, node_ids)
    allowed = "a NumPy or SciPy matrix, a HybridAdjacencyMatrix or a networkx graph"
    return HybridAdjacencyMatrix.from_dense(
        numbers_of(registry, name, result.toarray() if issparse(result) else result, allowed)
    )


@contextmanager
def answering(who: str) -> Iterator[None]:
    """An error inside about a graph names `who` has returned it."""
    try:
        yield
    except TopologyError as error:
        place = f"{who}, {error.place}" if error.place else who
        raise TopologyError(
            error.code, error.message, place=place, value=error.value, allowed=error.allowed, hint=error.hint
        ) from error


def numbers_of(registry: Registry[Any], name: str, result: Any, allowed: str) -> np.ndarray[Any, Any]:
    """The dense matrix that a plugged-in function has returned; C018, saying what is `allowed`, for anything else."""
    try:
        matrix = np.asarray(result)
    except ValueError:  # rows of different lengths
        matrix = np.empty(0)
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        what = f"{registry.kind} '{name}' returned {type(result).__name__}"
        found = f"shape {matrix.shape}, dtype {matrix.dtype}" if isinstance(result, np.ndarray) else None
        raise ConfigError("C018", what, place=registry.key, value=found, allowed=allowed)
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


def parameters_of(registry: Registry[Any], name: str, function: Any = None) -> Mapping[str, inspect.Parameter]:
    """What a plugged-in function may be called with; C017 where that cannot be told, as of what is no function.

    Args:
        function: of the plug-in, where it is not one itself.
    """
    function = registry.get(name) if function is None else function
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "C017",
            f"{registry.kind} '{name}' is a {type(function).__name__}",
            place=registry.key,
            allowed="a function whose parameters can be read",
        ) from error


def inject(
    registry: Registry[Any], name: str, available: Mapping[str, Any], function: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """What to call a plugged-in function with: the values of `available` that its parameters name.

    Args:
        function: of the plug-in, where it is not one itself.

    Raises:
        ConfigError: C010 an unknown name, C016 a parameter whose key is not set, C017 one that does not exist, or code
            that cannot be loaded.
    """
    arguments = {}
    kind = registry.kind
    for parameter in parameters_of(registry, name, function).values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        if required and parameter.name not in available:
            raise ConfigError(
                "C017",
                f"{kind} {name!r} asks for parameter {parameter.name!r}, which does not exist",
                place=registry.key,
                allowed=", ".join(sorted(available)),
            )
        if required and available[parameter.name] is None:
            raise ConfigError("C016", f"{kind} {name!r} needs {parameter.name}", place=parameter.name)
        if parameter.name in available:
            arguments[parameter.name] = available[parameter.name]
    return arguments


def from_network(graph: Any, node_ids: Sequence[str] = ()) -> HybridAdjacencyMatrix:
    """The matrix of a networkx graph; weights of edges are not read.

    A node of the graph is the node of its label where labels are the indices 0 to n-1 or the node ids, else the one of
    its position in ``graph.nodes``.

    Raises:
        TopologyError: T005 a self loop.
    """
    labels = list(graph.nodes)
    position = {label: index for index, label in enumerate(labels)}
    for named in (range(len(labels)), node_ids):
        if set(labels) == set(named):
            position = {label: index for index, label in enumerate(named)}
    pairs = [(position[edge[0]], position[edge[1]]) for edge in graph.edges]
    return HybridAdjacencyMatrix.from_edges(len(labels), pairs, symmetric=not graph.is_directed())


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
def ring(num_nodes: int, directed: bool = False) -> HybridAdjacencyMatrix:
    """A cycle; one node has no edge, two nodes have one. Directed: node i sends to i+1 only."""
    if num_nodes < 3:
        return line(num_nodes)
    return circulant(num_nodes, [1], symmetric=not directed)


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
    """The Harary graph H(k, n): the fewest edges with which no k-1 failing nodes cut it in two.

    The k/2 nearest nodes on either side of the cycle; an odd k adds the opposite node. Where k and n are both odd, one
    node, (n-1)/2, has k+1 neighbours (Harary, "The maximum connectivity of a graph", 1962).

    Raises:
        TopologyError: T011 if no such graph exists: k outside [1, num_nodes - 1], or k = 1 with more than two nodes.
    """
    if k_value == 1 and num_nodes > 2:
        text = "one neighbour each connects two nodes only"
        raise TopologyError("T011", text, place="k_value", allowed=degrees(num_nodes))
    if not 1 <= k_value < num_nodes:
        text = f"{num_nodes} nodes cannot have {k_value} neighbours each"
        raise TopologyError("T011", text, place="k_value", allowed=degrees(num_nodes))
    near = circulant(num_nodes, range(1, k_value // 2 + 1))
    if k_value % 2 == 0:
        return near
    opposite = np.arange((num_nodes + 1) // 2)
    across = np.stack([opposite, opposite + num_nodes // 2], axis=1)
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.concatenate([np.stack(near.edges(), axis=1), across]))


def degrees(num_nodes: int) -> str:
    """How many neighbours each of the nodes of a connected graph may have, in words."""
    return f"{min(2, num_nodes - 1)} to {num_nodes - 1}" if num_nodes > 1 else "two nodes or more"


def circulant(num_nodes: int, offsets: Iterable[int], symmetric: bool = True) -> HybridAdjacencyMatrix:
    """Node i sends to i + offset (modulo `num_nodes`) for each offset, and with `symmetric` the other way too."""
    first = np.arange(num_nodes)
    pairs = [np.stack([first, (first + offset) % num_nodes], axis=1) for offset in offsets]
    return HybridAdjacencyMatrix.from_edges(num_nodes, np.concatenate([np.empty((0, 2), int), *pairs]), symmetric)


@register_topology("custom")
def custom(
    num_nodes: int,
    adjacency_matrix_file_name: str | None = None,
    node_ids: tuple[str, ...] = (),
    directed: bool = False,
) -> HybridAdjacencyMatrix:
    """The matrix in a CSV file (:func:`icrf.topology.csv_matrix.read_adjacency_csv`), symmetric unless `directed`."""
    if not adjacency_matrix_file_name:
        raise ConfigError(
            "C016",
            "topology 'custom' needs a matrix",
            place="adjacency_matrix_file_name",
            allowed="the path of a CSV file",
        )
    names = node_ids or [f"client_{i}" for i in range(num_nodes)]
    return read_adjacency_csv(adjacency_matrix_file_name, names, symmetric=not directed)
