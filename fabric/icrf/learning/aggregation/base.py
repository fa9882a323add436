"""The contract of aggregation rules.

A rule says what it moves and keeps (:class:`icrf.protocol.Rows`), what a node does beside its own training, what a
node contributes, and how the next server state follows. Everything here works on flat arrays: row k of a state is
``state[k * num_parameters : (k + 1) * num_parameters]``, row 0 of the server's state is the model.

Two kinds of rules differ in what reaches the server: :class:`MeanAggregator` gets exact weighted means, whose bits
depend on neither grouping nor order; :class:`UpdateAggregator` gets every update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from icrf.learning.training import LocalTerms
from icrf.protocol import Rows
from icrf.registry import Registry
from icrf.update import CHUNK

Array = np.ndarray[Any, np.dtype[Any]]

AGGREGATORS: Registry[Callable[..., Any]] = Registry("aggregator")


def register_aggregator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an :class:`Aggregator` class known as an ``aggregation_strategy``.

    Its constructor gets the configuration's keys that it has parameters for, by name; those that are null are left to
    the parameter's default.
    """
    return AGGREGATORS.register(name)


@dataclass(frozen=True)
class ClientUpdate:
    """What one node's training has led to; all arrays are flat.

    Attributes:
        received: the rows that the server sent, shape (rows.down * num_parameters,); read only.
        trained: the model after training (and clipping), shape (num_parameters,); the node's live parameters.
        steps: optimizer steps that were made.
        state: what the node kept so far, zeros at first, shape (rows.client * num_parameters +
            rows.client_scalars,); read only.
        next_state: what it keeps from now on; filled with `state`, to be changed in place.
        out: a buffer for the contribution, shape (rows.up * num_parameters + rows.scalars,).
        chosen: which of the federation's models the node has trained. With several, `received` is that one alone.
        learned: the parts of `trained` that are learned; all others, such as counters, are averaged beside the rule.
    """

    received: Array
    trained: Array
    steps: int
    state: Array
    next_state: Array
    out: Array
    chosen: int = 0
    learned: Sequence[slice] = (slice(None),)


class Means(Protocol):
    """Weighted means of contributions, such as those of :class:`icrf.update.ExactSum`."""

    def mean_part(self, start: int, stop: int, out: Array) -> Array:
        """The mean of the elements `start` to `stop`, written to the float64 array `out`."""
        ...


@dataclass(frozen=True)
class RoundFacts:
    """What a rule may know about a round.

    Attributes:
        number: counted from 1.
        participants: nodes that contributed.
        clients: nodes that could have.
        scalars: exact weighted means of the numbers that contributions end with.
    """

    number: int
    participants: int
    clients: int
    scalars: tuple[float, ...] = ()


class Aggregator:
    """An aggregation rule. Instances hold settings only: whatever lasts is in the states that the fabric keeps.

    Attributes:
        rows: what the rule moves and keeps.
        num_models: how many models the federation learns, the first rows of the server's state. Where there are
            several, they are what is sent, and a node trains the one that suits its data best.
    """

    rows: Rows = Rows()
    num_models: int = 1

    def require(self, num_participants: int) -> None:
        """Raise C008 if the rule does not work with so many participants in a round."""

    def first_state(self, models: Array) -> Array:
        """The server's state before the first round: the initial models, and zeros in all other rows."""
        if self.rows.server == self.num_models:
            return models
        state = np.zeros(len(models) // self.num_models * self.rows.server, models.dtype)
        state[: len(models)] = models
        return state

    def sent(self, rows: Array, learned: Sequence[slice]) -> Array:
        """What goes out of the server's state.

        Args:
            rows: its first ``rows.down`` rows; read only.
            learned: the parts of a row that are learned.
        """
        return rows

    def terms(self, received: Array, state: Array) -> LocalTerms | None:
        """What is added to a node's local training.

        Args:
            received: see :class:`ClientUpdate`.
            state: what the node keeps; may be written to where a term says so.
        """
        return None

    def contribution(self, update: ClientUpdate) -> Array:
        """What a node sends, shape of ``update.out``; by default the trained model itself."""
        return update.trained

    def expected(self, model_absmax: Sequence[float]) -> tuple[float, ...]:
        """Largest absolute values that contributions of the next round are expected to have, per summed tensor.

        They choose the grid of exact sums, with 256-fold head room; beyond it the round is run again.

        Args:
            model_absmax: the maxima of the committed model's tensors, or those of every model, one after the other.
        """
        return (*tuple(model_absmax) * self.rows.up, *([1.0] if self.rows.scalars else []))


class MeanAggregator(Aggregator):
    """A rule that needs the weighted mean of the contributions only, element by element: partial sums merge."""

    def finish(self, total: Means, previous: Array, out: Array, facts: RoundFacts) -> None:
        """Write the next server state.

        Args:
            total: the exact sum of all contributions, of ``rows.up`` rows and ``rows.scalars`` numbers.
            previous: the committed server state, shape (rows.server * num_parameters,).
            out: where the next one goes.
            facts: without the scalars, which are read from `total`.

        Raises:
            WeightsError: W021 when the sum is void, W030 when nothing was added.
        """
        rows = self.rows
        size = len(previous) // rows.server
        numbers = total.mean_part(rows.up * size, rows.up * size + rows.scalars, np.empty(rows.scalars))
        known = RoundFacts(facts.number, facts.participants, facts.clients, tuple(numbers.tolist()))
        scratch = np.empty((rows.up, min(CHUNK, size)))
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            mean = [
                total.mean_part(k * size + start, k * size + stop, scratch[k, : stop - start]) for k in range(rows.up)
            ]
            before = [previous[k * size + start : k * size + stop] for k in range(rows.server)]
            after = [out[k * size + start : k * size + stop] for k in range(rows.server)]
            self.advance(mean, before, after, known)

    def advance(
        self, mean: Sequence[Array], previous: Sequence[Array], out: Sequence[Array], facts: RoundFacts
    ) -> None:
        """The same for some elements; NumPy rounds to the model's type where float64 is assigned to `out`.

        Args:
            mean: the weighted mean of each row of the contributions, float64; may be overwritten.
            previous: each row of the committed state, in the model's type.
            out: each row of the next one.
        """
        raise NotImplementedError


class UpdateAggregator(Aggregator):
    """A rule that has to see every update."""

    rows = Rows(every_update=True)

    def combine(self, updates: Sequence[Array], previous: Array, out: Array, facts: RoundFacts) -> None:
        """Write the next server state.

        Args:
            updates: the nodes' models in node-index order, each of shape (num_parameters,).
            previous: the committed server state, shape (rows.server * num_parameters,).
            out: where the next one goes.
        """
        raise NotImplementedError


def clip_update(received: Array, trained: Array, clip_norm: float, parts: Sequence[slice] = (slice(None),)) -> None:
    """Scale ``trained - received`` down to the L2 norm `clip_norm` where it is longer; `trained` changes in place.

    Args:
        parts: what is clipped, as one vector; the rest is left alone.
    """
    square = 0.0
    chunks = [chunk for part in parts for chunk in _chunks(part, len(trained))]
    for chunk in chunks:
        change = np.subtract(trained[chunk], received[chunk], dtype=np.float64)
        square += float(np.square(change, out=change).sum())
    norm = square**0.5
    if norm > clip_norm:
        for chunk in chunks:
            part, base = trained[chunk], received[chunk]
            part[:] = base + (clip_norm / norm) * np.subtract(part, base, dtype=np.float64)


def _chunks(part: slice, size: int) -> list[slice]:
    first, last, _ = part.indices(size)
    return [slice(at, min(at + CHUNK, last)) for at in range(first, last, CHUNK)]
