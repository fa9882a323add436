"""What every gateway does with a payload that comes in, however its frames travelled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from icrf.errors import IcrfError, InternalError, ProtocolError
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.wire.frames import FrameReader

log = logging.getLogger(__name__)

Receive = Callable[[PayloadHeader, "np.ndarray[Any, Any]", int], None]


def check_target(header: PayloadHeader, peer: PeerAddress) -> None:
    """Refuse a payload that is addressed to another cluster than it is sent to: each way looks at one of the two.

    Raises:
        ProtocolError: P001.
    """
    if header.target != peer.cluster:
        raise ProtocolError(
            "P001",
            f"a payload for cluster {header.target!r} cannot be sent to cluster {peer.cluster!r}",
            place="payload header, field target",
            allowed=repr(peer.cluster),
        )


def take_delivery(frames: Iterable[bytes], receive: Receive) -> IcrfError | None:
    """Assemble, verify and process one payload; returns the error that its sender must get, or None.

    What iterating `frames` itself raises (a broken connection) is passed on: then there is nobody to answer.
    """
    reader = FrameReader()
    try:
        for frame in frames:
            reader.feed(frame)
        received = reader.finish()
    except IcrfError as error:
        return error
    try:
        receive(received.header, received.array, received.wire_bytes)
    except IcrfError as error:
        return error
    except Exception as error:
        # A defect must reach the sender at once, as X001, and not as silence until its deadline.
        log.exception("processing a payload of run %s from %s failed", received.header.run_id, received.header.source)
        return InternalError(
            "X001",
            f"processing a payload failed: {type(error).__name__}: {error}",
            place=f"gateway of cluster {received.header.target}",
            hint="The log of that cluster's agent has the traceback",
        )
    return None
