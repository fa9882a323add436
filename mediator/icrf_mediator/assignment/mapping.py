"""Which part of a partition lies on which cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from icrf_mediator.assignment.base import Shares
from icrf_mediator.assignment.crossing import Costs, Crossing


def map_parts(
    crossing: Crossing, parts: list[int], pinned: Sequence[int], shares: Shares, costs: Costs | None
) -> list[int]:
    """Exchange whole parts between clusters of equal shares.

    Parts go where most of their pinned nodes have to be; the others in the order of their first nodes, and where links
    differ they are exchanged in twos while that makes what crosses cheaper.

    Args:
        parts: cluster per node.
        pinned: cluster per node that has to be somewhere, -1 for the others.
    """
    num_clusters = len(shares.target)
    owners = np.array(parts, dtype=np.int64)
    fixed = np.array(pinned, dtype=np.int64)
    first = np.full(num_clusters, len(parts), dtype=np.int64)
    np.minimum.at(first, owners, np.arange(len(parts)))
    has_pins = fixed >= 0
    overlap = np.zeros((num_clusters, num_clusters), dtype=np.int64)
    np.add.at(overlap, (owners[has_pins], fixed[has_pins]), 1)
    target = np.arange(num_clusters)
    for size in set(shares.target):
        group = np.array([c for c, share in enumerate(shares.target) if share == size])
        ordered = group[np.argsort(first[group], kind="stable")]
        if overlap[np.ix_(group, group)].any():
            rows, columns = linear_sum_assignment(overlap[np.ix_(ordered, group)], maximize=True)
            target[ordered[rows]] = group[columns]
        else:
            target[ordered] = group
            if costs is not None and not overlap[:, group].any():
                _exchange(crossing.between(parts, num_clusters), np.array(costs, dtype=np.int64), target, group)
    found: list[int] = target[owners].tolist()
    return found


def _exchange(between: np.ndarray, costs: np.ndarray, target: np.ndarray, group: np.ndarray) -> None:
    """Exchange the clusters of two parts of the group while that is cheaper; changes `target`."""
    best = _total(between, costs, target)
    improved = True
    while improved:
        improved = False
        for position, one in enumerate(group):
            for other in group[position + 1 :]:
                target[[one, other]] = target[[other, one]]
                if (total := _total(between, costs, target)) < best:
                    best, improved = total, True
                else:
                    target[[one, other]] = target[[other, one]]


def _total(between: np.ndarray, costs: np.ndarray, target: np.ndarray) -> int:
    return int((between * costs[np.ix_(target, target)]).sum())
