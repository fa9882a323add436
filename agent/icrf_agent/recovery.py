"""Brings back what died on a cluster: finds out who is alive and who is empty, and sets up again what can be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from icrf.errors import IcrfError, NodeError, make_error
from icrf_agent.host_notes import noted_residents, read_notes
from icrf_agent.host_state import HostHeld
from icrf_agent.substrate import Actor, Hosted, Shared, Substrate

log = logging.getLogger("icrf.agent")

ANSWER_S = 30.0
POLL_S = 0.1
MAX_DEATHS = 3
RETRY, RESTORE = "retry", "restore"
# The host's own name for what happens when one of these is the error of a step.
DEATHS = frozenset({"U003", "P003", "P030"})


class Healer:
    """Heals one cluster; its caller sees to it that one healing runs at a time.

    Args:
        cluster: its name.
        substrate: where actors live.
        alive: cleared while the cluster itself is gone; healing gives up then.
        warn: told (run id, text) of every host that died.
    """

    def __init__(
        self, cluster: str, substrate: Substrate, alive: asyncio.Event, warn: Callable[[str, str], None]
    ) -> None:
        self._cluster, self._substrate, self._alive, self._warn = cluster, substrate, alive, warn
        self._deaths: dict[tuple[str, int, str], int] = {}

    async def shared(self, shared: Shared, address: str, runs: Iterable[Hosted]) -> None:
        """Link all runs again in a manager that came back empty, and open a gateway that did.

        Raises:
            NodeError: U003 if one of them does not come back.
        """
        manager = shared.manager
        linked = await self.answer(manager, lambda: manager.call("linked"))
        for run in runs:
            activation = run.activation
            if linked.get(activation.run_id, (0,))[0] != activation.generation:
                await manager.call("link", activation)
                run.lost_mail = run.lost_mail or run.has_mail
                if run.position[0]:
                    await manager.call("begin_round", activation.run_id, activation.generation, *run.position)
                    # Some of what was posted in it, and ahead of it, is lost.
                    for position in sorted({run.position, max(run.position, run.tray.position)}):
                        await manager.call("abort", activation.run_id, *position)
                    run.tray.open((0, 0))
        if shared.gateway is not None:
            await self.answer(shared.gateway, lambda: self._substrate.open_gateway(address))

    async def hosts(self, run: Hosted) -> str:
        """``retry`` if all hosts of a run can start the open round again, else ``restore``.

        Raises:
            NodeError: U004 if a host died too often in the same round, U003 if one does not come back.
        """
        while True:
            if run.quarantine is not None:
                raise run.quarantine
            if not run.lives or run.lost_mail:
                return RESTORE
            found = await self.lives(run.hosts)
            await self._count(run, found)
            empty = [k for k, held in enumerate(found) if held.generation != run.activation.generation]
            if not run.active or any(run.keeps_state(k) for k in empty):
                return RESTORE
            if not empty:
                break
            try:
                await asyncio.gather(*(run.hosts[k].call("host_setup", run.setups[k]) for k in empty))
            except NodeError as error:
                # Its nodes' own code may kill it while it is set up: that counts too.
                if error.code != "U003":
                    raise
        parent = run.position[0] - 1
        here = all(parent in held.rounds for k, held in enumerate(found) if run.keeps_state(k))
        return RETRY if here or parent < 0 else RESTORE

    async def lives(self, hosts: Iterable[Actor]) -> list[HostHeld]:
        """What each host holds, once it answers."""
        return await asyncio.gather(*(self._held(host) for host in hosts))

    def forget(self, run_id: str) -> None:
        """The run is over."""
        self._deaths = {key: n for key, n in self._deaths.items() if key[0] != run_id}

    async def answer(self, actor: Actor, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask until there is an answer: an actor that died is waited for, one that hangs is killed first.

        Raises:
            NodeError: U003 if it does not come back, or the cluster itself is gone.
        """
        error: BaseException | None = None
        for _ in range(2):
            deadline = time.monotonic() + ANSWER_S
            while time.monotonic() < deadline and self._alive.is_set():
                try:
                    return await asyncio.wait_for(ask(), max(POLL_S, deadline - time.monotonic()))
                except TimeoutError as late:
                    error = late
                except IcrfError as refused:
                    # L004: the port of an earlier life of the gateway is not free yet.
                    if refused.code not in ("U003", "L004"):
                        raise
                    error = refused
                    await self._substrate.revive(actor, False)
                    await asyncio.sleep(POLL_S)
            if not self._alive.is_set():
                break
            await self._substrate.revive(actor, True)
        if isinstance(error, IcrfError):
            raise error
        raise NodeError("U003", f"it did not answer within {ANSWER_S:g} s", place=self._cluster) from error

    # ------------------------------------------------------------ inside

    async def _held(self, host: Actor) -> HostHeld:
        held: HostHeld = await self.answer(host, lambda: host.call("host_held"))
        return held

    async def _count(self, run: Hosted, found: list[HostHeld]) -> None:
        """Note every death since the last look; the third of a host in the same round ends it.

        A host that died for want of memory comes back with fewer active nodes, and that is not counted: as long as it
        has more than one there is something left to try.
        """
        dead = [slot for slot, held in enumerate(found) if held.life != run.lives[slot]]
        if not dead:
            return
        starved = await self._substrate.starved([run.lives[slot] for slot in dead])
        for slot in dead:
            was_starved = run.lives[slot] in starved
            run.lives[slot] = found[slot].life
            index, fault = read_notes(run.setups[slot].notes)
            if was_starved and self._shrink(run, slot):
                continue
            self._died(run, slot, index, "out of memory" if was_starved else fault)
        if run.quarantine is not None:
            raise run.quarantine

    def _shrink(self, run: Hosted, slot: int) -> bool:
        """Let half as many nodes be active as there were on a host; whether that is fewer."""
        setup = run.setups[slot]
        known = noted_residents(setup.notes)[0] or len(setup.nodes)
        active = min(known, len(setup.nodes), run.most_active or known)
        if active <= 1:
            return False
        most = active // 2
        run.allow_active(most)
        shortage = make_error(
            "R006",
            f"{run.host_label(slot)} was killed in round {run.position[0]} because memory ran out with {active} of its "
            f"{len(setup.nodes)} nodes active; hosts that are set up from now on keep at most {most} active",
            hint="resident_nodes and resident_memory_mb say it beforehand",
        )
        log.warning("%s: %s", self._cluster, shortage)
        self._warn(run.activation.run_id, str(shortage))
        return True

    def _died(self, run: Hosted, slot: int, index: int, fault: str) -> None:
        setup = run.setups[slot]
        host = setup.notes.rpartition("/")[2]
        key = (run.activation.run_id, run.position[0], host)
        deaths = self._deaths[key] = self._deaths.get(key, 0) + 1
        nodes = [index] if index in setup.nodes else list(setup.nodes)
        names = ", ".join(run.activation.nodes[i].id for i in nodes[:4]) + (", ..." if len(nodes) > 4 else "")
        last_words = fault or "killed by a signal, or it ended itself; its worker's log may say more"
        what = f"host of {names} died in round {run.position[0]}"
        log.warning("%s on %s (death %d): %s", what, self._cluster, deaths, last_words)
        self._warn(run.activation.run_id, f"{what} on {self._cluster} (death {deaths}): {last_words}")
        if deaths >= MAX_DEATHS:
            run.quarantine = NodeError(
                "U004",
                f"{names} died {deaths} times in round {run.position[0]}: {last_words}",
                place=f"{names} on {self._cluster}",
                hint="something it does ends its process",
            )
