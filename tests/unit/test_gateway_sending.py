"""A sender whose chunks are damaged on the way: only what is missing goes again, and not for ever."""

import threading

import numpy as np
import pytest

from icrf.ports import PayloadHeader
from icrf.wire.frames import FrameWriter
from icrf_agent.gateway_delivery import Intake
from icrf_agent.gateway_sending import MAX_DAMAGED, Broken, OutgoingPayload

WAIT_S = 20.0
ARRAY = np.random.default_rng(0).integers(0, 256, 1_000, dtype=np.uint8)
CHUNK = 100


class Wire:
    """Plays the connections of a sender: each hands its frames, perhaps damaged, to a receiver."""

    def __init__(self, damage):
        self.came, self.sent = [], []
        self.intake = Intake(lambda header, array, wire_bytes: self.came.append(array.copy()))
        self.damage = damage

    def __call__(self, frames, timeout):
        number = len(self.sent)
        self.sent.append([])
        return Call(self.intake.take(self.passing(number, frames)))

    def passing(self, number, frames):
        for frame in frames:
            self.sent[number].append(frame)
            yield self.damage(number, frame)

    @property
    def chunks(self):
        """How many chunks each connection carried."""
        return [sum(len(frame) == CHUNK + 16 for frame in frames) for frames in self.sent]


class Call:
    """The replies, with what else a call has."""

    def __init__(self, replies):
        self.replies = replies

    def __iter__(self):
        return self.replies

    def add_callback(self, callback):
        return True

    def cancel(self):
        self.replies.close()


def send(wire, closing=None):
    header = PayloadHeader("r", 1, 1, 1, "update", 3, "eu-west", "us-east", "uint8", ARRAY.size)
    payload = OutgoingPayload(FrameWriter(header, ARRAY, CHUNK), WAIT_S, closing or threading.Event())
    return payload.send(lambda: wire)


def flipped(frame):
    return frame[:-1] + bytes([frame[-1] ^ 1])


def is_chunk(frame, index):
    return len(frame) == CHUNK + 16 and int.from_bytes(frame[:4], "little") == index


def test_a_damaged_chunk_goes_again_with_what_came_behind_it():
    wire = Wire(lambda number, frame: flipped(frame) if number == 0 and is_chunk(frame, 6) else frame)
    assert send(wire) is None
    assert wire.chunks == [7, 4]
    assert len(wire.came) == 1 and np.array_equal(wire.came[0], ARRAY)


def test_damage_at_other_places_each_time_is_outlived():
    wire = Wire(lambda number, frame: flipped(frame) if is_chunk(frame, 2 * number) and number < 5 else frame)
    assert send(wire) is None
    assert len(wire.sent) == 6 and np.array_equal(wire.came[0], ARRAY)


def test_a_chunk_that_never_comes_whole_is_given_up():
    wire = Wire(lambda number, frame: flipped(frame) if is_chunk(frame, 6) else frame)
    error = send(wire)
    assert (error.code, error.place) == ("P021", "chunk 6")
    assert len(wire.sent) == MAX_DAMAGED and wire.came == []


def test_a_damaged_trailer_costs_the_whole():
    wire = Wire(lambda number, frame: flipped(frame) if number == 0 and frame.startswith(b"ICRT") else frame)
    assert send(wire) is None
    assert wire.chunks == [10, 10] and len(wire.came) == 1


def test_a_gateway_that_closes_does_not_try_again():
    closing = threading.Event()
    closing.set()
    with pytest.raises(Broken, match="damaged"):
        send(Wire(lambda number, frame: flipped(frame) if is_chunk(frame, 6) else frame), closing)
