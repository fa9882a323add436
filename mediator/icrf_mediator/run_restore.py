"""A run out of the journal: what an earlier life of the mediator knew about it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from icrf.ports import Write
from icrf.protocol import (
    QUEUED,
    ClusterProfile,
    NodeSpec,
    PhaseSpan,
    RoundProfile,
    RoundResult,
    Rows,
    RunEvent,
    RunInfo,
    Submission,
    TensorSpec,
)
from icrf_mediator.effects import Effects, Now
from icrf_mediator.graphs import graph_of
from icrf_mediator.placement import Placement
from icrf_mediator.runs import RunMachine

Tables = Mapping[str, Sequence[Write]]


def run_info(row: Mapping[str, Any]) -> RunInfo:
    """A row of ``runs``."""
    return RunInfo(**{**row, "clusters": tuple(row["clusters"])})


def run_event(row: Mapping[str, Any]) -> RunEvent:
    """A row of ``events``."""
    parts = dict(row)
    if parts.get("round"):
        result = parts["round"]
        profile = round_profile(found) if (found := result.get("profile")) else None
        parts["round"] = RoundResult(**{**result, "profile": profile})
    return RunEvent(**parts)


def round_profile(row: Mapping[str, Any]) -> RoundProfile:
    """The profile in a row of ``events``."""
    clusters = {
        name: ClusterProfile(found["hosts"], tuple(PhaseSpan(**span) for span in found["phases"]))
        for name, found in row["clusters"].items()
    }
    return RoundProfile(**{**row, "clusters": clusters})


def submission_of(row: Mapping[str, Any]) -> Submission:
    """A row of ``submissions``."""
    parts = dict(row)
    for key in ("schedule", "communities"):
        parts[key] = tuple(parts.get(key, ()))
    parts["nodes"] = tuple(NodeSpec(**node) for node in parts["nodes"])
    parts["graph"] = graph_of(parts["graph"])
    parts["layout"] = tuple(TensorSpec(**{**t, "shape": tuple(t["shape"])}) for t in parts["layout"])
    parts["rows"] = Rows(**parts["rows"])
    return Submission(**parts)


def restore_run(
    info: RunInfo,
    tables: Tables,
    events: Sequence[RunEvent],
    addresses: Callable[[str], str],
    now: Now,
    effects: Effects,
    **times: float,
) -> RunMachine:
    """The machine of a run that had not ended. It waits for its clusters, and goes on from the last commit."""
    run_id = info.run_id
    submission = submission_of(_rows(tables, "submissions", run_id)[0].row)
    run = RunMachine(run_id, submission, now, addresses, **times)
    run.record.info = progressed(info, list(events))
    run.record.events = list(events)
    goals = _rows(tables, "goals", run_id)
    assignments = _rows(tables, "assignments", run_id)
    activations = _rows(tables, "activations", run_id)
    commits = _rows(tables, "commits", run_id)
    if goals:
        run.load_goal(goals[-1].row)
    if not assignments:
        run.rejoin_queue(effects, now)
        return run
    rows = {int(write.key[1]): write.row for write in assignments}
    placed = cache(lambda generation: Placement.from_row(rows[generation]))
    newest = max(rows)
    is_set_up = newest in {int(write.key[1]) for write in activations}
    _load_placement(run, newest, placed(newest), None if is_set_up else rows[newest].get("instead_of"))
    run.load_progress(
        [a.row for a in activations],
        [
            (
                int(c.key[1]),
                str(c.row["model_sha256"]),
                tuple(c.row["absmax"]),
                bool(c.row["consensus_sha256"]),
                bool(c.row.get("evaluated")),
            )
            for c in commits
        ],
    )
    for commit in commits:
        run.load_metrics(int(commit.key[1]), commit.row["metrics"])
    for row in _rows(tables, "members", run_id):
        run.load_members(int(row.key[1]), str(row.row["nodes"]))
    for row in _rows(tables, "participants", run_id):
        run.load_participants(int(row.key[1]), str(row.row["participants"]), str(row.row.get("late", "")))
    for row in _rows(tables, "checkpoints", run_id):
        # Where it is not told, the mediator that wrote it did not move nodes.
        generation = int(row.row.get("generation", min(rows)))
        run.checkpoints.load(int(row.key[1]), row.row["artifacts"], generation, placed(generation))
    run.load_graphs(
        {int(row.key[1]): graph_of(row.row) for row in _rows(tables, "graphs", run_id)},
        {int(row.key[1]): int(row.row["round"]) for row in activations},
        {int(row.key[1]): int(row.row["round"]) for row in _rows(tables, "relinks", run_id)},
    )
    (run.rejoin_queue if info.status == QUEUED else run.rejoin)(effects, now)
    return run


def _load_placement(run: RunMachine, generation: int, placement: Placement, instead_of: Any) -> None:
    """Where its nodes live; `instead_of` is the row of where they lived before a move by choice that was not over."""
    before = Placement.from_row(instead_of) if instead_of else None
    if before is not None and run.info.status == QUEUED:
        # There was no room for it.
        run.load_placement(generation, before)
    else:
        run.load_placement(generation, placement, before)


def progressed(info: RunInfo, events: Sequence[RunEvent]) -> RunInfo:
    """The row of a run is as old as its last status; what rounds have added since is in its events."""
    rounds = [e.round for e in events if e.round is not None]
    if not rounds:
        return info
    accuracies = [r.metrics["accuracy"] for r in rounds if "accuracy" in r.metrics]
    return replace(
        info,
        rounds_done=rounds[-1].number,
        accuracy=accuracies[-1] if accuracies else info.accuracy,
        bytes_inter_cluster=sum(r.bytes_inter_cluster for r in rounds),
    )


def _rows(tables: Tables, name: str, run_id: str) -> list[Write]:
    return [write for write in tables.get(name, ()) if write.key[0] == run_id]


def request_id(row: Mapping[str, Any]) -> str:
    """The client's request id of a row of ``submissions``."""
    return str(row["client_request_id"])
