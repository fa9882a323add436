"""A payload as a sequence of byte frames, for gRPC streams with identity serialisers. Pure: no I/O, no gRPC.

::

    opening   "ICRF" u8 version  u8 resumes  u32 header bytes  u64 total bytes  u32 chunk bytes
              | header | u64 xxh3 of all before
    chunk     u32 index  u32 length  u64 xxh3 of the data | data          (as many as it takes, possibly none)
    trailer   "ICRT" u32 number of chunks  16 bytes payload id

All integers are little-endian, array elements too. The payload id is the 128-bit xxh3 over the chunk checksums in
order, so that a missing or exchanged chunk cannot hide. xxh3 finds faults, not forgers: who may send is decided by
the connection. An opening that resumes is followed by the chunks that the receiver does not have yet. Refused frames
raise :class:`icrf.errors.ProtocolError`:

========  ==============================================================================================
P001      an intact opening that says something impossible, or a header this version cannot read
P004      an intact opening of another frame version
P020      a frame out of order, twice, too long, or after the trailer
P021      bytes that do not match their checksum, or a payload that does not match its id
P022      the payload ended early
P026      a declared size above the limit; raised before anything is allocated
========  ==============================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import xxhash

from icrf.errors import ProtocolError
from icrf.ports import PayloadHeader
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.codec import from_proto, parse, to_proto
from icrf.wire.destination import Destination

FRAME_VERSION = 1
CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 2 << 20
MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 10 << 30
DTYPES = frozenset(
    ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
)

# What a coded payload's bytes are, to the frames.
CODED_DTYPE = "uint8"

_OPENING = struct.Struct("<4sBBIQI")
_CHUNK = struct.Struct("<IIQ")
_TRAILER = struct.Struct("<4sI16s")
_CHECKSUM = struct.Struct("<Q")
_OPENING_MAGIC = b"ICRF"
_TRAILER_MAGIC = b"ICRT"


Array = np.ndarray[Any, Any]
Allocate = Callable[[PayloadHeader], Array]
Reserve = Callable[[PayloadHeader], Array | Future[Array]]


def num_bytes(header: PayloadHeader) -> int:
    """How large the array of a payload is."""
    return header.num_elements * np.dtype(header.dtype).itemsize


def plain_array(header: PayloadHeader) -> Array:
    """An array for a payload in ordinary memory."""
    return np.empty(header.num_elements, header.dtype)


@dataclass(frozen=True)
class Received:
    """A verified payload.

    Attributes:
        header: what the sender said about it.
        array: one-dimensional, owned by the caller; the coded bytes where the header has a coding.
        wire_bytes: sum of the lengths of all frames, the gateway's own headers included.
        payload_id: hex xxh3-128 over the chunk checksums.
    """

    header: PayloadHeader
    array: np.ndarray[Any, Any]
    wire_bytes: int
    payload_id: str


@dataclass(frozen=True)
class Opening:
    """What the first frame of a payload says; `resumes`: the receiver is asked how much of it is there already."""

    header: PayloadHeader
    total_bytes: int
    chunk_bytes: int
    resumes: bool = False

    @property
    def num_chunks(self) -> int:
        return -(-self.total_bytes // self.chunk_bytes)

    def chunk_length(self, index: int) -> int:
        """Bytes of data in chunk `index`: all chunks are full but the last."""
        return min(self.chunk_bytes, self.total_bytes - index * self.chunk_bytes)


class FrameWriter:
    """The frames of one array; iterate to get them, as often as needed.

    Every chunk is copied once, into its frame, and its checksum computed once. The array is only read.

    Args:
        header: its `dtype` and `num_elements` must be the array's, unless it has a coding.
        array: one-dimensional, contiguous, in native byte order; with a coding what it was coded to, uint8.
        chunk_bytes: data bytes per chunk, at most :data:`MAX_CHUNK_BYTES`.

    Raises:
        ProtocolError: P001 if header and array disagree, P026 if the header or the array exceeds its limit.
    """

    def __init__(self, header: PayloadHeader, array: np.ndarray[Any, Any], chunk_bytes: int = CHUNK_BYTES) -> None:
        _check_sendable(header, array, chunk_bytes)
        self.header = header
        self._data = array.view(np.uint8).data
        self._chunk_bytes = chunk_bytes
        raw = bytes(to_proto(header).SerializeToString())
        if len(raw) > MAX_HEADER_BYTES:
            _refuse(
                "P026",
                f"the payload header takes {len(raw)} bytes",
                place="header",
                allowed=f"at most {MAX_HEADER_BYTES}",
                hint="Send to fewer recipients at once",
            )
        self._raw_header = raw
        self._checksums: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        yield self.opening()
        yield from self.body()

    @property
    def num_chunks(self) -> int:
        return -(-self._data.nbytes // self._chunk_bytes)

    @property
    def chunk_bytes(self) -> int:
        """Data bytes of every chunk but the last."""
        return self._chunk_bytes

    def opening(self, *, resumes: bool = False) -> bytes:
        """The first frame.

        Args:
            resumes: ask the receiver what it has; :meth:`body` then starts after that.
        """
        sizes = len(self._raw_header), self._data.nbytes, self._chunk_bytes
        opening = _OPENING.pack(_OPENING_MAGIC, FRAME_VERSION, resumes, *sizes) + self._raw_header
        return opening + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(opening))

    def body(self, start: int = 0) -> Iterator[bytes]:
        """The chunks from index `start` on, and the trailer over all of them."""
        for index in range(start, self.num_chunks):
            data = self._chunk(index)
            yield b"".join((_CHUNK.pack(index, data.nbytes, *_CHECKSUM.unpack(self._checksum(index))), data))
        identity = xxhash.xxh3_128(b"".join(self._checksum(index) for index in range(self.num_chunks)))
        yield _TRAILER.pack(_TRAILER_MAGIC, self.num_chunks, identity.digest())

    @property
    def wire_bytes(self) -> int:
        """Sum of the lengths of all frames, each sent once."""
        return len(self.opening()) + self.num_chunks * _CHUNK.size + self._data.nbytes + _TRAILER.size

    def _chunk(self, index: int) -> memoryview:
        return self._data[index * self._chunk_bytes : (index + 1) * self._chunk_bytes]

    def _checksum(self, index: int) -> bytes:
        while len(self._checksums) <= index:
            checksum = xxhash.xxh3_64_intdigest(self._chunk(len(self._checksums)))
            self._checksums.append(_CHECKSUM.pack(checksum))
        return self._checksums[index]


class FrameReader:
    """Assembles the frames of one payload into one preallocated array.

    Feed the frames in order, then call :meth:`finish`. After an error, what was verified before it stands: another
    stream may go on from there, unless the trailer was at fault.

    Args:
        max_bytes: declared sizes above it are refused with P026 before anything is allocated.
        allocate: makes the array of a payload that is not coded, or begins to.
    """

    def __init__(self, max_bytes: int = MAX_PAYLOAD_BYTES, allocate: Reserve = plain_array) -> None:
        self._max_bytes, self._allocate = max_bytes, allocate
        self._opening: Opening | None = None
        self._destination: Destination | None = None
        self._next = 0
        self._identity = xxhash.xxh3_128()
        self._payload_id = ""
        self._wire_bytes = 0

    @property
    def header(self) -> PayloadHeader | None:
        """The header, once the opening frame was fed."""
        return self._opening.header if self._opening else None

    @property
    def num_verified(self) -> int:
        """Chunks that are there and match their checksums."""
        return self._next

    @property
    def complete(self) -> bool:
        """Whether the trailer has been read."""
        return bool(self._payload_id)

    @property
    def wire_bytes(self) -> int:
        """Bytes of all frames fed so far."""
        return self._wire_bytes

    def feed(self, frame: bytes) -> None:
        """Take the next frame.

        Raises:
            ProtocolError: see the table of this module.
        """
        if self.complete:
            _refuse("P020", "a frame follows the trailer", place=f"frame of {len(frame)} bytes")
        if self._opening is None or self._destination is None:
            self._open(frame)
        elif self._next < self._opening.num_chunks:
            self._take_chunk(frame, self._opening, self._destination)
        else:
            self._take_trailer(frame)
        self._wire_bytes += len(frame)

    def abandon(self) -> None:
        """Nothing more will come, nor be asked for: an array that nobody has begun to make is not made."""
        if self._destination is not None:
            self._destination.abandon()

    def finish(self) -> Received:
        """The whole payload.

        Raises:
            ProtocolError: P022 if frames are missing.
        """
        if self._opening is None or self._destination is None:
            _refuse("P022", "the payload ended before its first frame", place="opening frame")
        if not self.complete:
            _refuse(
                "P022",
                f"the payload ended after {self._next} of {self._opening.num_chunks} chunks without its trailer",
                place=f"chunk {self._next}",
            )
        with _memory_for(self._opening):
            array = self._destination.array()
        return Received(self._opening.header, array, self._wire_bytes, self._payload_id)

    def _open(self, frame: bytes) -> None:
        opening = read_opening(frame, self._max_bytes)
        with _memory_for(opening):
            if opening.header.coding:
                self._destination = Destination(np.empty(opening.total_bytes, CODED_DTYPE))
            else:
                self._destination = Destination(self._allocate(opening.header))
        self._opening = opening

    def _take_chunk(self, frame: bytes, opening: Opening, destination: Destination) -> None:
        place = f"chunk {self._next}"
        if len(frame) == _TRAILER.size and frame.startswith(_TRAILER_MAGIC):
            _refuse("P022", f"the trailer comes after {self._next} of {opening.num_chunks} chunks", place=place)
        if len(frame) < _CHUNK.size:
            _refuse("P022", f"the frame of {len(frame)} bytes is too short for a chunk", place=place)
        index, length, checksum = _CHUNK.unpack_from(frame)
        if index != self._next:
            _refuse("P020", "chunk out of order", place=place, value=index, allowed=str(self._next))
        expected = opening.chunk_length(index)
        if length != expected:
            _refuse("P020", "chunk of a wrong length", place=place, value=length, allowed=str(expected))
        data = memoryview(frame)[_CHUNK.size :]
        if data.nbytes != length:
            code = "P022" if data.nbytes < length else "P020"
            _refuse(code, f"the chunk declares {length} bytes and holds {data.nbytes}", place=place)
        if xxhash.xxh3_64_intdigest(data) != checksum:
            _refuse("P021", "the chunk does not match its checksum", place=place)
        with _memory_for(opening):
            destination.write(index * opening.chunk_bytes, data)
        self._identity.update(_CHECKSUM.pack(checksum))
        self._next += 1

    def _take_trailer(self, frame: bytes) -> None:
        if len(frame) != _TRAILER.size or not frame.startswith(_TRAILER_MAGIC):
            _refuse("P020", f"a frame of {len(frame)} bytes stands where the trailer belongs", place="trailer")
        _, count, identity = _TRAILER.unpack(frame)
        if count != self._next:
            _refuse("P020", "the trailer counts other chunks", place="trailer", value=count, allowed=str(self._next))
        if identity != self._identity.digest():
            _refuse("P021", "the payload does not match its id", place="trailer")
        self._payload_id = identity.hex()


@contextmanager
def _memory_for(opening: Opening) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        _refuse(
            "P026",
            f"no memory for a payload of {opening.total_bytes} bytes",
            place="opening frame",
            hint="Give this cluster's gateway and object store more memory",
        )
    except CancelledError:
        _refuse("P020", "the transfer was given up, or goes on over another connection", place="frame")


def read_opening(frame: bytes, max_bytes: int = MAX_PAYLOAD_BYTES) -> Opening:
    """Read and check the first frame of a payload; allocates nothing.

    Raises:
        ProtocolError: P001, P004, P020, P021, P022 or P026, see the table of this module.
    """
    place = "opening frame"
    if len(frame) < _OPENING.size + _CHECKSUM.size:
        _refuse("P022", f"the frame of {len(frame)} bytes is too short for an opening", place=place)
    if len(frame) > _OPENING.size + MAX_HEADER_BYTES + _CHECKSUM.size:
        _refuse("P026", f"the opening takes {len(frame)} bytes", place=place, allowed=f"a header of {MAX_HEADER_BYTES}")
    body = memoryview(frame)[: -_CHECKSUM.size]
    if xxhash.xxh3_64_intdigest(body) != _CHECKSUM.unpack_from(frame, len(body))[0]:
        _refuse("P021", "the first frame does not match its checksum or is no opening", place=place)
    magic, version, resumes, header_bytes, total_bytes, chunk_bytes = _OPENING.unpack_from(frame)
    if magic != _OPENING_MAGIC:
        _refuse("P020", "the first frame is no opening", place=place)
    if version != FRAME_VERSION or resumes > 1:
        _refuse("P004", "frames of another version", place=place, value=version, allowed=str(FRAME_VERSION))
    if header_bytes != len(body) - _OPENING.size:
        _refuse("P020", "the header has another length than declared", place=place, value=header_bytes)
    if total_bytes > max_bytes:
        _refuse("P026", f"payload of {total_bytes} bytes", place=place, allowed=f"at most {max_bytes} bytes")
    if not 1 <= chunk_bytes <= MAX_CHUNK_BYTES or total_bytes > chunk_bytes * 0xFFFFFFFF:
        _refuse("P001", "chunk size out of range", place=place, value=chunk_bytes, allowed=f"1 to {MAX_CHUNK_BYTES}")
    header = _read_header(bytes(body[_OPENING.size :]))
    plain_bytes = num_bytes(header)
    if plain_bytes > max_bytes:
        _refuse("P026", f"payload of {plain_bytes} bytes", place=place, allowed=f"at most {max_bytes} bytes")
    if not header.coding and plain_bytes != total_bytes:
        _refuse(
            "P001",
            f"{header.num_elements} elements of {header.dtype} do not take {total_bytes} bytes",
            place=f"{place}, field num_elements",
        )
    return Opening(header, total_bytes, chunk_bytes, bool(resumes))


def _read_header(raw: bytes) -> PayloadHeader:
    place = "opening frame, header"
    header = from_proto(parse(raw, gateway_pb2.PayloadHeader), PayloadHeader)
    if header.dtype not in DTYPES:
        _refuse(
            "P001",
            f"element type {header.dtype!r} unknown",
            place=f"{place}, field dtype",
            allowed=", ".join(sorted(DTYPES)),
        )
    if header.num_elements < 0:
        _refuse("P001", "negative size", place=f"{place}, field num_elements", value=header.num_elements)
    return header


def _check_sendable(header: PayloadHeader, array: np.ndarray[Any, Any], chunk_bytes: int) -> None:
    if array.ndim != 1 or not array.flags.c_contiguous or not array.dtype.isnative:
        _refuse(
            "P001",
            f"an array of shape {array.shape} and type {array.dtype.str} cannot be sent",
            place="payload",
            allowed="one-dimensional, contiguous, native byte order",
        )
    if header.coding:
        if array.dtype.name != CODED_DTYPE:
            _refuse("P001", f"a coded payload of {array.dtype.name}", place="payload", allowed=CODED_DTYPE)
    elif array.dtype.name != header.dtype or header.dtype not in DTYPES or array.size != header.num_elements:
        _refuse(
            "P001",
            f"the header says {header.num_elements} elements of {header.dtype}, "
            f"the array has {array.size} of {array.dtype.name}",
            place="payload header",
            allowed=f"the array's own, one of {', '.join(sorted(DTYPES))}",
        )
    if array.nbytes > MAX_PAYLOAD_BYTES:
        _refuse("P026", f"payload of {array.nbytes} bytes", place="payload", allowed=f"at most {MAX_PAYLOAD_BYTES}")
    if not 1 <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"chunk_bytes {chunk_bytes} is not in 1 to {MAX_CHUNK_BYTES}")


def _refuse(code: str, message: str, **parts: Any) -> NoReturn:
    raise ProtocolError(code, message, **parts)
