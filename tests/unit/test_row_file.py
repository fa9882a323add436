"""Rows and byte strings on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np
import pytest

from icrf.errors import ResourceError
from icrf_agent.row_file import BytesFile, RowFile


def test_a_row_that_the_system_reads_and_writes_in_pieces_comes_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwrite

    def some_read(descriptor: int, buffers: Sequence[memoryview], place: int) -> int:
        return read(descriptor, [buffers[0][:5]], place)

    monkeypatch.setattr(os, "preadv", some_read)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, data[:7], place))
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    table = RowFile(3, 4, np.float32)
    for number in (2, 0, 1):
        table[number] = rows[number]
    assert np.array_equal([table[number] for number in range(3)], rows)
    states = BytesFile()
    states[4] = b"a state of many bytes"
    assert states[4] == b"a state of many bytes"


def test_a_row_that_was_not_written_is_no_row() -> None:
    table = RowFile(2, 4, np.float32)
    table[0] = np.ones(4)
    with pytest.raises(IndexError):
        table[1]


def test_byte_strings_may_come_while_somebody_looks_at_all_of_them() -> None:
    states = BytesFile()
    states[0] = b"first"
    for number, _ in enumerate(states.values(), start=1):
        states[number] = b"more"
    assert dict(states) == {0: b"first", 1: b"more"}


def test_a_full_disk_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="R005") as refused:
        RowFile(1, 4, np.float32)[0] = np.ones(4)
    assert "TMPDIR" in str(refused.value.hint)
