"""Communities of nodes whose data look alike, found by their labels, for placement; never by where nodes live."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from icrf.seeds import stable_random_state

Counts = np.ndarray[Any, np.dtype[np.int64]]

# Affinity propagation looks at all pairs in every step: a third of a second for 1,000 nodes, 15 s for 5,000.
MAX_PROPAGATED = 2_000
_PURPOSE = "label-communities"


def label_communities(label_counts: Counts, seed: int, noise: float = 0.0) -> tuple[int, ...]:
    """The community of each node: those with similar shares of labels are in one.

    Affinity propagation (Frey and Dueck, Science 2007) on the cosine similarity of the histograms finds how many there
    are by itself. Where it does not settle, and above 2,000 nodes, k-means on the histograms of length 1 makes as many
    as there are labels, at most the root of the number of nodes.

    Args:
        label_counts: training samples per node and label, shape (num_nodes, num_labels).
        seed: of the federation.
        noise: scale of the Laplace noise that is added to every count before anything is looked at; 0: none.

    Returns:
        community per node, numbered in the order of their first members.
    """
    counts = np.asarray(label_counts, dtype=np.float64)
    if noise > 0:
        drawn = stable_random_state(seed, "label-noise").laplace(scale=noise, size=counts.shape)
        counts = np.maximum(counts + drawn, 0.0)
    lengths = np.linalg.norm(counts, axis=1, keepdims=True)
    # Rounded, so that what is equal on paper is equal.
    directions = np.divide(counts, lengths, out=np.zeros_like(counts), where=lengths > 0).round(12)
    kinds, alike = np.unique(directions, axis=0, return_inverse=True)
    found: np.ndarray | None = alike.reshape(-1) if len(kinds) < 3 else None
    if found is None and len(directions) <= MAX_PROPAGATED:
        found = _propagated(directions, seed)
    if found is None:
        wanted = min(len(kinds), counts.shape[1], max(2, int(len(directions) ** 0.5)))
        found = _by_means(directions, wanted, seed)
    number = {community: k for k, community in enumerate(dict.fromkeys(found.tolist()))}
    return tuple(number[community] for community in found.tolist())


def _propagated(directions: np.ndarray, seed: int) -> np.ndarray | None:
    """Communities by affinity propagation; None where it does not settle."""
    from sklearn.cluster import AffinityPropagation  # noqa: PLC0415 - takes a second, and most runs do without
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    state = stable_random_state(seed, _PURPOSE)
    with warnings.catch_warnings():
        # That it has not settled is told by what it returns; what is all alike, by a single community.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="All samples have mutually equal similarities")
        # With less damping it swings from step to step where many nodes are nearly the same.
        fitted = AffinityPropagation(affinity="precomputed", damping=0.9, random_state=state).fit(
            directions @ directions.T
        )
    found: np.ndarray = fitted.labels_
    # Where it stopped before it settled, all labels are -1, or it says so by the number of its steps.
    return found if (found >= 0).all() and fitted.n_iter_ < fitted.max_iter else None


def _by_means(directions: np.ndarray, number: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans  # noqa: PLC0415 - as above

    state = stable_random_state(seed, _PURPOSE)
    found: np.ndarray = MiniBatchKMeans(number, random_state=state, n_init=3).fit(directions).labels_
    return found
