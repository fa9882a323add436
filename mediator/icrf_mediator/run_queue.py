"""A run that waits for room: in line, and between two tries to reserve. Pure."""

from __future__ import annotations

import hashlib

from icrf.errors import IcrfError, ResourceError
from icrf.protocol import FAILED, QUEUED, RESERVING, Release
from icrf_mediator.effects import Effects, Now
from icrf_mediator.holdings import Holding
from icrf_mediator.placement import Placement
from icrf_mediator.run_base import NEVER, RunBase

FIRST_PAUSE_S, MAX_PAUSE_S = 4.0, 60.0


class RunQueue(RunBase):
    """What a run does before it has its slots."""

    # When a refused reservation is tried again; NEVER while none has to be.
    _rest_until_s = NEVER
    _queue_until_s = NEVER
    # After a restart of the mediator, until when clusters that were there before may register again.
    _expects_until_s = 0.0
    _tries = 0
    _refusal = ""

    @property
    def is_queued(self) -> bool:
        """Whether it waits for room, and holds nothing but what is still being given back."""
        return self.info.status == QUEUED

    @property
    def held_since(self) -> float:
        """When it got in line for the last time with success, in seconds since the epoch, for display."""
        since = 0.0
        for event in self.events:
            if event.kind == "status" and event.status == QUEUED:
                since = 0.0
            elif event.kind == "status" and event.status == RESERVING:
                since = since or event.at
        return since

    def needs(self, placement: Placement, since_wall_s: float) -> dict[str, Holding]:
        """What it holds, or would hold, by cluster."""
        slots = placement.slots
        return {
            c: Holding(self.info.federation, slots[c], placement.resources[c], since_wall_s) for c in placement.clusters
        }

    def queued(self, effects: Effects, now: Now, waiting_for: str) -> None:
        """Say what a queued run waits for, once per reason."""
        self.record.waits(effects, now, waiting_for)

    def not_yet(self, now: Now) -> str:
        """Why it cannot try to reserve now, however much is free; empty if it can."""
        if self._held:
            return f"{', '.join(sorted(self._held))} to take back what was reserved; {self._refusal}"
        return self._refusal if now.monotonic_s < self._rest_until_s != NEVER else ""

    def expects_clusters(self, now: Now) -> bool:
        """Whether clusters that it was submitted for may still be on their way back."""
        return now.monotonic_s < self._expects_until_s

    def wakes(self, now: Now) -> bool:
        """True once after every rest."""
        if not self.is_queued or now.monotonic_s < self._rest_until_s:
            return False
        self._rest_until_s = NEVER
        return True

    def requeue(self, effects: Effects, now: Now, error: IcrfError) -> None:
        """A cluster could not reserve in time: give back what the others hold, and try again when all have done so.

        Nodes that were about to move by choice go on where they lived before.

        Whoever holds the rest is no run of this mediator, or there would have been no try; it may be another fabric's,
        which waits for what this run holds. So nothing is held on to, and the pause depends on the run: of two that
        are in each other's way, one is sooner.
        """
        for cluster in sorted(self._held):
            effects.send(cluster, Release(self.run_id, self.generation))
        before, self._instead_of = self._instead_of, None
        if before is not None:
            self._place(before)
        self._pending, self._storing = {}, False
        for names in (self._away, self._excluded, self._returning, self._late):
            names.clear()
        self._rest_until_s = now.monotonic_s + pause_s(self.run_id, self._tries)
        self._tries += 1
        self._refusal = f"another try: {error.message}"
        if error.hint:
            self._refusal += f" ({error.hint})"
        self._wait_from(now)
        self._deadline_s = NEVER
        self.record.change(clusters=())
        self.record.status(effects, now, QUEUED, self._refusal)

    def rejoin_queue(self, effects: Effects, now: Now) -> None:
        """After a restart of the mediator: in line again; where it was placed before, something may be left of it."""
        self._held = set(self.placement.clusters) if self.placement else set()
        self._expects_until_s = self._rest_until_s = now.monotonic_s + self._lease_s
        self._wait_from(now)
        self.record.status(effects, now, QUEUED)

    def _wait_from(self, now: Now) -> None:
        """Its patience runs from now on, unless it does already."""
        patience = self.config.get("queue_deadline_s")
        if patience is not None:
            self._queue_until_s = min(self._queue_until_s, now.monotonic_s + float(patience))

    def _has_room(self) -> None:
        """It has got what it waited for."""
        self._queue_until_s, self._tries = NEVER, 0

    def _tick_queued(self, effects: Effects, now: Now) -> None:
        if now.monotonic_s < self._queue_until_s:
            return
        patience = f"{float(self.config['queue_deadline_s']):g} s"
        error = ResourceError(
            "R003", f"no room within {patience}: it waited for {self.info.waiting_for}", place="queue_deadline_s"
        )
        self._end(effects, now, FAILED, error)


def pause_s(run_id: str, tries: int) -> float:
    """How long a run rests after so many refusals before: longer every time, and for every run differently."""
    drawn = hashlib.sha256(f"{run_id}/{tries}".encode()).digest()
    share = int.from_bytes(drawn[:8], "big") / 2**64
    longest: float = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0**tries)
    return longest * share
