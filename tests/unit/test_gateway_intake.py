"""How payloads come in over connections that break: what was verified is kept, and nothing is processed twice."""

import gc
import threading
import weakref

import numpy as np
import pytest

from icrf.errors import RoutingError
from icrf.ports import PayloadHeader
from icrf.wire.destination import MOST_WAITING
from icrf.wire.frames import CHUNK_BYTES, FrameWriter, plain_array
from icrf.wire.gateway_rpc import INITIAL_CREDIT_BYTES, decode_reply
from icrf_agent.gateway_delivery import LARGE_BYTES, MAX_BROKEN, NUM_MAKERS, Intake

WAIT_S = 20.0
ARRAY = np.random.default_rng(0).integers(0, 256, 1_000, dtype=np.uint8)


def writer_of(array=ARRAY, attempt=1, chunk_bytes=100, sender=3, run="r"):
    header = PayloadHeader(run, 1, 1, attempt, "update", sender, "eu-west", "us-east", array.dtype.name, array.size)
    return FrameWriter(header, array, chunk_bytes)


class Lost(Exception):
    """The connection is gone."""


def lost_after(frames, count):
    for number, frame in enumerate(frames):
        if number == count:
            raise Lost
        yield frame


def resuming(writer, start):
    return [writer.opening(resumes=True), *writer.body(start)]


def replies(intake, frames):
    return [decode_reply(raw) for raw in intake.take(frames)]


@pytest.fixture
def came():
    return []


@pytest.fixture
def intake(came):
    intake = Intake(lambda header, array, wire_bytes: came.append((header, array.copy(), wire_bytes)))
    yield intake
    intake.close()
    intake.close()


def break_off(intake, writer, frames):
    """A connection that ends after so many frames."""
    with pytest.raises(Lost):
        replies(intake, lost_after(writer, frames))


def test_a_broken_transfer_goes_on_where_it_was(intake, came):
    writer = writer_of()
    break_off(intake, writer, 1 + 4)
    first, last = replies(intake, resuming(writer, 4))
    assert (first.verified_chunks, first.answered) == (4, False)
    assert last.answered and last.error is None
    ((_, array, wire_bytes),) = came
    assert np.array_equal(array, ARRAY) and wire_bytes == writer.wire_bytes


def test_a_damaged_chunk_costs_itself_and_what_came_after(intake, came):
    writer = writer_of()
    frames = list(writer)
    frames[5] = frames[5][:-1] + bytes([frames[5][-1] ^ 1])
    assert replies(intake, frames)[-1].error.code == "P021"
    assert replies(intake, resuming(writer, 4))[0].verified_chunks == 4
    assert np.array_equal(came[0][1], ARRAY) and len(came) == 1


def test_a_sender_that_does_not_resume_begins_anew(intake, came):
    writer = writer_of()
    break_off(intake, writer, 5)
    other = writer_of(ARRAY[::-1].copy())
    assert replies(intake, other)[-1].error is None
    assert np.array_equal(came[0][1], ARRAY[::-1])


def test_what_never_came_cannot_be_gone_on_with(intake, came):
    assert replies(intake, resuming(writer_of(), 0))[0].verified_chunks == 0
    assert len(came) == 1


def test_other_bytes_under_the_same_name_are_not_mixed_in(intake, came):
    break_off(intake, writer_of(), 5)
    changed = ARRAY.copy()
    changed[0] ^= 1
    assert replies(intake, resuming(writer_of(changed), 4))[-1].error.code == "P021"
    assert came == []
    assert [r.verified_chunks for r in replies(intake, resuming(writer_of(changed), 0))] == [0, 10]
    assert np.array_equal(came[0][1], changed)


def test_the_answer_to_a_whole_payload_is_given_again(came):
    def refuse(header, array, wire_bytes):
        came.append(wire_bytes)
        raise RoutingError("P003", "over")

    intake = Intake(refuse)
    writer = writer_of()
    answers = [replies(intake, writer)[-1], *(replies(intake, resuming(writer, 10))[-1] for _ in range(2))]
    assert [answer.error.code for answer in answers] == ["P003"] * 3
    assert len(came) == 1


def test_what_is_still_being_processed_is_waited_for_and_not_processed_twice(came):
    entered, go = threading.Event(), threading.Event()

    def receive(header, array, wire_bytes):
        came.append(header)
        entered.set()
        assert go.wait(WAIT_S)

    intake = Intake(receive)
    writer, answers = writer_of(), []
    first = threading.Thread(target=lambda: answers.append(replies(intake, writer)[-1]))
    first.start()
    assert entered.wait(WAIT_S)
    again = threading.Thread(target=lambda: answers.append(replies(intake, resuming(writer, 10))[-1]))
    again.start()
    go.set()
    first.join(WAIT_S)
    again.join(WAIT_S)
    assert [answer.answered and answer.error is None for answer in answers] == [True, True]
    assert len(came) == 1


def test_a_connection_that_was_given_up_can_no_longer_feed(intake, came):
    writer = writer_of()
    frames = list(writer)
    brought, go = threading.Event(), threading.Event()

    def stalling():
        yield from frames[:3]
        brought.set()
        assert go.wait(WAIT_S)
        yield from frames[3:]

    answers = []
    old = threading.Thread(target=lambda: answers.append(replies(intake, stalling())[-1]))
    old.start()
    assert brought.wait(WAIT_S)
    new = intake.take(iter(resuming(writer, 2)))
    assert decode_reply(next(new)).verified_chunks == 2
    go.set()
    old.join(WAIT_S)
    assert answers[0].error.code == "P020"
    assert [decode_reply(raw).answered for raw in new] == [True]
    assert len(came) == 1


def test_a_sender_gets_credit_as_its_chunks_are_verified():
    array = np.zeros(12 << 20, dtype=np.uint8)
    intake = Intake(lambda header, array, wire_bytes: None, window_bytes=4 << 20)
    given = replies(intake, writer_of(array, chunk_bytes=1 << 20))
    ahead = [reply.credit_bytes - (reply.verified_chunks << 20) for reply in given[:-1]]
    assert given[0].verified_chunks == 0 and given[0].credit_bytes > INITIAL_CREDIT_BYTES
    assert set(ahead) == {4 << 20}
    assert given[-2].credit_bytes >= array.nbytes


def test_what_is_broken_off_is_not_kept_for_ever_nor_without_limit(came):
    intake = Intake(lambda *payload: came.append(payload), keep_broken_s=0.01)
    writer = writer_of()
    break_off(intake, writer, 5)
    (transfer,) = intake._transfers.values()
    transfer.expiry.join(WAIT_S)
    assert replies(intake, resuming(writer, 0))[0].verified_chunks == 0
    intake.close()
    intake = Intake(lambda *payload: came.append(payload))
    for sender in range(MAX_BROKEN + 1):
        break_off(intake, writer_of(sender=sender), 5)
    kept = [replies(intake, resuming(writer_of(sender=n), 4))[0].verified_chunks for n in range(MAX_BROKEN)]
    assert kept == [4] * MAX_BROKEN
    assert replies(intake, resuming(writer_of(sender=MAX_BROKEN), 0))[0].verified_chunks == 0
    intake.close()


@pytest.mark.parametrize("refused", [False, True])
def test_a_processed_payload_is_not_held(refused):
    held = []

    def receive(header, array, wire_bytes):
        held.append(weakref.ref(array))
        if refused:
            raise RoutingError("P003", "over")

    intake = Intake(receive)
    replies(intake, writer_of())
    gc.collect()
    assert held[0]() is None


def test_a_large_payload_comes_in_while_there_is_no_place_for_it_yet(came):
    """Its first chunks are verified, and more of it is asked for, before the array is made."""
    allowed = threading.Event()

    def allocate(header):
        assert allowed.wait(WAIT_S)
        return plain_array(header)

    array = np.random.default_rng(1).integers(0, 256, (MOST_WAITING + 2) * CHUNK_BYTES, np.uint8)
    intake = Intake(lambda header, found, wire_bytes: came.append(found.copy()), allocate=allocate)
    frames = iter(writer_of(array, chunk_bytes=CHUNK_BYTES))

    def until_more_is_asked_for():
        for number, frame in enumerate(frames):
            if number == MOST_WAITING // 2:
                allowed.set()
            yield frame

    granted = []
    for raw in intake.take(until_more_is_asked_for()):
        reply = decode_reply(raw)
        granted.append((reply.verified_chunks, allowed.is_set()))
    intake.close()
    assert any(verified and not placed for verified, placed in granted)
    assert reply.answered and reply.error is None
    assert np.array_equal(came[0], array)


@pytest.mark.parametrize("size", [1_000, LARGE_BYTES + 1])
def test_a_defect_in_making_place_reaches_the_sender(came, size):
    def allocate(header):
        raise KeyError("odd")

    intake = Intake(lambda *payload: came.append(payload), allocate=allocate)
    answer = replies(intake, writer_of(np.zeros(size, np.uint8), chunk_bytes=CHUNK_BYTES))[-1]
    intake.close()
    assert answer.answered and answer.error.code == "X001" and "odd" in answer.error.message
    assert came == []


def test_what_was_broken_off_goes_with_its_attempt_and_with_its_run(intake):
    break_off(intake, writer_of(attempt=1), 5)
    break_off(intake, writer_of(run="other"), 5)
    assert replies(intake, writer_of(attempt=2))[-1].error is None
    assert replies(intake, resuming(writer_of(attempt=1), 0))[0].verified_chunks == 0, "an earlier attempt"
    break_off(intake, writer_of(attempt=3), 5)
    intake.forget("r")
    assert replies(intake, resuming(writer_of(attempt=3), 0))[0].verified_chunks == 0, "a run that is over"
    assert replies(intake, resuming(writer_of(run="other"), 4))[0].verified_chunks == 4


@pytest.fixture
def places():
    """An intake whose places for large payloads are made when that is allowed, one list of those that were made."""
    allowed, made = threading.Event(), []

    def allocate(header):
        if header.num_elements >= LARGE_BYTES:
            assert allowed.wait(WAIT_S)
            made.append(header.run_id)
        return plain_array(header)

    intake = Intake(lambda *payload: None, allocate=allocate)
    yield intake, allowed, made
    allowed.set()
    intake.close()


def test_no_payload_waits_for_the_place_of_another_one(places):
    intake, allowed, _ = places
    large = writer_of(np.zeros(LARGE_BYTES + (MOST_WAITING + 2) * CHUNK_BYTES, np.uint8), chunk_bytes=CHUNK_BYTES)
    stuck = threading.Event()

    def until_it_waits():
        for number, frame in enumerate(large):
            if number == MOST_WAITING + 1:
                stuck.set()
            yield frame

    threads = [threading.Thread(target=replies, args=(intake, frames)) for frames in (until_it_waits(), [])]
    threads[0].start()
    assert stuck.wait(WAIT_S)
    # Goes on with it over another connection, and has to wait for its place as well.
    threads[1] = threading.Thread(target=replies, args=(intake, [large.opening(resumes=True)]))
    threads[1].start()
    small = threading.Thread(target=replies, args=(intake, writer_of(run="small")))
    small.start()
    small.join(WAIT_S / 2)
    assert not small.is_alive() and not allowed.is_set()
    allowed.set()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_no_place_is_made_for_a_payload_that_is_gone(places):
    intake, allowed, made = places
    for number in range(20):
        frames = writer_of(np.zeros(LARGE_BYTES, np.uint8), run=f"r{number}", chunk_bytes=CHUNK_BYTES)
        assert replies(intake, [frames.opening()])[-1].error.code == "P022"
    allowed.set()
    intake.close()
    assert len(made) <= NUM_MAKERS
