"""One payload on its way out, over as many connections as it takes.

Over each connection frames go out as far as the receiver's credit reaches, while its replies come in. What the
receiver has verified counts as progress: after a fault the next connection starts behind it, and the sender's patience
starts anew.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from icrf.errors import IcrfError, ProtocolError
from icrf.wire.frames import FrameWriter
from icrf.wire.gateway_rpc import INITIAL_CREDIT_BYTES, Reply, decode_reply

RETRY_BASE_S = 0.05
RETRY_MAX_S = 1.0
MAX_DAMAGED = 3
# These say that the payload was not refused: the peer is away, restarting, or ended the call while stopping.
_BROKEN = frozenset((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED))
_DAMAGED = frozenset(("P021",))

Open = Callable[[], "grpc.StreamStreamMultiCallable[bytes, bytes]"]


class Broken(Exception):
    """The peer was not reached in time; says why."""


class OutgoingPayload:
    """Sends one payload until it is answered.

    Args:
        frames: the payload.
        timeout_s: how long the receiver may make no progress: verify no chunk, and not answer.
        closing: ends the wait between two attempts.
    """

    def __init__(self, frames: FrameWriter, timeout_s: float, closing: threading.Event) -> None:
        self._frames, self._timeout_s, self._closing = frames, timeout_s, closing
        self._verified = 0

    def send(self, open_stream: Open) -> IcrfError | None:
        """Send until the receiver has processed the payload or refused it; the refusal, or None.

        Args:
            open_stream: the method to call, asked for before every attempt.

        Raises:
            Broken: there was no progress for too long, or the gateway is being closed.
            grpc.RpcError: the call failed in a way that trying again does not mend.
        """
        deadline_s = time.monotonic() + self._timeout_s
        failures = damaged = attempts = 0
        while True:
            before = self._verified
            reason = ""
            try:
                answer = self._attempt(open_stream(), deadline_s, resumes=attempts > 0)
                if answer is None or answer.code not in _DAMAGED:
                    return answer
                damaged = 1 if self._verified > before else damaged + 1
                if damaged == MAX_DAMAGED:
                    return answer
            except grpc.RpcError as error:
                if not isinstance(error, grpc.Call) or error.code() not in _BROKEN:
                    raise
                reason = describe(error)
            attempts += 1
            if self._verified > before:
                deadline_s, failures = time.monotonic() + self._timeout_s, 0
            failures += 1
            left_s = deadline_s - time.monotonic()
            pause_s = random.uniform(0.0, min(RETRY_MAX_S, RETRY_BASE_S * 2**failures))
            if left_s <= 0.0 or self._closing.wait(min(pause_s, left_s)):
                raise Broken(reason or "the payload was damaged on its way")

    def _attempt(
        self, method: grpc.StreamStreamMultiCallable[bytes, bytes], deadline_s: float, *, resumes: bool
    ) -> IcrfError | None:
        flow = _Flow(self._frames, resumes)
        call = method(iter(flow), timeout=max(0.001, deadline_s - time.monotonic()))
        if not call.add_callback(flow.stop):
            flow.stop()
        answer = None
        try:
            for raw in call:
                reply = decode_reply(raw)
                self._verified = max(self._verified, reply.verified_chunks)
                if reply.answered:
                    answer = reply
                    break
                flow.grant(reply)
        finally:
            flow.stop()
            call.cancel()
        if answer is None:
            return ProtocolError("P021", "the receiver ended the transfer without an answer", place="replies")
        return answer.error


class _Flow:
    """The frames of one connection, given out as the receiver's credit allows."""

    def __init__(self, frames: FrameWriter, resumes: bool) -> None:
        self._frames, self._resumes = frames, resumes
        self._changed = threading.Condition()
        self._start: int | None = None if resumes else 0
        self._credit = INITIAL_CREDIT_BYTES
        self._stopped = False

    def grant(self, reply: Reply) -> None:
        """The receiver has room for more."""
        with self._changed:
            if self._start is None:
                self._start = reply.verified_chunks
            self._credit = max(self._credit, reply.credit_bytes)
            self._changed.notify_all()

    def stop(self) -> None:
        """The connection is over."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        yield self._frames.opening(resumes=self._resumes)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._start is not None)
            start = self._start
        if start is None:
            return
        body = self._frames.body(start)
        for index in range(start, self._frames.num_chunks):
            if not self._may_begin(index * self._frames.chunk_bytes):
                return
            yield next(body)
        yield from body

    def _may_begin(self, offset: int) -> bool:
        """Wait for credit. A chunk may exceed it, not begin beyond it: so any window lets every chunk through."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or offset < self._credit)
            return not self._stopped


def describe(error: Exception) -> str:
    """One line about a failed call; gRPC's own text has a dozen."""
    return f"{error.code().name} {error.details()}" if isinstance(error, grpc.Call) else str(error)
