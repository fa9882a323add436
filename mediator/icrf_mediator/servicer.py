"""The mediator's side of the control wire: gRPC in, calls of the service out. No decision is taken here.

Requests are parsed inside the handlers and not by gRPC, so that bytes which are no request get P001 with a place, as
any other bad input does, and not gRPC's INTERNAL. Every failure leaves as a status of the catalogue: errors of the
fabric as they are, anything else as X001 with a reference to the mediator's log.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf import message_factory

from icrf.errors import IcrfError, InternalError, ProtocolError, RunError
from icrf.ports import AgentPort, BlobWriter
from icrf.protocol import (
    ClusterInfo,
    Instruction,
    MeasuredLink,
    Plan,
    Register,
    Reject,
    Report,
    RunEvent,
    RunInfo,
    Submission,
)
from icrf.wire._generated.icrf.v1 import cluster_pb2, federation_pb2, types_pb2
from icrf.wire.addresses import CHUNK_BYTES
from icrf.wire.codec import from_proto, pack_instruction, parse, to_proto, unpack_report
from icrf.wire.identity import CLUSTER
from icrf.wire.status import ACCEPTED_KEY, to_status
from icrf_mediator.access import Access

log = logging.getLogger("icrf.mediator.wire")

T = TypeVar("T")

MAX_ARTIFACT_BYTES = 10 << 30
"""Largest artifact that an agent may upload."""

_UNARY_CAP_S = 60.0
_CALL_CAP_S = 600.0
_STREAM_CAP_S = 3_600.0
_CAPS_S = {
    "Submit": 120.0,
    "Plan": 120.0,
    "CallNode": _CALL_CAP_S,
    "SendMessage": _CALL_CAP_S,
    "MeasureLinks": _CALL_CAP_S,
    "Watch": _STREAM_CAP_S,
    "Fetch": _STREAM_CAP_S,
    "Upload": _STREAM_CAP_S,
    "Connect": None,  # as long as the agent lives; keepalive ends it
}


class MediatorService(Protocol):
    """What the servicers need: everything the mediator does, on one event loop, raising IcrfError."""

    async def submit(self, submission: Submission) -> RunInfo: ...

    async def plan(self, submission: Submission) -> Plan: ...

    async def get(self, run_id: str) -> RunInfo: ...

    async def list_runs(self) -> list[RunInfo]: ...

    async def clusters(self) -> list[ClusterInfo]: ...

    async def links(self) -> list[MeasuredLink]: ...

    async def measure_links(self) -> list[MeasuredLink]: ...

    def watch(self, run_id: str, after_seq: int) -> AsyncIterator[RunEvent]: ...

    async def cancel(self, run_id: str) -> RunInfo: ...

    async def advance(self, run_id: str, stage: str, rounds: int) -> RunInfo: ...

    async def change_nodes(self, run_id: str, add: Sequence[str], remove: Sequence[str]) -> RunInfo: ...

    async def finish(self, run_id: str) -> RunInfo: ...

    async def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes: ...

    async def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None: ...

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        """F006 is raised at the call. The iterator may block; it is read in a worker thread."""

    async def agent_connected(self, register: Register, port: AgentPort, peer: str) -> str:
        """Returns the session id. An agent that is not admitted gets a Reject through its port."""

    async def agent_report(self, session: str, report: Report) -> None: ...

    async def agent_disconnected(self, session: str) -> None: ...

    def upload_writer(self, run_id: str, artifact: str) -> BlobWriter:
        """The writer may block; it is used in a worker thread."""


def add_to_server(server: grpc.aio.Server, service: MediatorService, access: Access | None = None) -> None:
    """Register both services of the control wire; without `access` for everybody, on a server of loopback."""
    access = access or Access()
    servicers = (FederationServicer(service, access), ClusterServicer(service, access))
    server.add_generic_rpc_handlers(tuple(one.handlers() for one in servicers))


class FederationServicer:
    """``icrf.v1.Federation``: what the SDK calls. One method per RPC, named like the service's own."""

    def __init__(self, service: MediatorService, access: Access) -> None:
        self._service, self._access = service, access
        self._carry_through = CarryThrough()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server registers."""
        return _handlers(federation_pb2.DESCRIPTOR.services_by_name["Federation"], self, self._access)

    async def submit(self, request: Any, context: Any) -> Any:
        """Accept a federation."""
        return to_proto(await self._carry_through(self._service.submit(from_proto(request, Submission))))

    async def plan(self, request: Any, context: Any) -> Any:
        """Dry run."""
        return to_proto(await self._service.plan(from_proto(request, Submission)))

    async def get(self, request: Any, context: Any) -> Any:
        """One run."""
        return to_proto(await self._service.get(request.run_id))

    async def list_runs(self, request: Any, context: Any) -> Any:
        """All runs, newest first."""
        return federation_pb2.ListRunsReply(runs=[to_proto(run) for run in await self._service.list_runs()])  # type: ignore[misc]

    async def clusters(self, request: Any, context: Any) -> Any:
        """Registered clusters."""
        return federation_pb2.ClustersReply(clusters=[to_proto(one) for one in await self._service.clusters()])  # type: ignore[misc]

    async def links(self, request: Any, context: Any) -> Any:
        """What was measured between clusters."""
        return federation_pb2.LinksReply(links=[to_proto(one) for one in await self._service.links()])  # type: ignore[misc]

    async def measure_links(self, request: Any, context: Any) -> Any:
        """Measure it anew."""
        measured = await self._service.measure_links()
        return federation_pb2.LinksReply(links=[to_proto(one) for one in measured])  # type: ignore[misc]

    async def watch(self, request: Any, context: Any) -> None:
        """Events until the run's end. The initial metadata tells the caller that the watch stands."""
        events = self._service.watch(request.run_id, request.after_seq)
        await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
        try:
            async for event in events:
                await context.write(to_proto(event))
        finally:
            # An abandoned generator would otherwise live on as a watcher until the garbage collector finds it.
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()

    async def cancel(self, request: Any, context: Any) -> Any:
        """Ask for the end of a run."""
        return to_proto(await self._carry_through(self._service.cancel(request.run_id)))

    async def advance(self, request: Any, context: Any) -> Any:
        """Let a held run go on."""
        advanced = self._service.advance(request.run_id, request.stage, request.rounds)
        return to_proto(await self._carry_through(advanced))

    async def change_nodes(self, request: Any, context: Any) -> Any:
        """Other nodes may take part from the next round on."""
        changed = self._service.change_nodes(request.run_id, tuple(request.add), tuple(request.remove))
        return to_proto(await self._carry_through(changed))

    async def finish(self, request: Any, context: Any) -> Any:
        """End a kept run."""
        return to_proto(await self._carry_through(self._service.finish(request.run_id)))

    async def call_node(self, request: Any, context: Any) -> None:
        """Call a node's method; the value leaves in chunks."""
        value = await self._service.call_node(request.run_id, request.node_id, request.method, request.arguments)
        await _write_chunks(context, value)

    async def send_message(self, request: Any, context: Any) -> Any:
        """Deliver a supervisor's message."""
        await self._service.send_message(request.run_id, list(request.recipients), request.message)
        return federation_pb2.SendMessageReply()

    async def fetch(self, request: Any, context: Any) -> None:
        """The bytes of an artifact in chunks."""
        await _require_member(self._access, self._service, context, request.run_id)
        chunks = self._service.fetch(request.run_id, request.artifact)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            await _write_chunks(context, chunk)


class ClusterServicer:
    """``icrf.v1.Cluster``: the control stream and the uploads of agents."""

    def __init__(self, service: MediatorService, access: Access) -> None:
        self._service, self._access = service, access
        self._carry_through = CarryThrough()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server registers."""
        return _handlers(cluster_pb2.DESCRIPTOR.services_by_name["Cluster"], self, self._access)

    async def connect(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """One agent's stream: register first, then reports in and instructions out until either side ends it."""
        register = await _next_report(requests)
        if not isinstance(register, Register):
            found = "nothing" if register is None else type(register).__name__
            raise ProtocolError("P001", f"{found} came first", place="Cluster.Connect", allowed="Register")
        self._access.require_cluster(context, register.cluster, what="register as", place="Cluster.Connect")
        port = StreamPort()
        session = await self._service.agent_connected(register, port, context.peer())
        reader = asyncio.create_task(self._read_reports(session, requests, port))
        try:
            await port.drain(lambda instruction: context.write(pack_instruction(instruction)))
            if reader.done():
                await reader
        finally:
            # The agent's hang-up cancels this handler, also here: the service must hear of the end nevertheless.
            await self._carry_through(self._end(session, reader))

    async def _end(self, session: str, reader: asyncio.Task[None]) -> None:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await self._service.agent_disconnected(session)

    async def _read_reports(self, session: str, requests: AsyncIterator[bytes], port: StreamPort) -> None:
        try:
            while (report := await _next_report(requests)) is not None:
                await self._service.agent_report(session, report)
        finally:
            port.disconnect()

    async def upload(self, requests: AsyncIterator[bytes], context: Any) -> Any:
        """Store an artifact; it becomes visible only when all of it is here."""
        header = await anext(aiter(requests), None)
        request = None if header is None else parse(header, cluster_pb2.UploadRequest)
        if request is None or request.WhichOneof("body") != "header":
            raise ProtocolError("P001", "no header came first", place="Cluster.Upload", allowed="UploadHeader")
        await _require_member(self._access, self._service, context, request.header.run_id)
        writer = self._service.upload_writer(request.header.run_id, request.header.artifact)
        try:
            await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
            stored_bytes = 0
            async for raw in requests:
                chunk = _chunk(raw)
                stored_bytes += len(chunk)
                if stored_bytes > MAX_ARTIFACT_BYTES:
                    raise _too_large("artifact", stored_bytes, MAX_ARTIFACT_BYTES)
                await _in_thread(writer.write, chunk)
            return cluster_pb2.UploadReply(sha256=await _in_thread(writer.commit))
        except BaseException:
            await asyncio.to_thread(writer.abort)
            raise


class CarryThrough:
    """Runs calls to their end even if the caller vanishes meanwhile: half a decision is worse than one unseen."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def __call__(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of `call`; a cancelled caller leaves it running."""
        task = asyncio.create_task(call)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Also when the caller is gone and nobody else would say it.
        if not task.cancelled() and not isinstance(task.exception(), (IcrfError, type(None))):
            log.error("a change failed", exc_info=task.exception())


class StreamPort:
    """:class:`icrf.ports.AgentPort` over a stream: an ordered queue that one task writes out.

    It belongs to the mediator's event loop. After a Reject, or after `disconnect` once what was queued before it is
    written, the stream ends.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Instruction | None] = asyncio.Queue()

    def send(self, instruction: Instruction) -> None:
        """See :meth:`icrf.ports.AgentPort.send`."""
        self._queue.put_nowait(instruction)

    def disconnect(self) -> None:
        """See :meth:`icrf.ports.AgentPort.disconnect`."""
        self._queue.put_nowait(None)

    async def drain(self, write: Callable[[Instruction], Awaitable[None]]) -> None:
        """Write instructions in order until the end of the stream."""
        while (instruction := await self._queue.get()) is not None:
            await write(instruction)
            if isinstance(instruction, Reject):
                return


# ---------------------------------------------------------------- requests and chunks


async def _next_report(requests: AsyncIterator[bytes]) -> Report | None:
    """The next report of a stream; None when the agent has ended it."""
    raw = await anext(aiter(requests), None)
    return None if raw is None else unpack_report(parse(raw, types_pb2.Report))


async def _in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Like ``asyncio.to_thread``, but a cancelled caller waits for the thread: a writer has one user at a time."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _chunk(raw: bytes) -> bytes:
    request = parse(raw, cluster_pb2.UploadRequest)
    if request.WhichOneof("body") != "chunk":
        raise ProtocolError("P001", "not a chunk", place="Cluster.Upload", allowed="chunk")
    chunk: bytes = request.chunk
    if len(chunk) > CHUNK_BYTES:
        raise _too_large("chunk", len(chunk), CHUNK_BYTES)
    return chunk


def _too_large(what: str, found: int, limit: int) -> ProtocolError:
    return ProtocolError("P026", f"{what} of {found} bytes > limit {limit}", place="Cluster.Upload", value=found)


async def _write_chunks(context: Any, data: bytes) -> None:
    for start in range(0, len(data), CHUNK_BYTES):
        await context.write(federation_pb2.Chunk(data=data[start : start + CHUNK_BYTES]))


# ---------------------------------------------------------------- handlers


async def _require_member(access: Access, service: MediatorService, context: Any, run_id: str) -> None:
    """Artifacts of a run are its clusters' business: to others it does not exist; F001."""
    caller = access.caller(context, "run_id")
    if caller is not None and caller.kind == CLUSTER and caller.name not in (await service.get(run_id)).clusters:
        raise RunError("F001", f"no federation {run_id!r} on {caller}", place="run_id", value=run_id)


def _handlers(service: Any, servicer: Any, access: Access) -> grpc.GenericRpcHandler:
    """Bind each RPC of a protobuf service to the method of `servicer` that bears its name in snake case."""
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {rpc.name: _handler(rpc, getattr(servicer, _snake(rpc.name)), access) for rpc in service.methods},
    )


def _handler(rpc: Any, method: Callable[..., Awaitable[Any]], access: Access) -> grpc.RpcMethodHandler[Any, Any]:
    reply_class = message_factory.GetMessageClass(rpc.output_type)
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    kind = kinds[rpc.client_streaming, rpc.server_streaming]
    handler: grpc.RpcMethodHandler[Any, Any] = kind(
        _guarded(rpc, method, access), request_deserializer=None, response_serializer=reply_class.SerializeToString
    )
    return handler


def _guarded(rpc: Any, method: Callable[..., Awaitable[Any]], access: Access) -> Callable[[Any, Any], Awaitable[Any]]:
    """Check the caller, parse the request, cap the deadline, and let nothing but a status of the catalogue out."""
    request_class = message_factory.GetMessageClass(rpc.input_type)
    name = f"{rpc.containing_service.name}.{rpc.name}"

    async def guarded(request: Any, context: Any) -> Any:
        cap_s = _cap_s(rpc.name, context)
        try:
            async with asyncio.timeout(cap_s) as timer:
                access.require_kind(context, rpc.name)
                return await method(request if rpc.client_streaming else parse(request, request_class), context)
        except IcrfError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the boundary: it is logged and answered with a reference
            if isinstance(error, TimeoutError) and timer.expired():
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"{name} took longer than {cap_s:.0f} s")
            failure = _internal(error, name)
        status = to_status(failure)
        await context.abort(status.code, status.details, status.trailing_metadata)

    return guarded


def _cap_s(rpc_name: str, context: Any) -> float | None:
    """The caller's deadline, but at most ours: a caller without one must not hold a handler for ever."""
    cap_s = _CAPS_S.get(rpc_name, _UNARY_CAP_S)
    remaining_s = context.time_remaining()
    if cap_s is None or remaining_s is None:
        return cap_s
    return min(cap_s, max(0.0, float(remaining_s)))


def _internal(error: Exception, name: str) -> IcrfError:
    """A defect: its traceback stays in the mediator's log, the caller gets a reference to find it there."""
    reference = uuid.uuid4().hex[:8]
    log.error("internal error %s in %s", reference, name, exc_info=error)
    hint = "the mediator's log has the details under this reference"
    return InternalError("X001", f"internal error of the mediator, reference {reference}", place=name, hint=hint)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
