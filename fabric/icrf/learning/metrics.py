"""Metrics of an evaluation beside accuracy and loss, by name; whoever wants another registers it::

    @icrf.register("metric", "brier")
    def brier(scores, labels) -> float: ...

A metric gets the model's scores of all samples, float of shape (n, num_classes), and their classes, int64 of shape
(n,), n > 0, as NumPy arrays, and returns a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.registry import Registry

Array = np.ndarray[Any, np.dtype[Any]]
Metric = Callable[[Array, Array], float]

METRICS: Registry[Metric] = Registry("metric")


@METRICS.register("balanced_accuracy")
def balanced_accuracy(scores: Array, labels: Array) -> float:
    """The mean over the classes that occur of the share of their samples that are told right."""
    right = scores.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


@METRICS.register("macro_f1")
def macro_f1(scores: Array, labels: Array) -> float:
    """The mean over the classes that occur or are told of the harmonic mean of precision and recall."""
    told = scores.argmax(axis=1)
    found = []
    for label in np.unique(np.concatenate([labels, told])):
        both = np.count_nonzero((told == label) & (labels == label))
        found.append(2 * both / (np.count_nonzero(told == label) + np.count_nonzero(labels == label)))
    return float(np.mean(found))


@METRICS.register("top_5_accuracy")
def top_5_accuracy(scores: Array, labels: Array) -> float:
    """The share of samples whose class is among the five of the highest scores; of equals the lower class counts."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    return float((best == labels[:, np.newaxis]).any(axis=1).mean())


def measure(names: Sequence[str], scores: Array, labels: Array) -> dict[str, float]:
    """The named metrics, each under its name, a ``module:attr`` under its last part.

    Raises:
        ConfigError: C010 for an unknown name, C017 for code that cannot be loaded or that raises, C018 for what returns
            no number.
    """
    found = {}
    for name in names:
        metric = METRICS.get(name)
        with METRICS.calling(name):
            value = metric(scores, labels)
        try:
            found[metric_key(name)] = float(value)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise ConfigError(
                "C018", f"metric '{name}' returned {kind}", place="metrics", allowed="a number"
            ) from error
    return found


def require_metrics(names: Sequence[str]) -> None:
    """Load all of them; C010 or C017 for one that cannot be used, C008 for two of the same name."""
    for number, name in enumerate(names):
        metric = METRICS.get(name)
        if not callable(metric):
            what = f"metric '{name}' is a {type(metric).__name__}"
            raise ConfigError("C017", what, place=METRICS.key, allowed="a function of scores and labels")
        if metric_key(name) in ("accuracy", "loss", *(metric_key(other) for other in names[:number])):
            raise ConfigError("C008", f"two metrics are called '{metric_key(name)}'", place="metrics", value=name)


def metric_key(name: str) -> str:
    """What a metric is called in results."""
    return name.rpartition(":")[2].rpartition(".")[2]
