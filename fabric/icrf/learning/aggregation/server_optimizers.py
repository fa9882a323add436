"""Rules that take an optimizer's step on the negative pseudo-gradient ``g = x - mean(y_i)``.

The steps are those of ``torch.optim`` in float64 (Reddi et al. 2021, arXiv 2003.00295, call the family FedOpt), written
relative to the mean of the nodes' models: a learning rate of 1 without momentum is FedAvg, bit by bit. The optimizer's
buffers are rows of the server's state, in the model's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from icrf.learning.aggregation.base import Array, MeanAggregator, RoundFacts, register_aggregator
from icrf.learning.training import LocalTerms, optimizer_rows
from icrf.protocol import Rows


@register_aggregator("FedAvgM")
class FedAvgM(MeanAggregator):
    """SGD with momentum on the server: ``v = beta v + g``, ``x - lr v`` (Hsu et al. 2019, arXiv 1909.06335)."""

    rows = Rows(server=2)
    nesterov: ClassVar[bool] = False

    def __init__(self, server_learning_rate: float = 1.0, server_momentum: float = 0.9) -> None:
        self.learning_rate, self.momentum = server_learning_rate, server_momentum

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        gradient = previous[0] - mean[0]
        velocity = self.momentum * previous[1].astype(np.float64) + gradient
        # x - lr (g + beta v), with the velocity of before or, looking ahead, of now.
        ahead = velocity if self.nesterov else previous[1]
        step = (self.learning_rate - 1.0) * gradient + (self.learning_rate * self.momentum) * ahead
        out[0][:] = mean[0] - step
        out[1][:] = velocity


@register_aggregator("DiLoCo")
class DiLoCo(FedAvgM):
    """Local steps whose optimizer state outlives the round, and Nesterov momentum on the server (Douillard et al. 2023,
    arXiv 2311.08105): ``v = beta v + g``, ``x - lr (g + beta v)``."""

    nesterov = True

    def __init__(
        self,
        optimizer: str = "SGD",
        momentum: float = 0.0,
        server_learning_rate: float = 0.7,
        server_momentum: float = 0.9,
    ) -> None:
        super().__init__(server_learning_rate, server_momentum)
        client, scalars = optimizer_rows(optimizer, momentum)
        self.rows = Rows(server=2, client=client, client_scalars=scalars)

    def terms(self, received: Array, state: Array) -> LocalTerms | None:
        return LocalTerms(optimizer_state=state) if len(state) else None


class _Adaptive(MeanAggregator):
    """A step divided by the root of a second moment."""

    def __init__(self, server_learning_rate: float = 0.1, tau: float = 1e-3) -> None:
        self.learning_rate, self.tau = server_learning_rate, tau


@register_aggregator("FedAdagrad")
class FedAdagrad(_Adaptive):
    """``s = s + g^2``, ``x - lr g / (sqrt(s) + tau)``, as ``torch.optim.Adagrad``."""

    rows = Rows(server=2)

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        gradient = previous[0] - mean[0]
        total = previous[1] + np.square(gradient)
        out[0][:] = previous[0] - self.learning_rate * gradient / (np.sqrt(total) + self.tau)
        out[1][:] = total


@register_aggregator("FedAdam")
class FedAdam(_Adaptive):
    """``m = b1 m + (1-b1) g``, ``v = b2 v + (1-b2) g^2``, both corrected for their start at zero,
    ``x - lr m / (sqrt(v) + tau)``, as ``torch.optim.Adam``."""

    rows = Rows(server=3)

    def __init__(
        self,
        server_learning_rate: float = 0.1,
        server_beta1: float = 0.9,
        server_beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(server_learning_rate, tau)
        self.beta1, self.beta2 = server_beta1, server_beta2

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        gradient = previous[0] - mean[0]
        first = self.beta1 * previous[1].astype(np.float64) + (1.0 - self.beta1) * gradient
        second = self.second_moment(previous[2].astype(np.float64), np.square(gradient))
        corrected = first / (1.0 - self.beta1**facts.number)
        root = np.sqrt(second / (1.0 - self.beta2**facts.number))
        out[0][:] = previous[0] - self.learning_rate * corrected / (root + self.tau)
        out[1][:], out[2][:] = first, second

    def second_moment(self, before: Array, square: Array) -> Array:
        """The next second moment, float64."""
        moment: Array = self.beta2 * before + (1.0 - self.beta2) * square
        return moment


@register_aggregator("FedYogi")
class FedYogi(FedAdam):
    """FedAdam whose second moment moves by the size of ``g^2`` alone: ``v - (1-b2) g^2 sign(v - g^2)``."""

    def second_moment(self, before: Array, square: Array) -> Array:
        moment: Array = before - (1.0 - self.beta2) * square * np.sign(before - square)
        return moment
