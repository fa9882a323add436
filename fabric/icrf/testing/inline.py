"""A whole fabric of N clusters inside this process, without Ray and without sockets.

Mediator, agents, hosts, topology managers and gateways are the real ones; only what carries them differs. A
federation of ten nodes over three clusters runs in a second, with the bits it has on real clusters.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType

from icrf.daemon import MonotonicClock
from icrf.loop_thread import LoopThread
from icrf.ports import AgentLink, Clock, MediatorPort, PayloadTransport
from icrf.protocol import Capacity, Warned
from icrf_agent.gateway_inproc import InProcessTransport, TransportHub
from icrf_agent.inline_substrate import InlineCpus, InlineSubstrate
from icrf_agent.runtime import HostedRuntime
from icrf_agent.service import AgentIdentity, AgentService
from icrf_mediator.blobs import MemoryBlobs
from icrf_mediator.inprocess import InProcessLink, InProcessMediator
from icrf_mediator.mediator import Policy
from icrf_mediator.service import MediatorService
from icrf_mediator.store import MemoryStore


class InlineFabric:
    """Starts the fabric; a context manager.

    Args:
        clusters: how many, or their names.
        num_slots: hosts per cluster.
        templates: node classes by ``local:NAME``.
        labels: labels by cluster name.
        cpus: what clusters reserve from, by name, where somebody else does too; else each has enough.
        quota: slots of a cluster that one federation may hold at once; 0: all.
        policy: times of the mediator.
        clock: the mediator's time; by default that of this machine.

    Attributes:
        agents: the agents by cluster name.
        substrates: what carries their hosts, and kills them on command.
    """

    def __init__(
        self,
        clusters: int | Sequence[str] = 1,
        *,
        num_slots: int = 2,
        templates: Mapping[str, type] | None = None,
        labels: Mapping[str, Mapping[str, str]] | None = None,
        cpus: Mapping[str, InlineCpus] | None = None,
        quota: int = 0,
        policy: Policy | None = None,
        clock: Clock | None = None,
    ) -> None:
        names = [f"local-{k + 1}" for k in range(clusters)] if isinstance(clusters, int) else list(clusters)
        self._thread = LoopThread("icrf-inline-fabric")
        self._hub = TransportHub()
        self.store, self.blobs = MemoryStore(), MemoryBlobs()
        self._capacity = Capacity(num_slots, float(num_slots), 0.0, 1 << 33, quota=quota)
        self._cpus = dict(cpus or {})
        self._templates = dict(templates or {})
        self._labels = {k: dict(v) for k, v in (labels or {}).items()}
        self._policy, self._clock = policy, clock or MonotonicClock()
        self._current: MediatorService | None = None
        self.agents: dict[str, AgentService] = {}
        self.substrates: dict[str, InlineSubstrate] = {}
        self._serving: list[asyncio.Task[None]] = []
        self.service: MediatorService = self._thread.call(self._start(names))
        self.port: MediatorPort = InProcessMediator(self.service, self._thread.loop)

    def _new_service(self) -> MediatorService:
        return MediatorService(self.store, self.blobs, self._clock, self._policy)

    def _transport(self, identity: AgentIdentity) -> PayloadTransport:
        """How payloads travel from and to a cluster."""
        return InProcessTransport(self._hub, identity.cluster)

    def _link(self, cluster: str) -> AgentLink:
        """How its agent talks to the mediator."""
        return InProcessLink(lambda: self._current)

    async def _start(self, names: Sequence[str]) -> MediatorService:
        service = self._new_service()
        await service.start()
        self._current = service
        for name in names:
            await self._add(service, name)
        return service

    async def _add(self, service: MediatorService, name: str) -> None:
        identity = AgentIdentity(name, uuid.uuid4().hex, self._labels.get(name, {}))
        substrate = InlineSubstrate(self._capacity, lambda: self._transport(identity))
        if name in self._cpus:
            substrate.cpus = self._cpus[name]
        self.substrates[name] = substrate
        link = self._link(name)
        runtime = HostedRuntime(
            name,
            substrate,
            templates=self._templates,
            warn=lambda run_id, text: link.report(Warned(run_id, text)),
        )
        agent = AgentService(identity, link, runtime)
        await agent.start()
        self._serving.append(asyncio.create_task(agent.serve()))
        await agent.registered.wait()
        self.agents[name] = agent

    def restart_mediator(self) -> None:
        """The mediator dies without a word, and a new one starts on its journal."""
        self._thread.call(self._restart())
        self.port = InProcessMediator(self.service, self._thread.loop)

    async def _restart(self) -> None:
        old, self._current = self.service, None
        await old.stop()
        self.service = self._new_service()
        await self.service.start()
        self._current = self.service

    def stop_agent(self, name: str) -> None:
        """An agent leaves at once; nothing is left of what lived on its cluster."""
        self._thread.call(self.agents.pop(name).stop())

    def start_agent(self, name: str) -> None:
        """An agent for a cluster that has none."""
        assert self._current is not None
        self._thread.call(self._add(self._current, name))

    def close(self) -> None:
        """Stop agents and mediator; harmless when called twice."""
        if self._thread.loop.is_closed():
            return
        self._thread.call(self._stop())
        self._thread.close()

    async def _stop(self) -> None:
        for agent in self.agents.values():
            await agent.stop()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self.service.stop()

    def __enter__(self) -> InlineFabric:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
