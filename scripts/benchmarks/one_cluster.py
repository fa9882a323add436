"""``scripts/bench one-cluster``: the same rounds in ICRF, in a plain loop and in the peers, side by side."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import Case, parse_case
from benchmarks.catalogue import DEFAULT_CASES, DEFAULT_SYSTEMS, REFERENCE, SYSTEMS
from benchmarks.document import write_part
from benchmarks.environments import PACKAGES, ROOT, set_up
from benchmarks.figures import LEAST_REPEATS, Row, make_row, markdown
from benchmarks.machine import circumstances
from benchmarks.measure import measure

DOCUMENT = ROOT / "docs" / "performance.md"
COMMAND = "scripts/bench one-cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--cases", type=_names, default=DEFAULT_CASES, help="digitsN, tinyN, heavyN, comma-separated")
    parser.add_argument("--systems", type=_names, default=DEFAULT_SYSTEMS, help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each system on each case (default: 5)")
    parser.add_argument("--rounds", type=int, help="measured rounds of a run (default: by case)")
    parser.add_argument("--json", action="store_true", help="only JSON lines, no table")
    parser.add_argument("--setup", action="store_true", help="install the peers' environments first (minutes)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def compare(case: Case, systems: Sequence[str], repeats: int) -> list[Row]:
    """Run all systems in turn, as often as asked, the reference first; a row for each."""
    runs: dict[str, list[Mapping[str, Any]]] = {name: [] for name in systems}
    for number in range(repeats):
        for name in systems:
            if any("unavailable" in run or "failed" in run for run in runs[name]):
                continue
            found = measure(SYSTEMS[name], case)
            runs[name].append(found)
            _say(f"{case.name} {name} {number + 1}/{repeats}: {_glance(found)}")
    return [make_row(case.name, name, runs[name], runs[REFERENCE][: len(runs[name])]) for name in systems]


def _glance(found: Mapping[str, Any]) -> str:
    if "round_s" not in found:
        return str(found.get("unavailable") or found.get("failed"))
    seconds = sorted(found["round_s"])
    return f"{seconds[len(seconds) // 2]:.4f} s a round, first after {found['first_round_s']:.1f} s"


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a row was refused, 2 for a command that makes no sense."""
    try:
        cases = [parse_case(name, arguments.rounds) for name in arguments.cases]
        systems = _chosen(arguments.systems)
    except ValueError as error:
        _say(str(error))
        return 2
    if arguments.setup:
        for environment in PACKAGES:
            if any(SYSTEMS[name].environment == environment for name in systems):
                set_up(environment)
    rows: list[Row] = []
    load = os.getloadavg()[0]
    for case in cases:
        for row in compare(case, systems, arguments.repeat):
            rows.append(row)
            print(row.line(), flush=True)
    titles = {name: system.title for name, system in SYSTEMS.items()}
    table = markdown(rows, titles)
    if not arguments.json:
        print(f"\n{table}")
    refused = [row for row in rows if row.refused]
    if arguments.write:
        if refused or arguments.repeat < LEAST_REPEATS:
            _say(f"{DOCUMENT.name} is written from whole measurements of at least {LEAST_REPEATS} runs only")
            return 2
        measured_on = circumstances(COMMAND, (row.values.get("versions", {}) for row in rows), load)
        write_part(DOCUMENT, COMMAND, f"{measured_on}\n\n{table}")
    return 1 if refused else 0


def _chosen(names: Sequence[str]) -> list[str]:
    """The systems, the reference first and always among them."""
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"no system {', '.join(unknown)}: there are {', '.join(SYSTEMS)}")
    return [REFERENCE, *(name for name in names if name != REFERENCE)]
