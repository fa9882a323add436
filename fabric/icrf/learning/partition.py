"""Splits of the training data over the nodes: pure functions of the data, the number of parts and the seed.

A split is one owner per sample. Making it takes a few sorts however many nodes there are, so that every host makes it
for itself and takes out the parts of its own nodes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.datasets import Dataset
from icrf.learning.injection import accepted_arguments
from icrf.learning.partitioners import BUILT_IN, IntArray
from icrf.learning.rng import derive_seed, global_randomness
from icrf.registry import Registry

PARTITIONERS: Registry[Callable[..., Any]] = Registry("partitioner")
for _name, _partitioner in BUILT_IN.items():
    PARTITIONERS.add(_name, _partitioner)


class Partition(Sequence[IntArray]):
    """The parts of a split: ascending int64 sample indices per node, each made when it is asked for.

    Args:
        owners: node per sample, -1 for nobody; shape (num_samples,).
        num_parts: number of nodes.

    Attributes:
        sizes: samples per node, shape (num_parts,).
    """

    def __init__(self, owners: IntArray, num_parts: int) -> None:
        dealt = np.flatnonzero(owners >= 0)
        self.sizes: IntArray = np.bincount(owners[dealt], minlength=num_parts)
        self._samples = dealt[np.argsort(owners[dealt], kind="stable")]
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, part: int) -> IntArray: ...

    @overload
    def __getitem__(self, part: slice) -> Sequence[IntArray]: ...

    def __getitem__(self, part: int | slice) -> IntArray | Sequence[IntArray]:
        if isinstance(part, slice):
            return [self[k] for k in range(*part.indices(len(self)))]
        if not 0 <= part < len(self):
            raise IndexError(part)
        end = int(self._ends[part])
        return self._samples[end - int(self.sizes[part]) : end]


def partition(
    kind: str,
    labels: IntArray,
    num_parts: int,
    seed: int,
    beta: float = 0.5,
    *,
    groups: IntArray | None = None,
    classes_per_node: int = 2,
    shards_per_node: int = 2,
) -> Partition:
    """Split samples over nodes.

    Args:
        kind: a registered name (see :mod:`icrf.learning.partitioners`) or ``module:attr`` of a function. It is called
            by name with those of ``labels``, ``num_parts``, ``seed``, ``beta``, ``groups``, ``classes_per_node`` and
            ``shards_per_node`` that it has parameters for, and returns the owner of every sample (an int64 array, -1
            for nobody) or a sequence with an array of sample indices per node.
        labels: class numbers, shape (num_samples,).
        num_parts: number of nodes.
        seed: the federation's seed; every cluster computes the same split from it.
        beta: concentration for ``dir`` and ``quantity``.
        groups: natural ids, shape (num_samples,), for ``natural``.
        classes_per_node: for ``pathological``.
        shards_per_node: for ``shards``.

    Returns:
        Disjoint parts, none empty.

    Raises:
        ConfigError: C008 when there are fewer samples than nodes or no such split exists, C010 for an unknown kind,
            C017 for code that cannot be loaded or that raises, C018 for a split of the user's that breaks these rules.
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
    offered = {
        "labels": labels,
        "num_parts": num_parts,
        "seed": seed,
        "beta": beta,
        "groups": groups,
        "classes_per_node": classes_per_node,
        "shards_per_node": shards_per_node,
    }
    with PARTITIONERS.calling(kind), global_randomness(seed):  # every host splits by itself, and all must get the same
        owners = split(**accepted_arguments(split, offered))
    if not isinstance(owners, np.ndarray) or owners.ndim != 1 or owners.dtype.kind != "i":
        owners = _owners_of_parts(kind, owners, len(labels), num_parts)
    inside = len(owners) == len(labels) and -1 <= owners.min() <= owners.max() < num_parts
    made = Partition(owners, num_parts) if inside else None
    if made is None or not made.sizes.all():
        raise _no_split(kind, len(labels), num_parts, "a node without samples, or owners that are no nodes")
    return made


def configured_partition(config: Any, dataset: Dataset, num_parts: int) -> Partition:
    """The split of a configuration (:class:`icrf.spec.FederationConfig`); see :func:`partition`."""
    return partition(
        config.data_distribution_kind,
        dataset.train_y,
        num_parts,
        derive_seed(config.seed, 0, 0, "partition"),
        config.dirichlet_beta,
        groups=dataset.groups,
        classes_per_node=config.classes_per_node,
        shards_per_node=config.shards_per_node,
    )


def _owners_of_parts(kind: str, parts: Any, num_samples: int, num_parts: int) -> IntArray:
    """Owners from an array of sample indices per node."""
    try:
        arrays = [np.asarray(part, np.int64) for part in parts]
    except (TypeError, ValueError) as error:
        raise _no_split(kind, num_samples, num_parts, type(parts).__name__) from error
    samples = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
    outside = samples.size and not 0 <= samples.min() <= samples.max() < num_samples
    if len(arrays) != num_parts or outside or np.unique(samples).size != samples.size:
        found = f"{len(arrays)} parts with {samples.size} samples, {np.unique(samples).size} of them different"
        raise _no_split(kind, num_samples, num_parts, found)
    owners = np.full(num_samples, -1, np.int64)
    owners[samples] = np.repeat(np.arange(num_parts), [len(part) for part in arrays])
    return owners


def _no_split(kind: str, num_samples: int, num_parts: int, found: str) -> ConfigError:
    return ConfigError(
        "C018",
        f"partitioner '{kind}' made no split of {num_samples} samples into {num_parts} parts",
        place="data_distribution_kind",
        value=found,
        allowed="disjoint, non-empty parts",
    )
