"""Metrics of an evaluation beyond accuracy and loss, by name; whoever wants another registers it::

    @register_metric("brier")
    def brier(scores, labels) -> float: ...

A metric gets the model's scores of all samples, a float tensor of shape (n, num_classes), and the int64 classes of
shape (n,), n > 0, and returns a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from icrf.errors import ConfigError
from icrf.registry import Registry

Metric = Callable[[Any, Any], float]

METRICS: Registry[Metric] = Registry("metric")


def register_metric(name: str) -> Callable[[Metric], Metric]:
    """Make a metric known under a name for ``evaluation_metrics``."""
    return METRICS.register(name)


def measure(names: Sequence[str], scores: Any, labels: Any) -> dict[str, float]:
    """The metrics of these names; one that is given as ``module:attr`` is called by its attribute.

    Raises:
        ConfigError: C010 unknown name, C017 code that cannot be loaded, C018 what comes back is no number.
    """
    found = {}
    for name in names:
        value = METRICS.get(name)(scores, labels)
        try:
            found[name.rpartition(":")[2]] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "C018",
                f"metric '{name}' returned {type(value).__name__}",
                place="evaluation_metrics",
                allowed="a number",
            ) from error
    return found


def _by_class(scores: Any, labels: Any) -> tuple[Any, Any, Any]:
    """Per class, as float64 of shape (num_classes,): right answers, samples, answers."""
    answers, num_classes = scores.argmax(1), scores.shape[1]
    right = torch.bincount(labels[answers == labels], minlength=num_classes)
    samples = torch.bincount(labels, minlength=num_classes)
    return right.double(), samples.double(), torch.bincount(answers, minlength=num_classes).double()


@register_metric("macro_f1")
def macro_f1(scores: Any, labels: Any) -> float:
    """The unweighted mean of the F1 scores of all classes that occur among labels or answers."""
    right, samples, answers = _by_class(scores, labels)
    occur = samples + answers > 0
    return float((2 * right[occur] / (samples + answers)[occur]).mean())


@register_metric("balanced_accuracy")
def balanced_accuracy(scores: Any, labels: Any) -> float:
    """The unweighted mean of the recalls of all classes that occur among the labels."""
    right, samples, _ = _by_class(scores, labels)
    occur = samples > 0
    return float((right[occur] / samples[occur]).mean())


@register_metric("top_5_accuracy")
def top_5_accuracy(scores: Any, labels: Any) -> float:
    """The share of samples whose class is among the five with the highest scores."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return float((best == labels[:, None]).any(1).double().mean())
