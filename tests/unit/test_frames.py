"""Payload frames: what goes in comes out, and nothing damaged ever does."""

import struct
from concurrent.futures import Future

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icrf.errors import ProtocolError
from icrf.ports import PayloadHeader
from icrf.wire.destination import MOST_WAITING
from icrf.wire.frames import CHUNK_BYTES, DTYPES, MAX_PAYLOAD_BYTES, FrameReader, FrameWriter, read_opening

DAMAGED = {"P020", "P021", "P022"}


def header_for(array, **changes):
    fields = {
        "run_id": "run-1",
        "generation": 3,
        "round": 7,
        "attempt": 2,
        "kind": "partial",
        "sender": -1,
        "source": "eu-west",
        "target": "us-east",
        "dtype": array.dtype.name,
        "num_elements": array.size,
        "weight": 640,
        "recipients": (0, 4, 1000),
    }
    return PayloadHeader(**{**fields, **changes})


def read(frames):
    reader = FrameReader()
    for frame in frames:
        reader.feed(frame)
    return reader.finish()


def opening_with(total_bytes, header_bytes=b"", version=1, chunk_bytes=CHUNK_BYTES, magic=b"ICRF"):
    body = struct.pack("<4sBBIQI", magic, version, 0, len(header_bytes), total_bytes, chunk_bytes) + header_bytes
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


arrays = hnp.arrays(st.sampled_from(sorted(DTYPES)), st.integers(0, 300))


@given(arrays, st.integers(1, 400))
def test_any_array_comes_out_with_the_same_bits_and_the_same_header(array, chunk_bytes):
    writer = FrameWriter(header_for(array), array, chunk_bytes)
    frames = list(writer)
    got = read(frames)
    assert got.header == header_for(array)
    assert got.array.dtype == array.dtype
    assert got.array.tobytes() == array.tobytes()
    assert got.wire_bytes == writer.wire_bytes == sum(map(len, frames))


@given(st.data(), arrays.filter(len), st.integers(1, 64))
@settings(max_examples=300)
def test_damage_is_found_and_never_becomes_data(data, array, chunk_bytes):
    frames = list(FrameWriter(header_for(array), array, chunk_bytes))
    where = data.draw(st.integers(0, len(frames) - 1))
    damage = data.draw(st.sampled_from(("flip", "swap", "drop", "repeat", "cut", "grow", "end", "more")))
    if damage == "flip":
        bit = data.draw(st.integers(0, len(frames[where]) * 8 - 1))
        flipped = bytearray(frames[where])
        flipped[bit // 8] ^= 1 << bit % 8
        frames[where] = bytes(flipped)
    elif damage == "swap":
        other = data.draw(st.integers(0, len(frames) - 1).filter(lambda i: i != where))
        frames[where], frames[other] = frames[other], frames[where]
    elif damage == "drop":
        del frames[where]
    elif damage == "repeat":
        frames.insert(where, frames[where])
    elif damage == "cut":
        frames[where] = frames[where][: data.draw(st.integers(0, len(frames[where]) - 1))]
    elif damage == "grow":
        frames[where] += data.draw(st.binary(min_size=1, max_size=20))
    elif damage == "end":
        frames = frames[:where]
    else:
        frames.append(data.draw(st.binary(max_size=40)))
    with pytest.raises(ProtocolError) as refused:
        read(frames)
    assert refused.value.code in DAMAGED


@given(arrays.filter(lambda a: a.nbytes > 8), arrays, st.integers(1, 64))
def test_a_chunk_of_another_payload_is_refused(array, other, chunk_bytes):
    frames = list(FrameWriter(header_for(array), array, chunk_bytes))
    changed = array.copy()
    changed.view(np.uint8)[0] ^= 1
    frames[1] = list(FrameWriter(header_for(changed), changed, chunk_bytes))[1]
    with pytest.raises(ProtocolError) as refused:
        read(frames)
    assert refused.value.code == "P021"


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_garbage_is_a_protocol_error(frames):
    with pytest.raises(ProtocolError):
        read(frames)


@given(st.binary(max_size=100), st.integers(0, 1 << 20), st.integers(0, 1 << 22))
def test_an_intact_opening_with_a_senseless_header_is_a_protocol_error(raw, total_bytes, chunk_bytes):
    with pytest.raises(ProtocolError) as refused:
        FrameReader().feed(opening_with(total_bytes, raw, chunk_bytes=chunk_bytes))
    assert refused.value.code == "P001"


def test_the_damaged_chunk_is_named():
    array = np.arange(100, dtype=np.float32)
    frames = list(FrameWriter(header_for(array), array, 100))
    frames[3] = frames[3][:-1] + b"\xff"
    with pytest.raises(ProtocolError, match="P021 chunk 2"):
        read(frames)


def test_chunks_are_a_mebibyte_each():
    array = np.zeros((2 << 20) + 1, dtype=np.uint8)
    frames = list(FrameWriter(header_for(array), array))
    assert [len(frame) - 16 for frame in frames[1:-1]] == [1 << 20, 1 << 20, 1]


def test_the_payload_id_depends_on_the_data_alone():
    array = np.arange(100, dtype=np.float32)
    first = read(FrameWriter(header_for(array), array))
    again = read(FrameWriter(header_for(array, attempt=9), array))
    other = read(FrameWriter(header_for(array), array + 1))
    assert first.payload_id == again.payload_id != other.payload_id


@pytest.mark.parametrize("total_bytes", [MAX_PAYLOAD_BYTES + 1, 10_995_116_277_760, (1 << 64) - 1])
def test_a_size_above_the_limit_is_refused_with_the_first_frame(total_bytes):
    with pytest.raises(ProtocolError) as refused:
        FrameReader().feed(opening_with(total_bytes))
    assert refused.value.code == "P026"
    assert str(total_bytes) in str(refused.value)


def test_the_limit_can_be_lowered():
    array = np.zeros(101, dtype=np.uint8)
    with pytest.raises(ProtocolError) as refused:
        FrameReader(max_bytes=100).feed(next(iter(FrameWriter(header_for(array), array))))
    assert refused.value.code == "P026"


def test_too_long_headers_are_refused_on_both_sides():
    array = np.zeros(1, dtype=np.uint8)
    with pytest.raises(ProtocolError) as refused:
        FrameWriter(header_for(array, recipients=tuple(range(60_000))), array)
    assert refused.value.code == "P026"
    with pytest.raises(ProtocolError) as refused:
        read_opening(opening_with(1, bytes((64 << 10) + 1)))
    assert refused.value.code == "P026"


def test_another_version_and_another_magic_are_told_apart():
    with pytest.raises(ProtocolError, match="P004"):
        read_opening(opening_with(0, version=2))
    with pytest.raises(ProtocolError, match="P020"):
        read_opening(opening_with(0, magic=b"ICRT"))


def test_a_header_that_contradicts_the_declared_size_is_refused():
    array = np.zeros(4, dtype=np.float32)
    frame = next(iter(FrameWriter(header_for(array), array)))
    raw = frame[22:-8]
    assert read_opening(opening_with(16, raw)).header == header_for(array)
    with pytest.raises(ProtocolError, match=r"P001.*num_elements"):
        read_opening(opening_with(17, raw))


@pytest.mark.parametrize(
    ("array", "changes"),
    [
        (np.zeros((2, 2), dtype=np.float32), {}),
        (np.zeros(8, dtype=np.float32)[::2], {}),
        (np.zeros(4, dtype=">f4"), {}),
        (np.zeros(4, dtype=np.complex64), {}),
        (np.zeros(4, dtype=object), {}),
        (np.zeros(4, dtype=np.float32), {"dtype": "float64"}),
        (np.zeros(4, dtype=np.float32), {"num_elements": 5}),
    ],
)
def test_what_cannot_be_sent_is_refused_before_the_first_frame(array, changes):
    with pytest.raises(ProtocolError) as refused:
        FrameWriter(header_for(array, **changes), array)
    assert refused.value.code == "P001"


def test_a_read_only_array_is_only_read():
    array = np.arange(1000, dtype=np.float64)
    array.flags.writeable = False
    got = read(FrameWriter(header_for(array), array, 256)).array
    assert np.array_equal(got, array)
    assert got.flags.writeable and got.flags.owndata


@pytest.mark.parametrize("late", [0, 3, MOST_WAITING, MOST_WAITING + 3])
def test_chunks_may_come_before_the_array_that_they_are_for(late):
    array = np.arange(100 * (MOST_WAITING + 5), dtype=np.uint8)
    frames = list(FrameWriter(header_for(array), array, 100))
    made = Future()
    reader = FrameReader(allocate=lambda header: made)
    for frame in frames[: 1 + min(late, MOST_WAITING)]:
        reader.feed(frame)
    # With more of them the sender would wait.
    made.set_result(np.zeros(array.size, np.uint8))
    for frame in frames[1 + min(late, MOST_WAITING) :]:
        reader.feed(frame)
    assert np.array_equal(reader.finish().array, array)
    assert reader.finish().array is made.result()


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_payload_that_there_is_no_memory_for_is_refused(when):
    def nowhere(header):
        if when == "at once":
            raise MemoryError
        made = Future()
        made.set_exception(MemoryError())
        return made

    array = np.arange(10, dtype=np.float32)
    reader = FrameReader(allocate=nowhere)
    with pytest.raises(ProtocolError) as refused:
        for frame in FrameWriter(header_for(array), array):
            reader.feed(frame)
    assert refused.value.code == "P026"
