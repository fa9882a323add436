"""IFCA: several models, each the mean over the clients that chose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from icrf.errors import ConfigError
from icrf.learning.aggregation.averaging import FedAvg
from icrf.learning.aggregation.base import Aggregator, Array, ClientUpdate, MeanAggregator, RoundFacts
from icrf.learning.training import LocalTerms
from icrf.protocol import Rows


class Ifca(MeanAggregator):
    """The Iterative Federated Clustering Algorithm with model averaging (Ghosh et al. 2020, arXiv 2006.04088).

    The server keeps and sends K models. A node trains the one of lowest loss on its own data, j, and sends a
    contribution that is zero but for row j, what it trained, and the j-th of K numbers, a one. So the exact mean of row
    j over the exact mean of number j is the weighted mean over those that chose model j, in whatever way the sums
    were grouped. A model that nobody chose stays as it is.

    Args:
        within: what those that chose a model do; the server takes their mean.
        num_models: K.

    Raises:
        ConfigError: C008 for a rule that is no FedAvg.
    """

    def __init__(self, within: Aggregator, num_models: int) -> None:
        if not isinstance(within, FedAvg):
            raise ConfigError(
                "C008",
                f"{type(within).__name__} is no FedAvg, by which each of several models is averaged",
                place="aggregation_strategy",
                allowed="FedAvg, FedProx, a subclass of them",
            )
        self.within, self.num_models = within, num_models
        self.rows = Rows(down=num_models, up=num_models, scalars=num_models, server=num_models)

    def require(self, num_participants: int) -> None:
        self.within.require(1)  # of a group nothing is known beforehand

    def terms(self, received: Array, state: Array) -> LocalTerms | None:
        return self.within.terms(received, state)

    def contribution(self, update: ClientUpdate) -> Array:
        size = len(update.trained)
        update.out.fill(0.0)
        row = update.out[update.chosen * size : (update.chosen + 1) * size]
        row[:] = self.within.contribution(replace(update, out=row))
        update.out[self.num_models * size + update.chosen] = 1.0
        return update.out

    def expected(self, model_absmax: Sequence[float]) -> tuple[float, ...]:
        count = len(model_absmax) // self.num_models
        models = (model_absmax[k * count : (k + 1) * count] for k in range(self.num_models))
        return (*(largest for model in models for largest in self.within.expected(model)), 1.0)

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        for k, share in enumerate(facts.scalars):
            if share:
                mean[k][:] /= share
                self.within.advance([mean[k]], [previous[k]], [out[k]], replace(facts, scalars=()))
            else:
                out[k][:] = previous[k]
