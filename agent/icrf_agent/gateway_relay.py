"""The receiving end of the mediator's relay: one long-lived stream of offers, one stream per transfer.

See ``icrf_mediator/relay.py`` for the picture of a transfer.
"""

from __future__ import annotations

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from icrf.errors import ProtocolError
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.codec import parse
from icrf.wire.gateway_rpc import ATTACH, DONE, RECEIVE, RELAY_SERVICE, encode_ack, method_path
from icrf_agent.gateway_delivery import Receive, take_delivery

if TYPE_CHECKING:
    from collections.abc import Generator

    _RawStream = grpc.UnaryStreamMultiCallable[bytes, bytes]
    _RawUnary = grpc.UnaryUnaryMultiCallable[bytes, bytes]

log = logging.getLogger(__name__)

RECONNECT_BASE_S = 0.1
RECONNECT_MAX_S = 2.0
DONE_TIMEOUT_S = 10.0


class RelayLink:
    """Receives what is sent to `cluster` through the relay, in threads of its own.

    A lost connection is retried for ever with full jitter. A broken transfer is dropped: its sender hears of it
    from the relay and sends again.

    Args:
        channel: to the mediator; stays the caller's.
        cluster: name under which the relay offers payloads.
        incarnation: tells this life of the gateway from earlier ones.
        receive: see :class:`icrf.ports.PayloadTransport`.
        num_workers: transfers taken in at the same time; further ones wait at their senders.
    """

    def __init__(
        self, channel: grpc.Channel, cluster: str, incarnation: str, receive: Receive, num_workers: int
    ) -> None:
        self._cluster = cluster
        self._incarnation = incarnation
        self._receive = receive
        self._open_offers: _RawStream = channel.unary_stream(method_path(RELAY_SERVICE, ATTACH))
        self._open_frames: _RawStream = channel.unary_stream(method_path(RELAY_SERVICE, RECEIVE))
        self._say_done: _RawUnary = channel.unary_unary(method_path(RELAY_SERVICE, DONE))
        self._lock = threading.Lock()
        self._calls: set[grpc.Call] = set()
        self._closing = threading.Event()
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix=f"icrf-relay-{cluster}")
        self._listener = threading.Thread(target=self._listen, name=f"icrf-relay-{cluster}", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """End all streams and threads; waits for payloads that are being processed."""
        with self._lock:
            self._closing.set()
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        self._listener.join()
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _listen(self) -> None:
        failures = 0
        while not self._closing.is_set():
            attach = gateway_pb2.RelayAttach(cluster=self._cluster, incarnation=self._incarnation)
            try:
                for raw in self._frames_of(self._open_offers, attach.SerializeToString()):
                    failures = 0
                    offer = parse(raw, gateway_pb2.RelayOffer)
                    if offer.transfer_id:
                        self._workers.submit(self._take, offer.transfer_id, offer.source)
            except (grpc.RpcError, ProtocolError) as error:
                if not self._closing.is_set():
                    log.info("cluster %s lost its relay, trying again: %s", self._cluster, describe(error))
            failures += 1
            self._closing.wait(random.uniform(0.0, min(RECONNECT_MAX_S, RECONNECT_BASE_S * 2**failures)))

    def _take(self, transfer_id: str, source: str) -> None:
        asked = gateway_pb2.RelayReceive(transfer_id=transfer_id, incarnation=self._incarnation)
        frames = self._frames_of(self._open_frames, asked.SerializeToString())
        try:
            ack = encode_ack(take_delivery(frames, self._receive))
            done = gateway_pb2.RelayDone(transfer_id=transfer_id, incarnation=self._incarnation, ack=ack)
            self._say_done(done.SerializeToString(), timeout=DONE_TIMEOUT_S)
        except grpc.RpcError as error:
            log.info("transfer %s from cluster %s was broken off: %s", transfer_id, source, describe(error))
        finally:
            frames.close()

    def _frames_of(self, method: _RawStream, request: bytes) -> Generator[bytes, None, None]:
        """The messages of one call that ends when this link closes or nobody iterates any more."""
        with self._lock:
            if self._closing.is_set():
                return
            call = method(request)
            self._calls.add(call)
        try:
            yield from call
        finally:
            call.cancel()
            with self._lock:
                self._calls.discard(call)


def describe(error: Exception) -> str:
    """One line about a failed call; gRPC's own text has a dozen."""
    return f"{error.code().name} {error.details()}" if isinstance(error, grpc.Call) else str(error)
