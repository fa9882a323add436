"""A state with its committed version and the one an open attempt has made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.errors import InternalError, RoutingError
from icrf.protocol import StartRound
from icrf.staleness import late_nodes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HostHeld:
    """What a host says about itself.

    Attributes:
        life: another one after every restart of its process.
        generation: of the activation that is set up; 0 if there is none.
        nodes: node indices that are set up.
        rounds: the rounds whose states it can start from; empty if it keeps no state.
        node_states: whether nodes of it have a durable state of their own.
    """

    life: str
    generation: int = 0
    nodes: tuple[int, ...] = ()
    rounds: tuple[int, ...] = ()
    node_states: bool = False


class VersionedState:
    """Round r starts from committed round r-1; what attempt (r, a) makes waits until round r+1 says it was committed.

    Args:
        initial: the state to start from.
        round_number: the round after which it was committed; 0: before the first.
        recycle: whether `spare` may hand out buffers of states that are over; not where somebody may still look at
            them. Fresh pages for a large model take longer than filling them.
    """

    def __init__(self, initial: Array, round_number: int = 0, *, recycle: bool = False) -> None:
        self.committed = initial
        self.round = round_number
        self._first = round_number
        self._recycle = recycle
        self._pending: tuple[int, int, Array] | None = None
        self._over: Array | None = None

    def rebase(self, start: StartRound) -> Array:
        """The committed state an attempt starts from; P003 if this host does not have it."""
        if self._pending and self._pending[0] == start.round - 1:
            # The initial state may be shared with others, so it is never handed out again.
            self._over = self.committed if self._recycle and self.round > self._first else None
            self.round, _, self.committed = self._pending
            self._pending = None
        if self.round != start.round - 1:
            raise RoutingError("P003", f"round {start.round} starts from a state that is not here", value=self.round)
        return self.committed

    def stage(self, start: StartRound, state: Array) -> None:
        """Keep what an attempt has made; a later attempt of the same round replaces it."""
        self._pending = (start.round, start.attempt, state)

    def at(self, round_number: int) -> Array | None:
        """The state of a round that is known to be committed, or None."""
        if self._pending and self._pending[0] == round_number:
            return self._pending[2]
        return self.committed if self.round == round_number else None

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds whose states are here."""
        pending = self._pending
        return (self.round, pending[0]) if pending else (self.round,)

    @property
    def latest(self) -> Array:
        """The newest state, for looking at a node between rounds."""
        return self._pending[2] if self._pending else self.committed

    def spare(self) -> Array:
        """A buffer like the state's for what an attempt makes."""
        abandoned = self._pending[2] if self._pending and self._recycle else None
        self._pending = None
        found = self._over if self._over is not None else abandoned
        self._over = None
        return found if found is not None else np.empty_like(self.committed)


class EarlierModels:
    """Global models of earlier rounds, for as long as late clusters owe updates that start from them.

    Args:
        models: those that were restored, by the round after which they were committed.
    """

    def __init__(self, models: Mapping[int, Array] | None = None) -> None:
        self._models = dict(models or {})

    def enter(self, start: StartRound, server: VersionedState, size: int) -> None:
        """An attempt begins, `server` is rebased already: keep the models that it or a later round will need, no others.

        Args:
            server: the aggregator's state, whose first `size` elements are the model.
        """
        needed = sorted({late.round - 1 for late in start.late} | {owed - 1 for owed in start.kept})
        found = {number: self._models.get(number) for number in needed}
        if server.round in found and found[server.round] is None:
            # The state's own buffer may be used again.
            found[server.round] = np.array(server.committed[:size])
        missing = [number for number, model in found.items() if model is None]
        if missing:
            raise InternalError("X001", f"round {start.round} needs the model of round {missing[0]}, which is not here")
        self._models = {number: model for number, model in found.items() if model is not None}

    def sent(self, start: StartRound, row: Array) -> Array:
        """What goes out in an attempt: `row` alone, or as the first of rows (1 + late, size), one per late round."""
        if not start.late:
            return row
        return np.stack([row, *(self._models[late.round - 1] for late in start.late)])

    @property
    def by_round(self) -> Mapping[int, Array]:
        """The models that are kept."""
        return self._models


def row_for(start: StartRound, recipients: Collection[int]) -> int:
    """Which row of :meth:`EarlierModels.sent` these nodes of one cluster train from; -1: there is but one."""
    if not start.late:
        return -1
    late = late_nodes(start.late)
    owed = next((late[node] for node in recipients if node in late), None)
    return 0 if owed is None else 1 + start.late.index(owed)
