"""Finds the processes of a test environment through ``/proc`` and ends them (Linux)."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from icrf.testing.waiting import until
from icrf_agent.keeper import end_session, session_members

_POLL_S = 0.02
_GRACE_S = 10.0

# Ray's workers overwrite their command line with what they do: ``ray::ManagerActor.invoke``.
_ACTORS = {
    "manager": re.compile(r"ray::ManagerActor\b"),
    "gateway": re.compile(r"ray::GatewayActor\b"),
    "host": re.compile(r"ray::(HostActor|\w+Host)\b"),
}
ACTORS = tuple(_ACTORS)


def marked(variable: str, value: str) -> list[int]:
    """Processes that were started with `variable` set to `value`, wherever they hang in the tree."""
    needle = os.fsencode(f"{variable}={value}")
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if needle in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile, or it is another user's
    return found


def end_all(variable: str, value: str, spare: Iterable[int] = ()) -> None:
    """SIGKILL for every marked process and for whatever shares a session with one that is led by a marked process.

    The sessions matter because some of Ray's processes overwrite their environment and carry no mark that can be read.
    """
    ours = {os.getpid(), *spare}
    mine = os.getsid(0)
    deadline = time.monotonic() + _GRACE_S
    sessions: set[int] = set()
    while (left := set(marked(variable, value)) - ours) and time.monotonic() < deadline:
        for pid in left:
            session = _session(pid)
            if session not in (0, mine):
                sessions.add(session)
            send(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    for session in sessions:
        end_session(session)


def actors(session: int, what: str) -> list[int]:
    """Workers of a Ray cluster that are ``manager``, ``gateway`` or ``host``, oldest first."""
    pattern = _ACTORS[what]
    return _by_age(pid for pid in session_members(session) if pattern.match(command_line(pid)))


def programs(session: int, name: str) -> list[int]:
    """Processes of a session whose program is called `name`, oldest first."""
    return _by_age(
        pid for pid in session_members(session) if os.path.basename(command_line(pid).partition(" ")[0]) == name
    )


def command_line(pid: int) -> str:
    """As ``ps`` shows it; empty for a process that has ended."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def await_end(pid: int, timeout_s: float = _GRACE_S) -> bool:
    """Whether the process has ended, as a zombie at least, within `timeout_s`."""

    def has_ended() -> bool:
        fields = _stat(pid)
        return not fields or fields[0] in "ZX"

    try:
        return until(has_ended, timeout_s)
    except TimeoutError:
        return False


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _by_age(pids: Iterable[int]) -> list[int]:
    born = {pid: int(fields[19]) for pid in pids if (fields := _stat(pid))}
    return sorted(born, key=lambda pid: (born[pid], pid))


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third on, the state; empty for a process that is gone."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def private_bytes(pid: int) -> int:
    """Resident memory of a process that is not mapped from files or shared, such as an object store."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
