"""A turn of a system on a case of ``scripts/bench between-clusters``: its processes, and what is seen from outside."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from benchmarks.crossings import CARRIERS, WARM_UP, Crossing, Job, heard
from benchmarks.environments import ROOT, python_of, why_not
from benchmarks.memory import Family, Sampler
from benchmarks.sockets import free_ports, received_bytes
from icrf.testing.processes import private_bytes
from icrf_mediator.certs import init_authority

END_S = 60.0
LIMIT_S = 900.0
SAMPLE_S = 0.02
_SHOWN_LINES = 5
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")))),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class SideEnded(Exception):
    """A process of a measurement has ended before it was done; the text says with what last words."""


class Side:
    """One of the processes of a measurement; ended with the block that it is entered in.

    Args:
        environment: what it finds in its environment besides this process's own.
        log: where its standard error goes.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], log: Path) -> None:
        carrier = CARRIERS[job.system]
        self._name, self._log = job.role, log
        with log.open("wb") as told:
            self._process = subprocess.Popen(
                [str(python_of(carrier.environment)), "-m", carrier.module, job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
                text=True,
                env={**os.environ, **_ENVIRONMENT, **environment},
            )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe(self._process.stdout).close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def hear(self) -> Mapping[str, Any]:
        """The next thing that it says.

        Raises:
            SideEnded: it has ended instead.
        """
        for line in self._pipe(self._process.stdout):
            if (found := heard(line)) is not None:
                return found
        code = self._process.wait()
        words = self._log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        raise SideEnded(f"the {self._name} ended with {code}: {' / '.join(words)}")

    def go_on(self) -> None:
        """Let it begin the next repetition."""
        pipe = self._pipe(self._process.stdin)
        pipe.write("\n")
        pipe.flush()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


class Growth(Sampler):
    """How much more private memory a process takes at its peak, while the context lasts, than at its beginning.

    Attributes:
        num_bytes: that much more.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(SAMPLE_S)
        self._pid, self._idle = pid, private_bytes(pid)
        self.num_bytes = 0

    def sample(self) -> None:
        """Look how much it has now."""
        # A process that has ended has no memory; that it has, its silence tells.
        with suppress(OSError, StopIteration):
            self.num_bytes = max(self.num_bytes, private_bytes(self._pid) - self._idle)


@dataclass(frozen=True)
class _Stage:
    """Where the processes of a turn are started.

    Attributes:
        job: what all of them are told.
        start: starts one of them.
    """

    job: Job
    start: Callable[[Job], Side]
    stack: ExitStack


@contextmanager
def _stage(crossing: Crossing, system: str, repeat: int, tls: bool) -> Iterator[_Stage]:
    """All processes that were started on it, and theirs, have ended when it is left."""
    family = Family()
    with TemporaryDirectory(prefix="icrf-bench-") as folder:
        certs = Path(folder) / "certs"
        if tls:
            init_authority(certs)
        numbers = itertools.count()
        # What hangs is ended, and its silence ends the turn.
        limit = threading.Timer(LIMIT_S, family.end, (0.0,))
        limit.start()
        try:
            with ExitStack() as stack:

                def start(job: Job) -> Side:
                    log = Path(folder) / f"{job.role}{next(numbers)}.log"
                    return stack.enter_context(Side(job, family.environment, log))

                yield _Stage(Job("", system, crossing, repeat, certs=str(certs) if tls else ""), start, stack)
        finally:
            limit.cancel()
            family.end()


def measure(crossing: Crossing, system: str, repeat: int, *, tls: bool = False) -> Mapping[str, Any]:
    """One turn of a system on a case.

    Returns:
        ``seconds`` of each repetition, what each has ``delivered``, and ``versions``; of the fabric with payloads also
        ``socket_bytes`` of one repetition, and with a relay ``relay_growth_bytes``. Or why there is nothing: ``failed``
        or ``unavailable``.
    """
    carrier = CARRIERS[system]
    if problem := why_not(carrier.environment):
        return {"unavailable": problem}
    if not crossing.megabytes:
        crossing = replace(crossing, receivers=min(crossing.receivers, carrier.most_messages))
    work = _parties if carrier.environment else _one_way
    try:
        with _stage(crossing, system, min(repeat, crossing.most_repeats), tls) as stage:
            return {**work(stage), "delivered": crossing.delivered}
    except SideEnded as error:
        return {"failed": str(error)}


def _parties(stage: _Stage) -> Mapping[str, Any]:
    """Both run the same program and find each other; the source's figures."""
    peers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    sides = [stage.start(replace(stage.job, role=role, peers=peers)) for role in ("sink", "source")]
    return [side.hear() for side in sides][1]


def _one_way(stage: _Stage) -> Mapping[str, Any]:
    """Sinks listen, or wait at the relay, and the source sends."""
    job, relay, growth = stage.job, "", None
    if job.system == "icrf-relay":
        relaying = stage.start(replace(job, role="relay"))
        relay = relaying.hear()["address"]
    sinks = [stage.start(replace(job, role="sink", relay=relay, number=k)) for k in range(job.crossing.clusters)]
    peers = tuple(sink.hear()["address"] for sink in sinks)
    if relay and job.crossing.megabytes:
        growth = stage.stack.enter_context(Growth(relaying.pid))
    source = stage.start(replace(job, role="source", peers=peers, relay=relay))
    ports = [int(address.rpartition(":")[2]) for address in ((relay,) if relay else peers)]
    read: list[float] = []
    counted: list[int] = []
    while "sent" in (found := source.hear()):
        read.append(max(sink.hear()["seconds"] for sink in sinks))
        counted.append(sum(received_bytes(port) for port in ports))
        source.go_on()
    seen = {} if growth is None else {"relay_growth_bytes": growth.num_bytes}
    return {**found, **seen, **_from_outside(job.crossing, found["seconds"], read, counted)}


def _from_outside(
    crossing: Crossing, seconds: Sequence[float], read: Sequence[float], counted: Sequence[int]
) -> Mapping[str, Any]:
    """What the source does not see; of plain gRPC, which says nothing in between, there is nothing to add."""
    if not counted:
        return {}
    if crossing.megabytes:
        return {"socket_bytes": (counted[-1] - counted[0]) / (len(counted) - 1)}
    # Reading comes after sending, so that its time adds to it; the first repetitions do not count.
    return {"seconds": [a + b for a, b in zip(seconds, read[WARM_UP:], strict=True)]}
