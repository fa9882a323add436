"""Splits of the training data over the nodes: pure functions of labels, number of parts and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.rng import stable_random_state
from icrf.registry import Registry

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Partitioner = Callable[[IntArray, int, int, float], "list[IntArray]"]

PARTITIONERS: Registry[Partitioner] = Registry("partitioner")

_MAX_TRIES = 1000
_MIN_SAMPLES = 10


def partition(kind: str, labels: IntArray, num_parts: int, seed: int, beta: float = 0.5) -> list[IntArray]:
    """Split samples over nodes.

    Args:
        kind: a registered name (``iid``, ``dir``) or ``module:attr`` of a function ``(labels, num_parts, seed, beta)``.
        labels: class numbers, shape (num_samples,).
        num_parts: number of nodes.
        seed: the federation's seed; every cluster computes the same split from it.
        beta: concentration for ``dir``.

    Returns:
        Ascending int64 sample indices per node: disjoint, covering, none empty.

    Raises:
        ConfigError: C008 when there are fewer samples than nodes or no split is found, C010 for an unknown kind, C018
            when a partitioner of the user breaks the rules above.
    """
    split = PARTITIONERS.get(kind)
    if num_parts < 1 or num_parts > len(labels):
        raise ConfigError(
            "C008",
            f"{num_parts} nodes share {len(labels)} training samples",
            place="number_of_clients",
            value=num_parts,
            allowed=f"1 to {len(labels)}",
        )
    parts = [np.sort(np.asarray(part, np.int64)) for part in split(labels, num_parts, seed, beta)]
    everything = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    complete = np.array_equal(everything, np.arange(len(labels)))
    if len(parts) != num_parts or not complete or not all(part.size for part in parts):
        raise ConfigError(
            "C018",
            f"partitioner '{kind}' made no split of {len(labels)} samples into {num_parts} parts",
            place="data_distribution_kind",
            value=f"{len(parts)} parts with {everything.size} samples",
            allowed="disjoint, non-empty parts that cover all samples",
        )
    return parts


@PARTITIONERS.register("iid")
def iid(labels: IntArray, num_parts: int, seed: int, beta: float) -> list[IntArray]:
    """A random permutation cut into parts whose sizes differ by at most one; `beta` is not used."""
    order = stable_random_state(seed, "partition-iid").permutation(len(labels))
    return np.array_split(order, num_parts)


@PARTITIONERS.register("dir")
def dirichlet(labels: IntArray, num_parts: int, seed: int, beta: float) -> list[IntArray]:
    """Label skew: each class is divided over the parts in proportions drawn from a symmetric Dirichlet(beta).

    Synthetic heterogeneity by Dirichlet draws goes back to Hsu et al. 2019 (arXiv 1909.06335), who draw the class
    mixture of each client; the draw per class used here also skews the sample counts and needs no replacement.
    Small `beta` gives nodes few classes, large `beta` approaches an IID split.

    A draw is repeated, with the next numbers of the same stream, until every part has at least
    ``min(10, num_samples / num_parts / 2)`` samples. Parts that already hold their fair share get no more of the
    remaining classes, as in Li et al. 2021 (arXiv 2102.02079), or hardly any draw would do for many parts.

    Raises:
        ConfigError: C008 when no draw does, C007 for a `beta` that is not positive.
    """
    if not beta > 0:
        raise ConfigError("C007", "must be positive", place="dirichlet_beta", value=beta, allowed="> 0")
    least = max(1.0, min(_MIN_SAMPLES, len(labels) / num_parts / 2))
    random = stable_random_state(seed, "partition-dir")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(_MAX_TRIES):
        parts = _draw(members, num_parts, beta, random)
        if min(len(part) for part in parts) >= least:
            return parts
    raise ConfigError(
        "C008",
        f"no Dirichlet({beta:g}) split of {len(labels)} samples gives each of {num_parts} nodes {least:g} samples",
        place="dirichlet_beta",
        value=beta,
        hint="Raise dirichlet_beta or lower number_of_clients",
    )


def _draw(members: list[Any], num_parts: int, beta: float, random: np.random.RandomState) -> list[IntArray]:
    """One draw: owner of every sample, class by class."""
    share = sum(map(len, members)) / num_parts
    counts = np.zeros(num_parts, np.int64)
    owners = []
    for indices in members:
        # Gamma draws over their sum are a Dirichlet draw; a sum of zero (tiny beta) falls back to equal shares.
        weights = random.standard_gamma(beta, num_parts) * (counts < share)
        total = weights.sum()
        weights = weights / total if total > 0 else np.full(num_parts, 1 / num_parts)
        cuts = (np.cumsum(weights)[:-1] * len(indices)).astype(np.int64)
        sizes = np.diff(cuts, prepend=0, append=len(indices))
        owners.append(np.repeat(np.arange(num_parts), sizes)[np.argsort(random.random_sample(len(indices)))])
        counts += sizes
    owner = np.concatenate(owners)
    samples = np.concatenate(members)[np.argsort(owner, kind="stable")]
    return np.split(samples, np.cumsum(counts)[:-1])
