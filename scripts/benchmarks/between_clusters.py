"""``scripts/bench between-clusters``: what crosses from one Ray cluster to others, and rounds over two of them, beside
what gRPC itself, RayFed and Flower's deployment can do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cases import Case, parse_case
from benchmarks.catalogue import System
from benchmarks.crossing_figures import crossing_table, round_rows, round_table, rows_of
from benchmarks.crossings import CARRIERS, CASES, REFERENCE, Crossing
from benchmarks.document import write_part
from benchmarks.environments import ROOT, set_up
from benchmarks.figures import LEAST_REPEATS, Row
from benchmarks.machine import circumstances
from benchmarks.measure import measure as measure_rounds
from benchmarks.turns import measure

DOCUMENT = ROOT / "docs" / "performance.md"
COMMAND = "scripts/bench between-clusters"
# Around so often, so that what else the machine does falls on all systems.
TURNS = 2
# Flower's deployment takes seconds for a round.
ROUNDS, MOST_ROUND_RUNS = 5, 3

TRAINING = "loop"
ROUND_SYSTEMS = {
    TRAINING: System("the training alone, one process", "loop"),
    "icrf": System("**ICRF**, two clusters, direct", "two_clusters"),
    "flower": System("Flower's deployment, a SuperNode per client", "flower_deployment", "flower", most_clients=4),
}
SYSTEMS = (*CARRIERS, "flower")
DEFAULT_CASES = ("bulk100", "bulk2000", "small", "fanout", "clusters3", "digits2")
TLS = {"off": (False,), "on": (True,), "both": (False, True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--cases", default=",".join(DEFAULT_CASES), help=f"of {', '.join(CASES)}, digitsN, tinyN, heavyN"
    )
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions in each of two turns (default: 5)")
    parser.add_argument("--tls", nargs="?", const="on", default="both", choices=TLS, help="(default: both)")
    parser.add_argument("--megabytes", type=int, help="payloads of this size instead, to try things out")
    parser.add_argument("--json", action="store_true", help="only JSON lines, no tables")
    parser.add_argument("--setup", action="store_true", help="install the peers' environments first (minutes)")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        crossings: with those that fan-outs are compared with.
        systems: the reference first.
    """

    crossings: Sequence[Crossing]
    rounds: Sequence[Case]
    systems: Sequence[str]

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Asked:
        """From the command's options.

        Raises:
            ValueError: they make no sense.
        """
        if arguments.repeat < 1 or (arguments.megabytes is not None and arguments.megabytes < 1):
            raise ValueError("--repeat and --megabytes must be at least 1")
        if arguments.write and (arguments.megabytes or arguments.repeat < LEAST_REPEATS):
            raise ValueError(f"{DOCUMENT.name} is written from whole payloads and at least {LEAST_REPEATS} repetitions")
        systems = [REFERENCE, *(name for name in _names(arguments.systems) if name != REFERENCE)]
        if unknown := [name for name in systems if name not in SYSTEMS]:
            raise ValueError(f"no system {', '.join(unknown)}: there are {', '.join(SYSTEMS)}")
        wanted = _names(arguments.cases)
        singles = [CASES[name].single for name in wanted if name in CASES and CASES[name].single]
        crossings = [case for name, case in CASES.items() if name in (*wanted, *singles)]
        if arguments.megabytes:
            crossings = [replace(case, megabytes=arguments.megabytes) if case.megabytes else case for case in crossings]
        rounds = [parse_case(name, ROUNDS) for name in wanted if name not in CASES]
        return cls(crossings, rounds, systems)

    @property
    def environments(self) -> set[str]:
        """Those of the peers among the systems."""
        carriers = {CARRIERS[name].environment for name in self.systems if name in CARRIERS and self.crossings}
        peers = {ROUND_SYSTEMS[name].environment for name in self.systems if name in ROUND_SYSTEMS and self.rounds}
        return (carriers | peers) - {""}


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def cross(asked: Asked, repeat: int, tls: bool) -> Iterator[Row]:
    """Rows of all crossings, as they are done."""
    done: dict[str, Mapping[str, Sequence[Mapping[str, Any]]]] = {}
    for crossing in asked.crossings:
        carried = [name for name in asked.systems if name in CARRIERS and CARRIERS[name].takes(crossing, tls)]
        if REFERENCE not in carried:
            continue
        runs: dict[str, list[Mapping[str, Any]]] = {name: [] for name in carried}
        for _ in range(TURNS):
            for name in carried:
                if not _is_over(runs[name]):
                    found = measure(crossing, name, repeat, tls=tls)
                    runs[name].append(found)
                    _say(f"{crossing.name} {name} TLS {'on' if tls else 'off'}: {_glance(found)}")
        done[crossing.name] = runs
        yield from rows_of(crossing, runs, tls=tls, singles=done.get(crossing.single))


def run_rounds(asked: Asked, repeat: int) -> Iterator[Row]:
    """Rows of all rounds, as they are done."""
    for case in asked.rounds:
        systems = [TRAINING, *(name for name in ROUND_SYSTEMS if name in asked.systems)]
        runs: dict[str, list[Mapping[str, Any]]] = {name: [] for name in systems}
        for _ in range(min(repeat, MOST_ROUND_RUNS)):
            for name in systems:
                if not _is_over(runs[name]):
                    found = measure_rounds(ROUND_SYSTEMS[name], case)
                    runs[name].append(found)
                    _say(f"{case.name} {name}: {_glance(found)}")
        yield from round_rows(case.name, runs, TRAINING)


def _is_over(runs: Sequence[Mapping[str, Any]]) -> bool:
    return any("unavailable" in run or "failed" in run for run in runs)


def _glance(found: Mapping[str, Any]) -> str:
    seconds = sorted(found.get("seconds") or found.get("round_s") or [])
    return f"{seconds[len(seconds) // 2]:.4f} s" if seconds else str(found.get("unavailable") or found.get("failed"))


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a row was refused, 2 for a command that makes no sense."""
    try:
        asked = Asked.read(arguments)
    except ValueError as error:
        _say(str(error))
        return 2
    if arguments.setup:
        for environment in sorted(asked.environments):
            set_up(environment)
    load = os.getloadavg()[0]
    crossed: list[Row] = []
    for tls in TLS[arguments.tls]:
        crossed += _told(cross(asked, arguments.repeat, tls))
    rounds = _told(run_rounds(asked, arguments.repeat))
    titles = {name: system.title for name, system in ROUND_SYSTEMS.items()}
    parts = [crossing_table(crossed)] if crossed else []
    parts += [f"Rounds over two clusters:\n\n{round_table(rounds, titles)}"] if rounds else []
    text = "\n\n".join(parts)
    if not arguments.json:
        print(f"\n{text}")
    rows = [*crossed, *rounds]
    if any(row.refused for row in rows):
        return 1
    if arguments.write:
        measured_on = circumstances(COMMAND, (row.values.get("versions", {}) for row in rows), load)
        write_part(DOCUMENT, COMMAND, f"{measured_on}\n\n{text}")
    return 0


def _told(rows: Iterator[Row]) -> list[Row]:
    found = []
    for row in rows:
        found.append(row)
        print(row.line(), flush=True)
    return found
