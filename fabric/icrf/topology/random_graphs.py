"""Random graphs, drawn from the federation's seed with generators whose streams are frozen.

A draw that is not connected is drawn again, with a generator of its own, a bounded number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from icrf.errors import TopologyError
from icrf.seeds import stable_random_state
from icrf.topology.builders import circulant, degrees, register_topology
from icrf.topology.hybrid import HybridAdjacencyMatrix

Pairs = np.ndarray[Any, np.dtype[np.int64]]

MAX_DRAWS = 100
# A random graph of more edges would take gigabytes while it is built.
MAX_RANDOM_EDGES = 5_000_000
# The gaps of a smaller one would leave 64 bits; such a graph has no edge in any case.
_LEAST_PROBABILITY = 1e-12


@register_topology("random_regular")
def random_regular(num_nodes: int, k_value: int, seed: int) -> HybridAdjacencyMatrix:
    """A random graph in which every node has `k_value` neighbours.

    Points are paired at random, loops and double edges are paired anew among what is left (Steger and Wormald,
    "Generating random regular graphs quickly", 1999).

    Raises:
        TopologyError: T008 too many edges, T011 if no such graph exists, or none was found that is connected.
    """
    if not 1 <= k_value < num_nodes or num_nodes * k_value % 2:
        raise TopologyError(
            "T011",
            f"no graph of {num_nodes} nodes has {k_value} neighbours each",
            place="k_value",
            allowed=degrees(num_nodes) + (", even" if num_nodes % 2 and num_nodes > 1 else ""),
        )
    _require_few_edges(num_nodes * k_value / 2, num_nodes, "k_value")
    # The rest is thin where almost all edges are wanted: leave out a random graph instead.
    missing = num_nodes - 1 - k_value
    if missing < k_value:
        return _connected(
            "random_regular", num_nodes, seed, lambda random: _without(_pairing(random, num_nodes, missing), num_nodes)
        )
    hint = "raise k_value: a graph of degree 1 or 2 is hardly ever connected" if k_value < 3 else ""
    return _connected("random_regular", num_nodes, seed, lambda random: _pairing(random, num_nodes, k_value), hint=hint)


@register_topology("small_world")
def small_world(num_nodes: int, k_value: int, seed: int, rewire_probability: float = 0.1) -> HybridAdjacencyMatrix:
    """A ring of `k_value` near neighbours each, whose edges are moved with a probability (Watts and Strogatz 1998).

    Raises:
        TopologyError: T011 if `k_value` is odd or outside [2, num_nodes - 1], or no connected graph was found.
    """
    if not 2 <= k_value < num_nodes or k_value % 2:
        raise TopologyError(
            "T011",
            f"a small world of {num_nodes} nodes with {k_value} neighbours each does not exist",
            place="k_value",
            allowed=f"an even number from 2 to {num_nodes - 1}" if num_nodes > 2 else "three nodes or more",
        )

    def draw(random: np.random.RandomState) -> Pairs:
        taken = circulant(num_nodes, range(1, k_value // 2 + 1))
        edges = {(i, j) for i, j in zip(*(part.tolist() for part in taken.edges()), strict=True) if i < j}
        degree = [k_value] * num_nodes
        for offset in range(1, k_value // 2 + 1):
            for node in np.flatnonzero(random.random_sample(num_nodes) < rewire_probability).tolist():
                if degree[node] == num_nodes - 1:
                    continue
                old = (node + offset) % num_nodes
                new = next(j for j in _nodes(random, num_nodes) if j != node and _pair(node, j) not in edges)
                edges.remove(_pair(node, old))
                edges.add(_pair(node, new))
                degree[old] -= 1
                degree[new] += 1
        return np.array(sorted(edges), dtype=np.int64)

    hint = "raise k_value or lower rewire_probability"
    return _connected("small_world", num_nodes, seed, draw, hint=hint)


@register_topology("erdos_renyi")
def erdos_renyi(
    num_nodes: int, seed: int, edge_probability: float | None = None, directed: bool = False
) -> HybridAdjacencyMatrix:
    """Every pair of nodes has an edge with the same probability, by default 2 ln(n) / n; directed: every ordered pair.

    Below ln(n) / n such a graph is hardly ever connected (Erdős and Rényi 1959). The gaps between edges are drawn from
    the geometric distribution (Batagelj and Brandes, "Efficient generation of large random networks", 2005).

    Raises:
        TopologyError: T008 too many edges, T011 no connected graph was found.
    """
    threshold = math.log(max(num_nodes, 2)) / num_nodes
    probability = min(1.0, 2 * threshold) if edge_probability is None else max(edge_probability, _LEAST_PROBABILITY)
    total = num_nodes * (num_nodes - 1) // (1 if directed else 2)
    _require_few_edges(probability * total, num_nodes, "edge_probability")

    def draw(random: np.random.RandomState) -> Pairs:
        chosen = _bernoulli(random, total, probability)
        if directed:
            first, rest = np.divmod(chosen, max(num_nodes - 1, 1))
            return np.stack([first, rest + (rest >= first)], axis=1)
        # Pair k of (1,0), (2,0), (2,1), (3,0), ...; the square root may be off by one.
        first = ((1 + np.sqrt(1 + 8 * chosen.astype(np.float64))) / 2).astype(np.int64)
        first -= first * (first - 1) // 2 > chosen
        first += (first + 1) * first // 2 <= chosen
        return np.stack([first, chosen - first * (first - 1) // 2], axis=1)

    hint = f"raise edge_probability; below {threshold:.2g} such a graph is hardly ever connected"
    return _connected("erdos_renyi", num_nodes, seed, draw, symmetric=not directed, hint=hint)


# ---------------------------------------------------------------- drawing


def _connected(
    name: str,
    num_nodes: int,
    seed: int,
    draw: Callable[[np.random.RandomState], Pairs | None],
    *,
    symmetric: bool = True,
    hint: str = "",
) -> HybridAdjacencyMatrix:
    """The first draw that is (strongly) connected; a draw of None found no graph."""
    for attempt in range(MAX_DRAWS):
        pairs = draw(stable_random_state(seed, f"topology-{name}-{attempt}"))
        if pairs is not None:
            matrix = HybridAdjacencyMatrix.from_edges(num_nodes, pairs, symmetric)
            if matrix.is_strongly_connected():
                return matrix
    raise TopologyError(
        "T011",
        f"{MAX_DRAWS} draws gave no connected graph",
        place=f"topology {name!r}",
        value=f"{num_nodes} nodes",
        hint=hint,
    )


def _require_few_edges(expected: float, num_nodes: int, key: str) -> None:
    if expected > MAX_RANDOM_EDGES:
        raise TopologyError(
            "T008",
            f"about {expected:.3g} edges among {num_nodes} nodes",
            place=key,
            allowed=f"at most {MAX_RANDOM_EDGES} edges",
            hint=f"lower {key}",
        )


def _pairing(random: np.random.RandomState, num_nodes: int, degree: int) -> Pairs | None:
    """Edges of a random regular graph, or None where what is left cannot be paired."""
    points = np.repeat(np.arange(num_nodes), degree)
    taken = np.empty(0, dtype=np.int64)
    while len(points):
        random.shuffle(points)
        low, high = np.minimum(points[0::2], points[1::2]), np.maximum(points[0::2], points[1::2])
        keys = low * num_nodes + high
        _, first = np.unique(keys, return_index=True)
        new = np.zeros(len(keys), dtype=bool)
        new[first] = True
        new &= (low != high) & ~np.isin(keys, taken)
        if not new.any() and not _can_be_paired(points, taken, num_nodes):
            return None
        taken = np.concatenate([taken, keys[new]])
        points = np.concatenate([low[~new], high[~new]])
    return np.stack([taken // num_nodes, taken % num_nodes], axis=1)


def _can_be_paired(points: Pairs, taken: Pairs, num_nodes: int) -> bool:
    nodes = np.unique(points)
    if len(nodes) > 1_000:
        return True
    first, second = np.triu_indices(len(nodes), 1)
    return bool((~np.isin(nodes[first] * num_nodes + nodes[second], taken)).any())


def _without(pairs: Pairs | None, num_nodes: int) -> Pairs | None:
    """All edges but these."""
    if pairs is None:
        return None
    first, second = np.triu_indices(num_nodes, 1)
    rest = ~np.isin(first * num_nodes + second, pairs[:, 0] * num_nodes + pairs[:, 1])
    return np.stack([first[rest], second[rest]], axis=1)


def _bernoulli(random: np.random.RandomState, total: int, probability: float) -> Pairs:
    """The successes among `total` independent trials, ascending."""
    found: list[Pairs] = []
    last = -1
    while last < total:
        # One chunk nearly always reaches the end; a few gaps more cost nothing.
        gaps = random.geometric(probability, int(probability * total * 1.1) + 64).astype(np.int64)
        # A gap beyond the end is as good as the end, and many of them must not overflow their sum.
        places = last + np.cumsum(np.minimum(gaps, total + 1))
        found.append(places[places < total])
        last = int(places[-1])
    return np.concatenate(found)


def _nodes(random: np.random.RandomState, num_nodes: int) -> Iterator[int]:
    while True:
        yield int(random.randint(num_nodes))


def _pair(i: int, j: int) -> tuple[int, int]:
    return (i, j) if i < j else (j, i)
