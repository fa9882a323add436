"""Learning on one host: models, data, local training, and the layout of the flat parameter buffer.

Names load on first use, so that reading a layout does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icrf.learning.aggregation import (
        Aggregator,
        MeanAggregator,
        UpdateAggregator,
        build_aggregator,
        register_aggregator,
    )
    from icrf.learning.datasets import Dataset, configured_dataset, load_dataset
    from icrf.learning.flat_module import FlatModule
    from icrf.learning.layout import Layout
    from icrf.learning.metrics import require_metrics
    from icrf.learning.models import build_model, check_fit, check_starts, register_model
    from icrf.learning.partition import configured_partition, partition
    from icrf.learning.training import LocalTrainer, evaluate
    from icrf.learning.vectorizable import resolved_width

__all__ = [
    "Aggregator",
    "Dataset",
    "FlatModule",
    "Layout",
    "LocalTrainer",
    "MeanAggregator",
    "UpdateAggregator",
    "build_aggregator",
    "build_model",
    "check_fit",
    "check_starts",
    "configured_dataset",
    "configured_partition",
    "evaluate",
    "load_dataset",
    "partition",
    "register_aggregator",
    "register_model",
    "require_metrics",
    "resolved_width",
]

_HOME = {
    "Aggregator": "aggregation",
    "MeanAggregator": "aggregation",
    "UpdateAggregator": "aggregation",
    "build_aggregator": "aggregation",
    "register_aggregator": "aggregation",
    "Dataset": "datasets",
    "configured_dataset": "datasets",
    "load_dataset": "datasets",
    "FlatModule": "flat_module",
    "Layout": "layout",
    "build_model": "models",
    "check_fit": "models",
    "check_starts": "models",
    "require_metrics": "metrics",
    "register_model": "models",
    "configured_partition": "partition",
    "partition": "partition",
    "LocalTrainer": "training",
    "evaluate": "training",
    "resolved_width": "vectorizable",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
