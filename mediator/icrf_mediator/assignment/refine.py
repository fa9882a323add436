"""Local refinement of a partition into clusters, after Fiduccia and Mattheyses (DAC 1982), for k parts.

A pass moves every node at most once, always the move with the best gain, even if it is negative, and in the end keeps
the best prefix. Sizes may leave their bounds by one node within a pass, so a swap is just two moves in a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from icrf_mediator.assignment.base import Pins
from icrf_mediator.assignment.crossing import Costs, Neighbours

MAX_PASSES = 12
# Moves without a new best after which a pass gives up.
_MIN_PATIENCE, _PATIENCE = 100, 400


def refine(
    graph: Neighbours,
    clusters: list[int],
    low: Sequence[int],
    high: Sequence[int],
    pins: Pins,
    passes: int = MAX_PASSES,
    costs: Costs | None = None,
) -> list[int]:
    """Move nodes between clusters while that makes what crosses cheaper.

    Args:
        clusters: cluster per node to start from; not changed.
        low: fewest nodes per cluster; a start below it is kept from shrinking further.
        high: most nodes per cluster; a start above it is kept from growing further.
        pins: node -> allowed clusters.
        costs: what an edge between two clusters costs; None: all the same.

    Returns:
        cluster per node; the edges that it cuts cost at most what those of the start do.
    """
    sizes = np.bincount(clusters, minlength=len(low)).tolist()
    low = [min(a, b) for a, b in zip(low, sizes, strict=True)]
    high = [max(a, b) for a, b in zip(high, sizes, strict=True)]
    for _ in range(passes):
        one = _Pass(graph, clusters, low, high, pins, costs)
        improved = one.run()
        if improved <= 0:
            break
        clusters = one.best()
    return clusters


def mend(
    graph: Neighbours,
    clusters: list[int],
    low: Sequence[int],
    high: Sequence[int],
    pins: Pins,
    costs: Costs | None = None,
) -> list[int]:
    """Bring the sizes within their bounds, as far as pins allow, with the fewest moves.

    Each move is the one that costs least at the time.

    Args:
        clusters: cluster per node to start from; not changed.
        low, high: fewest and most nodes per cluster, which sum to at most and at least the number of nodes.
        pins: node -> allowed clusters.
    """
    sizes = np.bincount(clusters, minlength=len(low)).tolist()
    if all(least <= size <= most for least, size, most in zip(low, sizes, high, strict=True)):
        return clusters
    one = _Mending(graph, clusters, low, high, pins, costs)
    one.run()
    return one.best()


class _Pass:
    """One pass. `connections[v * k + c]` counts the neighbours of v in cluster c."""

    def __init__(
        self,
        graph: Neighbours,
        clusters: Sequence[int],
        low: Sequence[int],
        high: Sequence[int],
        pins: Pins,
        costs: Costs | None,
    ) -> None:
        self._graph = graph
        self._clusters = list(clusters)
        self._low, self._high, self._pins, self._costs = low, high, pins, costs
        # Where links differ, a cluster without any neighbour of a node may be nearer to those that it has.
        self._anywhere = costs is not None
        self._k = len(low)
        self._all = range(self._k)
        self._sizes: list[int] = np.bincount(self._clusters, minlength=self._k).tolist()
        rows = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
        owners = np.array(self._clusters)[graph.indices] if graph.indices else np.array([], dtype=np.int64)
        counted = np.bincount(rows * self._k + owners, minlength=graph.num_nodes * self._k)
        self._connections: list[int] = counted.tolist()
        self._outside = sum(self._excess(cluster, size) for cluster, size in enumerate(self._sizes))
        self._locked = bytearray(graph.num_nodes)
        for node, allowed in pins.items():
            self._locked[node] = len(allowed) == 1
        self._heaps: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._moves: list[tuple[int, int]] = []
        self._kept = 0
        # Only nodes at a border can gain; the others join when a neighbour moves.
        own = np.array(self._clusters)[rows] if len(rows) else rows
        for node in np.unique(rows[own != owners]).tolist():
            self._push(node, self._all)

    def run(self) -> int:
        """Make the moves; returns how much less the best prefix costs."""
        gained, best = 0, 0
        n = self._graph.num_nodes
        patience = max(_MIN_PATIENCE, min(_PATIENCE, n // 5), n // 50)
        while len(self._moves) - self._kept < patience:
            move = self._pop()
            if move is None:
                break
            gain, node, target = move
            self._moves.append((node, self._clusters[node]))
            self._apply(node, target)
            gained += gain
            if gained > best and self._outside == 0:
                best, self._kept = gained, len(self._moves)
        return best

    def best(self) -> list[int]:
        """The clusters after the best prefix of the moves."""
        result = list(self._clusters)
        for node, source in reversed(self._moves[self._kept :]):
            result[node] = source
        return result

    def _cost(self, node: int, cluster: int) -> int:
        """What the edges of a node cost if it lives on `cluster`, but for a summand that is the same for all."""
        base = node * self._k
        if self._costs is None:
            return -self._connections[base + cluster]
        there = self._costs[cluster]
        return sum(self._connections[base + other] * there[other] for other in self._all)

    def _push(self, node: int, targets: Iterable[int]) -> None:
        source, base = self._clusters[node], node * self._k
        present = self._cost(node, source)
        allowed = self._pins.get(node)
        for target in targets:
            external = self._connections[base + target]
            if target != source and (external or self._anywhere) and (allowed is None or target in allowed):
                cost = (-external if self._costs is None else self._cost(node, target)) - present
                heapq.heappush(self._heaps.setdefault((source, target), []), (cost, node))

    def _pop(self) -> tuple[int, int, int] | None:
        """The best move that the sizes allow: (gain, node, target)."""
        best: tuple[int, int, int, int] | None = None
        for (source, target), heap in self._heaps.items():
            # What stands first is at most too good, so a heap that looks worse is worse.
            if not heap or (best is not None and heap[0] > best[:2]) or not self._fits(source, target):
                continue
            self._settle(source, target, heap)
            if heap:
                candidate = (*heap[0], source, target)
                best = candidate if best is None or candidate < best else best
        if best is None:
            return None
        cost, node, source, target = best
        heapq.heappop(self._heaps[source, target])
        return -cost, node, target

    def _settle(self, source: int, target: int, heap: list[tuple[int, int]]) -> None:
        """Bring a move with its present gain to the front; entries are pushed only when a gain rises."""
        while heap:
            cost, node = heap[0]
            attracts = self._anywhere or self._connections[node * self._k + target]
            if self._locked[node] or self._clusters[node] != source or not attracts:
                heapq.heappop(heap)
                continue
            present = self._cost(node, target) - self._cost(node, source)
            if present <= cost:
                return
            heapq.heapreplace(heap, (present, node))

    def _fits(self, source: int, target: int) -> bool:
        """Whether a move keeps sizes within one of their bounds, and mends rather than worsens what is outside."""
        after_source, after_target = self._sizes[source] - 1, self._sizes[target] + 1
        if after_source < self._low[source] - 1 or after_target > self._high[target] + 1:
            return False
        return self._outside == 0 or self._change(source, target) < 0

    def _change(self, source: int, target: int) -> int:
        """By how much a move from source to target changes the number of nodes outside the bounds."""
        after = self._excess(source, self._sizes[source] - 1) + self._excess(target, self._sizes[target] + 1)
        return after - self._excess(source, self._sizes[source]) - self._excess(target, self._sizes[target])

    def _excess(self, cluster: int, size: int) -> int:
        return max(0, self._low[cluster] - size, size - self._high[cluster])

    def _apply(self, node: int, target: int) -> None:
        source = self._clusters[node]
        self._outside += self._change(source, target)
        self._clusters[node] = target
        self._sizes[source] -= 1
        self._sizes[target] += 1
        self._locked[node] = 1
        for neighbour in self._graph.of(node):
            base = neighbour * self._k
            self._connections[base + source] -= 1
            self._connections[base + target] += 1
            home = self._clusters[neighbour]
            if self._locked[neighbour] or (home == target and self._costs is None):
                continue
            # Leaving a cluster that lost a neighbour became better for every target, else only joining the new one;
            # where links differ in what they cost, any of them may have.
            self._push(neighbour, self._all if home == source or self._costs is not None else (target,))


class _Mending(_Pass):
    """Moves that bring sizes within their bounds, and no others."""

    _next = 0

    def run(self) -> int:
        """Make the moves; returns how many there were."""
        while self._outside:
            self._over = {c for c in self._all if self._sizes[c] > self._high[c]}
            self._under = {c for c in self._all if self._sizes[c] < self._low[c]}
            move = self._pop() or self._unconnected()
            if move is None:
                break
            _, node, target = move
            self._moves.append((node, self._clusters[node]))
            self._apply(node, target)
        self._kept = len(self._moves)
        return self._kept

    def _fits(self, source: int, target: int) -> bool:
        """Whether a move leads from where there are too many to where there are too few, as far as there are both."""
        gives = source in self._over if self._over else self._sizes[source] > self._low[source]
        takes = target in self._under if self._under else self._sizes[target] < self._high[target]
        return source != target and gives and takes

    def _unconnected(self) -> tuple[int, int, int] | None:
        """The next node that may move, where none has a neighbour where it is wanted."""
        n = self._graph.num_nodes
        # From where the last one was found, and around: what was passed over may have to move after all.
        for step in range(n):
            node = (self._next + step) % n
            if self._locked[node]:
                continue
            source, allowed = self._clusters[node], self._pins.get(node, self._all)
            targets = [target for target in self._all if target in allowed and self._fits(source, target)]
            if targets:
                self._next = node
                return 0, node, min(targets, key=lambda target: (self._cost(node, target), target))
        return None
