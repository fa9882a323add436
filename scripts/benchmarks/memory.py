"""The processes of a measured system, and what they take together of memory and processors (Linux)."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

_MARK = "ICRF_BENCH_RUN"
_KILL_S = 5.0
# Processor time of a process in user and kernel mode, and that of its ended children, in what _fields returns.
_TIMES = slice(11, 15)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Family:
    """All processes that were started with this family's mark in their environment, and their children.

    Both are asked for: a process may overwrite its environment with its title, or lose its parent.

    Args:
        name: the mark; a new one by default.
    """

    def __init__(self, name: str = "") -> None:
        self._mark = f"{_MARK}={name or uuid.uuid4().hex}"
        self._known: dict[int, bool] = {}

    @property
    def environment(self) -> Mapping[str, str]:
        """What the first process must find in its environment."""
        name, _, value = self._mark.partition("=")
        return {name: value}

    @classmethod
    def mine(cls) -> Family:
        """The family of this process, itself included."""
        family = cls(os.environ.get(_MARK, ""))
        family._known[os.getpid()] = True
        return family

    def processor_s(self) -> float:
        """Seconds of processors that the living members have taken, and those of their children that have ended."""
        return sum(sum(map(int, _fields(pid)[_TIMES])) for pid in self.members()) / os.sysconf("SC_CLK_TCK")

    def members(self) -> list[int]:
        """Ids of the living processes."""
        alive = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
        self._known = {pid: ours for pid, ours in self._known.items() if pid in alive}
        for pid in sorted(alive - self._known.keys()):
            self._known[pid] = self._belongs(pid)
        return [pid for pid, ours in self._known.items() if ours and _fields(pid)[0] != b"Z"]

    def _belongs(self, pid: int) -> bool:
        if self._known.get(int(_fields(pid)[1])):
            return True
        try:
            return self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False  # it has just ended, or is another user's

    def end(self, grace_s: float = 10.0) -> None:
        """Wait a little for all to end, then kill who is left."""
        if self._gone_within(grace_s):
            return
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._gone_within(_KILL_S)

    def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.members():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True


def _fields(pid: int) -> list[bytes]:
    """The fields of ``/proc/PID/stat`` from the state on; those of an ended process if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return [b"Z", *[b"0"] * 20]


class Sampler:
    """Calls :meth:`sample` again and again while the context lasts, and once at its end."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.sample()

    def sample(self) -> None:
        """Look once; in the sampler's thread until the context ends."""
        raise NotImplementedError


class MemoryWatch(Sampler):
    """Samples the memory of a family while the context lasts.

    Attributes:
        private_bytes: largest sum of resident memory that no file and no other process shares, so without what lies in
            an object store.
        resident_bytes: largest sum of resident memory; shared pages count once per process.
    """

    def __init__(self, family: Family, every_s: float = 0.25) -> None:
        super().__init__(every_s)
        self._family = family
        self.private_bytes = self.resident_bytes = 0

    def sample(self) -> None:
        """Add up what all members hold now."""
        pages = list(_pages(self._family.members()))
        self.resident_bytes = max(self.resident_bytes, _PAGE * sum(resident for resident, _ in pages))
        self.private_bytes = max(self.private_bytes, _PAGE * sum(resident - shared for resident, shared in pages))


def _pages(pids: list[int]) -> Iterator[tuple[int, int]]:
    """(resident, shared) pages of each process."""
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/statm").read_bytes().split()
        except OSError:
            continue  # it has just ended
        yield int(fields[1]), int(fields[2])
