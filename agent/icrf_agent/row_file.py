"""Rows of many nodes in a flat file: what a host keeps of nodes that are not all in its memory.

A file has the rows one after the other, as they lie in memory. It has no name, so that nothing is left of it when its
process ends, however it ends: what must outlive a host is in the checkpoints.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from icrf.errors import ResourceError

Array = np.ndarray[Any, Any]


class _NamelessFile:
    """A file without a name, opened when it is first used; it lies where Python puts temporary files (``TMPDIR``).

    Raises:
        ResourceError: R005 when the disk is full, or the folder cannot be written to.
    """

    @cached_property
    def _descriptor(self) -> int:
        try:
            descriptor, path = tempfile.mkstemp(prefix="icrf-nodes-")
            os.unlink(path)
        except OSError as error:
            raise _no_room(error) from error
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read_into(self, buffer: memoryview, place: int) -> bool:
        """Fill a buffer; whether there was so much."""
        # The system reads 2 GiB at most in one go, which a row of a large model exceeds.
        while buffer and (found := os.preadv(self._descriptor, [buffer], place)):
            buffer, place = buffer[found:], place + found
        return not buffer

    def write(self, data: memoryview, place: int) -> None:
        """Write all of it."""
        try:
            while data:
                written = os.pwrite(self._descriptor, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            raise _no_room(error) from error


class RowFile:
    """A table of shape (num_rows, width) on disk, used like an array; ``table[k]`` is a copy of a row.

    Not thread-safe.
    """

    def __init__(self, num_rows: int, width: int, dtype: Any) -> None:
        self.shape: tuple[int, int] = (num_rows, width)
        self.dtype = np.dtype(dtype)
        self._row_bytes: int = width * self.dtype.itemsize
        self._file = _NamelessFile()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, number: int) -> Array:
        row = np.empty(self.shape[1], self.dtype)
        self.read(number, row)
        return row

    def read(self, number: int, out: Array) -> None:
        """Copy a row into a contiguous array of its width and type: fresh memory takes longer than the reading."""
        if not self._file.read_into(_bytes_of(out), self._place(number)):
            raise IndexError(f"row {number} was not written yet")

    def __setitem__(self, number: int, row: Array) -> None:
        found = np.ascontiguousarray(row, self.dtype).reshape(self.shape[1])
        self._file.write(_bytes_of(found), self._place(number))

    def _place(self, number: int) -> int:
        if not 0 <= number < self.shape[0]:
            raise IndexError(number)
        return number * self._row_bytes


class BytesFile(Mapping[int, bytes]):
    """Byte strings by number in a file that only grows; what is replaced is freed with the file."""

    def __init__(self) -> None:
        self._file = _NamelessFile()
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def __getitem__(self, number: int) -> bytes:
        start, size = self._places[number]
        found = bytearray(size)
        self._file.read_into(memoryview(found), start)
        return bytes(found)

    def __setitem__(self, number: int, data: bytes) -> None:
        self._file.write(memoryview(data), self._end)
        self._places[number] = (self._end, len(data))
        self._end += len(data)

    def __iter__(self) -> Iterator[int]:
        # A list at once: whoever asks a host what it holds does so while nodes come and go.
        return iter(list(self._places))

    def __len__(self) -> int:
        return len(self._places)


Table = Array | RowFile


def make_table(rows: Sequence[Array], width: int, dtype: Any, on_disk: bool) -> Table:
    """A table of these rows, in memory or on disk; one without any elements is in memory."""
    table = RowFile(len(rows), width, dtype) if on_disk and width else np.empty((len(rows), width), dtype)
    for number, row in enumerate(rows):
        table[number] = row
    return table


def read_row(table: Table, number: int, out: Array) -> None:
    """Copy a row of a table into a contiguous array of its width and type."""
    if isinstance(table, RowFile):
        table.read(number, out)
    else:
        np.copyto(out, table[number])


def like(table: Table) -> Table:
    """An empty table of the same form."""
    return RowFile(*table.shape, table.dtype) if isinstance(table, RowFile) else np.empty_like(table)


def _bytes_of(row: Array) -> memoryview:
    found: memoryview = row.view(np.uint8).data
    return found


def _no_room(error: OSError) -> ResourceError:
    return ResourceError(
        "R005",
        f"the state of nodes that are not active cannot be written: {error.strerror}",
        place=tempfile.gettempdir(),
        hint="make room there, set TMPDIR to a larger disk, or raise resident_nodes",
    )
