"""A whole fabric of N clusters inside this process, without Ray, over real sockets and lines that can be bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icrf.ports import AgentLink, PayloadTransport
from icrf.testing.inline import InlineFabric
from icrf.wan import WanLine, WanLines, WanShape
from icrf.wire.agent_link import GrpcAgentLink
from icrf.wire.identity import CLUSTER, Identity
from icrf.wire.tls import TlsFiles
from icrf_agent.gateway import GrpcTransport
from icrf_agent.gateway_delivery import WINDOW_BYTES
from icrf_agent.service import AgentIdentity
from icrf_mediator.certs import init_authority, issue
from icrf_mediator.server import MediatorServer
from icrf_mediator.service import MediatorService

_STOP_S = 0.2


class SocketFabric(InlineFabric):
    """An :class:`InlineFabric` whose agents dial the mediator, and whose gateways dial each other, over gRPC.

    All of it passes the lines of the clusters, which count it: payloads that come to a cluster, and what its agent and
    the mediator say to each other.

    Args:
        clusters: how many, or their names.
        relay: payloads go through the mediator instead of from gateway to gateway.
        wan: what the lines do, all of them or by cluster; by default they only count.
        certs: an empty folder for an authority: then all of it is encrypted, and everybody shows a certificate of it.
        window_bytes: how far senders of payloads may be ahead of what is verified.
        options: see :class:`InlineFabric`.
    """

    def __init__(
        self,
        clusters: int | Sequence[str] = 2,
        *,
        relay: bool = False,
        wan: WanShape | Mapping[str, WanShape] | None = None,
        certs: Path | None = None,
        window_bytes: int = WINDOW_BYTES,
        **options: Any,
    ) -> None:
        names = [f"local-{k + 1}" for k in range(clusters)] if isinstance(clusters, int) else list(clusters)
        self._relay, self._lines = relay, WanLines(names, wan or WanShape())
        self._window = window_bytes
        self._mediator_tls: TlsFiles | None = None
        self._tls: dict[str, TlsFiles | None] = dict.fromkeys(names)
        if certs is not None:
            self._mediator_tls = TlsFiles.at(init_authority(certs))
            self._tls = {name: TlsFiles.at(issue(certs, Identity(CLUSTER, name))) for name in names}
        self._server: MediatorServer | None = None
        self._ways_out: dict[str, str] = {}
        self._payload_ways: dict[str, str] = {}
        super().__init__(names, **options)

    @property
    def mediator_address(self) -> str:
        """``HOST:PORT`` of the mediator, past all lines."""
        assert self._server is not None
        return self._server.address

    @property
    def lines(self) -> dict[str, WanLine]:
        """The line of each cluster."""
        return self._lines.lines

    def payload_way(self, cluster: str) -> str:
        """The way over which payloads come to a cluster: its gateway's address, or its way to the relay."""
        return self._payload_ways[cluster]

    def payload_bytes(self) -> int:
        """What the sockets between gateways have carried, in both directions; without `relay`, all payloads."""
        return self._lines.payload_bytes()

    def _new_service(self) -> MediatorService:
        return MediatorService(self.store, self.blobs, self._clock, self._policy, reach=self._reach)

    def _reach(self, cluster: str, address: str) -> str:
        if not address:
            return ""
        way = self._payload_ways[cluster] = self._lines.reach(cluster, address)
        return way

    async def _start(self, names: Sequence[str]) -> MediatorService:
        # The agents dial as soon as they are made.
        service = await super()._start([])
        self._server = MediatorServer(service, "127.0.0.1:0", tls=self._mediator_tls)
        await self._server.start()
        for name in names:
            self._ways_out[name] = self._lines.way_out(name, self._server.address)
            await self._add(service, name)
        return service

    def _transport(self, identity: AgentIdentity) -> PayloadTransport:
        listen = None if self._relay else "127.0.0.1:0"
        # A way of its own, so that payloads can be cut off while the agent is not.
        relay = self._payload_ways[identity.cluster] = self._lines.way_out(identity.cluster, self.mediator_address)
        holder = identity.agent_id or identity.incarnation
        tls = self._tls[identity.cluster]
        return GrpcTransport(listen, relay, identity.cluster, holder, window_bytes=self._window, tls=tls)

    def _link(self, cluster: str) -> AgentLink:
        return GrpcAgentLink(self._ways_out[cluster], tls=self._tls[cluster])

    async def _stop(self) -> None:
        await super()._stop()
        if self._server is not None:
            await self._server.stop(_STOP_S)

    def close(self) -> None:
        """Stop agents, mediator and lines; harmless when called twice."""
        super().close()
        self._lines.close()
