"""Payloads between clusters over gRPC: dialled directly where the peer has an address, else through the relay.

Delivery is *at least once*: when a connection breaks after the receiver processed a payload and before the sender
heard of it, the sender sends again. `receive` must therefore tolerate a payload twice; the header names it uniquely.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import numpy as np

from icrf.errors import IcrfError, LocalError, ProtocolError
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.wire.addresses import SERVER_OPTIONS, dial_target, format_address, parse_address, refuse_plaintext
from icrf.wire.frames import Allocate, FrameWriter, plain_array
from icrf.wire.gateway_rpc import DELIVER, GATEWAY_SERVICE, RELAY_SERVICE, SEND, Reply, encode_reply, method_path
from icrf.wire.handshake import explain
from icrf.wire.identity import CLUSTER, THE_MEDIATOR, Identity, caller_of
from icrf.wire.status import from_rpc_error
from icrf.wire.tls import TlsFiles, listen_on, open_channel
from icrf_agent.gateway_delivery import WINDOW_BYTES, Intake, Receive, check_target
from icrf_agent.gateway_relay import RelayLink
from icrf_agent.gateway_sending import Broken, OutgoingPayload

NUM_WORKERS = 8


class GrpcTransport:
    """The PayloadTransport adapter over gRPC; see :class:`icrf.ports.PayloadTransport`.

    Args:
        listen: ``host:port`` to accept direct payloads on (port 0: any free one), or None.
        relay_address: ``host:port`` of the mediator, or None. With it, `serve` also attaches to the relay, and peers
            without an address are reached through it.
        cluster: name of this cluster.
        incarnation: tells this life of the gateway from earlier ones.
        num_workers: payloads taken in at the same time on each way; further ones wait at their senders.
        window_bytes: how far senders may be ahead of what has been verified here, and so what a fault can cost.
        tls: the cluster's certificate: it is shown to every peer, every peer must show its own, and a payload is
            taken from the cluster only that its header names as source. None: plaintext.

    Raises:
        LocalError: L003 for a malformed address, L002 for one that is not on this machine, without `tls`.
        SecurityError: S001, S002 or S004 for a certificate that cannot be used or is not the cluster's.
    """

    def __init__(
        self,
        listen: str | None,
        relay_address: str | None,
        cluster: str,
        incarnation: str,
        num_workers: int = NUM_WORKERS,
        window_bytes: int = WINDOW_BYTES,
        tls: TlsFiles | None = None,
    ) -> None:
        self._listen = listen
        self._tls = tls
        self._relay_address = relay_address
        self._cluster = cluster
        self._incarnation = incarnation
        self._num_workers, self._window = num_workers, window_bytes
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # By whom they reach and the certificate that they show: one that was replaced is not used for new calls.
        self._channels: dict[tuple[str, Identity, tuple[int, ...]], grpc.Channel] = {}
        self._server: grpc.Server | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._link: RelayLink | None = None
        self._intake: Intake | None = None
        if listen is not None:
            host, _ = parse_address(listen, place="gateway")
            if tls is None:
                refuse_plaintext(host, place="gateway")
        if relay_address is not None:
            dial_target(relay_address, place="relay", encrypted=tls is not None)
        if tls is not None:
            tls.require(Identity(CLUSTER, cluster))

    def serve(self, receive: Receive, allocate: Allocate = plain_array) -> str:
        """Start accepting; see the port. A relay that is not there yet is waited for in the background.

        Raises:
            LocalError: L004 if the port is taken.
        """
        # One for both ways: a payload that was broken off on one may go on over the other.
        intake = self._intake = Intake(receive, self._window, allocate=allocate)
        address = self._serve_direct(self._listen, intake) if self._listen is not None else ""
        if (relay := self._relay_address) is not None:
            open_relay = partial(self._channel, relay, THE_MEDIATOR)
            self._link = RelayLink(open_relay, self._cluster, self._incarnation, intake, self._num_workers)
        return address

    def send(self, header: PayloadHeader, array: np.ndarray[Any, Any], peer: PeerAddress, timeout_s: float) -> None:
        """Send one payload and wait until the peer has processed it; see the port."""
        check_target(header, peer)
        address = peer.address or self._relay_address
        if not address:
            raise self._unreachable(peer, "it has no address and this gateway no relay")
        path = method_path(GATEWAY_SERVICE, DELIVER) if peer.address else method_path(RELAY_SERVICE, SEND)
        whom = Identity(CLUSTER, peer.cluster) if peer.address else THE_MEDIATOR
        payload = OutgoingPayload(FrameWriter(header, array), timeout_s, self._closing)
        try:
            error = payload.send(lambda: self._channel(address, whom).stream_stream(path))
        except Broken as broken:
            if self._closing.is_set():
                raise self._unreachable(peer, "this gateway was closed") from broken
            why = explain(dial_target(address, encrypted=self._tls is not None), self._tls, whom, what=str(whom))
            raise self._unreachable(peer, f"no progress for {timeout_s:g} s: {why or broken}") from broken
        except grpc.RpcError as failed:
            raise from_rpc_error(failed, address, what=f"gateway of cluster {peer.cluster}") from failed
        except ValueError as failed:
            # What gRPC says of a channel that `close` has closed since.
            if not self._closing.is_set():
                raise
            raise self._unreachable(peer, "this gateway was closed") from failed
        if error is not None:
            raise error

    def forget(self, run_id: str) -> None:
        """See the port."""
        with self._lock:
            intake = self._intake
        if intake is not None:
            intake.forget(run_id)

    def close(self) -> None:
        """End every connection and thread; waits for payloads that are being processed. Harmless when called twice."""
        with self._lock:
            self._closing.set()
            server, self._server = self._server, None
            workers, self._workers = self._workers, None
            link, self._link = self._link, None
            intake, self._intake = self._intake, None
        if link is not None:
            link.close()
        if server is not None:
            server.stop(None).wait()
        if workers is not None:
            workers.shutdown(wait=True)
        if intake is not None:
            intake.close()
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _serve_direct(self, listen: str, intake: Intake) -> str:
        def deliver(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            if self._tls is None:
                return intake.take(frames)
            try:
                caller = caller_of(context.auth_context(), place="gateway")
            except IcrfError as error:
                return iter((encode_reply(Reply(answered=True, error=error)),))
            return intake.take(frames, sender=caller)

        host, _ = parse_address(listen)
        workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix=f"icrf-gateway-{self._cluster}")
        server = grpc.server(workers, options=SERVER_OPTIONS)
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            DELIVER: grpc.stream_stream_rpc_method_handler(deliver)
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(GATEWAY_SERVICE, handlers),))
        try:
            port = listen_on(server, listen, self._tls)
        except RuntimeError as error:
            workers.shutdown()
            raise LocalError(
                "L004", f"cannot listen on {listen}", place="gateway", hint="Choose another port, or 0 for any free one"
            ) from error
        server.start()
        self._server, self._workers = server, workers
        return format_address(host, port)

    def _channel(self, address: str, whom: Identity) -> grpc.Channel:
        with self._lock:
            if self._closing.is_set():
                raise self._unreachable(PeerAddress("", address), "this gateway is closed")
            key = (address, whom, () if self._tls is None else self._tls.stamp())
            channel = self._channels.get(key)
            if channel is None:
                target = dial_target(address, place="gateway", encrypted=self._tls is not None)
                channel = self._channels[key] = open_channel(target, self._tls, whom)
            return channel

    def _unreachable(self, peer: PeerAddress, reason: str) -> ProtocolError:
        way = peer.address or f"the relay at {self._relay_address}"
        return ProtocolError(
            "P030",
            f"cluster {peer.cluster!r} cannot be reached over {way}: {reason}",
            place=f"gateway of cluster {self._cluster}",
            hint="Check that its agent runs and that its address can be dialled from here",
        )
