"""What every gateway does with a payload that comes in, however its frames travelled.

A transfer that breaks is kept for a while as far as it was verified, so that its sender can go on from there over
another connection; and what became of a transfer is remembered, for a sender that did not hear it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from icrf.errors import IcrfError, InternalError, ProtocolError, SecurityError
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.wire.frames import (
    Allocate,
    Array,
    FrameReader,
    Opening,
    Received,
    Reserve,
    num_bytes,
    plain_array,
    read_opening,
)
from icrf.wire.gateway_rpc import INITIAL_CREDIT_BYTES, Reply, encode_reply
from icrf.wire.identity import CLUSTER, Identity

log = logging.getLogger(__name__)

Receive = Callable[[PayloadHeader, "np.ndarray[Any, Any]", int], None]

WINDOW_BYTES = 8 << 20
KEEP_BROKEN_S = 60.0
MAX_BROKEN = 8
MAX_REMEMBERED = 1024
# Below this a thread, and a call of the object store, cost more than a copy.
LARGE_BYTES, NUM_MAKERS = 1 << 20, 2

_Key = tuple[PayloadHeader, int, int]


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


def take_delivery(frames: Iterable[bytes], receive: Receive, allocate: Allocate = plain_array) -> IcrfError | None:
    """Assemble, verify and process one payload that comes in one piece; the error that its sender must get, or None."""
    reader = FrameReader(allocate=allocate)
    try:
        for frame in frames:
            reader.feed(frame)
        received = reader.finish()
    except IcrfError as error:
        return error
    return process(received, receive)


def process(received: Received, receive: Receive) -> IcrfError | None:
    """Hand a verified payload on; the error that its sender must get, or None."""
    try:
        receive(received.header, received.array, received.wire_bytes)
    except IcrfError as error:
        return error
    except Exception as error:
        log.exception("processing a payload of run %s from %s failed", received.header.run_id, received.header.source)
        return _defect(error, place=f"gateway of cluster {received.header.target}")
    return None


def _defect(error: Exception, place: str) -> IcrfError:
    """What must reach the sender at once, as X001, and not as silence until its deadline."""
    return InternalError(
        "X001",
        f"processing a payload failed: {type(error).__name__}: {error}",
        place=place,
        hint="The log of that cluster's agent has the traceback",
    )


class _Transfer:
    """One payload on its way in, over as many connections as it takes; `stream` is the one that may feed it."""

    def __init__(self, allocate: Reserve) -> None:
        self.lock = threading.Lock()
        self.reader: FrameReader | None = FrameReader(allocate=allocate)
        self.stream: object = None
        self.trailer = b""
        # As it travels: an error object would hold on to what it was raised in, the payload among it.
        self.answer: Future[bytes] = Future()
        self.expiry: threading.Timer | None = None

    def keep(self) -> None:
        """It does not expire any more; under the intake's lock, like all of `stream` and `expiry`."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None

    def feed(self, stream: object, frame: bytes) -> FrameReader:
        """Take a frame of the stream that is in charge; a frame of an earlier one ends that stream."""
        with self.lock:
            if self.stream is not stream or self.reader is None:
                raise ProtocolError("P020", "the transfer goes on over another connection", place="frame")
            self.reader.feed(frame)
            return self.reader


class Intake:
    """Takes payloads in; thread-safe, one call of :meth:`take` per connection of a transfer.

    Args:
        receive: see :class:`icrf.ports.PayloadTransport`.
        window_bytes: how far a sender may be ahead of what is verified.
        keep_broken_s: how long the verified part of a broken transfer waits for its sender.
        allocate: see :class:`icrf.ports.PayloadTransport`.
    """

    def __init__(
        self,
        receive: Receive,
        window_bytes: int = WINDOW_BYTES,
        keep_broken_s: float = KEEP_BROKEN_S,
        allocate: Allocate = plain_array,
    ) -> None:
        self._receive, self._allocate = receive, allocate
        self._makers = ThreadPoolExecutor(NUM_MAKERS, thread_name_prefix="icrf-landing")
        self._window, self._keep_broken_s = window_bytes, keep_broken_s
        self._lock = threading.Lock()
        self._transfers: OrderedDict[_Key, _Transfer] = OrderedDict()
        self._closed = False

    def take(self, frames: Iterable[bytes], sender: Identity | None = None) -> Iterator[bytes]:
        """Take one connection's frames; yields the replies to be sent back, the last of which answers.

        Args:
            frames: as they come.
            sender: whose certificate the connection has; None where nobody shows one, or the relay has looked at it.

        What iterating `frames` raises (a broken connection) is passed on: then there is nobody to answer.
        """
        source = iter(frames)
        first = next(source, b"")
        try:
            opening = read_opening(first)
            _require_source(opening.header, sender)
            transfer = self._claim(opening, source, first)
        except IcrfError as error:
            yield encode_reply(Reply(answered=True, error=error))
            return
        try:
            yield from self._assemble(opening, transfer, source)
        finally:
            self._leave(_key(opening), transfer, source)

    def close(self) -> None:
        """Forget what is kept; harmless when called twice."""
        with self._lock:
            self._closed = True
            transfers = list(self._transfers.values())
            self._transfers.clear()
        self._makers.shutdown(cancel_futures=True)
        for transfer in transfers:
            if transfer.expiry is not None:
                transfer.expiry.cancel()
                transfer.expiry.join()

    def forget(self, run_id: str) -> None:
        """Drop what is kept of payloads of a run that were broken off."""
        with self._lock:
            for key, transfer in list(self._transfers.items()):
                if key[0].run_id == run_id and transfer.expiry is not None:
                    self._drop(key, transfer)

    def _reserve(self, header: PayloadHeader) -> Array | Future[Array]:
        """An array for a payload; a large one is made while its first chunks come in."""
        if num_bytes(header) < LARGE_BYTES:
            return self._made(header)
        try:
            return self._makers.submit(self._made, header)
        except RuntimeError:
            # The gateway is being closed, which this connection will hear.
            return plain_array(header)

    def _made(self, header: PayloadHeader) -> Array:
        try:
            return self._allocate(header)
        except (IcrfError, MemoryError):
            raise
        except Exception as error:
            log.exception("there is no place for a payload of run %s from %s", header.run_id, header.source)
            raise _defect(error, place=f"gateway of cluster {header.target}") from error

    def _assemble(self, opening: Opening, transfer: _Transfer, source: Iterator[bytes]) -> Iterator[bytes]:
        if transfer.trailer:
            yield encode_reply(Reply(opening.num_chunks, opening.total_bytes))
            yield self._answer_again(opening, transfer, source)
            return
        try:
            received = yield from self._feed(opening, transfer, source)
        except IcrfError as error:
            reader = transfer.reader
            kept = 0 if reader is None or reader.num_verified == opening.num_chunks else reader.num_verified
            yield encode_reply(Reply(kept, answered=True, error=error))
            return
        refusal = process(received, self._receive)
        transfer.answer.set_result(encode_reply(Reply(opening.num_chunks, opening.total_bytes, True, refusal)))
        yield transfer.answer.result()

    def _feed(self, opening: Opening, transfer: _Transfer, source: Iterator[bytes]) -> Generator[bytes, None, Received]:
        """Replies while chunks come in; returns the payload. Room for more is given when half of it is used."""
        reader = transfer.reader
        assert reader is not None
        granted, frame = INITIAL_CREDIT_BYTES, b""
        while True:
            verified = reader.num_verified * opening.chunk_bytes
            if (opening.resumes and not frame) or (
                granted < opening.total_bytes and granted - verified <= self._window // 2
            ):
                granted = verified + self._window
                yield encode_reply(Reply(reader.num_verified, granted))
            if reader.complete or not (frame := next(source, b"")):
                break
            try:
                transfer.feed(source, frame)
            except IcrfError:
                if reader.num_verified == opening.num_chunks:
                    # It is the trailer that is wrong: any of the chunks may be.
                    self._forget(_key(opening), transfer)
                raise
        with transfer.lock:
            received = reader.finish()
            transfer.trailer, transfer.reader = frame, None
        return received

    def _answer_again(self, opening: Opening, transfer: _Transfer, source: Iterator[bytes]) -> bytes:
        """The answer to a sender that sends a whole payload again; waits if the payload is still being processed."""
        if next(source, b"") != transfer.trailer:
            self._forget(_key(opening), transfer)
            error = ProtocolError("P021", "the payload differs from what came before under its name", place="trailer")
            return encode_reply(Reply(answered=True, error=error))
        return transfer.answer.result()

    def _claim(self, opening: Opening, stream: object, first: bytes) -> _Transfer:
        """The transfer that a connection goes on with, which is a new one unless it resumes a known one."""
        key = _key(opening)
        with self._lock:
            known = self._transfers.get(key) if opening.resumes else None
            transfer = known or _Transfer(self._reserve)
            transfer.keep()
            transfer.stream = stream
            if (replaced := self._transfers.get(key)) is not None and replaced is not transfer:
                self._drop(key, replaced)
            self._transfers[key] = transfer
            self._transfers.move_to_end(key)
            for old_key, old in list(self._transfers.items()):
                if len(self._transfers) > MAX_REMEMBERED or (old.expiry and _precedes(old_key[0], opening.header)):
                    self._drop(old_key, old)
        # Apart from the other, so that no transfer waits for another one: a chunk that waits for its place holds this.
        with transfer.lock:
            if known is None and transfer.reader is not None:
                transfer.reader.feed(first)
        return transfer

    def _leave(self, key: _Key, transfer: _Transfer, stream: object) -> None:
        """A connection is over: keep what may be gone on with, but not for ever."""
        with self._lock:
            reader = transfer.reader
            if transfer.stream is not stream or reader is None or self._transfers.get(key) is not transfer:
                return
            broken = sum(1 for t in self._transfers.values() if t.expiry is not None)
            if self._closed or reader.num_verified == 0 or broken >= MAX_BROKEN:
                self._drop(key, transfer)
                return
            transfer.expiry = threading.Timer(self._keep_broken_s, self._forget, (key, transfer))
            transfer.expiry.daemon = True
            transfer.expiry.start()

    def _forget(self, key: _Key, transfer: _Transfer) -> None:
        with self._lock:
            if self._transfers.get(key) is transfer:
                self._drop(key, transfer)

    def _drop(self, key: _Key, transfer: _Transfer) -> None:
        """Under the lock: a transfer that cannot be gone on with."""
        del self._transfers[key]
        transfer.keep()
        transfer.stream = None
        if transfer.reader is not None:
            transfer.reader.abandon()


def _require_source(header: PayloadHeader, sender: Identity | None) -> None:
    if sender is not None and sender != Identity(CLUSTER, header.source):
        error = SecurityError(
            "S004",
            f"the certificate names {sender}, which may not send as cluster {header.source}",
            place="payload header, field source",
            allowed=f"cluster {header.source}",
        )
        log.warning("a payload of run %s was refused: %s", header.run_id, error)
        raise error


def _key(opening: Opening) -> _Key:
    return opening.header, opening.total_bytes, opening.chunk_bytes


def _precedes(one: PayloadHeader, other: PayloadHeader) -> bool:
    """Whether a payload belongs to an earlier attempt of the same run."""
    earlier = (one.generation, one.round, one.attempt) < (other.generation, other.round, other.attempt)
    return one.run_id == other.run_id and earlier
