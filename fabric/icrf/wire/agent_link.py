"""The agent's side of the wire: :class:`icrf.ports.AgentLink` over a control stream that the agent dials out."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import tenacity

from icrf.errors import IcrfError, LocalError, ProtocolError, SecurityError
from icrf.protocol import Heartbeat, Instruction, Reject, Report
from icrf.wire._generated.icrf.v1 import cluster_pb2 as pb
from icrf.wire._generated.icrf.v1 import cluster_pb2_grpc, federation_pb2, federation_pb2_grpc
from icrf.wire.addresses import CHUNK_BYTES, dial_target
from icrf.wire.codec import pack_report, unpack_instruction
from icrf.wire.handshake import explain
from icrf.wire.identity import THE_MEDIATOR
from icrf.wire.status import ACCEPTED_KEY, from_rpc_error, from_status, is_unreachable
from icrf.wire.tls import TlsFiles, open_channel

_REGISTRATION_S = 20.0  # until the first instruction; after that keepalive finds a dead connection
_UPLOAD_TIMEOUT_S = 3_600.0
_CLOSE_S = 2.0
_RECONNECT_SPREAD_S = 0.5
# Until somebody has replaced a certificate; asking sooner only fills the logs.
_CERTIFICATE_PAUSE_S = 60.0
_FULL_JITTER = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)

# A mediator that answers one of these will answer the same the next time: trying again would only hide it.
_FINAL = frozenset({"INVALID_ARGUMENT", "PERMISSION_DENIED", "FAILED_PRECONDITION", "UNIMPLEMENTED", "ALREADY_EXISTS"})


class GrpcAgentLink:
    """:class:`icrf.ports.AgentLink` over grpc.aio. All methods belong to the event loop that calls :meth:`run`.

    Reports made while there is no connection are kept and sent in order after the next registration, except
    heartbeats, which a registration replaces. A report that was handed to a connection which then broke may be lost
    or, if it was the last one, arrive twice: the mediator asks again for what it misses and knows what it has.

    Args:
        address: ``host:port`` of the mediator.
        on_state: called with one sentence whenever the connection is lost, retried or back.
        registration_s: how long the mediator may take to answer a registration.
        tls: the cluster's certificate, looked at again for every connection of the control stream; None: plaintext.

    Raises:
        LocalError: L003 for a malformed address, L002 for one that is not on this machine, without `tls`.
    """

    def __init__(
        self,
        address: str,
        *,
        on_state: Callable[[str], None] | None = None,
        registration_s: float = _REGISTRATION_S,
        tls: TlsFiles | None = None,
    ) -> None:
        self._address, self._target = address, dial_target(address, encrypted=tls is not None)
        self._tls, self._was_connected = tls, False
        self._stamp: tuple[int, ...] = ()
        self._on_state, self._registration_s = on_state, registration_s
        # Control and bulk have a connection each: an upload must never delay a heartbeat.
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._outbox: deque[Any] = deque()
        self._more, self._drained = asyncio.Event(), asyncio.Event()
        self._drained.set()
        self._closing, self._stopped = asyncio.Event(), asyncio.Event()
        self._stopped.set()
        self._stream: Any = None

    # ------------------------------------------------------------ control stream

    async def run(self, register: Callable[[], Report], deliver: Callable[[Instruction], None]) -> None:
        """See :meth:`icrf.ports.AgentLink.run`.

        Raises:
            IcrfError: what the mediator answered to the registration if asking again cannot help, for instance P004;
                S001 to S004 about certificates, unless it has been connected before: then it waits for better ones.
        """
        self._stopped.clear()
        try:
            while not self._closing.is_set():
                stream, first = await self._connect(register)
                if stream is None or await self._session(stream, first, deliver):
                    return
                if not self._closing.is_set():
                    self._tell("mediator unreachable, retrying")
                    # All agents lose a restarted mediator at once; they should not all come back at once.
                    await self._pause(random.uniform(0.0, _RECONNECT_SPREAD_S))
        except asyncio.CancelledError:
            # grpc.aio raises this in a reader whose call was cancelled, which is how `close` ends a dead stream.
            task = asyncio.current_task()
            if not self._closing.is_set() or (task is not None and task.cancelling()):
                raise
        finally:
            self._stream = None
            self._stopped.set()

    async def _connect(self, register: Callable[[], Report]) -> tuple[Any, Instruction | None]:
        """A registered stream and its first instruction; (None, None) if `close` came first."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._worth_repeating),
            wait=_wait_s,
            sleep=self._pause,
            before_sleep=self._tell_retry,
            reraise=True,
        )
        try:
            connected: tuple[Any, Instruction] = await retrying(self._register_unless_closing, register)
            self._was_connected = True
            return connected
        except IcrfError:
            if self._closing.is_set():
                return None, None
            raise

    async def _register_unless_closing(self, register: Callable[[], Report]) -> tuple[Any, Instruction]:
        """Dial, and give that up at once when the link closes: a call that was just made may not notice its channel."""
        dialling = asyncio.ensure_future(self._register_anew(register))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({dialling, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not dialling.done():
                raise LocalError("L001", "this connection to the mediator is closed", place=self._address)
            return dialling.result()
        finally:
            for task in (dialling, closing):
                task.cancel()
            await asyncio.gather(dialling, closing, return_exceptions=True)

    async def _register_anew(self, register: Callable[[], Report]) -> tuple[Any, Instruction]:
        """Register with the certificate as it is now, and find out why if that fails for reasons of certificates."""
        stamp = () if self._tls is None else self._tls.stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            await self._drop_channels()
        try:
            return await self._register(register)
        except LocalError as error:
            if not is_unreachable(error) or self._closing.is_set():
                raise
            why = await asyncio.to_thread(explain, self._target, self._tls, THE_MEDIATOR)
            raise why or error from None

    async def _register(self, register: Callable[[], Report]) -> tuple[Any, Instruction]:
        stub: Any = cluster_pb2_grpc.ClusterStub(self._channel("control"))
        # No deadline: the stream lives as long as the agent. Keepalive ends it when the mediator is gone.
        stream = stub.Connect()
        try:
            async with asyncio.timeout(self._registration_s):
                await stream.write(pack_report(register()))
                raw = await stream.read()
            if raw is grpc.aio.EOF:
                raise LocalError("L001", "mediator ended the connection", place=self._address)
            return stream, unpack_instruction(raw)
        except TimeoutError:
            stream.cancel()
            raise LocalError("L001", "mediator did not answer the registration", place=self._address) from None
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._failure(stream, error) from None
        except BaseException:
            stream.cancel()
            raise

    async def _session(self, stream: Any, first: Instruction | None, deliver: Callable[[Instruction], None]) -> bool:
        """Serve one connection until it ends; returns True if the mediator rejected the agent."""
        self._stream = stream
        self._tell("connected to the mediator")
        sender = asyncio.create_task(self._send_reports(stream))
        instruction = first
        try:
            while instruction is not None:
                deliver(instruction)
                if isinstance(instruction, Reject):
                    return True
                instruction = await self._read(stream)
            return False
        finally:
            self._stream = None
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            stream.cancel()

    async def _read(self, stream: Any) -> Instruction | None:
        """The next instruction; None when the connection is over."""
        try:
            raw = await stream.read()
        except grpc.RpcError as error:
            self._tell(str(from_rpc_error(error, self._address)))
            return None
        return None if raw is grpc.aio.EOF else unpack_instruction(raw)

    async def _send_reports(self, stream: Any) -> None:
        while True:
            while not self._outbox:
                self._more.clear()
                await self._more.wait()
            try:
                await stream.write(self._outbox[0])
            except (grpc.RpcError, asyncio.InvalidStateError):
                return  # the reader of this stream learns why, and ends the session
            self._outbox.popleft()
            if not self._outbox:
                self._drained.set()

    def report(self, report: Report) -> None:
        """See :meth:`icrf.ports.AgentLink.report`; P001 at once if the report cannot travel."""
        if self._stream is None and isinstance(report, Heartbeat):
            return
        self._outbox.append(pack_report(report))
        self._drained.clear()
        self._more.set()

    # ------------------------------------------------------------ uploads

    async def upload(self, run_id: str, artifact: str, chunks: Iterator[bytes]) -> str:
        """See :meth:`icrf.ports.AgentLink.upload`. `chunks` is read in a worker thread, one at a time.

        Nothing is buffered, so a broken upload is not repeated here: the caller, who can make the chunks again,
        decides.

        Raises:
            IcrfError: the mediator's answer, L001 if it is gone, P021 if it stored other bytes than were sent.
        """
        stub: Any = cluster_pb2_grpc.ClusterStub(self._channel("bulk"))
        call = stub.Upload(timeout=_UPLOAD_TIMEOUT_S)
        digest = hashlib.sha256()
        try:
            await call.write(pb.UploadRequest(header=pb.UploadHeader(run_id=run_id, artifact=artifact)))
            # Wait until it is wanted: refusing a stream under way would race with its next chunk and hide the reason.
            if ACCEPTED_KEY not in (await call.initial_metadata() or ()):
                await call
                raise ProtocolError("P004", "the mediator did not accept the upload", place=self._address)
            while (chunk := await asyncio.to_thread(_next_chunk, chunks, digest)) is not None:
                for start in range(0, len(chunk), CHUNK_BYTES):
                    await call.write(pb.UploadRequest(chunk=chunk[start : start + CHUNK_BYTES]))
            await call.done_writing()
            stored = str((await call).sha256)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._failure(call, error) from None
        finally:
            call.cancel()
        if stored != digest.hexdigest():
            raise ProtocolError("P021", "the mediator stored other bytes than were sent", place=artifact, value=stored)
        return stored

    async def download(self, run_id: str, artifact: str) -> bytes:
        """See :meth:`icrf.ports.AgentLink.download`.

        Raises:
            IcrfError: F006 if there is no such artifact, L001 if the mediator is gone.
        """
        stub: Any = federation_pb2_grpc.FederationStub(self._channel("bulk"))
        call = stub.Fetch(federation_pb2.FetchRequest(run_id=run_id, artifact=artifact), timeout=_UPLOAD_TIMEOUT_S)
        parts = []
        try:
            async for chunk in call:
                parts.append(chunk.data)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from None
        finally:
            call.cancel()
        return b"".join(parts)

    # ------------------------------------------------------------ end

    async def close(self) -> None:
        """See :meth:`icrf.ports.AgentLink.close`. Queued reports get two seconds to leave on a live connection."""
        self._closing.set()
        stream = self._stream
        if stream is not None:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await self._drained.wait()
                    await stream.done_writing()
                    await self._stopped.wait()
            except (TimeoutError, grpc.RpcError):
                stream.cancel()
        await self._drop_channels()
        await self._stopped.wait()

    # ------------------------------------------------------------ inside

    async def _drop_channels(self) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()

    def _channel(self, purpose: str) -> grpc.aio.Channel:
        if self._closing.is_set():
            raise LocalError("L001", "this connection to the mediator is closed", place=self._address)
        if purpose not in self._channels:
            self._channels[purpose] = open_channel(self._target, self._tls, THE_MEDIATOR, module=grpc.aio)
        return self._channels[purpose]

    async def _failure(self, call: Any, error: BaseException) -> IcrfError:
        """Why a call failed. A write to a call that is over says only that; the call itself knows more."""
        if isinstance(error, grpc.RpcError):
            return from_rpc_error(error, self._address)
        code, details = await call.code(), await call.details()
        return from_status(code, details or "", await call.trailing_metadata() or (), self._address)

    def _worth_repeating(self, error: BaseException) -> bool:
        if not isinstance(error, IcrfError) or self._closing.is_set():
            return False
        return self._was_connected if isinstance(error, SecurityError) else error.status not in _FINAL

    async def _pause(self, delay_s: float) -> None:
        """Sleep that `close` ends."""
        try:
            async with asyncio.timeout(delay_s):
                await self._closing.wait()
        except TimeoutError:
            pass

    def _tell_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._tell(f"mediator unreachable, retrying: {error}")

    def _tell(self, text: str) -> None:
        if self._on_state is not None:
            self._on_state(text)


def _wait_s(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return _CERTIFICATE_PAUSE_S if isinstance(error, SecurityError) else _FULL_JITTER(state)


def _next_chunk(chunks: Iterator[bytes], digest: Any) -> bytes | None:
    chunk = next(chunks, None)
    if chunk is not None:
        digest.update(chunk)
    return chunk
