"""Payloads between gateways of one process: no sockets, the same frames and the same byte counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from icrf.errors import IcrfError, ProtocolError, error_from_dict
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.wire.frames import Allocate, FrameWriter, plain_array
from icrf_agent.gateway_delivery import Receive, check_target, take_delivery

Take = Callable[[Iterable[bytes]], IcrfError | None]


class TransportHub:
    """Where the gateways of one process find each other by cluster name."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._takers: dict[str, Take] = {}

    def attach(self, cluster: str, take: Take) -> None:
        """Make `cluster` reachable; replaces an earlier one of that name."""
        with self._changed:
            self._takers[cluster] = take
            self._changed.notify_all()

    def detach(self, cluster: str, take: Take) -> None:
        """Make `cluster` unreachable, unless somebody else serves that name by now."""
        with self._changed:
            if self._takers.get(cluster) is take:
                del self._takers[cluster]

    def find(self, cluster: str, deadline_s: float) -> Take | None:
        """What takes payloads for `cluster`, waiting for it until `deadline_s` of the monotonic clock."""
        with self._changed:
            self._changed.wait_for(lambda: cluster in self._takers, max(0.0, deadline_s - time.monotonic()))
            return self._takers.get(cluster)


class InProcessTransport:
    """The PayloadTransport adapter without sockets; see :class:`icrf.ports.PayloadTransport`.

    The receiver runs in the sender's thread, so `timeout_s` bounds the wait for the peer and not its processing.

    Args:
        hub: shared by all transports that shall reach each other.
        cluster: the name under which peers find this one.
    """

    def __init__(self, hub: TransportHub, cluster: str) -> None:
        self._hub = hub
        self._cluster = cluster
        self._lock = threading.Lock()
        self._take: Take | None = None
        self._closed = False

    def serve(self, receive: Receive, allocate: Allocate = plain_array) -> str:
        with self._lock:
            self._check_open()
            self._take = partial(take_delivery, receive=receive, allocate=allocate)
            self._hub.attach(self._cluster, self._take)
        return ""

    def send(self, header: PayloadHeader, array: np.ndarray[Any, Any], peer: PeerAddress, timeout_s: float) -> None:
        self._check_open()
        check_target(header, peer)
        frames = FrameWriter(header, array)
        take = self._hub.find(peer.cluster, time.monotonic() + timeout_s)
        if take is None:
            raise ProtocolError(
                "P030",
                f"cluster {peer.cluster!r} did not appear within {timeout_s:g} s",
                place=f"gateway of cluster {self._cluster}",
                hint="Check that its agent runs",
            )
        error = take(frames)
        if error is not None:
            # A fresh error as it would come over the wire: the receiver's traceback and frames stay with the receiver.
            raise error_from_dict(error.to_dict())

    def forget(self, run_id: str) -> None:
        """Nothing is broken off here."""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._take is not None:
                self._hub.detach(self._cluster, self._take)
                self._take = None

    def _check_open(self) -> None:
        if self._closed:
            raise ProtocolError(
                "P030", "this gateway is closed", place=f"gateway of cluster {self._cluster}", hint="Open a new one"
            )
