"""How the phases of a round run on one cluster, and what passes between its hosts on the way.

A host hands what it has made to whoever called it, and gets along what this cluster knows of the attempt. So the
topology manager, which checks every edge and keeps what others collect, is called once per phase and not once per
host; where no other cluster can have posted anything, the next phase does not wait for it either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from icrf.errors import RoutingError
from icrf.ports import PhaseReport
from icrf.protocol import StartRound
from icrf_agent.host_tools import Worked
from icrf_agent.phase_reports import merge_reports
from icrf_agent.substrate import Actor, Hosted


class Phases:
    """Runs the phases of all runs of a cluster.

    Args:
        manager: the cluster's topology manager, which may be replaced.
    """

    def __init__(self, manager: Callable[[], Actor]) -> None:
        self._manager = manager

    async def begin(self, run: Hosted, start: StartRound) -> None:
        """Open the attempt; harmless when it is open."""
        position = (start.round, start.attempt)
        run.position = max(run.position, position)
        if run.tray.position == position:
            return
        await self.drop(run)
        await self._manager().call("begin_round", start.run_id, start.generation, start.round, start.attempt)
        if run.position != position:
            # A later attempt was begun meanwhile: the tray is that one's.
            raise _over(start)
        run.tray.open(position)

    async def on(self, run: Hosted, slots: Sequence[int], method: str, start: StartRound) -> PhaseReport:
        """One phase on the hosts in these slots; the cluster's report. P003 where the attempt is over, also because
        some of what was posted in it is lost."""
        if not run.tray.is_of(start):
            raise _over(start)
        worked = await self._call(run, slots, method, start)
        run.stateful.update(slot for slot, one in zip(slots, worked, strict=True) if one.report.node_states)
        await self._post(run, start, worked)
        seconds = {run.host_label(slot): one.seconds for slot, one in zip(slots, worked, strict=True)}
        return replace(merge_reports([one.report for one in worked]), seconds=seconds)

    async def publish(self, run: Hosted, start: StartRound) -> None:
        """Open the attempt while the hosts with an aggregator prepare what they send; then post that."""
        _, worked = await asyncio.gather(
            self.begin(run, start), self._call(run, run.aggregating_slots, "host_publish_model", start)
        )
        await self._post(run, start, worked)

    async def settle(self, run: Hosted) -> None:
        """Wait until the manager has taken in, or refused, all that was posted."""
        waiting, run.tray.waiting = run.tray.waiting, []
        await asyncio.gather(*waiting)

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

    async def _post(self, run: Hosted, start: StartRound, worked: Sequence[Worked]) -> None:
        postings = [posting for one in worked for posting in one.postings]
        if not postings:
            return
        if not run.tray.is_of(start):
            raise _over(start)
        if _is_alone(run):
            for posting in postings:
                run.tray.postings.setdefault((posting.kind, posting.senders), posting)
        telling = asyncio.ensure_future(self._manager().call("publish_all", postings))
        # Where the attempt fails for another reason, nobody asks any more what the manager said.
        telling.add_done_callback(lambda told: told.cancelled() or told.exception())
        run.tray.waiting.append(telling)
        if not _is_alone(run):
            await self.settle(run)


def _over(start: StartRound) -> RoutingError:
    """What a topology manager says too: whoever runs an attempt that is still open begins another one."""
    return RoutingError("P003", f"round {start.round} attempt {start.attempt} of run {start.run_id[:8]} is over here")


def _is_alone(run: Hosted) -> bool:
    """Whether nobody outside this cluster posts anything of a run."""
    return len(run.activation.clusters) == 1
