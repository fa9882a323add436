"""The receiving end of the mediator's relay: one long-lived stream of offers, one stream per transfer.

See ``icrf_mediator/relay.py`` for the picture of a transfer.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from icrf.errors import IcrfError
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.codec import parse
from icrf.wire.gateway_rpc import ATTACH, RECEIVE, RELAY_SERVICE, method_path
from icrf_agent.gateway_delivery import Intake
from icrf_agent.gateway_sending import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

log = logging.getLogger(__name__)

RECONNECT_BASE_S = 0.1
RECONNECT_MAX_S = 2.0


class RelayLink:
    """Receives what is sent to `cluster` through the relay, in threads of its own.

    A lost connection is retried for ever with full jitter. Of a broken transfer its sender hears from the relay, and
    goes on with another one.

    Args:
        open_channel: gives the channel to the mediator for the next call; channels stay the caller's.
        cluster: name under which the relay offers payloads.
        incarnation: tells this life of the gateway from earlier ones.
        intake: takes the payloads.
        num_workers: transfers taken in at the same time; further ones wait at their senders.
    """

    def __init__(
        self,
        open_channel: Callable[[], grpc.Channel],
        cluster: str,
        incarnation: str,
        intake: Intake,
        num_workers: int,
    ) -> None:
        self._cluster = cluster
        self._incarnation = incarnation
        self._intake = intake
        self._open_channel = open_channel
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
                for raw in self._messages_of(partial(self._offers, attach.SerializeToString())):
                    failures = 0
                    offer = parse(raw, gateway_pb2.RelayOffer)
                    if offer.transfer_id:
                        self._workers.submit(self._take, offer.transfer_id, offer.source)
            except (grpc.RpcError, IcrfError) as error:
                if not self._closing.is_set():
                    log.info("cluster %s lost its relay, trying again: %s", self._cluster, describe(error))
            failures += 1
            self._closing.wait(random.uniform(0.0, min(RECONNECT_MAX_S, RECONNECT_BASE_S * 2**failures)))

    def _take(self, transfer_id: str, source: str) -> None:
        asked = gateway_pb2.RelayReceive(transfer_id=transfer_id, incarnation=self._incarnation)
        replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        replies.put(asked.SerializeToString())
        frames = self._messages_of(lambda: self._frames(iter(replies.get, None)))
        try:
            for reply in self._intake.take(frames):
                replies.put(reply)
            # Said: with this the relay ends the stream.
            replies.put(b"")
            for _ in frames:
                pass
        except grpc.RpcError as error:
            log.info("transfer %s from cluster %s was broken off: %s", transfer_id, source, describe(error))
        finally:
            replies.put(None)
            frames.close()

    def _offers(self, attach: bytes) -> Any:
        method: Any = self._open_channel().unary_stream(method_path(RELAY_SERVICE, ATTACH))
        return method(attach)

    def _frames(self, replies: Iterator[bytes]) -> Any:
        method: Any = self._open_channel().stream_stream(method_path(RELAY_SERVICE, RECEIVE))
        return method(replies)

    def _messages_of(self, method: Callable[[], Iterator[bytes]]) -> Generator[bytes, None, None]:
        """The messages of one call that ends when this link closes or nobody iterates any more."""
        with self._lock:
            if self._closing.is_set():
                return
            call: Any = method()
            self._calls.add(call)
        try:
            yield from call
        finally:
            call.cancel()
            with self._lock:
                self._calls.discard(call)
