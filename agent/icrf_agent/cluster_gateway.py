"""The gateway of a cluster: payloads of its nodes leave here, payloads of other clusters come in and are checked.

A plain, thread-safe class around a :class:`~icrf.ports.PayloadTransport`; on Ray it is a threaded detached actor.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from icrf.exchange import MESSAGE, PROBE
from icrf.ports import Arrival, LinkSpeed, PayloadHeader, PayloadTransport
from icrf.protocol import PeerAddress
from icrf.wire.frames import num_bytes, plain_array
from icrf.wire.tls import TlsFiles
from icrf_agent.gateway import GrpcTransport
from icrf_agent.gateway_coding import PayloadCoder
from icrf_agent.gateway_delivery import LARGE_BYTES
from icrf_agent.link_meter import PATIENCE_S, measure_link
from icrf_agent.object_store import References
from icrf_agent.topology_manager import HybridTopologyManager

Cursor = tuple[str, int]
"""How far a reader of arrivals has come: the gateway's life, and the number of arrivals read in it."""


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway on sockets is reached.

    Attributes:
        incarnation: whose gateway it is: the id of the agent, over all its lives.
        listen: ``HOST:PORT`` to accept peers on (port 0: any); None takes payloads through the relay only.
        relay: address of the mediator's relay.
        tls: where the cluster's certificate lies on the gateway's machine; None: plaintext.
    """

    cluster: str
    incarnation: str
    listen: str | None
    relay: str | None
    tls: TlsFiles | None = None

    def transport(self) -> PayloadTransport:
        return GrpcTransport(self.listen, self.relay, self.cluster, self.incarnation, tls=self.tls)


class Landings(References, Protocol):
    """The cluster's object store, where what comes in lands."""

    def allocate(self, num_elements: int, dtype: str) -> np.ndarray[Any, Any]:
        """A one-dimensional array to be filled and then put."""


class HybridClusterGateway:
    """Sends and receives payloads for one cluster.

    Args:
        transport: how payloads travel; it is opened at once.
        manager: decides whether a payload may come in.
        references: the cluster's object store.
    """

    def __init__(
        self, transport: Callable[[], PayloadTransport], manager: HybridTopologyManager, references: Landings
    ) -> None:
        self._manager, self._references = manager, references
        self._coder = PayloadCoder()
        self._arrivals: list[Arrival] = []
        self._life, self._dropped = uuid.uuid4().hex, 0
        self._came = threading.Condition()
        self._closed = False
        self._transport = transport()
        self._address = self._transport.serve(self._receive, self._allocate)

    def address(self) -> str:
        """Where peers can dial it; empty if only the relay reaches it."""
        return self._address

    def send(self, header: PayloadHeader, reference: Any, row: int, peer: PeerAddress, timeout_s: float) -> None:
        """Send a posted array, or one row of it (row >= 0); returns when the peer has accepted it."""
        array = self._references.get(reference)
        if row >= 0:
            array = array.reshape(-1, header.num_elements)[row]
        array = np.ascontiguousarray(array).reshape(-1)
        self._coder.send(header, array, lambda coded, data: self._transport.send(coded, data, peer, timeout_s))

    def send_bytes(self, header: PayloadHeader, data: bytes, peer: PeerAddress, timeout_s: float) -> None:
        """Send encoded letters."""
        self._transport.send(header, np.frombuffer(data, np.uint8), peer, timeout_s)

    def measure(self, source: str, peer: PeerAddress) -> LinkSpeed:
        """Measure the way from this cluster, `source`, to another one; blocks for seconds at most.

        Raises:
            ProtocolError: P030 if it cannot be reached.
        """
        return measure_link(lambda header, data: self._transport.send(header, data, peer, PATIENCE_S), source, peer)

    def next_arrivals(self, wait_s: float, cursor: Cursor = ("", 0)) -> tuple[Cursor, list[Arrival]]:
        """Payloads that came after `cursor`, and the next cursor; waits up to `wait_s` for one.

        What was read is kept until the next call acknowledges it with its cursor: the reader may have died meanwhile.
        """
        with self._came:
            if cursor[0] == self._life:
                read = cursor[1] - self._dropped
                if read > 0:
                    del self._arrivals[:read]
                    self._dropped = cursor[1]
            # A reader of an earlier life has something to ask the manager first.
            if not self._arrivals and not self._closed and cursor[0] in ("", self._life):
                self._came.wait(wait_s)
            return (self._life, self._dropped + len(self._arrivals)), list(self._arrivals)

    def forget(self, run_id: str) -> None:
        """Nothing more of this run will come or go: drop what its payloads were packed against, and parts of them."""
        self._coder.forget(run_id)
        self._transport.forget(run_id)

    def close(self) -> None:
        """Stop accepting; harmless when called twice."""
        with self._came:
            self._closed = True
            self._came.notify_all()
        self._transport.close()

    def _allocate(self, header: PayloadHeader) -> np.ndarray[Any, Any]:
        """Where a payload is assembled. Nobody gets room in the object store for what would be refused.

        Raises:
            IcrfError: why it is refused.
        """
        if header.kind in (MESSAGE, PROBE) or num_bytes(header) < LARGE_BYTES:
            return plain_array(header)
        self._manager.require_welcome(header)
        return self._references.allocate(header.num_elements, header.dtype)

    def _receive(self, header: PayloadHeader, array: np.ndarray[Any, Any], wire_bytes: int) -> None:
        if header.kind == PROBE:
            return
        coded, took = header.coding, array.nbytes
        header, array = self._coder.decode(header, array)
        saved = array.nbytes - took
        if header.kind == MESSAGE:
            if not self._manager.deliver_letters(header, array.tobytes(), wire_bytes):
                return
        else:
            # In a list, because an actor would get the array itself in place of a bare reference. Known ones arrive
            # too: an earlier life of the gateway may have died before it could tell; its reader knows what it has.
            self._manager.deliver(header, [self._references.put(array, header.kind)], wire_bytes, saved)
            if coded:
                self._coder.accepted(header, array)
        with self._came:
            self._arrivals.append(Arrival(header, wire_bytes, saved))
            self._came.notify_all()
