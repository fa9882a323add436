"""``fabric run --verify-determinism``: a federation runs twice, and every committed hash must be the same."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from icrf.console.commands import Outcome, run_here
from icrf.console.doors import Doors
from icrf.console.format import format_count
from icrf.console.terminal import Terminal
from icrf.errors import ConfigError, IcrfError, InternalError
from icrf.model_file import write_file
from icrf.protocol import COMPLETED, Submission
from icrf.run_folder import default_folder, json_bytes
from icrf.sinks import MetricsSink

# What of a round decides, or is decided by, its bits; the rest is time and traffic.
_COMPARED = ("model_sha256", "consensus_sha256", "participants", "metrics")
AGAIN = "again"


def run_twice(
    terminal: Terminal,
    doors: Doors,
    submission: Submission,
    clusters: int,
    out: Path | None,
    sinks: Sequence[MetricsSink] = (),
) -> Outcome:
    """Run a federation twice, the second time on another number of clusters where that is possible.

    The first run leaves its folder in `out` and tells the sinks, the second in ``out/again``. The summary is that of
    the first run with ``deterministic`` (null if either run did not complete) and ``second_run`` beside it. Runs that
    differ end with X002 and the first round in which they do.
    """
    other = _other_number(doors, submission, clusters)
    summary, code = run_here(terminal, doors, submission, clusters, out, sinks)
    summary["deterministic"] = None
    if code:
        return summary, code
    terminal.line()
    terminal.line(f"the same federation again, on {format_count(other, 'local Ray cluster')}")
    repeated = replace(submission, client_request_id=uuid.uuid4().hex)
    second, code = run_here(terminal, doors, repeated, other, out and out / AGAIN)
    summary["second_run"] = {"run_id": second["run_id"], "clusters": other, "model_sha256": second["model_sha256"]}
    if code or second["status"] != COMPLETED:
        return summary, code
    folders = [(out or default_folder(summary["run_id"])), (out and out / AGAIN) or default_folder(second["run_id"])]
    difference = first_difference(*(_rounds(folder) for folder in folders))
    if difference is None and summary["model_sha256"] != second["model_sha256"]:
        difference = {"round": summary["rounds"], "field": "model_sha256"}
    summary["deterministic"] = difference is None
    if difference is not None:
        summary["second_run"]["first_difference"] = difference
    write_file(folders[0] / "summary.json", json_bytes(summary))
    if difference is None:
        terminal.facts([("verified", f"both runs have the same hashes in all {summary['rounds']} rounds")])
        return summary, 0
    error = _differ(difference, (clusters, other), folders)
    terminal.error(error)
    return summary, error.exit_code


def first_difference(first: list[Mapping[str, Any]], second: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first round in which two runs differ, and in what; None if they are equal.

    Args:
        first: lines of the ``rounds.jsonl`` of one run, in order.
        second: those of the other.
    """
    for a, b in zip_longest(first, second):
        if a is None or b is None:
            return {"round": (a or b)["round"], "field": "round"}
        for name in _COMPARED:
            if a.get(name) != b.get(name):
                return {"round": a["round"], "field": name, "first": a.get(name), "second": b.get(name)}
    return None


def _rounds(folder: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]


def _other_number(doors: Doors, submission: Submission, clusters: int) -> int:
    """Another number of clusters that the federation can run on, else the same: where nodes live must change no bit."""
    other = 1 if clusters > 1 else 2
    try:
        return other if doors.plan_local(submission, other).feasible else clusters
    except ConfigError:
        return clusters  # `placement` names clusters that there would not be


def _differ(difference: Mapping[str, Any], clusters: tuple[int, int], folders: list[Path]) -> IcrfError:
    number, name = difference["round"], difference["field"]
    if name == "round":
        message = f"round {number} was run only once of two times"
    else:
        message = f"round {number} did not repeat: the two runs differ in {name}"
    return InternalError(
        "X002",
        message,
        place="--verify-determinism",
        value=_brief(difference.get("second")),
        allowed=_brief(difference.get("first")) or "",
        hint=f"compare {folders[0]} ({format_count(clusters[0], 'cluster')}) with {folders[1]} "
        f"({format_count(clusters[1], 'cluster')}); code that reads the time, the network or its process's state "
        "is what makes runs differ",
    )


def _brief(value: object) -> str | None:
    return None if value is None else str(value)[:80]
