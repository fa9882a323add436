"""``scripts/bench between-clusters``: what crosses from one Ray cluster to another, beside what gRPC itself can do."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from benchmarks.crossing import CASES, Crossing, Job
from benchmarks.figures import Row, short, spread
from icrf_mediator.certs import init_authority

SYSTEMS = ("grpc-copy", "grpc", "icrf", "icrf-relay")
REFERENCE = "grpc-copy"
DEFAULT_CASES = ("bulk100", "small", "fanout")
_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
END_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions in each of two turns (default: 5)")
    parser.add_argument("--tls", action="store_true", help="all connections encrypted, gRPC's own too")
    parser.add_argument("--json", action="store_true", help="only JSON lines")


class Side:
    """One of the processes of a measurement; ended with the block that it is entered in."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-m", "benchmarks.crossing", json.dumps(asdict(job))]
        paths = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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

    def hear(self) -> Mapping[str, Any]:
        """The next thing that it says.

        Raises:
            RuntimeError: it has ended instead.
        """
        for line in self._pipe(self._process.stdout):
            if line.startswith("{"):
                found: Mapping[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"a side of the measurement ended with {self._process.wait()}")

    def go_on(self) -> None:
        """Let it begin the next repetition."""
        pipe = self._pipe(self._process.stdin)
        pipe.write("\n")
        pipe.flush()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def measure(case: Crossing, system: str, repeat: int, *, tls: bool = False) -> Mapping[str, Any]:
    """One turn of a system on a case: ``seconds`` of each repetition, and ``versions``."""
    with ExitStack() as stack:
        relay = certs = ""
        if tls:
            certs = stack.enter_context(TemporaryDirectory(prefix="icrf-bench-"))
            init_authority(Path(certs))
        job = Job("", system, case.name, repeat, certs=certs)
        if system == "icrf-relay":
            relay = stack.enter_context(Side(replace(job, role="relay"))).hear()["address"]
        sink = stack.enter_context(Side(replace(job, role="sink", relay=relay)))
        peer = sink.hear()["address"]
        source = stack.enter_context(Side(replace(job, role="source", peer=peer, relay=relay)))
        read: list[float] = []
        while "sent" in (found := source.hear()):
            read.append(sink.hear()["seconds"])
            source.go_on()
    # Reading comes after sending, so that its time adds to it; only messages are read.
    extra = read[1:] if read and not case.megabytes else [0.0] * len(found["seconds"])
    return {**found, "seconds": [a + b for a, b in zip(found["seconds"], extra, strict=True)]}


def rows_of(case: Crossing, runs: Mapping[str, Sequence[Mapping[str, Any]]], *, tls: bool = False) -> list[Row]:
    """A row for each system: delivered per second, and in relation to the reference."""
    rates = {name: [case.rate(s) for run in turns for s in run["seconds"]] for name, turns in runs.items()}
    medians = {name: spread(values)["median"] for name, values in rates.items()}
    return [
        Row(
            case.name,
            name,
            {
                **spread(values),
                "unit": case.unit,
                "tls": tls,
                "ratio_to_reference": short(medians[name] / medians[REFERENCE]),
                "versions": runs[name][0]["versions"],
            },
        )
        for name, values in rates.items()
    ]


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; 2 for a command that makes no sense."""
    cases = [name for name in arguments.cases.split(",") if name]
    systems = [REFERENCE, *(name for name in arguments.systems.split(",") if name and name != REFERENCE)]
    unknown = [*(set(cases) - set(CASES)), *(set(systems) - set(SYSTEMS))]
    if unknown or arguments.repeat < 1:
        wrong = f"no case or system {', '.join(sorted(unknown))}" if unknown else "--repeat must be at least 1"
        print(f"bench: {wrong}", file=sys.stderr)
        return 2
    for name in cases:
        runs: dict[str, list[Mapping[str, Any]]] = {system: [] for system in systems}
        # Twice around, so that what else the machine does falls on all of them.
        for _ in range(2):
            for system in systems:
                runs[system].append(measure(CASES[name], system, arguments.repeat, tls=arguments.tls))
                if not arguments.json:
                    print(f"bench: {name} {system} measured", file=sys.stderr, flush=True)
        for row in rows_of(CASES[name], runs, tls=arguments.tls):
            print(row.line(), flush=True)
    return 0
