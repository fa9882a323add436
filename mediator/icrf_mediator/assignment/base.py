"""What every assignment strategy shares: the result, the port, fair shares and pins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from icrf.protocol import ClusterInfo
from icrf.registry import Registry
from icrf.topology import HybridAdjacencyMatrix

Pins = Mapping[int, Collection[int]]


@dataclass(frozen=True)
class Assignment:
    """Where nodes live.

    Attributes:
        clusters: cluster index per node.
        explanation: one sentence per node that says why it lives there.
    """

    clusters: tuple[int, ...]
    explanation: tuple[str, ...]


@dataclass(frozen=True)
class Hints:
    """What a strategy may look at beside graph, clusters and pins.

    Attributes:
        seed: of the federation.
        previous: cluster index per node under the assignment before, -1 for a node whose cluster is no longer there;
            empty for a first assignment.
        costs: what an edge between two clusters costs, see :func:`icrf_mediator.assignment.links.link_costs`; None: all
            the same.
        communities: community per node by what their data look like, -1 for a node in none; empty where that does not
            matter.
        improve: with an assignment before, whether nodes may also move where that makes less cross.
    """

    seed: int = 0
    previous: tuple[int, ...] = ()
    costs: tuple[tuple[int, ...], ...] | None = None
    communities: tuple[int, ...] = ()
    improve: bool = False


class AssignmentStrategy(Protocol):
    """Decides where nodes live. Pure: equal arguments give an equal result, and nothing is kept between calls."""

    def assign(
        self, adj: HybridAdjacencyMatrix, clusters: Sequence[ClusterInfo], pins: Pins, hints: Hints = Hints()
    ) -> Assignment:
        """Assign every node to one cluster.

        Args:
            clusters: at least one; their order defines the cluster indices. Their slots are those that the federation
                can have, none on a cluster where no node may live.
            pins: node index -> indices of the clusters that may host it; nodes not named may live anywhere.
            hints: a strategy may leave them aside.
        """


ASSIGNMENTS: Registry[type[AssignmentStrategy]] = Registry("assignment")


@dataclass(frozen=True)
class Shares:
    """How many nodes each cluster takes: at least `low`, at most `high`, ideally `target` (sums to the node count)."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    target: tuple[int, ...]


def fair_shares(num_nodes: int, slots: Sequence[int], pinned: Sequence[int]) -> Shares:
    """Shares of nodes in proportion to slots, by largest remainder; ties go to the cluster that comes first.

    A cluster on which more nodes are pinned than its share takes just those, and the rest is shared by the others.

    Args:
        slots: slots per cluster; if all are 0, clusters count as equal.
        pinned: nodes per cluster that have to live there.
    """
    weights = [max(0, s) for s in slots]
    if not any(weights):
        weights = [1] * len(weights)
    full: set[int] = set()
    while True:
        others = [c for c in range(len(weights)) if c not in full]
        rest = num_nodes - sum(pinned[c] for c in full)
        total = max(1, sum(weights[c] for c in others))
        rounded_up = {c for c in others if pinned[c] > rest * weights[c] // total}
        crowded = {c for c in rounded_up if pinned[c] > -(-rest * weights[c] // total)}
        # Pins within the rounding of a share do no harm while there are enough odd nodes to round up with.
        if not crowded and len(rounded_up) > rest - sum(rest * weights[c] // total for c in others):
            crowded = rounded_up
        if not crowded:
            break
        full |= crowded
    low, high, target = list(pinned), list(pinned), list(pinned)
    for c in others:
        low[c] = target[c] = rest * weights[c] // total
        high[c] = -(-rest * weights[c] // total)
    by_remainder = sorted(others, key=lambda c: (c not in rounded_up, -(rest * weights[c] % total), c))
    for c in by_remainder[: rest - sum(low[c] for c in others)]:
        target[c] += 1
    return Shares(tuple(low), tuple(high), tuple(target))


def cluster_slots(clusters: Sequence[ClusterInfo]) -> list[int]:
    """Slots that count for a share: those of clusters that are alive, or of all while none is."""
    none_alive = not any(cluster.alive for cluster in clusters)
    return [cluster.capacity.num_slots if cluster.alive or none_alive else 0 for cluster in clusters]


def place_pinned(pins: Pins, num_nodes: int, slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """Put pinned nodes first, the least free ones before the others.

    Returns:
        (cluster per node with -1 for a node without pin, pinned nodes per cluster). A node with several allowed
        clusters goes to the one with most share left, and those after it with the same choice follow it while that
        share lasts: neighbours often follow each other.
    """
    clusters = [-1] * num_nodes
    counts = [0] * len(slots)
    shares = fair_shares(num_nodes, slots, counts)
    latest: dict[tuple[int, ...], int] = {}
    for node in sorted(pins, key=lambda node: (len(pins[node]), node)):
        allowed = tuple(sorted(pins[node]))
        best = latest.get(allowed, -1)
        if best < 0 or counts[best] >= shares.target[best]:
            best = latest[allowed] = max(allowed, key=lambda c: (shares.target[c] - counts[c], -c))
        clusters[node] = best
        counts[best] += 1
    return clusters, counts


def room_for(num_nodes: int, clusters: Sequence[ClusterInfo], pins: Pins) -> tuple[list[int], Shares]:
    """Where pinned nodes go, -1 for the others, and how many nodes each cluster takes."""
    slots = cluster_slots(clusters)
    pinned, counts = place_pinned(pins, num_nodes, slots)
    return pinned, fair_shares(num_nodes, slots, counts)
