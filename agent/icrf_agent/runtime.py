"""The cluster that computes: hosts, topology manager and gateway, on whatever substrate carries them.

:class:`HostedRuntime` implements :class:`icrf.ports.ClusterRuntime` once; a :class:`Substrate` (Ray, or inline
objects) only knows how to start things and how to call them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from icrf.errors import RoutingError, RunError
from icrf.exchange import CONSENSUS, MESSAGE, PARTIAL, UPDATE, Transfer
from icrf.ports import Arrival, ClusterFacts, ModelFile, PayloadHeader, PhaseReport
from icrf.protocol import CENTRALIZED, Activate, Activated, PeerAddress, Reserve, StartRound
from icrf_agent.host_nodes import HostSetup
from icrf_agent.topology_manager import Posting

ARRIVALS_POLL_S = 20.0
SEND_TIMEOUT_S = 120.0


class Actor(Protocol):
    """Something that lives elsewhere and can be called; raises IcrfErrors only."""

    async def call(self, method: str, *arguments: Any) -> Any: ...


@dataclass(frozen=True)
class Shared:
    """What all runs of a cluster share; no gateway where there is no other cluster."""

    manager: Actor
    gateway: Actor | None


class Substrate(Protocol):
    """Where hosts live."""

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        """Connect and start the shared actors."""

    async def reserve(self, request: Reserve) -> None:
        """Reserve the slots of a run, all or none; R001, R003."""

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        """A host in slot `slot` of the run's reservation, named `name` in the run's namespace."""

    async def release(self, run_id: str) -> None:
        """Kill the run's hosts and give its slots back; harmless when nothing is there."""

    async def close(self) -> None:
        """End everything; harmless when called twice."""


@dataclass
class _Hosted:
    """A run on this cluster."""

    activation: Activate
    hosts: list[Actor]
    nodes: list[tuple[int, ...]]
    setting_up: asyncio.Future[Activated]
    position: tuple[int, int] = (0, 0)

    @cached_property
    def _slot_of(self) -> dict[int, int]:
        return {node: slot for slot, nodes in enumerate(self.nodes) for node in nodes}

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {node.id: index for index, node in enumerate(self.activation.nodes)}

    def index_of(self, node_id: str) -> int:
        if node_id not in self._index_of:
            raise RoutingError("P012", f"no node '{node_id}'", value=node_id)
        return self._index_of[node_id]

    def host_of(self, index: int) -> Actor:
        if index not in self._slot_of:
            owner = self.activation.clusters[self.activation.assignment[index]]
            raise RunError("F005", f"{self.activation.nodes[index].id} lives on cluster {owner}", value=owner)
        return self.hosts[self._slot_of[index]]

    def shares_host(self, index: int) -> bool:
        return len(self.nodes[self._slot_of[index]]) > 1

    @property
    def centralized(self) -> bool:
        return self.activation.flow == CENTRALIZED

    @cached_property
    def model_host(self) -> Actor:
        """The host that makes the global or consensus model, on the coordinator's cluster."""
        if self.centralized:
            for index, node in enumerate(self.activation.nodes):
                if "aggregate" in node.role.split("-"):
                    return self.host_of(index)
        return self.hosts[0]


class HostedRuntime:
    """See :class:`icrf.ports.ClusterRuntime`.

    Args:
        cluster: name of this cluster.
        substrate: where hosts live.
        templates: node classes of the submitting process, by ``local:NAME`` (one cluster only).
        allow: user code that may run here; None allows everything.
    """

    def __init__(
        self,
        cluster: str,
        substrate: Substrate,
        *,
        templates: Mapping[str, type] | None = None,
        allow: tuple[str, ...] | None = None,
    ) -> None:
        self._cluster, self._substrate = cluster, substrate
        self._templates = templates if templates is not None else {}
        self._allow = allow
        self._runs: dict[str, _Hosted] = {}
        self._shared: Shared | None = None
        self._closing = asyncio.Event()
        # Creating and releasing hosts must not overlap: what one makes, the other has to find.
        self._lifecycle = asyncio.Lock()

    async def start(self) -> ClusterFacts:
        facts, self._shared = await self._substrate.start(self._cluster)
        if self._shared.gateway:
            facts = replace(facts, gateway_address=await self._shared.gateway.call("address"))
        return facts

    async def reserve(self, request: Reserve) -> None:
        await self._substrate.reserve(request)

    async def activate(self, request: Activate) -> Activated:
        """Split this cluster's nodes over its slots in index order and set them up; repeating waits for the first."""
        async with self._lifecycle:
            run = self._runs.get(request.run_id)
            if run is None or run.activation.generation != request.generation:
                run = self._runs[request.run_id] = await self._create(request)
        return await run.setting_up

    async def _create(self, request: Activate) -> _Hosted:
        """The hosts of a run, about to set up their nodes."""
        here = request.clusters.index(self._cluster)
        local = [n for n, c in enumerate(request.assignment) if c == here]
        groups = _split(local, min(request.num_slots, len(local)))
        await self._manager.call("link", request)
        setups = [
            HostSetup(request, self._cluster, group, self._needed_templates(request), self._allow) for group in groups
        ]
        hosts = await asyncio.gather(
            *(
                self._substrate.create_host(setup, host_name(request, setup.nodes, slot), slot)
                for slot, setup in enumerate(setups)
            )
        )
        return _Hosted(request, list(hosts), groups, asyncio.ensure_future(self._set_up(request, hosts, setups)))

    async def _set_up(self, request: Activate, hosts: Sequence[Actor], setups: Sequence[HostSetup]) -> Activated:
        parts = await asyncio.gather(*(h.call("host_setup", s) for h, s in zip(hosts, setups, strict=True)))
        return Activated(
            request.run_id,
            request.generation,
            num_samples=tuple(pair for part in parts for pair in part.num_samples),
            absmax=_elementwise_max([p.absmax for p in parts]),
            state_hashes=b"".join(p.state_hashes for p in parts),
            model_hash="".join(p.model_hash for p in parts),
        )

    async def publish_model(self, run_id: str, start: StartRound) -> None:
        run = await self._begin(run_id, start)
        await run.model_host.call("host_publish_model", start)

    async def train(self, run_id: str, start: StartRound) -> PhaseReport:
        run = await self._begin(run_id, start)
        report = await self._on_all(run, "host_train", start)
        await self._send_letters(run, start.round, start.attempt)
        return report

    async def aggregate(self, run_id: str, start: StartRound) -> PhaseReport:
        run = self._run(run_id)
        if run.centralized:
            report: PhaseReport = await run.model_host.call("host_aggregate", start)
        else:
            report = await self._on_all(run, "host_aggregate", start)
        await self._send_letters(run, start.round, start.attempt)
        return report

    async def evaluate(self, run_id: str, start: StartRound) -> PhaseReport:
        run = self._run(run_id)
        report: PhaseReport = await run.model_host.call("host_evaluate", start)
        await self._send_letters(run, start.round, start.attempt)
        return report

    async def send_payload(self, run_id: str, start: StartRound, transfer: Transfer) -> None:
        run = self._run(run_id)
        posting, row = await self._posting_for(start, transfer)
        partial = transfer.kind in (PARTIAL, CONSENSUS)
        layout = run.activation.layout
        header = self._header(
            run,
            (start.round, start.attempt),
            transfer.kind,
            transfer.target,
            sender=transfer.sender,
            dtype="float64" if partial else layout[0].dtype,
            num_elements=sum(_size(t.shape) for t in layout),
            weight=posting.weight,
            recipients=transfer.recipients if partial else (),
        )
        assert self._shared is not None and self._shared.gateway is not None
        peer = self._peer(run, transfer.target)
        await self._shared.gateway.call("send", header, [posting.reference], row, peer, SEND_TIMEOUT_S)

    async def abort(self, run_id: str, round_number: int, attempt: int) -> None:
        await self._manager.call("abort", run_id, round_number, attempt)

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Payloads as the gateway accepts them."""
        gateway = self._shared.gateway if self._shared else None
        while gateway is not None and not self._closing.is_set():
            for arrival in await gateway.call("next_arrivals", ARRIVALS_POLL_S):
                yield arrival

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
        host = run.host_of(index)
        return host, not run.shares_host(index)

    async def send_message(self, run_id: str, recipients: Sequence[int], message: bytes) -> None:
        await self._manager.call("publish_supervisor", run_id, tuple(recipients), message)

    async def release(self, run_id: str) -> None:
        async with self._lifecycle:
            run = self._runs.pop(run_id, None)
            if run is not None:
                run.setting_up.cancel()
            try:
                if self._shared is not None:
                    await self._manager.call("unlink", run_id)
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

    # ------------------------------------------------------------ inside

    @property
    def _manager(self) -> Actor:
        assert self._shared is not None
        return self._shared.manager

    def _run(self, run_id: str) -> _Hosted:
        if run_id not in self._runs:
            raise RunError("F005", f"run {run_id[:8]} is not active on cluster {self._cluster}")
        return self._runs[run_id]

    async def _begin(self, run_id: str, start: StartRound) -> _Hosted:
        run = self._run(run_id)
        await self._manager.call("begin_round", run_id, start.generation, start.round, start.attempt)
        run.position = max(run.position, (start.round, start.attempt))
        return run

    async def _on_all(self, run: _Hosted, method: str, start: StartRound) -> PhaseReport:
        return merge_reports(await asyncio.gather(*(host.call(method, start) for host in run.hosts)))

    async def _posting_for(self, start: StartRound, transfer: Transfer) -> tuple[Posting, int]:
        """The posting that a transfer sends, and which row of it (-1: all)."""
        if transfer.kind in (PARTIAL, CONSENSUS):
            args = (start.run_id, start.round, start.attempt, transfer.kind)
            return await self._manager.call("cluster_partial", *args), -1
        postings = await self._manager.call("collect", start.run_id, start.round, start.attempt, transfer.kind)
        for posting in postings:
            if transfer.sender in posting.senders:
                row = posting.senders.index(transfer.sender) if transfer.kind == UPDATE else -1
                return posting, row
        raise RunError("F005", f"node {transfer.sender} has posted no {transfer.kind} in round {start.round}")

    async def _send_letters(self, run: _Hosted, round_number: int, attempt: int) -> None:
        """Letters to other clusters leave before the phase ends, so that they are there before the round commits."""
        if len(run.activation.clusters) == 1:
            return
        position = (round_number, attempt)
        bundles = await self._manager.call("take_outbox", run.activation.run_id, position)
        for target, bundle in bundles.items():
            header = self._header(run, position, MESSAGE, target, sender=-1, dtype="uint8", num_elements=len(bundle))
            assert self._shared is not None and self._shared.gateway is not None
            peer = self._peer(run, target)
            await self._shared.gateway.call("send_bytes", header, bundle, peer, SEND_TIMEOUT_S)

    def _header(self, run: _Hosted, position: tuple[int, int], kind: str, target: int, **parts: Any) -> PayloadHeader:
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

    def _peer(self, run: _Hosted, target: int) -> PeerAddress:
        name = run.activation.clusters[target]
        return next((p for p in run.activation.peers if p.cluster == name), PeerAddress(name, ""))

    def _needed_templates(self, request: Activate) -> dict[str, type]:
        return {name: kind for name, kind in self._templates.items() if name in request.config_json}


def host_name(request: Activate, nodes: Sequence[int], slot: int) -> str:
    """``{federation}/{node}`` where a node has a host of its own, else ``{federation}/host-{slot}``."""
    return f"{request.federation}/{request.nodes[nodes[0]].id if len(nodes) == 1 else f'host-{slot}'}"


def merge_reports(reports: Sequence[PhaseReport]) -> PhaseReport:
    """One report of a cluster from those of its hosts, in host order, which is node order."""
    sums: dict[str, tuple[int, int]] = {}
    for report in reports:
        for name, (numerator, weight) in report.metric_sums.items():
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + numerator, old[1] + weight)
    return PhaseReport(
        nodes=tuple(n for r in reports for n in r.nodes),
        overflow=tuple(sorted({t for r in reports for t in r.overflow})),
        absmax=_elementwise_max([r.absmax for r in reports]),
        metric_sums=sums,
        metrics={k: v for r in reports for k, v in r.metrics.items()},
        model_hash="".join(r.model_hash for r in reports),
        state_hashes=b"".join(r.state_hashes for r in reports),
        bytes_intra_cluster=sum(r.bytes_intra_cluster for r in reports),
    )


def _elementwise_max(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(max(column) for column in zip(*(r for r in rows if r), strict=True))


def _split(nodes: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Contiguous groups in index order whose sizes differ by one at most."""
    base, more = divmod(len(nodes), parts)
    sizes = [base + (k < more) for k in range(parts)]
    ends = [sum(sizes[: k + 1]) for k in range(parts)]
    return [tuple(nodes[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _size(shape: Sequence[int]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
