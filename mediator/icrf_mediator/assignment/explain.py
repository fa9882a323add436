"""Why a node lives where it lives, in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment.base import Pins


def explain(
    adj: HybridAdjacencyMatrix,
    clusters: Sequence[int],
    names: Sequence[str],
    pins: Pins,
    previous: Sequence[int] = (),
) -> tuple[str, ...]:
    """One sentence per node.

    Args:
        clusters: cluster index per node.
        names: of the clusters.
        previous: cluster index per node before, if there was an assignment before.
    """
    owners = np.array(clusters, dtype=np.int64)
    senders, receivers = adj.edges()
    degree = adj.degree.tolist()
    here = np.bincount(senders[owners[senders] == owners[receivers]], minlength=adj.num_nodes).tolist()
    elsewhere = _most_elsewhere(senders.astype(np.int64), owners, owners[receivers], len(names))
    sentences = []
    for node, cluster in enumerate(clusters):
        name = names[cluster]
        if node in pins:
            reason = _allowed(name, pins[node])
        elif degree[node] == 0:
            reason = f"balance: {name} had a share left"
        elif here[node] == 0:
            reason = f"balance: none of its {degree[node]} neighbours fits on {name}"
        else:
            reason = f"{here[node]} of its {degree[node]} neighbours are on {name}"
            more, other = elsewhere.get(node, (0, 0))
            if more > here[node]:
                reason = f"balance: {reason}, {more} on {names[other]}"
        if previous:
            moved = f"moved from {names[previous[node]]}" if previous[node] >= 0 else "moved: its cluster is gone"
            reason = f"stays: {reason}" if previous[node] == cluster else f"{moved}; {reason}"
        sentences.append(reason)
    return tuple(sentences)


def explain_communities(
    clusters: Sequence[int], names: Sequence[str], pins: Pins, communities: Sequence[int]
) -> tuple[str, ...]:
    """One sentence per node of an assignment that keeps communities by data together."""
    sizes = Counter(communities)
    here = Counter(zip(communities, clusters, strict=True))
    sentences = []
    for node, (community, cluster) in enumerate(zip(communities, clusters, strict=True)):
        name = names[cluster]
        if node in pins:
            sentences.append(_allowed(name, pins[node]))
        elif community < 0:
            sentences.append(f"balance: {name} had a share left")
        else:
            told = f"{here[community, cluster]} of the {sizes[community]} nodes with labels like its own"
            sentences.append(f"community {community}: {told} are on {name}")
    return tuple(sentences)


def _allowed(name: str, clusters: Collection[int]) -> str:
    return f"pinned to {name}" if len(clusters) == 1 else f"{name} is one of {len(clusters)} clusters that it may be on"


def _most_elsewhere(
    senders: np.ndarray, owners: np.ndarray, receivers_owners: np.ndarray, num_clusters: int
) -> dict[int, tuple[int, int]]:
    """node -> (how many of its neighbours are on the other cluster that has most of them, that cluster)."""
    away = owners[senders] != receivers_owners
    keys, counts = np.unique(senders[away] * num_clusters + receivers_owners[away], return_counts=True)
    order = np.lexsort((-(keys % num_clusters), counts))
    nodes, where = (keys // num_clusters)[order].tolist(), (keys % num_clusters)[order].tolist()
    # The last one of a node is that with the highest count, of equal ones the first cluster.
    return {node: (count, cluster) for node, count, cluster in zip(nodes, counts[order].tolist(), where, strict=True)}
