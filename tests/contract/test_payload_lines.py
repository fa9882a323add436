"""Payloads over a line that breaks, stalls and is thin: nothing is lost, and little is sent twice."""

import contextlib
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from icrf.errors import ProtocolError
from icrf.ports import PayloadHeader
from icrf.protocol import PeerAddress
from icrf.testing.relay_thread import RelayThread
from icrf.testing.waiting import until
from icrf.wan import WanLine, WanShape
from icrf.wire.frames import CHUNK_BYTES, FrameWriter
from icrf_agent.gateway import GrpcTransport

WAIT_S = 20.0
WINDOW = 1 << 20


def header_for(array, attempt=1):
    about = {"source": "eu-west", "target": "us-east", "dtype": array.dtype.name, "num_elements": array.size}
    return PayloadHeader("run", 1, 1, attempt, "partial", -1, **about)


class Line(WanLine):
    """The receiver's, with the way over which payloads come to it."""

    way = ""

    def carried(self):
        """Bytes that came over the way and went back."""
        return self.passed(self.way)


@contextlib.contextmanager
def over_a_line(kind, shape=None, receive=None):
    """Two gateways with the receiver's line between them: (sender, peer, line, what came)."""
    came = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(Line(shape or WanShape()))
        listen, relay, way_out = "127.0.0.1:0", None, None
        if kind == "relayed":
            listen, thread = None, RelayThread()
            stack.callback(thread.stop)
            relay = thread.address
            line.way = way_out = line.way_out(relay)
        receiver = GrpcTransport(listen, way_out, "us-east", "receiver", window_bytes=WINDOW)
        stack.callback(receiver.close)
        address = receiver.serve(receive or (lambda *payload: came.put(payload)))
        if kind == "direct":
            address = line.way = line.way_in(address)
        sender = GrpcTransport(None, relay, "eu-west", "sender")
        stack.callback(sender.close)
        yield sender, PeerAddress("us-east", address), line, came


gateways = pytest.mark.parametrize("kind", ["direct", "relayed"])


@gateways
def test_a_reset_at_forty_percent_costs_at_most_a_window(kind):
    array = np.random.default_rng(0).random(2_500_000)
    with over_a_line(kind) as (sender, peer, line, inbox):
        line.reset_after(int(0.4 * array.nbytes), line.way)
        sender.send(header_for(array), array, peer, WAIT_S)
        header, got, wire_bytes = inbox.get(timeout=WAIT_S)
        assert np.array_equal(got, array)
        assert wire_bytes == FrameWriter(header, array).wire_bytes
        # The window, a chunk that begins within it, and two per cent for headers and replies.
        assert array.nbytes < line.carried() <= 1.02 * array.nbytes + WINDOW + CHUNK_BYTES
        assert inbox.empty()


@gateways
def test_a_line_that_is_cut_again_and_again_delivers_in_the_end(kind):
    array = np.random.default_rng(0).random(2_000_000)
    with over_a_line(kind, WanShape(bytes_per_s=4e7)) as (sender, peer, line, inbox):
        cuts = [threading.Timer(0.05 * cut, line.reset) for cut in range(1, 6)]
        for cut in cuts:
            cut.start()
        sender.send(header_for(array), array, peer, WAIT_S)
        assert np.array_equal(inbox.get(timeout=WAIT_S)[1], array)
        for cut in cuts:
            cut.join()


@gateways
def test_patience_begins_anew_with_every_chunk_that_arrives(kind):
    """The whole takes longer than the sender may wait without progress."""
    array = np.random.default_rng(0).random(1_000_000)
    with over_a_line(kind, WanShape(bytes_per_s=4e6)) as (sender, peer, _, inbox):
        began = time.monotonic()
        sender.send(header_for(array), array, peer, 1.2)
        assert time.monotonic() - began > 1.2
        assert np.array_equal(inbox.get(timeout=WAIT_S)[1], array)


@gateways
def test_an_answer_that_was_lost_is_given_again_and_the_payload_processed_once(kind):
    """The line is cut while the receiver works on the whole payload."""
    array = np.random.default_rng(0).random(1_000_000)
    came = []

    def receive(header, array, wire_bytes):
        came.append(array.nbytes)
        cut.wait(WAIT_S)

    cut = threading.Event()
    with over_a_line(kind, receive=receive) as (sender, peer, line, _), ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.send, header_for(array), array, peer, WAIT_S)
        until(lambda: came)
        line.reset()
        cut.set()
        sent.result(WAIT_S)
        assert came == [array.nbytes]
        assert line.carried() < 1.02 * array.nbytes + CHUNK_BYTES


@gateways
def test_a_stalled_line_is_given_up_after_the_senders_patience(kind):
    array = np.random.default_rng(0).random(1_000_000)
    with over_a_line(kind) as (sender, peer, line, _):
        sender.send(header_for(array), array, peer, WAIT_S)
        line.stall()
        with pytest.raises(ProtocolError, match="P030"):
            sender.send(header_for(array, attempt=2), array, peer, 0.5)
        line.go_on()


@pytest.mark.slow
@pytest.mark.timeout(900)
@gateways
def test_a_payload_of_more_than_four_gibibytes_arrives(kind):
    """Sizes and offsets beyond 32 bits; the sender's pages but a few are the kernel's one page of zeros."""
    array = np.zeros((4 << 30) + 12_345_678, dtype=np.uint8)
    marks = [0, (1 << 31) + 5, (1 << 32) - 1, 1 << 32, array.size - 1]
    array[marks] = [1, 2, 3, 4, 5]
    came = []

    def receive(header, array, wire_bytes):
        came.append((array.nbytes, array[marks].tolist(), int(np.count_nonzero(array)), wire_bytes))

    with over_a_line(kind, receive=receive) as (sender, peer, line, _):
        line.reset_after(int(0.9 * array.nbytes), line.way)
        sender.send(header_for(array), array, peer, 120.0)
        assert came == [(array.nbytes, [1, 2, 3, 4, 5], 5, FrameWriter(header_for(array), array).wire_bytes)]
        assert line.carried() < 1.001 * array.nbytes + 2 * WINDOW
