"""The cluster that computes: hosts, topology manager and gateway, on whatever substrate carries them.

:class:`HostedRuntime` implements :class:`icrf.ports.ClusterRuntime` once; a :class:`Substrate` (Ray, or inline
objects) only knows how to start things and how to call them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from icrf.errors import IcrfError, NodeError, ResourceError, RoutingError, RunError
from icrf.exchange import EXACT, MESSAGE, OF_A_CLUSTER, UPDATE, Transfer, num_elements
from icrf.ports import Arrival, ClusterFacts, LinkSpeed, ModelFile, PayloadHeader, PhaseReport
from icrf.protocol import (
    Activate,
    Activated,
    HeldRun,
    PeerAddress,
    Relink,
    Reserve,
    StartRound,
    element_type,
    shared_size,
)
from icrf.update import elementwise_max
from icrf_agent.gateway_coding import coding_of
from icrf_agent.host_late import row_for
from icrf_agent.host_nodes import HostSetup
from icrf_agent.phases import TRAIN, Phases
from icrf_agent.postings import Posting
from icrf_agent.recovery import DEATHS, RESTORE, Healer
from icrf_agent.substrate import Actor, Hosted, Shared, Substrate, host_name, split_nodes

log = logging.getLogger("icrf.agent")

ARRIVALS_POLL_S = 20.0
MEND_AGAIN_S = 1.0
SEND_TIMEOUT_S = 120.0


class HostedRuntime:
    """See :class:`icrf.ports.ClusterRuntime`.

    Args:
        cluster: name of this cluster.
        substrate: where hosts live.
        templates: node classes of the submitting process, by ``local:NAME`` (one cluster only).
        allow: user code that may run here; None allows everything.
        notes: folder where hosts note what they run, the same in every life of the agent; None: a temporary one.
        warn: told (run id, text) when a host of a run has died.
    """

    def __init__(
        self,
        cluster: str,
        substrate: Substrate,
        *,
        templates: Mapping[str, type] | None = None,
        allow: tuple[str, ...] | None = None,
        notes: Path | None = None,
        warn: Callable[[str, str], None] | None = None,
    ) -> None:
        self._cluster, self._substrate = cluster, substrate
        self._templates = templates if templates is not None else {}
        self._allow = allow
        self._runs: dict[str, Hosted] = {}
        self._shared: Shared | None = None
        self._closing = asyncio.Event()
        self._alive, self._healing = asyncio.Event(), asyncio.Lock()
        self._healer = Healer(cluster, substrate, self._alive, warn or (lambda run_id, text: None))
        self._gateway_address = ""
        self._arrived: dict[str, set[PayloadHeader]] = {}
        self._notes, self._own_notes = notes, notes is None
        self._phases = Phases(lambda: self._manager)
        # Creating and releasing hosts must not overlap: what one makes, the other has to find.
        self._lifecycle = asyncio.Lock()

    async def start(self) -> ClusterFacts:
        return await self._started(*await self._substrate.start(self._cluster))

    async def _started(self, facts: ClusterFacts, shared: Shared) -> ClusterFacts:
        self._shared = shared
        if shared.gateway:
            self._gateway_address = await shared.gateway.call("address")
            facts = replace(facts, gateway_address=self._gateway_address)
        self._alive.set()
        return facts

    async def reserve(self, request: Reserve) -> None:
        """Reserve the slots; a cluster that is being rebuilt is waited for."""
        try:
            async with asyncio.timeout(request.deadline_s):
                await self._alive.wait()
        except TimeoutError as error:
            raise ResourceError("R003", f"cluster {self._cluster} was not rebuilt in time") from error
        await self._substrate.reserve(request)

    async def activate(self, request: Activate, checkpoint: bytes = b"") -> Activated:
        """Split this cluster's nodes over its slots in index order and set them up; repeating waits for the first."""
        async with self._lifecycle:
            run = self._runs.get(request.run_id)
            if run is not None and run.activation.generation > request.generation:
                over = f"generation {request.generation} of run {request.run_id[:8]} is over"
                raise RoutingError("P003", over, value=run.activation.generation)
            if run is None or run.activation.generation < request.generation or run.setting_up is None:
                run = await self._create(request, checkpoint)
        assert run.setting_up is not None
        return await run.setting_up

    async def _create(self, request: Activate, checkpoint: bytes) -> Hosted:
        """The hosts of a run, living ones kept, about to set up their nodes."""
        run_id = request.run_id
        setups = self._setups(request)
        run = Hosted(request, [s.nodes for s in setups], setups)
        if run_id in self._runs:
            run.allow_active(self._runs[run_id].most_active)
        loaded, mail = await asyncio.to_thread(run.loaded, checkpoint)
        async with self._healing:
            await self._healer.shared(self._require_shared(), self._gateway_address, self._runs.values())
            await self._manager.call("link", request, mail)
            earlier = self._runs.get(run_id)
            if earlier is not None and earlier.setting_up is not None:
                earlier.setting_up.cancel()
            self._runs[run_id] = run
            self._arrived.pop(run_id, None)
        names = [host_name(request, setup.nodes, slot) for slot, setup in enumerate(setups)]
        await self._substrate.keep_hosts(run_id, names)
        create = self._substrate.create_host
        run.hosts = list(
            await asyncio.gather(*(create(s, n, k) for k, (s, n) in enumerate(zip(setups, names, strict=True))))
        )
        if self._runs.get(run_id) is not run:
            raise NodeError("U003", f"the cluster was lost while run {run_id[:8]} was activated", place=self._cluster)
        run.setting_up = asyncio.ensure_future(self._set_up(run, loaded))
        return run

    async def _set_up(self, run: Hosted, loaded: Sequence[HostSetup]) -> Activated:
        request = run.activation
        run.lives = [held.life for held in await self._healer.lives(run.hosts)]
        parts = await asyncio.gather(*(h.call("host_setup", s) for h, s in zip(run.hosts, loaded, strict=True)))
        run.active = True
        return Activated(
            request.run_id,
            request.generation,
            num_samples=tuple(pair for part in parts for pair in part.num_samples),
            absmax=elementwise_max(p.absmax for p in parts),
            state_hashes=b"".join(p.state_hashes for p in parts),
            model_hash="".join(p.model_hash for p in parts),
        )

    async def adopt(self, request: Activate) -> HeldRun | None:
        """Take over what an earlier life of the agent has left, if it is whole."""
        run_id = request.run_id
        linked = await self._manager.call("linked")
        generation, *position = linked.get(run_id, (0, 0, 0))
        mine = self._address_in(request)
        if generation != request.generation or (mine and mine != self._gateway_address):
            return None
        setups = self._setups(request)
        run = Hosted(request, [s.nodes for s in setups], setups, position=(position[0], position[1]), active=True)
        for slot, setup in enumerate(setups):
            host = await self._substrate.find_host(run_id, host_name(request, setup.nodes, slot), slot)
            if host is None:
                return None
            run.hosts.append(host)
        found = await self._healer.lives(run.hosts)
        if any((held.generation, held.nodes) != (generation, s.nodes) for held, s in zip(found, setups, strict=True)):
            return None
        run.lives = [held.life for held in found]
        run.stateful = {slot for slot, held in enumerate(found) if held.node_states}
        run.has_mail = await self._manager.call("has_mail", run_id)
        self._runs[run_id] = run
        return HeldRun(run_id, generation, *run.position)

    async def checkpoint(self, run_id: str, round_number: int) -> bytes:
        if run_id not in self._runs:
            raise RunError("F006", f"no state of run {run_id[:8]} on {self._cluster}")
        run = self._run(run_id)
        if run.lost_mail:
            raise RunError("F006", f"no mail of round {round_number} on {self._cluster}")
        keepers = [host for slot, host in enumerate(run.hosts) if run.keeps_state(slot)]
        # The manager first: it is not busy with the round that goes on, and forgets letters as hosts forget states.
        asked = [self._manager.call("mail_after", run_id, round_number)]
        mail, *parts = await asyncio.gather(*asked, *(host.call("host_checkpoint", round_number) for host in keepers))
        return await asyncio.to_thread(run.checkpoint_from, parts, mail, round_number)

    async def recover(self, run_id: str, error: IcrfError) -> str:
        """See the port; concurrent calls heal one after the other, later ones find it done.

        Raises:
            NodeError: U004 naming the node whose host has died too often in the open round; U003 if something does
                not come back.
        """
        if self._alive.is_set() and error.code not in DEATHS:
            return ""
        async with self._healing:
            run = self._runs.get(run_id)
            try:
                if run is None or not self._alive.is_set():
                    return RESTORE
                await self._healer.shared(self._require_shared(), self._gateway_address, self._runs.values())
                return await self._healer.hosts(run)
            except IcrfError:
                # With the cluster gone, whatever failed on it is not the run's fault.
                if not self._alive.is_set():
                    return RESTORE
                raise

    async def lost(self) -> str:
        reason = await self._substrate.lost()
        self._alive.clear()
        return reason

    async def rebuild(self) -> ClusterFacts:
        self._alive.clear()
        async with self._healing:
            # What is being created on the lost cluster holds up nothing on the new one.
            self._lifecycle = asyncio.Lock()
            for run_id in list(self._runs):
                self._forget(run_id)
            return await self._started(*await self._substrate.rebuild(self._cluster))

    async def publish_model(self, run_id: str, start: StartRound, ahead: bool = False) -> None:
        await self._phases.publish(self._run(run_id), start, ahead)

    async def train(self, run_id: str, start: StartRound, ahead: bool = False) -> PhaseReport:
        run = self._run(run_id)
        await self._phases.begin(run, start, ahead)
        report = await self._phases.on(run, range(len(run.hosts)), TRAIN, start, ahead)
        await self._send_letters(run, start.round, start.attempt)
        return report

    async def aggregate(self, run_id: str, start: StartRound) -> PhaseReport:
        run = self._run(run_id)
        slots = [run.model_slot] if start.merge else run.aggregating_slots
        report = await self._phases.on(run, slots, "host_aggregate", start)
        await self._phases.settle(run, start)
        await self._send_letters(run, start.round, start.attempt)
        return report

    async def install(self, run_id: str, start: StartRound) -> PhaseReport:
        run = self._run(run_id)
        return await self._phases.on(run, run.aggregating_slots, "host_install", start)

    async def evaluate(self, run_id: str, start: StartRound) -> PhaseReport:
        run = self._run(run_id)
        report = await self._phases.on(run, [run.model_slot], "host_evaluate", start)
        await self._send_letters(run, start.round, start.attempt)
        return report

    async def adapt(self, run_id: str, start: StartRound) -> PhaseReport:
        run = self._run(run_id)
        return await self._phases.on(run, [run.model_slot], "host_adapt", start)

    async def relink(self, request: Relink) -> Activate:
        async with self._lifecycle:
            run = self._run(request.run_id)
            async with self._healing:
                await self._healer.shared(self._require_shared(), self._gateway_address, self._runs.values())
                # Nobody heals in between: a manager of another generation than the run's is taken for an empty one.
                await self._manager.call("relink", request)
                run.relink(request)
            await asyncio.gather(*(host.call("host_relink", request) for host in run.hosts))
            return run.activation

    async def send_payload(self, run_id: str, start: StartRound, transfer: Transfer) -> None:
        run = self._run(run_id)
        posting, row = await self._posting_for(start, transfer)
        layout, rows = run.activation.layout, run.activation.rows
        header = self._header(
            run,
            (start.round, start.attempt),
            transfer.kind,
            transfer.target,
            sender=transfer.sender,
            dtype="float64" if transfer.kind in EXACT else element_type(layout),
            num_elements=num_elements(transfer.kind, shared_size(layout), rows, len(posting.senders)),
            weight=posting.weight,
            recipients=transfer.recipients if transfer.kind in EXACT else (),
            coding=coding_of(run.codec, transfer.kind),
        )
        peer = self._peer(run, transfer.target)
        await self._gateway.call("send", header, [posting.reference], row, peer, SEND_TIMEOUT_S)

    async def abort(self, run_id: str, round_number: int, attempt: int, leave_off: bool = False) -> None:
        run = self._runs.get(run_id)
        if run is not None and run.tray.position <= (round_number, attempt):
            await self._phases.drop(run)
        if not self._alive.is_set():
            return  # nothing of it is left
        if run is not None and leave_off:
            # A host that is dead or hangs is found out about by whoever needs it.
            asked = (host.call("host_leave_off", round_number, attempt) for host in run.hosts)
            await asyncio.gather(*asked, return_exceptions=True)
        async with self._healing:  # a manager that died in silence, while no step ran here, is linked again
            await self._healer.shared(self._require_shared(), self._gateway_address, self._runs.values())
        await self._manager.call("abort", run_id, round_number, attempt)

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Payloads as the gateway accepts them; goes on after the gateway, or the cluster, was replaced."""
        cursor = ("", 0)
        while not self._closing.is_set():
            await self._alive.wait()
            gateway = self._require_shared().gateway
            if gateway is None:
                return
            try:
                newer, found = await gateway.call("next_arrivals", ARRIVALS_POLL_S, cursor)
                missed: list[Arrival] = []
                if cursor[0] not in ("", newer[0]):
                    # What an earlier life of the gateway took in, and told nobody, is known to the manager.
                    missed = await self._manager.call("arrived")
                cursor = newer
            except IcrfError as error:
                if error.code != "U003":
                    raise
                await self._mend_gateway()
                continue
            for arrival in missed:
                if self._is_new(arrival.header):
                    yield arrival
            for arrival in found:
                # A gateway tells of letters once, and those of two phases may have equal headers.
                if self._is_new(arrival.header) or (arrival.header.kind == MESSAGE and not missed):
                    yield arrival

    async def _mend_gateway(self) -> None:
        if self._closing.is_set() or not self._alive.is_set():
            return
        try:
            async with self._healing:
                await self._healer.shared(self._require_shared(), self._gateway_address, self._runs.values())
        except IcrfError as error:
            log.warning("the gateway of %s: %s", self._cluster, error)
            await asyncio.sleep(MEND_AGAIN_S)

    def _is_new(self, header: PayloadHeader) -> bool:
        """Whether an arrival was not handed out before; those of finished rounds are forgotten."""
        if header.kind == MESSAGE and header.run_id in self._runs:
            self._runs[header.run_id].has_mail = True
        known = self._arrived.setdefault(header.run_id, set())
        if header in known:
            return False
        if all(header.round > other.round for other in known):
            known = self._arrived[header.run_id] = {h for h in known if h.round == header.round - 1}
        known.add(header)
        return True

    async def final_model(self, run_id: str, round_number: int) -> ModelFile:
        model: ModelFile = await self._run(run_id).model_host.call("host_model", round_number)
        return model

    async def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        run = self._run(run_id)
        index = run.index_of(node_id)
        result: bytes = await run.host_of(index).call("host_call", index, method, arguments)
        await self._send_letters(run, *run.position)
        return result

    def actor_of(self, run_id: str, index: int) -> tuple[Actor, bool]:
        """The actor of a node's host, and whether the node has it alone."""
        run = self._run(run_id)
        return run.host_of(index), not run.shares_host(index)

    async def send_message(self, run_id: str, recipients: Sequence[int], message: bytes) -> None:
        await self._manager.call("publish_supervisor", run_id, tuple(recipients), message)

    async def measure(self, peer: PeerAddress) -> LinkSpeed:
        return await self._gateway.call("measure", self._cluster, peer)  # type: ignore[no-any-return]

    async def release(self, run_id: str) -> None:
        async with self._lifecycle:
            self._forget(run_id)
            try:
                if self._shared is not None and self._alive.is_set():
                    await self._manager.call("unlink", run_id)
                    if self._shared.gateway is not None:
                        await self._shared.gateway.call("forget", run_id)
            except NodeError as error:
                # A manager or a gateway that died comes back without it.
                if error.code != "U003":
                    raise
            finally:
                await self._substrate.release(run_id)

    async def close(self) -> None:
        self._closing.set()
        try:
            for run_id in list(self._runs):
                await self.release(run_id)
        finally:
            self._shared = None
            await self._substrate.close()
            if self._own_notes and self._notes is not None:
                await asyncio.to_thread(shutil.rmtree, self._notes, True)

    # ------------------------------------------------------------ inside

    @property
    def _manager(self) -> Actor:
        return self._require_shared().manager

    @property
    def _gateway(self) -> Actor:
        gateway = self._require_shared().gateway
        assert gateway is not None
        return gateway

    def _require_shared(self) -> Shared:
        assert self._shared is not None
        return self._shared

    def _forget(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        self._arrived.pop(run_id, None)
        self._healer.forget(run_id)
        if run is not None:
            if run.setting_up is not None:
                run.setting_up.cancel()
            shutil.rmtree(self._notes_of(run_id), ignore_errors=True)

    def _notes_of(self, run_id: str) -> Path:
        if self._notes is None:
            self._notes = Path(tempfile.mkdtemp(prefix="icrf-notes-"))
        return self._notes / quote(run_id, safe="").replace(".", "%2E")

    def _setups(self, request: Activate) -> list[HostSetup]:
        """One setup per host; equal for equal requests, whoever asks."""
        here = request.clusters.index(self._cluster)
        local = [n for n, c in enumerate(request.assignment) if c == here]
        folder = self._notes_of(request.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        templates = self._needed_templates(request)
        return [
            HostSetup(request, self._cluster, group, templates, self._allow, str(folder / f"host-{slot}"))
            for slot, group in enumerate(split_nodes(local, min(request.num_slots, len(local))))
        ]

    def _address_in(self, request: Activate) -> str:
        return next((peer.address for peer in request.peers if peer.cluster == self._cluster), "")

    def _run(self, run_id: str) -> Hosted:
        if run_id not in self._runs or not self._runs[run_id].hosts:
            raise RunError("F005", f"run {run_id[:8]} is not active on cluster {self._cluster}")
        return self._runs[run_id]

    async def _posting_for(self, start: StartRound, transfer: Transfer) -> tuple[Posting, int]:
        """The posting that a transfer sends, and which row of it (-1: all)."""
        if transfer.kind in OF_A_CLUSTER:
            args = (start.run_id, start.round, start.attempt, transfer.kind, transfer.recipients or None)
            return await self._manager.call("cluster_posting", *args), -1
        asked = (start.run_id, start.round, start.attempt, transfer.kind, transfer.sender)
        posting, row = await self._manager.call("posted_by", *asked)
        return posting, row if transfer.kind == UPDATE else row_for(start, transfer.recipients)

    async def _send_letters(self, run: Hosted, round_number: int, attempt: int) -> None:
        """Letters to other clusters leave before the phase ends, so that they are there before the round commits."""
        if len(run.activation.clusters) == 1:
            return
        position = (round_number, attempt)
        run_id = run.activation.run_id
        bundles = await self._manager.call("outbox", run_id, position)
        for target, (number, bundle) in bundles.items():
            header = self._header(run, position, MESSAGE, target, sender=-1, dtype="uint8", num_elements=len(bundle))
            await self._gateway.call("send_bytes", header, bundle, self._peer(run, target), SEND_TIMEOUT_S)
            await self._manager.call("acknowledge", run_id, position, target, number)

    def _header(self, run: Hosted, position: tuple[int, int], kind: str, target: int, **parts: Any) -> PayloadHeader:
        return PayloadHeader(
            run_id=run.activation.run_id,
            generation=run.activation.generation,
            round=position[0],
            attempt=position[1],
            kind=kind,
            source=self._cluster,
            target=run.activation.clusters[target],
            **parts,
        )

    def _peer(self, run: Hosted, target: int) -> PeerAddress:
        name = run.activation.clusters[target]
        return next((p for p in run.activation.peers if p.cluster == name), PeerAddress(name, ""))

    def _needed_templates(self, request: Activate) -> dict[str, type]:
        return {name: kind for name, kind in self._templates.items() if name in request.config_json}
