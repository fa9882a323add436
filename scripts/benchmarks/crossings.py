"""What ``scripts/bench between-clusters`` sends, who carries it, and how its processes talk. Peers import this too, in
environments of their own: the standard library only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TEXT = "m" * 100
REFERENCE = "grpc-copy"
# Repetitions that do not count: until then an object store has memory that nobody has touched before.
WARM_UP = 3
# A machine with so little to do is quiet; looked at as often, and waited for as long.
QUIET, LOOK_S, PATIENCE_S = 0.08, 0.5, 30.0

LOCAL_RAY: Mapping[str, Any] = {
    "address": "local",
    "num_cpus": 2,
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "error",
}
"""How each side starts a Ray cluster of its own, whatever its version."""


@dataclass(frozen=True)
class Crossing:
    """What crosses, once per repetition.

    Attributes:
        megabytes: of one payload; 0 for messages.
        receivers: nodes that get it, or how many messages there are.
        clusters: over how many other clusters the nodes are spread.
        single: the case that sends the same payload to one node; empty for those that are no fan-out.
        most_repeats: more of it are not worth their time.
        encrypted: whether it is measured with TLS, too.
        all_ways: whether it is measured with everything that there is, and not only with the reference and the fabric.
    """

    name: str
    megabytes: int
    receivers: int = 1
    clusters: int = 1
    single: str = ""
    most_repeats: int = 100
    encrypted: bool = True
    all_ways: bool = True

    @property
    def unit(self) -> str:
        return "GB/s" if self.megabytes else "messages/s"

    @property
    def payload_bytes(self) -> int:
        return self.megabytes * 1_000_000

    @property
    def delivered(self) -> float:
        """By a repetition: gigabytes or messages."""
        return (self.megabytes / 1000 or 1) * self.receivers


CASES = {
    case.name: case
    for case in (
        Crossing("bulk100", 100),
        Crossing("bulk2000", 2000, most_repeats=3),
        Crossing("small", 0, 2000),
        Crossing("bulk10", 10, encrypted=False, all_ways=False),
        Crossing("fanout", 10, 40, single="bulk10", encrypted=False, all_ways=False),
        Crossing("clusters3", 100, 3, clusters=3, single="bulk100", most_repeats=3, encrypted=False, all_ways=False),
    )
}


@dataclass(frozen=True)
class Carrier:
    """A system that brings something from one place to another.

    Attributes:
        title: for the table.
        module: what runs its processes.
        environment: the peer's own environment; empty: the project's.
        payloads: whether it is measured with payloads.
        most_megabytes: of one payload.
        most_messages: it is so slow that more of them would only take time.
        encrypted: whether it is measured with TLS.
        all_cases: whether it is measured with fan-outs.
    """

    title: str
    module: str = "benchmarks.crossing"
    environment: str = ""
    payloads: bool = True
    most_megabytes: int = 1_000_000
    most_messages: int = 1_000_000
    encrypted: bool = True
    all_cases: bool = False

    def takes(self, crossing: Crossing, tls: bool) -> bool:
        """Whether the two are measured together."""
        if tls and not (self.encrypted and crossing.encrypted):
            return False
        if not self.payloads and crossing.megabytes:
            return False
        return crossing.megabytes <= self.most_megabytes and (crossing.all_ways or self.all_cases)


_RAYFED = "benchmarks.systems.rayfed"
CARRIERS = {
    REFERENCE: Carrier("gRPC stream, copied", all_cases=True),
    "grpc": Carrier("gRPC stream, dropped"),
    "icrf": Carrier("**ICRF**, direct", all_cases=True),
    "icrf-relay": Carrier("**ICRF**, relayed"),
    # A value is one message of gRPC, which holds less than 2 GiB, and exists in several copies.
    "rayfed": Carrier("RayFed", _RAYFED, "rayfed", most_megabytes=1000, most_messages=200, encrypted=False),
    "rayfed-join": Carrier(
        "RayFed, both join and get", _RAYFED, "rayfed", payloads=False, most_messages=200, encrypted=False
    ),
}


@dataclass(frozen=True)
class Job:
    """What the command tells one of its processes.

    Attributes:
        role: ``source``, ``sink`` or ``relay``.
        peers: addresses of the sinks.
        relay: address of the relay, if payloads go through it.
        certs: folder of an authority, if all connections are encrypted.
        number: which of the sinks.
    """

    role: str
    system: str
    crossing: Crossing
    repeat: int
    peers: tuple[str, ...] = ()
    relay: str = ""
    certs: str = ""
    number: int = 0

    def to_json(self) -> str:
        """As an argument of a process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What :meth:`to_json` made."""
        found = json.loads(text)
        return cls(**{**found, "crossing": Crossing(**found["crossing"]), "peers": tuple(found["peers"])})


def say(**found: Any) -> None:
    """A line for the command."""
    print(json.dumps(found), flush=True)


def heard(line: str) -> Mapping[str, Any] | None:
    """What :func:`say` said; None for a line of somebody else, such as a library."""
    if not line.startswith("{"):
        return None
    try:
        found: Mapping[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found


def settle() -> None:
    """Wait until the machine has next to nothing else to do: a Ray cluster that has come up is busy with itself for
    seconds. A machine that is never quiet is waited for no longer than half a minute."""
    deadline_s = time.monotonic() + PATIENCE_S
    before = _processor_time()
    while time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
        now = _processor_time()
        busy, total = (b - a for a, b in zip(before, now, strict=True))
        if busy <= QUIET * total:
            return
        before = now


def _processor_time() -> tuple[int, int]:
    """What all processors have spent on anything, and all of their time, in ticks of the kernel's clock."""
    with open("/proc/stat", encoding="ascii") as lines:
        spent = [int(ticks) for ticks in lines.readline().split()[1:9]]
    idle, waiting = spent[3:5]
    return sum(spent) - idle - waiting, sum(spent)


def timed(work: Callable[[int], None], repeat: int) -> list[float]:
    """Seconds of each repetition, after some that do not count."""
    settle()
    seconds = []
    for number in range(repeat + WARM_UP):
        began = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def python_version() -> str:
    """Of this process."""
    return sys.version.split()[0]
