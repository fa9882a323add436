"""What every measured process does around its system: read the job, keep time, write down what was found."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, judge
from benchmarks.memory import Family


class Unavailable(Exception):
    """The system cannot do this case; the text says why."""


@dataclass
class Rounds:
    """The times of a run's rounds.

    Attributes:
        started: wall-clock time at which the process was started.
        seconds: of each round, the first included.
        first_done: wall-clock time of the end of the first round.
        processor_s: what all of the system's processes had taken of the processors then, and at the end of the last.
    """

    started: float
    expected: int
    seconds: list[float] = field(default_factory=list)
    first_done: float = 0.0
    processor_s: list[float] = field(default_factory=list)

    @contextmanager
    def one(self) -> Iterator[None]:
        """A round runs inside."""
        begin = time.perf_counter()
        yield
        self.add(time.perf_counter() - begin)

    def add(self, seconds: float) -> None:
        """A round has just ended that took so long."""
        self.seconds.append(seconds)
        if len(self.seconds) == 1:
            self.first_done = time.time()
        if len(self.seconds) in (1, self.expected):
            self.processor_s.append(Family.mine().processor_s())


@dataclass(frozen=True)
class Finished:
    """What a system hands back.

    Attributes:
        weights: the last model by the names of the state.
        split: median seconds of the parts of a round, where the system knows them.
    """

    weights: Mapping[str, Any]
    split: Mapping[str, float] = field(default_factory=dict)


def run(work: Callable[[Case, Rounds, Mapping[str, Any]], Finished], *packages: str) -> None:
    """Do the job that the command line describes, and write the result where it says.

    Args:
        work: runs one warm-up round and the case's rounds; gets the job's own options last.
        packages: whose versions belong to the result.
    """
    job = json.loads(sys.argv[1])
    case, rounds = Case(**job["case"]), Rounds(job["started"], job["case"]["rounds"] + 1)
    try:
        finished = work(case, rounds, job["options"])
    except Unavailable as reason:
        found: dict[str, Any] = {"unavailable": str(reason)}
    else:
        if len(rounds.seconds) != rounds.expected:
            raise SystemExit(f"{len(rounds.seconds)} rounds were timed, {rounds.expected} asked for")
        taken = rounds.processor_s
        found = {
            "round_s": rounds.seconds[1:],
            "processor_s": (taken[1] - taken[0]) / case.rounds if taken else None,
            "first_round_s": rounds.first_done - rounds.started,
            **asdict(judge(case, finished.weights)),
            "split": dict(finished.split),
            "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        }
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
