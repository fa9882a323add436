"""How fast the way to another cluster is, measured with payloads like those of rounds. No I/O of its own."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from icrf.exchange import PROBE
from icrf.ports import LinkSpeed, PayloadHeader
from icrf.protocol import PeerAddress

Send = Callable[[PayloadHeader, "np.ndarray[Any, Any]"], None]

NUM_PINGS = 7
# Streams grow until one has taken so long that round trips and scheduling are a small part of it, or is this large.
FIRST_BYTES, GROWTH, MOST_BYTES = 64 << 10, 4, 4 << 20
LONG_ENOUGH_S = 0.5
# Nothing is begun after this, and what was begun is given up when nothing of it arrives for so long.
BUDGET_S, PATIENCE_S = 15.0, 10.0
# Of a stream that took no longer than a ping, what counts as the time of its bytes.
_LEAST_SHARE = 0.1


def measure_link(
    send: Send, source: str, peer: PeerAddress, clock: Callable[[], float] = time.perf_counter
) -> LinkSpeed:
    """Round-trip time and bandwidth of a way, from how long `send` takes.

    The round-trip time is the median of several empty payloads, after a first one that opens the connection. The
    bandwidth is that of the last of a few streams of growing size, without a round trip.

    Args:
        send: returns when the receiver has processed the payload; its errors are passed on.
        source: the name of this cluster.
    """
    began, measurement = clock(), uuid.uuid4().hex
    # What a line might compress would pass it faster than weights do.
    data = np.random.default_rng(0).integers(0, 256, MOST_BYTES, np.uint8)
    count = 0

    def timed(size: int) -> float:
        nonlocal count
        count += 1
        header = PayloadHeader(
            run_id=measurement,
            generation=0,
            round=0,
            attempt=count,
            kind=PROBE,
            sender=-1,
            source=source,
            target=peer.cluster,
            dtype="uint8",
            num_elements=size,
        )
        before = clock()
        send(header, data[:size])
        return clock() - before

    timed(0)
    pings = [timed(0)]
    while len(pings) < NUM_PINGS and clock() - began < BUDGET_S / 2:
        pings.append(timed(0))
    rtt_s, size = statistics.median(pings), FIRST_BYTES
    while True:
        took = timed(size)
        of_bytes = max(took - rtt_s, _LEAST_SHARE * took)
        larger = min(MOST_BYTES, GROWTH * size)
        expected_s = rtt_s + of_bytes * larger / size
        if size == MOST_BYTES or took - rtt_s >= LONG_ENOUGH_S or clock() - began + expected_s > BUDGET_S:
            return LinkSpeed(size / of_bytes, rtt_s)
        size = larger
