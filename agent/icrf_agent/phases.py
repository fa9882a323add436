"""How the phases of a round run on one cluster, and what passes between its hosts on the way.

A host hands what it has made to whoever called it, and gets along what this cluster knows of the attempt. So the
topology manager, which checks every edge and keeps what others collect, is called once per phase and not once per
host. Where no other cluster can have posted anything, hosts need nothing from it: it is told once per round, before
the cluster reports, and about headers only.

An attempt that nobody has asked for yet is run ahead: the one before is not over, so the manager does not hear that
it has begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from icrf.errors import RoutingError
from icrf.exchange import MODEL
from icrf.ports import PhaseReport
from icrf.protocol import StartRound
from icrf_agent.host_tools import Worked
from icrf_agent.phase_reports import merge_reports
from icrf_agent.substrate import Actor, Hosted

TRAIN = "host_train"


class Phases:
    """Runs the phases of all runs of a cluster.

    Args:
        manager: the cluster's topology manager, which may be replaced.
    """

    def __init__(self, manager: Callable[[], Actor]) -> None:
        self._manager = manager

    async def begin(self, run: Hosted, start: StartRound, ahead: bool = False) -> None:
        """Open the attempt; harmless when it is open."""
        position = (start.round, start.attempt)
        if run.lost_mail:
            raise _over(start)
        if ahead:
            if run.tray.position != position:
                run.tray.open(position)
            return
        run.position = max(run.position, position)
        if run.tray.position != position:
            await self.drop(run)
        elif run.tray.begun:
            return
        await self._manager().call("begin_round", start.run_id, start.generation, start.round, start.attempt)
        if run.position != position:
            # A later attempt was begun meanwhile: the tray is that one's.
            raise _over(start)
        if run.tray.position != position:
            run.tray.open(position)
        run.tray.begun = True

    async def on(
        self, run: Hosted, slots: Sequence[int], method: str, start: StartRound, ahead: bool = False
    ) -> PhaseReport:
        """One phase on the hosts in these slots; the cluster's report. P003 where the attempt is over, also because
        some of what was posted in it is lost."""
        if not run.tray.is_of(start):
            raise _over(start)
        if method != TRAIN:
            self._tell(run, start)
        worked = await self._call(run, slots, method, start)
        run.stateful.update(slot for slot, one in zip(slots, worked, strict=True) if one.report.node_states)
        run.has_mail = run.has_mail or any(one.letters for one in worked)
        await self._post(run, start, worked, ahead)
        seconds = {run.host_label(slot): one.seconds for slot, one in zip(slots, worked, strict=True)}
        return replace(merge_reports([one.report for one in worked]), seconds=seconds)

    async def publish(self, run: Hosted, start: StartRound, ahead: bool = False) -> None:
        """Open the attempt while the hosts with an aggregator prepare what they send; then post that."""
        worked: list[Worked] = []
        if ahead:
            # Who has made the new model has posted it for the next round in the same call.
            await self.begin(run, start, ahead)
            if not run.tray.has(MODEL):
                raise _over(start)
        else:
            _, worked = await asyncio.gather(
                self.begin(run, start), self._call(run, run.aggregating_slots, "host_publish_model", start)
            )
        await self._post(run, start, worked, ahead)

    async def settle(self, run: Hosted, start: StartRound) -> None:
        """Wait until the manager has taken in, or refused, all that was posted."""
        self._tell(run, start)
        await self._told(run)

    async def drop(self, run: Hosted) -> None:
        """Forget an attempt; a manager that hangs is not waited for, as what it has to say does not matter any more."""
        waiting = run.tray.waiting
        run.tray.open((0, 0))
        for telling in waiting:
            telling.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _call(self, run: Hosted, slots: Sequence[int], method: str, start: StartRound) -> list[Worked]:
        handed = tuple(run.tray.postings.values()) if _is_alone(run) else None
        worked: list[Worked] = await asyncio.gather(*(run.hosts[slot].call(method, start, handed) for slot in slots))
        return worked

    async def _post(self, run: Hosted, start: StartRound, worked: Sequence[Worked], ahead: bool) -> None:
        postings = [posting for one in worked for posting in one.postings]
        if postings and not run.tray.is_of(start):
            raise _over(start)
        run.tray.take(postings)
        if not _is_alone(run):
            self._tell(run, start, ahead)
            await self._told(run)

    def _tell(self, run: Hosted, start: StartRound, ahead: bool = False) -> None:
        """Tell the manager what it has not been told of an attempt: that it is open, and what was posted in it."""
        tray = run.tray
        if not tray.is_of(start) or not (tray.untold or (not tray.begun and not ahead)):
            return
        postings, tray.untold = tray.untold, []
        if _is_alone(run):
            # Nobody collects from it.
            postings = [replace(posting, reference=None) for posting in postings]
        if ahead:
            telling = self._manager().call("publish_all", postings)
        else:
            tray.begun, run.position = True, max(run.position, tray.position)
            telling = self._manager().call("take_in", start.run_id, start.generation, *tray.position, postings)
        told = asyncio.ensure_future(telling)
        # Where the attempt fails for another reason, nobody asks any more what the manager said.
        told.add_done_callback(lambda done: done.cancelled() or done.exception())
        tray.waiting.append(told)

    @staticmethod
    async def _told(run: Hosted) -> None:
        waiting, run.tray.waiting = run.tray.waiting, []
        await asyncio.gather(*waiting)


def _over(start: StartRound) -> RoutingError:
    """What a topology manager says too: whoever runs an attempt that is still open begins another one."""
    return RoutingError("P003", f"round {start.round} attempt {start.attempt} of run {start.run_id[:8]} is over here")


def _is_alone(run: Hosted) -> bool:
    """Whether nobody outside this cluster posts anything of a run."""
    return len(run.activation.clusters) == 1
