"""A state with its committed version and the one an open attempt has made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.errors import RoutingError
from icrf.protocol import StartRound

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HostHeld:
    """What a host says about itself.

    Attributes:
        life: another one after every restart of its process.
        generation: of the activation that is set up; 0 if there is none.
        nodes: node indices that are set up.
        rounds: the rounds whose states it can start from; empty if it keeps no state.
    """

    life: str
    generation: int = 0
    nodes: tuple[int, ...] = ()
    rounds: tuple[int, ...] = ()


class VersionedState:
    """Round r starts from committed round r-1; what attempt (r, a) makes waits until round r+1 says it was committed.

    Args:
        initial: the state to start from.
        round_number: the round after which it was committed; 0: before the first.
    """

    def __init__(self, initial: Array, round_number: int = 0) -> None:
        self.committed = initial
        self.round = round_number
        self._pending: tuple[int, int, Array] | None = None

    def rebase(self, start: StartRound) -> Array:
        """The committed state an attempt starts from; P003 if this host does not have it."""
        if self._pending and self._pending[0] == start.round - 1:
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
        """A buffer like the state's, reused where an abandoned attempt left one."""
        if self._pending:
            _, _, array = self._pending
            self._pending = None
            return array
        return np.empty_like(self.committed)
