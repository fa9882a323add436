"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.aggregation.averaging import effective_steps, require_sgd
from icrf.learning.aggregation.base import Array, ClientUpdate, MeanAggregator, RoundFacts, register_aggregator
from icrf.learning.training import LocalTerms
from icrf.protocol import Rows


@register_aggregator("SCAFFOLD")
class Scaffold(MeanAggregator):
    """Every local gradient is corrected by ``c - c_i`` (Karimireddy et al. 2020, arXiv 1910.06378, option II).

    The server keeps and sends (x, c), every node keeps its c_i and sends (y_i, change of c_i), where the new c_i is
    ``c_i - c + (x - y_i) / (K lr)``. The server makes ``x + server_lr * mean(y_i - x)`` and
    ``c + participants/clients * mean(change of c_i)``. With local momentum K is the number of effective steps.
    """

    rows = Rows(down=2, up=2, server=2, client=1)

    def __init__(
        self,
        learning_rate: float,
        momentum: float = 0.0,
        optimizer: str = "SGD",
        server_learning_rate: float = 1.0,
        clip_norm: float | None = None,
    ) -> None:
        require_sgd("SCAFFOLD", optimizer)
        if clip_norm is not None:
            message = "SCAFFOLD reads gradients off the update, which clip_norm changes"
            raise ConfigError("C008", message, place="clip_norm", value=clip_norm, allowed="null")
        self.learning_rate, self.momentum = learning_rate, momentum
        self.server_learning_rate = server_learning_rate

    def terms(self, received: Array, state: Array) -> LocalTerms | None:
        variate = received[len(state) :]
        return LocalTerms(correction=np.subtract(variate, state, dtype=np.float64).astype(state.dtype))

    def contribution(self, update: ClientUpdate) -> Array:
        size = len(update.trained)
        model, variate = update.received[:size], update.received[size:]
        scale = self.learning_rate * effective_steps(update.steps, self.momentum)
        if scale:
            gradient = np.subtract(model, update.trained, dtype=np.float64) / scale
            update.next_state[:] = np.subtract(update.state, variate, dtype=np.float64) + gradient
        update.out[:size] = update.trained
        np.subtract(update.next_state, update.state, out=update.out[size:])
        return update.out

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        # Relative to the mean, so that a server learning rate of 1 gives the mean itself, bit by bit.
        out[0][:] = mean[0] + (self.server_learning_rate - 1.0) * (mean[0] - previous[0])
        out[1][:] = previous[1] + (facts.participants / facts.clients) * mean[1]
