"""The relay seen from its wire: hand-made senders and receivers over a real server, all in one event loop."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest

from icrf.ports import PayloadHeader
from icrf.testing.waiting import async_until
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.addresses import CHANNEL_OPTIONS, SERVER_OPTIONS
from icrf.wire.frames import FrameReader, FrameWriter
from icrf.wire.gateway_rpc import Reply, decode_reply, encode_reply
from icrf.wire.status import from_rpc_error
from icrf_mediator.relay import RelayServicer

WAIT_S = 20.0
QUEUE_FRAMES = 3


def frames_of(array):
    sizes = {"dtype": array.dtype.name, "num_elements": array.size}
    header = PayloadHeader("r", 1, 1, 1, "partial", -1, source="eu-west", target="us-east", **sizes)
    return list(FrameWriter(header, array))


PROCESSED = encode_reply(Reply(answered=True))


class Sending:
    """A sender's call; awaited, it gives the last reply."""

    def __init__(self, call):
        self.call = call
        self.replies = asyncio.ensure_future(self.read())

    async def read(self):
        return [reply async for reply in self.call]

    async def last(self):
        return (await self.replies)[-1]

    def __await__(self):
        return self.last().__await__()

    def done(self):
        return self.replies.done()

    def cancel(self):
        self.call.cancel()
        self.replies.cancel()


class Taking:
    """A receiver's call: frames come out, replies go in."""

    def __init__(self, call, request):
        self.call, self.request = call, request

    async def read(self):
        if self.request is not None:
            request, self.request = self.request, None
            await self.call.write(request)
        return await self.call.read()

    async def frames(self):
        """All frames until the empty one that says that there are no more."""
        found = []
        while frame := await self.read():
            found.append(frame)
        return found

    async def answer(self, *replies):
        for reply in (*(replies or (PROCESSED,)), b""):
            await self.call.write(reply)

    def cancel(self):
        self.call.cancel()


class Net:
    """The relay and one channel to it."""

    def __init__(self, relay, channel):
        self.relay, self.channel = relay, channel

    def send(self, frames, timeout_s=WAIT_S):
        return Sending(self.channel.stream_stream("/icrf.v1.Relay/Send")(frames, timeout=timeout_s))

    async def attach(self, incarnation="x", cluster="us-east"):
        request = gateway_pb2.RelayAttach(cluster=cluster, incarnation=incarnation).SerializeToString()
        offers = self.channel.unary_stream("/icrf.v1.Relay/Attach")(request, timeout=WAIT_S)
        assert await offers.read() == b""
        return offers

    async def take(self, offers, incarnation="x"):
        offer = gateway_pb2.RelayOffer.FromString(await offers.read())
        return offer, self.receive(offer.transfer_id, incarnation)

    def receive(self, transfer_id, incarnation="x"):
        request = gateway_pb2.RelayReceive(transfer_id=transfer_id, incarnation=incarnation).SerializeToString()
        return Taking(self.channel.stream_stream("/icrf.v1.Relay/Receive")(timeout=WAIT_S), request)


def relayed(test):
    """Run a coroutine test against a fresh relay; every transfer must be gone at its end."""

    async def main():
        relay = RelayServicer(queue_frames=QUEUE_FRAMES, holder={"eu-west": "first"}.get)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        relay.register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
                await test(Net(relay, channel))
            await async_until(lambda: relay.stats().transfers == relay.stats().waiting == 0)
        finally:
            relay.close()
            await server.stop(0.1)

    def run():
        asyncio.run(main())

    run.__doc__ = test.__doc__
    return run


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def error_in(rpc_error):
    return from_rpc_error(rpc_error, "relay")


SMALL = frames_of(np.arange(10, dtype=np.float32))
LARGE = frames_of(np.zeros(64 << 20, dtype=np.uint8))


async def endless():
    """A payload that never ends. Its sender has no write under way when the relay answers: grpc.aio's client, unlike
    the blocking one that gateways use, reports such a write as INTERNAL instead of the status it got."""
    yield LARGE[0]
    yield LARGE[1]
    await asyncio.Event().wait()


@relayed
async def test_frames_pass_unchanged_and_the_receivers_ack_is_the_senders_answer(net):
    offers = await net.attach()
    send = net.send(SMALL)
    offer, stream = await net.take(offers)
    assert offer.source == "eu-west"
    assert await stream.frames() == SMALL
    await stream.answer(b"any bytes", b"at all")
    await send
    assert send.replies.result() == [b"any bytes", b"at all"]


@relayed
async def test_an_answer_before_the_last_frame_ends_the_transfer(net):
    offers = await net.attach()
    send = net.send(endless())
    _offer, stream = await net.take(offers)
    assert await stream.read() == LARGE[0]
    await stream.answer()
    assert decode_reply(await send).error is None


@relayed
async def test_a_receiver_that_does_not_read_stops_the_sender(net):
    pulled = 0

    async def counted():
        nonlocal pulled
        for frame in LARGE:
            pulled += 1
            yield frame

    offers = await net.attach()
    send = net.send(counted())
    _offer, stream = await net.take(offers)
    await async_until(lambda: net.relay.stats().queued_frames == QUEUE_FRAMES)
    assert pulled < len(LARGE) and not send.done()
    reader = FrameReader()
    for frame in await stream.frames():
        reader.feed(frame)
    assert reader.finish().array.nbytes == 64 << 20
    await stream.answer()
    assert decode_reply(await send).answered
    assert net.relay.stats().peak_queued_frames == QUEUE_FRAMES


@relayed
async def test_a_stalled_transfer_does_not_block_another_to_the_same_receiver(net):
    offers = await net.attach()
    stalled = net.send(LARGE)
    first, _ = await net.take(offers)
    await async_until(lambda: net.relay.stats().queued_frames == QUEUE_FRAMES)
    send = net.send(SMALL)
    second, stream = await net.take(offers)
    assert await stream.frames() == SMALL
    await stream.answer()
    assert decode_reply(await send).answered
    assert not stalled.done() and first.transfer_id != second.transfer_id
    stalled.cancel()


@relayed
async def test_a_receiver_that_drops_its_stream_makes_the_sender_try_again(net):
    offers = await net.attach()
    send = net.send(endless())
    _, stream = await net.take(offers)
    assert [await stream.read() for _ in range(2)] == LARGE[:2]
    stream.cancel()
    error = await refused(send)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error_in(error).code == "P030"


@relayed
async def test_a_receiver_that_detaches_makes_the_sender_try_again_even_after_the_last_frame(net):
    offers = await net.attach()
    send = net.send(SMALL)
    _, stream = await net.take(offers)
    assert await stream.frames() == SMALL
    offers.cancel()
    error = await refused(send)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert net.relay.stats().attached == ()


@relayed
async def test_a_new_life_of_a_gateway_takes_over(net):
    old = await net.attach("old")
    send = net.send(SMALL)
    await net.take(old, "old")
    new = await net.attach("new")
    assert (await refused(send)).code() is grpc.StatusCode.UNAVAILABLE
    assert (await refused(old.read())).code() is grpc.StatusCode.UNAVAILABLE
    send = net.send(SMALL)
    _offer, stream = await net.take(new, "new")
    assert await stream.frames() == SMALL
    await stream.answer()
    assert decode_reply(await send).answered


@relayed
async def test_a_payload_whose_sender_goes_away_is_never_whole(net):
    offers = await net.attach()
    send = net.send(endless())
    _, stream = await net.take(offers)
    reader = FrameReader()
    reader.feed(await stream.read())
    send.cancel()
    with contextlib.suppress(grpc.aio.AioRpcError):
        while frame := await stream.read():
            reader.feed(frame)
    assert not reader.complete


@relayed
async def test_a_target_is_waited_for_until_the_senders_deadline(net):
    error = await refused(net.send(SMALL, timeout_s=0.4))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error_in(error).code == "P030"
    assert "us-east" in error.details()
    send = net.send(SMALL)
    await async_until(lambda: net.relay.stats().waiting == 1)
    offers = await net.attach()
    _offer, stream = await net.take(offers)
    assert await stream.frames() == SMALL
    await stream.answer()
    assert decode_reply(await send).answered


@relayed
async def test_only_the_receiver_it_was_offered_to_takes_a_transfer_and_once(net):
    offers = await net.attach()
    send = net.send(endless())
    offer, stream = await net.take(offers)
    assert [await stream.read() for _ in range(2)] == LARGE[:2]
    for call in (
        net.receive(offer.transfer_id, "y").read(),
        net.receive(offer.transfer_id).read(),
        net.receive("t99").read(),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.NOT_FOUND
    assert not send.done()
    await stream.answer()
    assert decode_reply(await send).answered


@relayed
async def test_what_is_no_message_and_what_is_no_payload_are_refused_with_a_code(net):
    taking = net.receive("t1")
    taking.request = b"\xff\xff"
    error = await refused(taking.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_in(error).code == "P001"
    assert decode_reply(await net.send([b"GET / HTTP/1.1"])).error.code == "P022"
    assert decode_reply(await net.send([])).error.code == "P022"
    assert decode_reply(await net.send([SMALL[1]])).error.code in ("P021", "P022")


@relayed
async def test_closing_ends_the_attachments(net):
    offers = await net.attach()
    net.relay.close()
    net.relay.close()
    assert (await refused(offers.read())).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("queue_frames", [0, 17])
def test_the_queue_is_bounded(queue_frames):
    with pytest.raises(ValueError, match="1 to 16"):
        RelayServicer(queue_frames)


@relayed
async def test_a_name_that_an_agent_holds_is_not_taken_over(net):
    """A second agent of the same name attaches before it is refused; what is sent must go on to the first."""
    held = await net.attach("first", cluster="eu-west")
    error = error_in(await refused(net.attach("second", cluster="eu-west")))
    assert (error.code, "eu-west" in error.message) == ("A001", True)
    assert net.relay.stats().attached == ("eu-west",)
    other = await net.attach("again", cluster="us-east")
    assert not held.done() and not other.done()
