"""What is known and shown about one run: its state, its events, and the journal rows behind them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from icrf.errors import IcrfError
from icrf.ports import Write
from icrf.protocol import (
    QUEUED,
    TERMINAL,
    Fingerprint,
    RoundReport,
    RoundResult,
    RunEvent,
    RunInfo,
    Submission,
)
from icrf_mediator.effects import Effects, Now
from icrf_mediator.preparing import Preparing
from icrf_mediator.rounds import Commit


class RunRecord:
    """The record of a run. Every change of it is an effect: a row of the journal, an event for watchers.

    Attributes:
        info: the run as users see it.
        events: everything that happened, numbered from 1.
        preparing: how long it took to get ready, for display only.
    """

    def __init__(self, run_id: str, submission: Submission, config: dict[str, Any], now: Now) -> None:
        self.info = RunInfo(
            run_id=run_id,
            federation=config["federation_id"],
            status=QUEUED,
            flow=submission.flow,
            rounds_done=0,
            rounds_planned=int(config["federated_learning_rounds"]),
            clusters=(),
            created_at=now.wall_s,
            config_json=submission.config_json,
        )
        self.events: list[RunEvent] = []
        self.preparing = Preparing()
        self._fingerprints: dict[str, dict[str, Any]] = {}

    @property
    def terminal(self) -> bool:
        return self.info.status in TERMINAL

    def change(self, **parts: Any) -> None:
        """Change what is shown; journalled with the next status, or by `save`."""
        self.info = replace(self.info, **parts)

    def status(self, effects: Effects, now: Now, status: str, waiting_for: str = "", text: str = "") -> None:
        """Enter a status."""
        self.preparing.entered(status, now.monotonic_s)
        self.info = replace(self.info, status=status, waiting_for=waiting_for)
        self.save(effects)
        self.event(effects, now, "status", text or waiting_for)

    def save(self, effects: Effects) -> None:
        """Journal what is shown, where it does not follow from the events."""
        effects.writes.append(Write("runs", (self.info.run_id,), asdict(self.info)))

    def end(self, effects: Effects, now: Now, status: str, error: IcrfError | None) -> None:
        """Enter a terminal status and close the event stream."""
        text = str(error) if error else ""
        self.info = replace(self.info, finished_at=now.wall_s, error_json=error.to_json() if error else "")
        self.status(effects, now, status, text=text)
        self.event(effects, now, "end", text)

    def waits(self, effects: Effects, now: Now, waiting_for: str, *, quiet: bool = False) -> None:
        """Say what the run waits for, once per reason; `quiet` shows it without an event."""
        if waiting_for == self.info.waiting_for:
            return
        self.info = replace(self.info, waiting_for=waiting_for)
        if not quiet:
            self.event(effects, now, "waiting", waiting_for)

    def committed(self, effects: Effects, now: Now, commit: Commit, result: RoundResult, reached: bool) -> None:
        """Journal a round's one commit row, and show it."""
        row = {**vars(result), "absmax": list(commit.absmax), "evaluated": commit.evaluated}
        del row["node_metrics"], row["profile"]  # what decides nothing is in the event
        if self._fingerprints:
            row["fingerprints"] = self._fingerprints
        effects.writes.append(Write("commits", (self.info.run_id, commit.round), row))
        self.info = replace(
            self.info,
            rounds_done=commit.round,
            accuracy=commit.metrics.get("accuracy", self.info.accuracy),
            bytes_inter_cluster=self.info.bytes_inter_cluster + commit.bytes_inter_cluster,
            rounds_to_target=self.info.rounds_to_target or (commit.round if reached else 0),
        )
        if reached:
            self.save(effects)
        self.event(effects, now, "round", round_result=result)

    def fingerprints(self, effects: Effects, now: Now, determinism: str, found: Mapping[str, Fingerprint]) -> None:
        """Under ``recorded`` determinism: keep for the commit rows what decides the bits, and warn where it differs."""
        if determinism != "recorded":
            return
        self._fingerprints = {cluster: asdict(one) for cluster, one in found.items()}
        texts = []
        for name in [f.name for f in fields(Fingerprint)]:
            values = {cluster: row[name] for cluster, row in self._fingerprints.items()}
            if len(set(values.values())) > 1:
                texts.append(f"{name} is {', '.join(f'{value} on {c}' for c, value in sorted(values.items()))}")
        if texts:
            text = f"numeric fingerprints differ, so the bits depend on the placement: {'; '.join(texts)}"
            self.event(effects, now, "warning", text)

    def attempt(self, effects: Effects, cluster: str, report: RoundReport) -> None:
        """Journal one cluster's part of an attempt."""
        row = {
            "generation": report.generation,
            "participants": report.participants.hex(),
            "model_hash": report.model_hash,
            "state_hashes": report.state_hashes.hex(),
            "bytes_inter_cluster": report.bytes_inter_cluster,
        }
        effects.writes.append(Write("attempts", (self.info.run_id, report.round, report.attempt, cluster), row))

    def commit_took(self, number: int, seconds: float) -> None:
        """How long the commit of a round took to become durable; for display only."""
        for k in range(len(self.events) - 1, -1, -1):
            result = self.events[k].round
            if result is not None and result.number == number:
                self.events[k] = replace(self.events[k], round=replace(result, commit_s=seconds))
                return

    def event(
        self, effects: Effects, now: Now, kind: str, text: str = "", round_result: RoundResult | None = None
    ) -> None:
        """Append to the event stream."""
        run_id, status = self.info.run_id, self.info.status
        event = RunEvent(run_id, len(self.events) + 1, now.wall_s, kind, text, status, round_result)
        self.events.append(event)
        effects.events.append(event)
        effects.writes.append(Write("events", (run_id, event.seq), _event_row(event)))


def _event_row(event: RunEvent) -> dict[str, Any]:
    """The row of an event. Frozen values are not copied: this is done in every round, and copying takes long."""
    result = event.round
    if result is None:
        return dict(vars(event))
    profile = asdict(result.profile) if result.profile else None
    return {**vars(event), "round": {**vars(result), "profile": profile}}
