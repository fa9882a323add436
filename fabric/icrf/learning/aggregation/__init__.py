"""Aggregation rules: how a server makes the next model out of the participants' updates.

``base.py`` is the contract, the other modules are the rules. Formulas, keys and papers: ``docs/algorithms.md``.
"""

from icrf.learning.aggregation.averaging import FedAvg, FedNova, FedProx
from icrf.learning.aggregation.base import (
    AGGREGATORS,
    Aggregator,
    ClientUpdate,
    MeanAggregator,
    RoundFacts,
    UpdateAggregator,
    clip_update,
    register_aggregator,
)
from icrf.learning.aggregation.build import build_aggregator
from icrf.learning.aggregation.clustered import Ifca
from icrf.learning.aggregation.robust import Krum, Median, MultiKrum, TrimmedMean
from icrf.learning.aggregation.scaffold import Scaffold
from icrf.learning.aggregation.server_optimizers import DiLoCo, FedAdagrad, FedAdam, FedAvgM, FedYogi

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "ClientUpdate",
    "DiLoCo",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Ifca",
    "Krum",
    "MeanAggregator",
    "Median",
    "MultiKrum",
    "RoundFacts",
    "Scaffold",
    "TrimmedMean",
    "UpdateAggregator",
    "build_aggregator",
    "clip_update",
    "register_aggregator",
]
