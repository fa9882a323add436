"""What a host notes for its agent, so that it can be read after the host's process was killed.

Small files below a common prefix: ``PREFIX.current`` names the node whose code runs, ``PREFIX.fault`` is where Python
writes its stack on a fatal signal, ``PREFIX.residents`` says how many nodes are active and what they take, for the
process that comes after this one. What was written stays in the kernel's page cache when the writer dies.
"""

from __future__ import annotations

import faulthandler
import os
import weakref
from pathlib import Path

IDLE = -1
TAIL_LINES = 8
_CURRENT, _FAULT, _RESIDENTS = ".current", ".fault", ".residents"


class HostNotes:
    """The host's side.

    Args:
        prefix: path prefix of the files; nothing is noted if it is empty or its folder is not on this machine.

    Attributes:
        earlier_residents: the last (active nodes, bytes they take) of an earlier process of this host, else (0, 0).
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix if prefix and os.path.isdir(os.path.dirname(prefix)) else ""
        self._file = self._residents = -1
        self.earlier_residents = (0, 0)
        if self._prefix:
            self.earlier_residents = noted_residents(self._prefix)
            # Not truncated: what an earlier life of the host noted is the agent's to read.
            self._file, self._residents = map(self._opened, (_CURRENT, _RESIDENTS))

    def _opened(self, suffix: str) -> int:
        descriptor = os.open(self._prefix + suffix, os.O_RDWR | os.O_CREAT, 0o600)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def enter(self, index: int) -> None:
        """The code of node `index` is about to run."""
        if self._file >= 0:
            os.pwrite(self._file, b"%11d\n" % index, 0)

    def leave(self) -> None:
        """It has returned."""
        self.enter(IDLE)

    def residents(self, active: int, num_bytes: int) -> None:
        """So many nodes are active, and take so much."""
        if self._residents >= 0:
            os.pwrite(self._residents, b"%11d %19d\n" % (active, num_bytes), 0)

    def record_faults(self) -> None:
        """Have this process write its stacks there when it gets a fatal signal; for processes of their own only."""
        if self._prefix:
            # Kept open on purpose: the handler needs the descriptor until the end.
            self._faults = open(self._prefix + _FAULT, "ab", buffering=0)  # noqa: SIM115
            faulthandler.enable(self._faults, all_threads=False)


def read_notes(prefix: str) -> tuple[int, str]:
    """The agent's side: (node whose code ran, or -1; the end of the fault report), and both files are emptied."""
    current = _take(prefix + _CURRENT).strip()
    lines = [line.strip() for line in _take(prefix + _FAULT).splitlines() if line.strip()]
    index = int(current) if current.removeprefix("-").isdigit() else IDLE
    return index, " | ".join(lines[:TAIL_LINES])


def noted_residents(prefix: str) -> tuple[int, int]:
    """How many nodes of a host were active when it noted that last, and the bytes they took; else (0, 0)."""
    try:
        first, second = map(int, Path(prefix + _RESIDENTS).read_text().split())
    except (FileNotFoundError, ValueError):  # ValueError: its writer died over it
        return 0, 0
    return first, second


def _take(path: str) -> str:
    try:
        text = Path(path).read_text(errors="replace")
        os.truncate(path, 0)
    except FileNotFoundError:
        return ""
    return text.replace("\0", "")
