"""A state with its committed version and the one an open attempt has made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from icrf.errors import RoutingError
from icrf.protocol import StartRound

# What a host answers while a phase runs on it.
CONTROL_METHODS = frozenset({"host_held", "host_leave_off"})
# An array, or a table of rows that may lie on disk.
State = TypeVar("State")


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


class VersionedState(Generic[State]):
    """Round r starts from committed round r-1; what attempt (r, a) makes waits until round r+1 says it was committed.

    Args:
        initial: the state to start from.
        round_number: the round after which it was committed; 0: before the first.
        recycle: whether `spare` may hand out buffers of states that are over; not where somebody may still look at
            them. Fresh pages for a large model take longer than filling them.
        like: makes an empty state of the same form.
    """

    def __init__(
        self,
        initial: State,
        round_number: int = 0,
        *,
        recycle: bool = False,
        like: Callable[[State], State] = np.empty_like,  # type: ignore[assignment]
    ) -> None:
        self.committed = initial
        self.round = round_number
        self._first = round_number
        self._recycle, self._like = recycle, like
        self._pending: tuple[int, int, State] | None = None
        self._over: State | None = None

    def rebase(self, start: StartRound) -> State:
        """The committed state an attempt starts from; P003 if this host does not have it."""
        if self._pending and self._pending[0] == start.round - 1:
            # The initial state may be shared with others, so it is never handed out again.
            self._over = self.committed if self._recycle and self.round > self._first else None
            self.round, _, self.committed = self._pending
            self._pending = None
        if self.round != start.round - 1:
            raise RoutingError("P003", f"round {start.round} starts from a state that is not here", value=self.round)
        return self.committed

    def stage(self, start: StartRound, state: State) -> None:
        """Keep what an attempt has made; a later attempt of the same round replaces it."""
        self._pending = (start.round, start.attempt, state)

    def at(self, round_number: int) -> State | None:
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
    def latest(self) -> State:
        """The newest state, for looking at a node between rounds."""
        return self._pending[2] if self._pending else self.committed

    def spare(self) -> State:
        """A buffer like the state's for what an attempt makes."""
        abandoned = self._pending[2] if self._pending and self._recycle else None
        self._pending = None
        found = self._over if self._over is not None else abandoned
        self._over = None
        return found if found is not None else self._like(self.committed)
