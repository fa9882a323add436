"""The partitioners that come with the fabric.

Each is a function of labels, number of parts and seed (and what else its parameters name) that returns the owner of
every sample: an int64 array of shape (num_samples,), -1 for samples that nobody gets. All draws come from
``RandomState``, whose streams NumPy has frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.rng import stable_random_state

IntArray = np.ndarray[Any, np.dtype[np.int64]]

_LEAST_SAMPLES = 10
_NOBODY = -1


def iid(labels: IntArray, num_parts: int, seed: int) -> IntArray:
    """A random permutation cut into parts whose sizes differ by at most one."""
    order = stable_random_state(seed, "partition-iid").permutation(len(labels))
    return _owners(order, _even_sizes(len(labels), num_parts))


def dirichlet(labels: IntArray, num_parts: int, seed: int, beta: float) -> IntArray:
    """Label skew: each class is divided over the nodes in proportions drawn from a symmetric Dirichlet(beta).

    Synthetic heterogeneity by Dirichlet draws goes back to Hsu et al. 2019 (arXiv 1909.06335), who draw the class
    mixture of each client; the draw per class used here also skews the sample counts and needs no replacement.
    Small `beta` gives nodes few classes, large `beta` approaches an IID split.

    Nodes that already hold their fair share get no more of the remaining classes, as in Li et al. 2021
    (arXiv 2102.02079). Who is still left with fewer than ``min(10, num_samples / num_parts / 2)`` samples gets the
    rest from the largest nodes, so that any `beta` does for any number of nodes.

    Raises:
        ConfigError: C007 for a `beta` that is not positive.
    """
    _require_positive(beta)
    random = stable_random_state(seed, "partition-dir")
    share = len(labels) / num_parts
    counts = np.zeros(num_parts, np.int64)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        weights = random.standard_gamma(beta, num_parts) * (counts < share)
        sizes = _proportional_sizes(weights, len(members))
        owner[members] = np.repeat(np.arange(num_parts), sizes)[np.argsort(random.random_sample(len(members)))]
        counts += sizes
    return _topped_up(owner, counts, max(1, int(np.ceil(min(_LEAST_SAMPLES, share / 2)))), random)


def dominant_label(percentage: int) -> Any:
    """The partitioner in which `percentage` per cent of every node's samples carry its dominant label.

    Wang et al. 2020, "Optimizing Federated Learning on Non-IID Data with Reinforcement Learning" (INFOCOM), describe
    skew this way. The dominant labels are dealt out in turn, in an order drawn from the seed; all other samples of a
    node are drawn at random from the other labels. All nodes have the same number of samples: as many as there are
    enough of every label for. Samples beyond that are dealt to nobody.
    """

    def split(labels: IntArray, num_parts: int, seed: int) -> IntArray:
        return _dominant(labels, num_parts, seed, percentage)

    split.__doc__ = f"{percentage} % of a node's samples carry its dominant label; see :func:`dominant_label`."
    return split


def shards(labels: IntArray, num_parts: int, seed: int, shards_per_node: int = 2) -> IntArray:
    """Samples sorted by label, cut into shards of equal size (to one), so many of them at random to every node.

    With two shards per node this is the non-IID split of McMahan et al. 2017 (arXiv 1602.05629), section 3.

    Raises:
        ConfigError: C008 for more shards than samples.
    """
    num_shards = shards_per_node * num_parts
    if num_shards > len(labels):
        raise _impossible(
            f"{num_parts} nodes of {shards_per_node} shards need {num_shards} samples, there are {len(labels)}",
            "shards_per_node",
        )
    random = stable_random_state(seed, "partition-shards")
    # Equal labels in random order, so that a shard does not follow the order of the file.
    shuffled = random.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner_of_shard = np.empty(num_shards, np.int64)
    owner_of_shard[random.permutation(num_shards)] = np.repeat(np.arange(num_parts), shards_per_node)
    owner = np.empty(len(labels), np.int64)
    owner[order] = np.repeat(owner_of_shard, _even_sizes(len(labels), num_shards))
    return owner


def pathological(labels: IntArray, num_parts: int, seed: int, classes_per_node: int = 2) -> IntArray:
    """Every node holds exactly so many classes; each class is divided evenly among the nodes that hold it.

    The quantity-based label imbalance of Li et al. 2021 (arXiv 2102.02079, "#C = k"): one class per node in turn, in
    an order drawn from the seed, the others at random. Samples of a class that no node holds are dealt to nobody;
    there are such classes only where `num_parts` is smaller than the number of classes.

    Raises:
        ConfigError: C008 for more classes per node than there are, or a class with more holders than samples.
    """
    classes, members_of = np.unique(labels, return_inverse=True)
    num_classes = len(classes)
    if classes_per_node > num_classes:
        raise _impossible(f"the data has {num_classes} classes", "classes_per_node", classes_per_node)
    random = stable_random_state(seed, "partition-pathological")
    keys = random.random_sample((num_parts, num_classes))
    first = random.permutation(num_classes)[np.arange(num_parts) % num_classes]
    keys[np.arange(num_parts), first] = -1.0
    held = np.argsort(keys, axis=1, kind="stable")[:, :classes_per_node]
    owner = np.full(len(labels), _NOBODY, np.int64)
    for k in range(num_classes):
        holders = np.flatnonzero((held == k).any(axis=1))
        members = random.permutation(np.flatnonzero(members_of.reshape(-1) == k))
        if len(holders) > len(members):
            raise _impossible(
                f"{len(holders)} nodes hold class {classes[k]}, which has {len(members)} samples", "classes_per_node"
            )
        if len(holders):
            owner[members] = np.repeat(holders, _even_sizes(len(members), len(holders)))
    return owner


def quantity(labels: IntArray, num_parts: int, seed: int, beta: float) -> IntArray:
    """Quantity skew: sizes in proportions drawn from a symmetric Dirichlet(beta), labels as in the whole data.

    Li et al. 2021 (arXiv 2102.02079). Every node has one sample; the draw divides the rest.

    Raises:
        ConfigError: C007 for a `beta` that is not positive.
    """
    _require_positive(beta)
    random = stable_random_state(seed, "partition-quantity")
    order = random.permutation(len(labels))
    sizes = 1 + _proportional_sizes(random.standard_gamma(beta, num_parts), len(labels) - num_parts)
    return _owners(order, sizes)


def natural(labels: IntArray, num_parts: int, seed: int, groups: IntArray | None = None) -> IntArray:
    """Samples of one natural id (writer, site) stay together, as in LEAF (Caldas et al. 2018, arXiv 1812.01097).

    With as many ids as nodes, node k gets the k-th id in ascending order. With more, ids are dealt out in turn, in an
    order drawn from the seed.

    Raises:
        ConfigError: C008 for data without ids, or with fewer than nodes.
    """
    if groups is None:
        raise _impossible(
            "the data has no natural ids",
            "data_distribution_kind",
            "natural",
            "Set group_column for a table, or return a Dataset with groups",
        )
    ids, number = np.unique(groups, return_inverse=True)
    if len(ids) < num_parts:
        raise _impossible(f"{num_parts} nodes share {len(ids)} natural ids", "number_of_clients", num_parts)
    place = np.arange(len(ids))
    if len(ids) > num_parts:
        place = stable_random_state(seed, "partition-natural").permutation(len(ids))
    owner: IntArray = (place % num_parts)[number.reshape(-1)]
    return owner


BUILT_IN = {
    "iid": iid,
    "dir": dirichlet,
    "20": dominant_label(20),
    "50": dominant_label(50),
    "90": dominant_label(90),
    "shards": shards,
    "pathological": pathological,
    "quantity": quantity,
    "natural": natural,
}


# ---------------------------------------------------------------- parts of them


def _owners(order: IntArray, sizes: IntArray) -> IntArray:
    """Owner per sample where the first node gets the first samples of `order`, and so on."""
    owner = np.full(len(order), _NOBODY, np.int64)
    owner[order[: int(sizes.sum())]] = np.repeat(np.arange(len(sizes)), sizes)
    return owner


def _even_sizes(total: int, num_parts: int) -> IntArray:
    """Sizes that differ by at most one, the larger first, as ``numpy.array_split`` has them."""
    return np.full(num_parts, total // num_parts, np.int64) + (np.arange(num_parts) < total % num_parts)


def _proportional_sizes(weights: Any, total: int) -> IntArray:
    """Integers in proportion to `weights` that add up to `total`; gamma draws over their sum are a Dirichlet draw."""
    whole = weights.sum()
    # A sum of zero (a tiny beta) falls back to equal shares.
    shares = weights / whole if whole > 0 else np.full(len(weights), 1 / len(weights))
    cuts = np.minimum((np.cumsum(shares)[:-1] * total).astype(np.int64), total)
    return np.diff(cuts, prepend=0, append=total)


def _topped_up(owner: IntArray, counts: IntArray, least: int, random: np.random.RandomState) -> IntArray:
    """Give every node `least` samples at the cost of the largest nodes; ``least * num_parts <= num_samples``."""
    lacking = np.maximum(least - counts, 0)
    wanted = int(lacking.sum())
    if not wanted:
        return owner
    # The lowest level to which the largest nodes come down so that enough is free.
    low, high = least, int(counts.max())
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(counts - level, 0).sum() >= wanted else (low, level - 1)
    given = np.maximum(counts - low, 0)
    surplus = int(given.sum()) - wanted
    given[np.flatnonzero(given)[:surplus]] -= 1
    # A random order within every node decides which of its samples go.
    order = np.lexsort((random.random_sample(len(owner)), owner))
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    free = order[rank < np.repeat(given, counts)]
    owner[random.permutation(free)] = np.repeat(np.arange(len(counts)), lacking)
    return owner


def _dominant(labels: IntArray, num_parts: int, seed: int, percentage: int) -> IntArray:
    classes, label = np.unique(labels, return_inverse=True)
    label = label.reshape(-1)
    if len(classes) < 2:
        raise _impossible("the data has one class only", "data_distribution_kind", percentage)
    random = stable_random_state(seed, f"partition-{percentage}")
    own = random.permutation(len(classes))[np.arange(num_parts) % len(classes)]
    holders = np.bincount(own, minlength=len(classes))
    supply = np.bincount(label, minlength=len(classes))
    shuffled = random.permutation(len(label))
    by_label = shuffled[np.argsort(label[shuffled], kind="stable")]
    most = int((supply // np.maximum(holders, 1))[holders > 0].min())
    # The largest size of which `percentage` per cent, rounded, are at most so many.
    size = min(len(label) // num_parts, (100 * most + 49) // percentage) if most else 0
    while size:
        dominant = max(1, (percentage * size + 50) // 100)
        owner = _deal(label, by_label, own, holders, supply, size, dominant, random)
        if owner is not None:
            return owner
        size = min(size - 1, size * 49 // 50)
    raise _impossible(
        f"some label has fewer samples than the {int(holders.max())} nodes that it is to dominate", "number_of_clients"
    )


def _deal(
    label: IntArray,
    by_label: IntArray,
    own: IntArray,
    holders: IntArray,
    supply: IntArray,
    size: int,
    dominant: int,
    random: np.random.RandomState,
) -> IntArray | None:
    """Nodes of `size` samples, `dominant` of them with the own label; None where the others do not suffice."""
    num_parts = len(own)
    rank = np.arange(len(label)) - np.repeat(np.cumsum(supply) - supply, supply)
    is_dominant = rank < np.repeat(holders * dominant, supply)
    owner = np.full(len(label), _NOBODY, np.int64)
    owner[by_label[is_dominant]] = np.repeat(np.argsort(own, kind="stable"), dominant)
    # The others: a place per node and sample, and the own label kept out of them by swaps.
    rest = random.permutation(by_label[~is_dominant])
    place = np.full(len(rest), _NOBODY, np.int64)
    place[: num_parts * (size - dominant)] = np.repeat(np.arange(num_parts), size - dominant)
    kept_out, found = np.append(own, _NOBODY)[place], label[rest]
    for k in range(len(holders)):
        wrong = np.flatnonzero((kept_out == k) & (found == k))
        others = np.flatnonzero((kept_out != k) & (found != k))
        if len(wrong) > len(others):
            return None
        chosen = random.permutation(others)[: len(wrong)]
        for array in (rest, found):
            array[wrong], array[chosen] = array[chosen], array[wrong]
    owner[rest] = place
    return owner


def _require_positive(beta: float) -> None:
    if not beta > 0:
        raise ConfigError("C007", "must be positive", place="dirichlet_beta", value=beta, allowed="> 0")


def _impossible(problem: str, place: str, value: object = None, hint: str = "") -> ConfigError:
    return ConfigError("C008", problem, place=place, value=value, hint=hint or "Lower it, or lower number_of_clients")
