"""Runs as people read them: one line each in a list, a page for one, the end of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from icrf.console.format import (
    MISSING,
    format_age,
    format_bytes,
    format_duration,
    format_metric,
    safe_text,
    saved_text,
    short_id,
    sparkline,
)
from icrf.console.live import RoundTable, plain_round
from icrf.console.terminal import Terminal
from icrf.errors import error_from_dict
from icrf.model_file import ARTIFACT
from icrf.protocol import CANCELLED, COMPLETED, FAILED, HIERARCHICAL, QUEUED, TERMINAL, RoundResult, RunInfo

# Metrics that a summary shows by themselves, or that belong to training.
_ELSEWHERE = ("accuracy", "loss", "train_loss")
_MOST_METRICS = 8
_STYLES = {COMPLETED: "green", FAILED: "bold red", CANCELLED: "yellow"}


def status_text(status: str) -> Text:
    """A status in its colour."""
    return Text(status, style=_STYLES.get(status, "cyan"))


def run_dict(info: RunInfo) -> dict[str, Any]:
    """A run as ``--json`` has it: what JSON has a type for, without the configuration."""
    values = asdict(info)
    values.pop("config_json")
    error = values.pop("error_json")
    values["accuracy"] = info.accuracy if info.accuracy >= 0 else None
    values["error"] = json.loads(error) if error else None
    return values


def status_line(info: RunInfo) -> Text:
    """Run, federation and status on one line."""
    head = Text.assemble((short_id(info.run_id), "bold"), "  ", safe_text(info.federation), "  ")
    return head.append_text(status_text(info.status))


def show_runs(terminal: Terminal, runs: Sequence[RunInfo], now: float) -> None:
    """One line per run, newest first."""
    if not runs:
        terminal.line("no runs yet: fabric submit FED.yaml starts one")
        return
    rows = [
        (
            Text(short_id(run.run_id), style="bold"),
            run.federation,
            status_text(run.status),
            f"{run.rounds_done}/{run.rounds_planned}",
            format_metric(run.accuracy if run.accuracy >= 0 else None),
            format_age(now - run.created_at),
            _where(run),
        )
        for run in runs
    ]
    columns = ("run", "federation", "status", "rounds", "accuracy", "created", "clusters")
    terminal.table(columns, rows, right=("rounds", "accuracy"))


def _where(run: RunInfo) -> str:
    """The clusters of a run, or what it waits for while it has none."""
    if run.status == QUEUED and run.waiting_for:
        return f"waits for {safe_text(run.waiting_for)}"
    return ", ".join(run.clusters) or MISSING


def show_run(terminal: Terminal, info: RunInfo, rounds: Sequence[RoundResult], now: float) -> None:
    """The page of one run: where it stands, what it waits for, its last rounds."""
    terminal.line(status_line(info))
    end = info.finished_at or now
    facts: list[tuple[str, str | Text]] = [
        ("run id", info.run_id),
        ("rounds", f"{info.rounds_done} of {info.rounds_planned}"),
        ("clusters", ", ".join(info.clusters) or MISSING),
        ("flow", info.flow),
        ("created", format_age(now - info.created_at)),
        ("took" if info.finished_at else "running for", format_duration(end - info.created_at)),
        ("traffic", f"{format_bytes(info.bytes_inter_cluster)} between clusters"),
    ]
    if info.accuracy >= 0:
        facts.append(("accuracy", format_metric(info.accuracy)))
    if curve := sparkline([r.metrics["accuracy"] for r in rounds if "accuracy" in r.metrics], 40):
        facts.append(("", curve))
    if info.rounds_to_target:
        facts.append(("target", f"reached in round {info.rounds_to_target}"))
    if info.waiting_for and info.status not in TERMINAL:
        facts.append(("waiting for", Text(safe_text(info.waiting_for), style="bold yellow")))
    if info.model_sha256:
        facts.append(("sha256", info.model_sha256))
    terminal.facts(facts)
    merges = info.flow == HIERARCHICAL
    table = RoundTable(terminal, merges=merges)
    for result in rounds[-10:]:
        if terminal.live:
            table.row(result)
        else:
            terminal.line(plain_round(result, info.rounds_planned, merges=merges))
    if info.error_json:
        terminal.error(error_from_dict(json.loads(info.error_json)))


def show_summary(terminal: Terminal, summary: Mapping[str, Any], folder: Path | None) -> None:
    """How a run ended and where its files are."""
    run_id = str(summary["run_id"])
    head = Text.assemble((safe_text(str(summary["federation"])), "bold"), "  ")
    terminal.line()
    tail = f" after {summary['rounds']} rounds in {format_duration(float(summary['wall_s']))}"
    terminal.line(head.append_text(status_text(str(summary["status"]))).append(tail))
    facts: list[tuple[str, str | Text]] = [("run", short_id(run_id))]
    if summary["accuracy"] is not None:
        facts.append(("accuracy", Text(format_metric(summary["accuracy"]), style="bold")))
    if summary["loss"] is not None:
        facts.append(("loss", format_metric(summary["loss"])))
    others = {name: value for name, value in summary["metrics"].items() if name not in _ELSEWHERE}
    facts += [(safe_text(name), format_metric(value)) for name, value in list(others.items())[:_MOST_METRICS]]
    if len(others) > _MOST_METRICS:
        facts.append(("", f"and {len(others) - _MOST_METRICS} more metrics in summary.json"))
    if "rounds_to_target" in summary:
        reached = summary["rounds_to_target"]
        facts.append(("target", f"reached in round {reached}" if reached else "not reached"))
    facts.append(("traffic", f"{format_bytes(summary['bytes_inter_cluster'])} between clusters"))
    if "bytes_saved" in summary:
        facts.append(("", f"{summary['inter_cluster_codec']} {saved_text(summary)}"))
    if summary["model_sha256"]:
        facts.append(("sha256", str(summary["model_sha256"])))
    if folder is not None:
        files = {"model": ARTIFACT, "report": "report.html"}
        facts += [(label, str(folder / name)) for label, name in files.items() if (folder / name).exists()]
    terminal.facts(facts)
