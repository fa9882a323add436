"""One suite for every way a payload can take between clusters: in-process, gRPC direct, gRPC through the relay."""

import contextlib
import itertools
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from icrf.errors import InternalError, LocalError, ProtocolError, RoutingError
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.testing.relay_thread import RelayThread
from icrf.testing.waiting import until
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.addresses import CHANNEL_OPTIONS
from icrf.wire.frames import CHUNK_BYTES, FrameWriter
from icrf.wire.gateway_rpc import INITIAL_CREDIT_BYTES, decode_reply
from icrf_agent.gateway import GrpcTransport
from icrf_agent.gateway_inproc import InProcessTransport, TransportHub
from icrf_mediator.relay import MAX_QUEUE_FRAMES, QUEUE_FRAMES

WAIT_S = 20.0


def header_for(array, target="us-east", **changes):
    fields = {"run_id": "r", "generation": 1, "round": 1, "attempt": 1, "kind": "partial", "sender": -1}
    fields |= {"source": "eu-west", "target": target, "dtype": array.dtype.name, "num_elements": array.size}
    return PayloadHeader(**{**fields, **changes})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def never_ending(message, over):
    """Requests of a stream whose other side must not hear an end."""
    yield message
    over.wait(WAIT_S)


class Inbox:
    """A receiver that keeps what came."""

    def __init__(self):
        self.items = queue.Queue()

    def __call__(self, header, array, wire_bytes):
        self.items.put((header, array, wire_bytes))

    def get(self):
        return self.items.get(timeout=WAIT_S)


class InProcess:
    """The way without sockets."""

    def __init__(self):
        self.hub = TransportHub()

    def transport(self, cluster, serve=None, **options):
        transport = InProcessTransport(self.hub, cluster)
        if serve is not None:
            transport.serve(serve)
        return transport, PeerAddress(cluster, "")

    def nobody(self):
        return PeerAddress("nowhere", "")

    def close(self):
        pass


class Direct:
    """Each gateway listens."""

    def __init__(self):
        self.numbers = itertools.count()

    def transport(self, cluster, serve=None, port=0, **options):
        listen = None if serve is None else f"127.0.0.1:{port}"
        transport = GrpcTransport(listen, None, cluster, f"i{next(self.numbers)}", **options)
        return transport, PeerAddress(cluster, "" if serve is None else transport.serve(serve))

    def nobody(self):
        return PeerAddress("nowhere", f"127.0.0.1:{free_port()}")

    def close(self):
        pass


class Relayed:
    """Nobody listens but the relay."""

    def __init__(self):
        self.numbers = itertools.count()
        self.server = RelayThread()

    def transport(self, cluster, serve=None, port=0, **options):
        transport = GrpcTransport(None, self.server.address, cluster, f"i{next(self.numbers)}", **options)
        if serve is not None:
            assert transport.serve(serve) == ""
        return transport, PeerAddress(cluster, "")

    def nobody(self):
        return PeerAddress("nowhere", "")

    def close(self):
        self.server.stop()


@contextlib.contextmanager
def opened(way):
    """The way with `join`, which remembers what must be closed; checks that no thread stays."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        stack.callback(way.close)

        def join(*args, **options):
            transport, peer = way.transport(*args, **options)
            stack.callback(transport.close)
            return transport, peer

        way.join = join
        yield way
    for thread in set(threading.enumerate()) - before:
        # grpc's own threads end a moment after their channel; grpc.aio's poller is one per process and stays.
        if "_poll_wrapper" not in thread.name:
            thread.join(WAIT_S)
            assert not thread.is_alive(), f"{thread.name} is left"


@pytest.fixture(params=[InProcess, Direct, Relayed], ids=["in-process", "direct", "relayed"])
def way(request):
    with opened(request.param()) as way:
        yield way


@pytest.fixture
def relayed():
    with opened(Relayed()) as way:
        yield way


@pytest.fixture
def sending():
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10, dtype=np.float32),
        np.empty(0, dtype=np.float64),
        np.empty(0, dtype=np.uint8),
        np.random.default_rng(0).random(5_000_000, dtype=np.float32),
        np.random.default_rng(1).random(2_500_000),
        np.random.default_rng(2).integers(0, 256, 20_000_000, dtype=np.uint8),
    ],
    ids=lambda a: f"{a.dtype}-{a.nbytes}",
)
def test_a_payload_arrives_bit_by_bit(way, array):
    array.flags.writeable = False
    inbox = Inbox()
    _, peer = way.join("us-east", inbox)
    sender, _ = way.join("eu-west")
    header = header_for(array, sender=5, kind="update", weight=3, recipients=(1, 2, 70_000))
    sender.send(header, array, peer, WAIT_S)
    got_header, got, wire_bytes = inbox.get()
    assert got_header == header
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert np.array_equal(got, array)
    assert got.flags.writeable and not np.shares_memory(got, array)
    assert wire_bytes == FrameWriter(header, array).wire_bytes
    assert inbox.items.empty()


def test_send_returns_after_the_receiver_has_processed(way, sending):
    entered, go = threading.Event(), threading.Event()

    def receive(header, array, wire_bytes):
        entered.set()
        assert go.wait(WAIT_S)

    _, peer = way.join("us-east", receive)
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    sent = sending.submit(sender.send, header_for(array), array, peer, WAIT_S)
    assert entered.wait(WAIT_S)
    assert not sent.done()
    go.set()
    assert sent.result(WAIT_S) is None


def test_framing_costs_less_than_two_percent(way):
    inbox = Inbox()
    _, peer = way.join("us-east", inbox)
    sender, _ = way.join("eu-west")
    array = np.zeros(25_000, dtype=np.float32)
    sender.send(header_for(array), array, peer, WAIT_S)
    assert array.nbytes < inbox.get()[2] < 1.02 * array.nbytes


def test_concurrent_payloads_do_not_mix(way, sending):
    inbox = Inbox()
    _, peer = way.join("us-east", inbox)
    senders = [way.join(name)[0] for name in ("eu-west", "ap-south")]
    arrays = [np.full(200_000 + i, i, dtype=np.float64) for i in range(12)]
    sent = [sending.submit(senders[i % 2].send, header_for(a, sender=i), a, peer, WAIT_S) for i, a in enumerate(arrays)]
    for one in sent:
        one.result(WAIT_S)
    came = {header.sender: array for header, array, _ in (inbox.get() for _ in arrays)}
    assert all(np.array_equal(came[i], array) for i, array in enumerate(arrays))


def test_both_directions_at_once(way, sending):
    boxes = {name: Inbox() for name in ("us-east", "eu-west")}
    joined = {name: way.join(name, box) for name, box in boxes.items()}
    array = np.arange(300_000, dtype=np.float32)
    sent = [
        sending.submit(joined[a][0].send, header_for(array, source=a, target=b), array, joined[b][1], WAIT_S)
        for a, b in (("us-east", "eu-west"), ("eu-west", "us-east"))
    ]
    for one in sent:
        one.result(WAIT_S)
    assert {name: box.get()[0].target for name, box in boxes.items()} == {name: name for name in boxes}


def test_the_receivers_refusal_comes_back_as_it_was_raised(way):
    refusal = RoutingError(
        "P011", "no edge 3 -> 4", place="topology v2", value="3 -> 4", allowed="5, 6", hint="Add the edge"
    )

    def receive(header, array, wire_bytes):
        raise refusal

    _, peer = way.join("us-east", receive)
    sender, _ = way.join("eu-west")
    array = np.zeros(3_000_000, dtype=np.uint8)
    with pytest.raises(RoutingError) as refused:
        sender.send(header_for(array), array, peer, WAIT_S)
    assert refused.value.to_dict() == refusal.to_dict()
    assert refused.value is not refusal


def test_a_defect_of_the_receiver_is_an_internal_error(way, caplog):
    def receive(header, array, wire_bytes):
        raise ZeroDivisionError("oh")

    _, peer = way.join("us-east", receive)
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    with pytest.raises(InternalError, match=r"X001.*us-east.*ZeroDivisionError: oh"):
        sender.send(header_for(array), array, peer, WAIT_S)
    assert "ZeroDivisionError" in caplog.text


def test_a_peer_that_is_not_there_is_named(way):
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    peer = way.nobody()
    start = time.monotonic()
    with pytest.raises(ProtocolError, match="nowhere") as refused:
        sender.send(header_for(array, target="nowhere"), array, peer, 0.4)
    assert refused.value.code == "P030"
    assert peer.address in str(refused.value)
    assert time.monotonic() - start < 5.0


def test_a_peer_that_comes_later_is_waited_for(way, sending):
    inbox = Inbox()
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    port = free_port()
    peer = PeerAddress("us-east", f"127.0.0.1:{port}" if isinstance(way, Direct) else "")
    sent = sending.submit(sender.send, header_for(array), array, peer, WAIT_S)
    way.join("us-east", inbox, port=port)
    sent.result(WAIT_S)
    assert inbox.get()[0] == header_for(array)


def test_a_peer_that_left_is_unreachable_and_a_new_life_of_it_is_found(way):
    first, second = Inbox(), Inbox()
    gateway, peer = way.join("us-east", first)
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    sender.send(header_for(array), array, peer, WAIT_S)
    gateway.close()
    with pytest.raises(ProtocolError, match="P030"):
        sender.send(header_for(array), array, peer, 0.3)
    _, peer = way.join("us-east", second)
    sender.send(header_for(array, attempt=2), array, peer, WAIT_S)
    assert second.get()[0].attempt == 2
    assert first.items.qsize() == 1


def test_closing_twice_is_harmless_and_ends_sending(way):
    gateway, peer = way.join("us-east", Inbox())
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    sender.send(header_for(array), array, peer, WAIT_S)
    for transport in (sender, gateway, sender, gateway):
        transport.close()
    with pytest.raises(ProtocolError, match="P030"):
        sender.send(header_for(array), array, peer, 0.2)


def test_closing_ends_a_send_that_waits(way, sending):
    if isinstance(way, InProcess):
        pytest.skip("the wait is for the hub, which has no connection to close")
    sender, _ = way.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    sent = sending.submit(sender.send, header_for(array, target="nowhere"), array, way.nobody(), WAIT_S)
    if isinstance(way, Relayed):
        # The call is under way, not only about to start.
        until(lambda: way.server.relay.stats().waiting)
    sender.close()
    with pytest.raises(ProtocolError, match="P030"):
        sent.result(5.0)


def test_an_array_that_is_not_the_headers_is_refused_unsent(way):
    inbox = Inbox()
    _, peer = way.join("us-east", inbox)
    sender, _ = way.join("eu-west")
    with pytest.raises(ProtocolError, match="P001"):
        sender.send(header_for(np.zeros(4, dtype=np.float32)), np.zeros(4), peer, WAIT_S)
    assert inbox.items.empty()


def test_a_payload_for_another_cluster_than_the_peer_is_refused_unsent(way):
    inbox = Inbox()
    _, peer = way.join("us-east", inbox)
    sender, _ = way.join("eu-west")
    array = np.zeros(1, dtype=np.uint8)
    with pytest.raises(ProtocolError, match=r"P001.*ap-south"):
        sender.send(header_for(array, target="ap-south"), array, peer, WAIT_S)
    assert inbox.items.empty()


# ---------------------------------------------------------------- gRPC only: what the wire may do


def damaged_frames():
    array = np.random.default_rng(0).random(1_000_000)
    frames = list(FrameWriter(header_for(array), array))
    frames[2] = frames[2][:-1] + bytes([frames[2][-1] ^ 1])
    return frames


@pytest.mark.parametrize("kind", [Direct, Relayed], ids=["direct", "relayed"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda frames: frames, "P021 chunk 1"),
        (lambda frames: frames[:2], "P022 chunk 1"),
        (lambda frames: [frames[0], frames[3]], "P020 chunk 0"),
        (lambda frames: [], "P022 opening frame"),
        (lambda frames: [b"GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n"], "P021 opening frame"),
    ],
    ids=["flipped", "truncated", "reordered", "empty", "garbage"],
)
def test_a_damaged_payload_is_refused_and_never_received(kind, damage, expected):
    with opened(kind()) as way:
        inbox = Inbox()
        _, peer = way.join("us-east", inbox)
        address = peer.address or way.server.address
        path = "/icrf.v1.Gateway/Deliver" if peer.address else "/icrf.v1.Relay/Send"
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            *_, last = channel.stream_stream(path)(iter(damage(damaged_frames())), timeout=WAIT_S)
        error = decode_reply(last).error
        assert isinstance(error, ProtocolError)
        assert str(error).startswith(expected)
        assert inbox.items.empty()


def test_a_taken_port_is_an_error_with_a_hint():
    with opened(Direct()) as way:
        _, peer = way.join("us-east", Inbox())
        other = GrpcTransport(peer.address, None, "eu-west", "i9")
        with pytest.raises(LocalError, match="L004"):
            other.serve(Inbox())
        other.close()


@pytest.mark.parametrize(("address", "code"), [("0.0.0.0:0", "L002"), ("http://127.0.0.1:1", "L003"), ("x", "L003")])
def test_an_address_that_cannot_be_used_is_refused_at_once(address, code):
    with pytest.raises(LocalError, match=code):
        GrpcTransport(address, None, "eu-west", "i1")
    with pytest.raises(LocalError):
        GrpcTransport(None, address, "eu-west", "i1")


def test_without_an_address_and_a_relay_there_is_no_way():
    with opened(Direct()) as way:
        sender, _ = way.join("eu-west")
        array = np.zeros(1, dtype=np.uint8)
        with pytest.raises(ProtocolError, match=r"P030.*us-east.*no relay"):
            sender.send(header_for(array), array, PeerAddress("us-east", ""), WAIT_S)


# ---------------------------------------------------------------- the relay


def test_a_stalled_receiver_stalls_the_sender_and_fills_no_memory(relayed, sending):
    entered, go, done = threading.Event(), threading.Event(), Inbox()

    def receive(header, array, wire_bytes):
        if header.sender == 0:
            entered.set()
            assert go.wait(WAIT_S)
        done(header, array, wire_bytes)

    _, peer = relayed.join("us-east", receive, num_workers=1)
    sender, _ = relayed.join("eu-west")
    small, big = np.zeros(3, dtype=np.uint8), np.ones(40_000_000, dtype=np.uint8)
    first = sending.submit(sender.send, header_for(small, sender=0), small, peer, WAIT_S)
    assert entered.wait(WAIT_S)
    second = sending.submit(sender.send, header_for(big, sender=1), big, peer, WAIT_S)
    relay = relayed.server.relay
    # The opening, and what every receiver takes unasked: the credit ends before the relay's queue is full.
    until(lambda: relay.stats().queued_frames == 1 + INITIAL_CREDIT_BYTES // CHUNK_BYTES)
    assert relay.stats().transfers == 2
    assert not second.done()
    go.set()
    first.result(WAIT_S)
    second.result(WAIT_S)
    assert relay.stats().peak_queued_frames <= QUEUE_FRAMES <= MAX_QUEUE_FRAMES
    until(lambda: relay.stats().transfers == relay.stats().queued_frames == 0)


def test_a_restarted_relay_is_found_again(relayed, sending):
    inbox = Inbox()
    _, peer = relayed.join("us-east", inbox)
    sender, _ = relayed.join("eu-west")
    array = np.zeros(3, dtype=np.float32)
    sender.send(header_for(array), array, peer, WAIT_S)
    relayed.server.stop()
    sent = sending.submit(sender.send, header_for(array, attempt=2), array, peer, WAIT_S)
    relayed.server = RelayThread(int(relayed.server.address.rpartition(":")[2]))
    sent.result(WAIT_S)
    assert [inbox.get()[0].attempt for _ in range(2)] == [1, 2]


def test_a_gateway_that_dies_amid_a_transfer_is_replaced_and_the_payload_sent_again(relayed, sending):
    sender, _ = relayed.join("eu-west")
    array = np.random.default_rng(0).random(4_000_000)
    inbox, over = Inbox(), threading.Event()
    with grpc.insecure_channel(relayed.server.address, options=CHANNEL_OPTIONS) as channel:
        attach = gateway_pb2.RelayAttach(cluster="us-east", incarnation="x").SerializeToString()
        offers = channel.unary_stream("/icrf.v1.Relay/Attach")(attach, timeout=WAIT_S)
        assert next(offers) == b""
        sent = sending.submit(sender.send, header_for(array), array, PeerAddress("us-east", ""), WAIT_S)
        offer = gateway_pb2.RelayOffer.FromString(next(offers))
        asked = gateway_pb2.RelayReceive(transfer_id=offer.transfer_id, incarnation="x").SerializeToString()
        frames = channel.stream_stream("/icrf.v1.Relay/Receive")(never_ending(asked, over), timeout=WAIT_S)
        next(frames)
        next(frames)
    over.set()
    relayed.join("us-east", inbox)
    sent.result(WAIT_S)
    assert np.array_equal(inbox.get()[1], array)
