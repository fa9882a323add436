"""The relay: payloads between clusters that cannot dial each other, cut through the mediator.

One transfer, from the call of the sending gateway to its answer::

    sender                        relay                               receiver
      |                             | <------------- Attach(cluster) ---- |   once, long-lived
      | --- Send: opening --------> | ---- RelayOffer(transfer id) -----> |
      |                             | <------- Receive(transfer id) ----- |   one stream per transfer
      | --- frames ---------------> | ---- the same frames, then "" ----> |
      | <-- replies --------------- | <---- replies, then "" ------------ |

A stream of its own gives each transfer gRPC's flow control, so transfers to one receiver do not block each other. The
relay holds at most `queue_frames` frames of a transfer (and what gRPC keeps in its windows), never a payload; it reads
the opening frame to learn the target and passes every frame and every reply on unchanged. Whatever breaks on the way
ends the sender's call with UNAVAILABLE, and the sender goes on in another transfer: delivery is *at least once* until
it is answered.

Where callers show certificates, a gateway attaches for the cluster of its own, takes what was sent to that one, and
sends in its name only; what comes through the relay is therefore as good as what came directly. The latest gateway that
attaches under a name gets what is sent to it, unless the name is held by an agent of another incarnation:
a second agent of the same name, which will be refused, takes nothing away from the first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc

from icrf.errors import AgentError, IcrfError, ProtocolError
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.addresses import SERVER_OPTIONS
from icrf.wire.codec import parse
from icrf.wire.frames import read_opening
from icrf.wire.gateway_rpc import ATTACH, RECEIVE, RELAY_SERVICE, SEND, Reply, encode_reply
from icrf.wire.status import to_status
from icrf.wire.tls import TlsFiles, listen_on
from icrf_mediator.access import Access

log = logging.getLogger(__name__)

QUEUE_FRAMES = 4
MAX_QUEUE_FRAMES = 16
MAX_QUEUE_REPLIES = 64
# A sender without a deadline of its own may hold its call this long.
DEFAULT_TIMEOUT_S = 60.0
# The answer to a sender whose target never came must arrive before the sender's own deadline.
ANSWER_MARGIN_S = 0.1

_Context = grpc.aio.ServicerContext[bytes, bytes]


class _Gone(Exception):
    """The other side of a transfer went away; the sender may try again."""


@dataclass(frozen=True)
class RelayStats:
    """What the relay holds right now.

    Attributes:
        attached: names of the clusters that can be sent to.
        waiting: senders whose target is not attached.
        transfers: transfers between their offer and their answer.
        queued_frames: frames held over all transfers.
        peak_queued_frames: most frames ever held for one transfer.
    """

    attached: tuple[str, ...]
    waiting: int
    transfers: int
    queued_frames: int
    peak_queued_frames: int


@dataclass(eq=False)
class _Attachment:
    """A gateway that listens for offers; None in the queue ends its stream."""

    cluster: str
    incarnation: str
    offers: asyncio.Queue[gateway_pb2.RelayOffer | None] = field(default_factory=asyncio.Queue)


class _Transfer:
    """The frames between one Send and one Receive, and the replies between the two."""

    def __init__(self, transfer_id: str, to: _Attachment, queue_frames: int) -> None:
        self.transfer_id = transfer_id
        self.to = to
        self.taken = False
        self.peak = 0
        # None: the other side has said all. _Gone: it went away.
        self.frames: asyncio.Queue[bytes | _Gone | None] = asyncio.Queue(queue_frames)
        self.replies: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_QUEUE_REPLIES)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def put(self, frame: bytes | None) -> None:
        await self.frames.put(frame)
        self.peak = max(self.peak, self.frames.qsize())

    def fail(self, reason: str) -> None:
        """End the sender's call, unless it has its answer."""
        if not self.broken.done():
            self.broken.set_exception(_Gone(reason))

    def break_off(self) -> None:
        """End the receiver's stream; what is queued is dropped. The pump must not run any more."""
        while not self.frames.empty():
            self.frames.get_nowait()
        self.frames.put_nowait(_Gone("the sender went away"))
        if self.broken.done() and not self.broken.cancelled():
            self.broken.exception()  # retrieved: asyncio would report it as lost otherwise
        self.broken.cancel()


class RelayServicer:
    """The relay's handlers. Belongs to one event loop; only :meth:`stats` may be called from elsewhere.

    Args:
        queue_frames: frames of about 1 MiB held per transfer, 1 to 16.
        holder: who may attach for a cluster now: the id of its agent, which outlives the agent's process, where it has
            one. None: anybody.
        access: checks who calls; without it everybody may, on a server of loopback.
    """

    def __init__(
        self,
        queue_frames: int = QUEUE_FRAMES,
        holder: Callable[[str], str | None] = lambda cluster: None,
        access: Access | None = None,
    ) -> None:
        if not 1 <= queue_frames <= MAX_QUEUE_FRAMES:
            raise ValueError(f"queue_frames {queue_frames} is not in 1 to {MAX_QUEUE_FRAMES}")
        self._queue_frames = queue_frames
        self._holder, self._access = holder, access or Access()
        self._attached: dict[str, _Attachment] = {}
        self._changed = asyncio.Condition()
        self._transfers: dict[str, _Transfer] = {}
        self._numbers = itertools.count(1)
        self._waiting = 0
        self._peak = 0
        self._closed = False

    def register(self, server: grpc.aio.Server) -> None:
        """Add the relay's handlers to `server`, which is not started yet."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            ATTACH: grpc.unary_stream_rpc_method_handler(self._attach),
            SEND: grpc.stream_stream_rpc_method_handler(self._send),
            RECEIVE: grpc.stream_stream_rpc_method_handler(self._receive),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RELAY_SERVICE, handlers),))

    def stats(self) -> RelayStats:
        """What the relay holds; safe from any thread."""
        transfers = list(self._transfers.values())
        return RelayStats(
            attached=tuple(sorted(self._attached)),
            waiting=self._waiting,
            transfers=len(transfers),
            queued_frames=sum(t.frames.qsize() for t in transfers),
            peak_queued_frames=max((self._peak, *(t.peak for t in transfers))),
        )

    def close(self) -> None:
        """Let all attachments end, so that the server's grace is for transfers only; harmless when called twice."""
        self._closed = True
        for attachment in list(self._attached.values()):
            attachment.offers.put_nowait(None)

    # ------------------------------------------------------------ handlers

    async def _attach(self, request: bytes, context: _Context) -> None:
        asked = await _parse(request, gateway_pb2.RelayAttach, context)
        await self._require(context, asked.cluster, "receive for")
        if self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the relay is closing")
        if self._holder(asked.cluster) not in (None, asked.incarnation):
            await _abort(context, AgentError("A001", f"cluster {asked.cluster} is served by another agent"))
        attachment = _Attachment(asked.cluster, asked.incarnation)
        # The offer without an id says: attached.
        attachment.offers.put_nowait(gateway_pb2.RelayOffer())
        async with self._changed:
            earlier = self._attached.get(asked.cluster)
            if earlier is not None:
                log.info("cluster %r: gateway %r takes over", asked.cluster, asked.incarnation)
                self._detach(earlier, "another gateway attached under its name")
            self._attached[asked.cluster] = attachment
            self._changed.notify_all()
        try:
            while (offer := await attachment.offers.get()) is not None:
                await context.write(offer.SerializeToString())
        finally:
            self._detach(attachment, "its gateway went away")
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the relay is closing or another gateway attached")

    async def _send(self, frames: AsyncIterator[bytes], context: _Context) -> None:
        first = await anext(aiter(frames), b"")
        try:
            header = read_opening(first).header
            self._access.require_cluster(context, header.source, what="send as", place="payload header, field source")
        except IcrfError as error:
            await context.write(encode_reply(Reply(answered=True, error=error)))
            return
        remaining_s = context.time_remaining()
        wait_s = max(0.0, (DEFAULT_TIMEOUT_S if remaining_s is None else remaining_s) - ANSWER_MARGIN_S)
        target = await self._find(header.target, wait_s)
        if target is None:
            await _abort(context, _not_attached(header.target, wait_s))
        transfer = _Transfer(f"t{next(self._numbers)}", target, self._queue_frames)
        self._transfers[transfer.transfer_id] = transfer
        pump = asyncio.create_task(self._pump(first, frames, transfer))
        answer = asyncio.create_task(self._pass_replies(transfer, context))
        target.offers.put_nowait(gateway_pb2.RelayOffer(transfer_id=transfer.transfer_id, source=header.source))
        try:
            ends: set[asyncio.Future[Any]] = {pump, answer, transfer.broken}
            while not answer.done():
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                ends.discard(pump)
                for ended in done:
                    ended.result()
        except _Gone as gone:
            await _abort(
                context, ProtocolError("P030", f"cluster {header.target!r}: {gone}", place="relay", hint="Try again")
            )
        finally:
            del self._transfers[transfer.transfer_id]
            self._peak = max(self._peak, transfer.peak)
            for task in (pump, answer):
                task.cancel()
            await asyncio.gather(pump, answer, return_exceptions=True)
            transfer.break_off()

    async def _receive(self, replies: AsyncIterator[bytes], context: _Context) -> None:
        asked = await _parse(await anext(aiter(replies), b""), gateway_pb2.RelayReceive, context)
        transfer = self._transfers.get(asked.transfer_id)
        if transfer is None or transfer.taken or transfer.to.incarnation != asked.incarnation:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no transfer {asked.transfer_id} for this gateway")
        await self._require(context, transfer.to.cluster, "receive for")
        transfer.taken = True
        passing = asyncio.create_task(self._pass_frames(transfer, context))
        listening = asyncio.create_task(self._take_replies(replies, transfer))
        try:
            await asyncio.wait({passing, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not listening.done() and passing.result():
                await asyncio.wait({listening})
        finally:
            for task in (passing, listening):
                task.cancel()
            _, unanswered = await asyncio.gather(passing, listening, return_exceptions=True)
            if unanswered is not None:
                transfer.fail("the receiver ended the transfer")
        if unanswered is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the sender ended the transfer")

    # ------------------------------------------------------------ inside

    async def _pump(self, first: bytes, frames: AsyncIterator[bytes], transfer: _Transfer) -> None:
        await transfer.put(first)
        async for frame in frames:
            await transfer.put(frame)
        await transfer.put(None)

    async def _pass_frames(self, transfer: _Transfer, context: _Context) -> bool:
        """To the receiver; an empty frame tells it that there are no more, as it still has to reply.

        Returns:
            False if the sender is gone.
        """
        while isinstance(frame := await transfer.frames.get(), bytes):
            await context.write(frame)
        if frame is None:
            await context.write(b"")
        return frame is None

    async def _take_replies(self, replies: AsyncIterator[bytes], transfer: _Transfer) -> None:
        """From the receiver. An empty reply follows its last one: a receiver that dies ends the stream as well."""
        async for reply in replies:
            await transfer.replies.put(reply or None)
            if not reply:
                return
        raise _Gone("the receiver went away")

    async def _pass_replies(self, transfer: _Transfer, context: _Context) -> None:
        """To the sender, until the receiver has said its last."""
        while (reply := await transfer.replies.get()) is not None:
            await context.write(reply)

    async def _require(self, context: _Context, cluster: str, what: str) -> None:
        try:
            self._access.require_cluster(context, cluster, what=what, place="relay")
        except IcrfError as error:
            await _abort(context, error)

    async def _find(self, cluster: str, wait_s: float) -> _Attachment | None:
        self._waiting += 1
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: cluster in self._attached)
                return self._attached[cluster]
        except TimeoutError:
            return None
        finally:
            self._waiting -= 1

    def _detach(self, attachment: _Attachment, reason: str) -> None:
        if self._attached.get(attachment.cluster) is attachment:
            del self._attached[attachment.cluster]
        attachment.offers.put_nowait(None)
        for transfer in self._transfers.values():
            if transfer.to is attachment:
                transfer.fail(reason)


class RelayServer:
    """A relay that listens alone, without the rest of the mediator: for tests and measurements of gateways.

    Args:
        tls: the mediator's certificate; None: plaintext.
    """

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self.relay = RelayServicer(access=Access(authenticated=tls is not None))
        self._tls = tls
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on this machine (port 0: any free one); the address to dial."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self.relay.register(self._server)
        bound = listen_on(self._server, f"127.0.0.1:{port}", self._tls)
        await self._server.start()
        return f"127.0.0.1:{bound}"

    async def stop(self, grace_s: float) -> None:
        """Give transfers so long to end."""
        self.relay.close()
        if self._server is not None:
            await self._server.stop(grace_s)


async def _parse(raw: bytes, message_class: type[Any], context: _Context) -> Any:
    try:
        return parse(raw, message_class)
    except ProtocolError as error:
        await _abort(context, error)


async def _abort(context: _Context, error: IcrfError) -> NoReturn:
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _not_attached(cluster: str, wait_s: float) -> ProtocolError:
    return ProtocolError(
        "P030",
        f"cluster {cluster!r} did not attach to the relay within {wait_s:.3g} s",
        place="relay",
        hint="Check that its agent runs and can reach the mediator",
    )
