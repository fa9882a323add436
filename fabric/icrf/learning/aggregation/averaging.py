"""Rules whose next model is the mean of the nodes' models, or of their normalised changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.aggregation.base import Array, ClientUpdate, MeanAggregator, RoundFacts, register_aggregator
from icrf.learning.training import LocalTerms
from icrf.protocol import Rows

# Most local steps for which the first grid of FedNova holds, a 256th: with more the round is repeated on a coarser one.
_STEPS_EXPECTED = 2.0**12


@register_aggregator("FedAvg")
class FedAvg(MeanAggregator):
    """The weighted mean of the nodes' models (McMahan et al. 2017, arXiv 1602.05629)."""

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        out[0][:] = mean[0]


@register_aggregator("FedProx")
class FedProx(FedAvg):
    """FedAvg with ``mu/2 |w - x|^2`` added to every node's loss, x being the global model (Li et al. 2020,
    arXiv 1812.06127)."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def terms(self, received: Array, state: Array) -> LocalTerms | None:
        return LocalTerms(mu=self.mu, anchor=received)


def effective_steps(steps: int, momentum: float) -> float:
    """How often a gradient enters the change that so many steps of SGD make, divided by the number of gradients.

    ``|a|_1`` of FedNova: the number of steps itself without momentum, else ``sum_k (1 - rho^k) / (1 - rho)``.
    """
    if not momentum:
        return float(steps)
    return float((steps - momentum * (1.0 - momentum**steps) / (1.0 - momentum)) / (1.0 - momentum))


def require_sgd(rule: str, optimizer: str) -> None:
    """Raise C008 unless the change that local training makes is a sum of gradients."""
    if optimizer != "SGD":
        raise ConfigError("C008", f"{rule} needs local SGD", place="optimizer", value=optimizer, allowed="SGD")


@register_aggregator("FedNova")
class FedNova(MeanAggregator):
    """Nodes send ``d_i = (x - y_i) / a_i`` with their number of effective steps a_i; the server makes
    ``x - lr * mean(a_i) * mean(d_i)`` (Wang et al. 2020, arXiv 2007.07481)."""

    rows = Rows(up=1, scalars=1)

    def __init__(self, momentum: float = 0.0, optimizer: str = "SGD", server_learning_rate: float = 1.0) -> None:
        require_sgd("FedNova", optimizer)
        self.momentum, self.server_learning_rate = momentum, server_learning_rate

    def contribution(self, update: ClientUpdate) -> Array:
        size, steps = len(update.trained), effective_steps(update.steps, self.momentum)
        change = np.subtract(update.received, update.trained, dtype=np.float64)
        update.out[:size] = change / steps if update.steps else 0.0
        update.out[size] = steps
        return update.out

    def expected(self, model_absmax: Sequence[float]) -> tuple[float, ...]:
        return (*model_absmax, _STEPS_EXPECTED)

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        mean[0][:] *= self.server_learning_rate * facts.scalars[0]
        out[0][:] = previous[0] - mean[0]
