"""The work of :mod:`benchmarks.cases` in the form in which a configuration of ICRF names it: ``module:attr``."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import cases
from icrf import Dataset, FederatedNode

# Clients beyond those of the federation get nothing of it.
_MOST_HEAVY = 100


def digits() -> Dataset:
    """All digits, to train and to test on."""
    return Dataset(*cases.digits(), *cases.digits(), cases.CLASSES, "all digits")


def tiny() -> Dataset:
    """The synthetic batches of one client after the other."""
    return _batches(cases.MOST_TINY)


def tiny_many() -> Dataset:
    """The same for more clients, which takes longer to make."""
    return _batches(cases.MOST_TINY_MANY)


def _batches(num_clients: int) -> Dataset:
    batches = [cases.tiny_batch(k) for k in range(num_clients)]
    features, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Dataset(features, labels, features[:1], labels[:1], cases.CLASSES, "synthetic batches")


def heavy() -> Dataset:
    """A sample per client that nobody looks at."""
    features, labels = np.zeros((_MOST_HEAVY, cases.HEAVY_SIDE), np.float32), np.zeros(_MOST_HEAVY, np.int64)
    return Dataset(features, labels, features[:1], labels[:1], cases.HEAVY_SIDE, "nothing")


def in_turn(labels: Any, num_parts: int) -> Any:
    """Samples dealt out in turn: client k gets every sample whose number leaves k."""
    return np.arange(len(labels)) % num_parts


def in_batches(labels: Any, num_parts: int) -> Any:
    """Client k gets the k-th batch."""
    return _first(np.arange(len(labels)) // cases.BATCH, num_parts)


def one_each(labels: Any, num_parts: int) -> Any:
    """Client k gets the k-th sample."""
    return _first(np.arange(len(labels)), num_parts)


def _first(owners: Any, num_parts: int) -> Any:
    return np.where(owners < num_parts, owners, -1)


def small_model() -> Any:
    """The perceptron of ``digits`` and ``tiny``."""
    return cases.build_model("digits")


def large_model() -> Any:
    """The weights of ``heavy``."""
    return cases.build_model("heavy")


class Scaling(FederatedNode):
    """A client of ``heavy``."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        cases.scale(self.model)
        return {}
