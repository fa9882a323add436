"""Lossless packing of the arrays that cross between clusters.

An array is cut into chunks of :data:`icrf.codecs.CHUNK_ELEMENTS`, so that memory stays small. A chunk's elements are
taken as unsigned words: their own bits, or where both ends have a base these exclusive-or the bits of the base, so that
what has not changed is zero. The words go byte plane by byte plane through Zstandard (RFC 8878), each plane for itself:
planes of signs, exponents and trailing zeros shrink, those of noise are kept as they are. Where enough words are zero,
a bitmap says which are not, and only those follow.

Exact partial sums (:mod:`icrf.update`) need nothing of their own: they are float64, and the bits that their grid does
not use are zeros. Written as integers on the grid they pack no better (within 3 %, to either side).

What comes out of :func:`unpack` has every bit of what went into :func:`pack`; a checksum over it travels along.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import xxhash
import zstandard

from icrf.codecs import CHUNK_ELEMENTS
from icrf.errors import ProtocolError

LEVEL = 1

# Bytes per word, whether a bitmap comes first, words that follow.
_CHUNK = struct.Struct("<BBI")
_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")

Array = np.ndarray[Any, Any]


def pack(array: Array, base: Array | None = None) -> Array:
    """The packed bytes of an array, uint8 of shape (any,).

    Args:
        array: one-dimensional, contiguous.
        base: of the same shape and type, with equal bits at both ends; None for none.
    """
    parts = [_CHECKSUM.pack(xxhash.xxh3_64_intdigest(array.view(np.uint8).data))]
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False)
    bits = _bits(array)
    for start in range(0, array.size, CHUNK_ELEMENTS):
        words = bits[start : start + CHUNK_ELEMENTS]
        if base is not None:
            words = words ^ _bits(base[start : start + CHUNK_ELEMENTS])
        parts += _packed(words, compressor)
    return np.frombuffer(b"".join(parts), np.uint8)


def unpack(data: Array, dtype: str, num_elements: int, base: Array | None = None) -> Array:
    """The array that was packed.

    Args:
        data: what :func:`pack` has made, uint8.
        base: what it was packed against, of so many elements and this type.

    Raises:
        ProtocolError: P001 for bytes that cannot come from :func:`pack`, P021 for an array that does not match its
            checksum.
    """
    reader = _Reader(data.tobytes())
    checksum = _CHECKSUM.unpack(reader.take(_CHECKSUM.size))[0]
    array = np.empty(num_elements, dtype)
    bits = _bits(array)
    for start in range(0, num_elements, CHUNK_ELEMENTS):
        count = min(CHUNK_ELEMENTS, num_elements - start)
        words = reader.words(count, bits.dtype)
        if base is not None:
            words = words ^ _bits(base[start : start + count])
        bits[start : start + count] = words
    if reader.left:
        _refuse("bytes follow the last chunk", value=reader.left)
    if xxhash.xxh3_64_intdigest(array.view(np.uint8).data) != checksum:
        raise ProtocolError("P021", "the unpacked array does not match its checksum", place="packed payload")
    return array


def _bits(array: Array) -> Array:
    return array.view(f"u{array.dtype.itemsize}")


def _packed(words: Array, compressor: zstandard.ZstdCompressor) -> list[bytes]:
    """One chunk: its head, the bitmap if there is one, the planes."""
    present = words != 0
    sparse = int(np.count_nonzero(present)) * words.itemsize + words.size // 8 < words.nbytes
    planes = []
    if sparse:
        planes.append(np.packbits(present, bitorder="little"))
        words = words[present]
    largest = int(words.max()) if words.size else 0
    width = -(-largest.bit_length() // 8)
    columns = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, words.itemsize)
    planes += [np.ascontiguousarray(columns[:, k]) for k in range(width)]
    parts = [_CHUNK.pack(width, sparse, words.size)]
    for plane in planes:
        small = compressor.compress(plane.data)
        data = small if len(small) < plane.size else plane.tobytes()
        parts += [_LENGTH.pack(len(data)), data]
    return parts


class _Reader:
    """Reads packed bytes; nothing that they say is believed before it is checked."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._decompressor = zstandard.ZstdDecompressor()

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        if length > self.left:
            _refuse("the packed bytes end early", value=self.left, allowed=f"at least {length} more")
        self._at += length
        return self._data[self._at - length : self._at]

    def words(self, count: int, dtype: Any) -> Array:
        """The words of the next chunk of `count` elements."""
        width, sparse, present = _CHUNK.unpack(self.take(_CHUNK.size))
        if width > dtype.itemsize or sparse > 1 or (present > count if sparse else present != count):
            _refuse("impossible chunk", value=(width, sparse, present), allowed=f"{count} words of {dtype}")
        bitmap = np.frombuffer(self._plane(-(-count // 8)), np.uint8) if sparse else None
        columns = np.zeros((present, dtype.itemsize), np.uint8)
        for k, plane in enumerate(self._planes(width, present)):
            columns[:, k] = plane
        words: Array = columns.view(np.dtype(dtype).newbyteorder("<")).reshape(-1).astype(dtype, copy=False)
        if bitmap is None:
            return words
        where = np.unpackbits(bitmap, count=count, bitorder="little").view(bool)
        if int(np.count_nonzero(where)) != present:
            _refuse("a bitmap that counts other words than follow", value=present)
        found = np.zeros(count, dtype)
        found[where] = words
        return found

    def _planes(self, width: int, length: int) -> Iterator[Array]:
        for _ in range(width):
            yield np.frombuffer(self._plane(length), np.uint8)

    def _plane(self, length: int) -> bytes:
        data = self.take(_LENGTH.unpack(self.take(_LENGTH.size))[0])
        if len(data) >= length:
            plane = data
        else:
            try:
                plane = self._decompressor.decompress(data, max_output_size=length)
            except zstandard.ZstdError as error:
                raise ProtocolError("P001", f"a plane cannot be read: {error}", place="packed payload") from error
        if len(plane) != length:
            _refuse("a plane of another length", value=len(plane), allowed=str(length))
        return plane


def _refuse(message: str, **parts: Any) -> NoReturn:
    raise ProtocolError("P001", message, place="packed payload", **parts)
