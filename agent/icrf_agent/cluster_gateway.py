"""The gateway of a cluster: payloads of its nodes leave here, payloads of other clusters come in and are checked.

A plain, thread-safe class around a :class:`~icrf.ports.PayloadTransport`; on Ray it is a threaded detached actor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrf.exchange import MESSAGE
from icrf.ports import Arrival, PayloadHeader, PayloadTransport
from icrf.protocol import PeerAddress
from icrf_agent.gateway import GrpcTransport
from icrf_agent.topology_manager import HybridTopologyManager, References


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway on sockets is reached.

    Attributes:
        listen: ``HOST:PORT`` to accept peers on (port 0: any); None takes payloads through the relay only.
        relay: address of the mediator's relay.
    """

    cluster: str
    incarnation: str
    listen: str | None
    relay: str | None

    def transport(self) -> PayloadTransport:
        return GrpcTransport(self.listen, self.relay, self.cluster, self.incarnation)


class HybridClusterGateway:
    """Sends and receives payloads for one cluster.

    Args:
        transport: how payloads travel; it is opened at once.
        manager: decides whether a payload may come in.
        references: the cluster's object store.
    """

    def __init__(
        self, transport: Callable[[], PayloadTransport], manager: HybridTopologyManager, references: References
    ) -> None:
        self._manager, self._references = manager, references
        self._arrivals: list[Arrival] = []
        self._came = threading.Condition()
        self._closed = False
        self._transport = transport()
        self._address = self._transport.serve(self._receive)

    def address(self) -> str:
        """Where peers can dial it; empty if only the relay reaches it."""
        return self._address

    def send(self, header: PayloadHeader, reference: Any, row: int, peer: PeerAddress, timeout_s: float) -> None:
        """Send a posted array, or one row of it (row >= 0); returns when the peer has accepted it."""
        array = self._references.get(reference)
        if row >= 0:
            array = array.reshape(-1, header.num_elements)[row]
        self._transport.send(header, np.ascontiguousarray(array).reshape(-1), peer, timeout_s)

    def send_bytes(self, header: PayloadHeader, data: bytes, peer: PeerAddress, timeout_s: float) -> None:
        """Send encoded letters."""
        self._transport.send(header, np.frombuffer(data, np.uint8), peer, timeout_s)

    def next_arrivals(self, wait_s: float) -> list[Arrival]:
        """Payloads that came since the last call, each once; waits up to `wait_s` for one."""
        with self._came:
            if not self._arrivals and not self._closed:
                self._came.wait(wait_s)
            found, self._arrivals = self._arrivals, []
            return found

    def close(self) -> None:
        """Stop accepting; harmless when called twice."""
        with self._came:
            self._closed = True
            self._came.notify_all()
        self._transport.close()

    def _receive(self, header: PayloadHeader, array: np.ndarray[Any, Any], wire_bytes: int) -> None:
        if header.kind == MESSAGE:
            is_new = self._manager.deliver_letters(header, array.tobytes())
        else:
            # In a list, because an actor would get the array itself in place of a bare reference.
            is_new = self._manager.deliver(header, [self._references.put(array)])
        if not is_new:
            return
        with self._came:
            self._arrivals.append(Arrival(header, wire_bytes))
            self._came.notify_all()
