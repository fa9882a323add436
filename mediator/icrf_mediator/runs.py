"""The life of one run, as a state machine: events in, effects out. Pure.

::

    QUEUED <─ start, no room ─> RESERVING ─> RESERVED ─> ACTIVATING ─> READY ─> RUNNING ─┬─> IDLE (kept) ─ finish ─┐
                       ^    │           │            │          │         │    └────────────────────────┴─> COMPLETED
                       │    └───────────┴────────────┴──────────┴─────────┴─> FAILED, CANCELLED
                  RECOVERING <─ a death, a lost or a leaving cluster, a restart of the mediator

A run stops in RESERVED and READY when it was submitted with a stage, and goes on when asked to `advance`. Out of
RECOVERING it either runs the open round again (all committed states are intact), or, under a new generation, goes
through RESERVING once more and starts from the last durable checkpoint. Where nodes move, it does so on other clusters,
out of RECOVERING or between two rounds (``run_setup.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from icrf.errors import AgentError, IcrfError, RunError, make_error
from icrf.ports import Write
from icrf.protocol import (
    ACTIVATING,
    CANCELLED,
    COMPLETED,
    IDLE,
    QUEUED,
    READY,
    RECOVERING,
    RESERVED,
    RESERVING,
    RUNNING,
    STAGES,
    STOP,
    AbortAttempt,
    Activated,
    Checkpointed,
    Fingerprint,
    HeldRun,
    ModelStored,
    Relinked,
    Reserved,
    RoundReport,
    StoreModel,
)
from icrf_mediator.checkpoints import CHECKPOINTS
from icrf_mediator.checks import error_of
from icrf_mediator.effects import Effects, Now
from icrf_mediator.placement import Placement
from icrf_mediator.rounds import Commit
from icrf_mediator.run_base import LIVE, NEVER
from icrf_mediator.run_setup import GRACE_S, RunSetup

MAX_RECOVERIES = 12


class RunMachine(RunSetup):
    """One run from submission to its end; see the module's docstring."""

    # ------------------------------------------------------------ events from the SDK

    def submitted(self, effects: Effects, now: Now, planned_s: float = 0.0) -> None:
        """Journal the submission, whose planning took `planned_s`."""
        self.record.preparing.planned(planned_s)
        effects.writes.append(Write("submissions", (self.run_id,), asdict(self.submission)))
        self._save_goal(effects)
        self._wait_from(now)
        self.record.status(effects, now, QUEUED)

    def start(self, effects: Effects, now: Now, placement: Placement, fingerprints: Mapping[str, Fingerprint]) -> None:
        """Leave the queue: reserve on every cluster of the placement."""
        if self.placement is None:
            self._place(placement)
        self.record.change(clusters=placement.clusters)
        self._reserve(effects, now)
        self.record.fingerprints(effects, now, self.config.get("determinism", ""), fingerprints)

    def advance(self, effects: Effects, now: Now, stage: str, rounds: int) -> None:
        """Go on to `stage`; for ``run``, `rounds` is the total to reach (0: as configured). Repeating is harmless."""
        if stage == STOP:
            return self._stop(effects, now)
        if stage not in STAGES:
            raise RunError("F005", f"unknown stage '{stage}'", allowed=", ".join(STAGES))
        if self.terminal:
            raise RunError("F005", f"run {self.run_id[:8]} is {self.info.status}, it cannot go on")
        # As configured means: not beyond the target, once it was reached.
        wanted = rounds or (0 if self.info.rounds_to_target else self.info.rounds_planned)
        if self._storing and stage == "run" and wanted > self._rounds_wanted:
            raise RunError("F005", f"run {self.run_id[:8]} stores its model, it cannot go on")
        if STAGES.index(stage) >= STAGES.index(self._stage):
            self._stage = stage
        if stage == "run":
            self._rounds_wanted = max(self._rounds_wanted, wanted)
            self.record.change(rounds_planned=max(self.info.rounds_planned, rounds))
            self.record.save(effects)
        self._save_goal(effects)
        if self.info.status != RUNNING:
            self._go_on(effects, now)

    def finish(self, effects: Effects, now: Now) -> None:
        """End a kept run in order: now when idle, else after its rounds."""
        if self.terminal:
            return
        self._finishing = True
        self._save_goal(effects)
        if self.info.status == IDLE:
            self._go_on(effects, now)
        elif self.info.status not in (RUNNING, RECOVERING) and not (self.is_queued and self.info.rounds_done):
            self._end(effects, now, CANCELLED, RunError("F003", "finished before its first round"))

    def _stop(self, effects: Effects, now: Now) -> None:
        """End in order and soon: after the open round, without waiting for clusters that are away."""
        if self.terminal or self._stopping:
            return
        self._rounds_wanted = self._last_round()
        if not self._rounds_wanted:
            return self._end(effects, now, CANCELLED, RunError("F003", "stopped before its first round"))
        self._stopping = self._finishing = True
        self._excluded |= self._away
        self._save_goal(effects)
        if self._looking:
            self.stays(effects, now, "")
        elif self.info.status in (RECOVERING, IDLE):
            self._go_on(effects, now)

    def cancel(self, effects: Effects, now: Now) -> None:
        """End the run whatever it is doing; nothing of it is accepted afterwards."""
        if not self.terminal:
            self._end(effects, now, CANCELLED, RunError("F003", f"run {self.run_id[:8]} was cancelled"))

    # ------------------------------------------------------------ reports of agents

    def reserved(self, effects: Effects, now: Now, cluster: str, report: Reserved) -> None:
        """One cluster's reservation; all or nothing."""
        if self.info.status != RESERVING or report.generation != self.generation or cluster not in self._pending:
            return
        if report.error_json:
            error = error_of(cluster, report.error_json)
            return (self.requeue if error.code == "R003" else self._setback)(effects, now, error)
        if self._arrived(cluster):
            self._has_room()
            self.record.status(effects, now, RESERVED)
            self._go_on(effects, now)

    def activated(self, effects: Effects, now: Now, cluster: str, report: Activated) -> None:
        """One cluster has set up its nodes."""
        if self.info.status != ACTIVATING or report.generation != self.generation or cluster not in self._pending:
            return
        if report.error_json:
            return self._setback(effects, now, error_of(cluster, report.error_json))
        self._checks.activated(cluster, report)
        self._parts[cluster] = report
        if self._arrived(cluster):
            self._ready(effects, now)

    def round_report(self, effects: Effects, now: Now, cluster: str, report: RoundReport) -> None:
        """One cluster's part of an attempt; stale ones are dropped."""
        ledger = self._ledger
        if self.info.status != RUNNING or ledger is None or report.generation != self.generation:
            return
        if ledger.open is None or not ledger.accepts(report) or cluster not in ledger.open.clusters:
            if cluster in self._late and report.round == ledger.round + 1:
                self.warned(effects, now, f"{cluster}: round {report.round} came late and {self._fate_of_late}")
            return
        if report.error_json:
            error = error_of(cluster, report.error_json)
            if not report.recovery:
                return self.fail(effects, now, error)
            return self.recover(effects, now, error.message, report.recovery == "restore")
        self._checks.round_report(cluster, report)
        if report.overflow:
            return self._retry_coarser(effects, now, report.overflow)
        self._check_graph(cluster, report)
        self.record.attempt(effects, cluster, report)
        commit = ledger.collect(cluster, report)
        self._arrived(cluster)
        if commit:
            self._committed(effects, now, commit)
        else:
            waiting = f"round {report.round} on {', '.join(sorted(self._pending))}"
            self.record.waits(effects, now, waiting, quiet=True)

    def relinked(self, effects: Effects, now: Now, cluster: str, report: Relinked) -> None:
        """One cluster has taken over another graph; the next round waits for all."""
        if self.info.status != RUNNING or report.generation != self.generation or not self.graphs.between:
            return
        if report.error_json:
            return self._setback(effects, now, error_of(cluster, report.error_json))
        if cluster in self._pending and self._arrived(cluster):
            self.graphs.linked()
            self._go_on(effects, now)

    def checkpointed(self, effects: Effects, now: Now, cluster: str, report: Checkpointed) -> None:
        """One cluster's part of a checkpoint is durable, or could not be written."""
        if self.terminal:
            effects.deletes.append((self.run_id, CHECKPOINTS))
            return
        if report.generation < self._set_up_generation:
            return self.checkpoints.came_too_late(report.artifact)
        if report.error_json:
            # Of those that are lost anyway the run goes back to the one before.
            was_asked = report.round == self.checkpoints.open_round and self.info.status == RECOVERING
            self._lost_state = self._lost_state or was_asked
            self.checkpoints.give_up()
            if self._looking:
                self.stays(effects, now, f"their state did not become durable: {error_of(cluster, report.error_json)}")
        elif self.checkpoints.arrived(cluster, report.round, report.artifact):
            artifacts = self.checkpoints.durable[report.round]
            generation = self.checkpoints.generation(report.round)
            effects.writes.append(
                Write("checkpoints", (self.run_id, report.round), {"artifacts": artifacts, "generation": generation})
            )
            effects.deletes += [(self.run_id, artifact) for artifact in self.checkpoints.outdated()]
            self._forget_graphs()
        if (self.leaving or self._returning) and self.info.status in LIVE and not (self._ledger and self._ledger.open):
            self._go_on(effects, now)

    def model_stored(self, effects: Effects, now: Now, cluster: str, report: ModelStored) -> None:
        """The final model is in the blob store: the run is complete."""
        asked = self._pending.get(cluster) if self._storing else None
        if self.terminal or asked != StoreModel(report.run_id, report.generation, report.round):
            return
        if report.error_json:
            return self.recover(effects, now, error_of(cluster, report.error_json).message, lost_state=True)
        self.record.change(model_sha256=report.sha256)
        self._end(effects, now, COMPLETED, None)

    def warned(self, effects: Effects, now: Now, text: str) -> None:
        """Pass on what an agent wants the user to see."""
        if not self.terminal:
            self.record.event(effects, now, "warning", text)

    # ------------------------------------------------------------ clusters come and go

    def cluster_lost(self, effects: Effects, now: Now, cluster: str) -> None:
        """The lease of a cluster ran out, or its agent left."""
        if not self.terminal and cluster not in self.clusters:
            self._held.discard(cluster)
        if self.terminal or cluster not in self.clusters:
            return
        self._held.discard(cluster)
        error = AgentError(
            "A003", f"cluster {cluster} was lost in {self._doing()}", hint="start its fabric-agent again"
        )
        left_in_order = cluster in self.leaving
        self._gone_for(now, [cluster], 0.0 if left_in_order else GRACE_S)
        self._returning.discard(cluster)
        if self.config.get("on_cluster_loss") == "fail" and not left_in_order:
            return self.fail(effects, now, error)
        if self._excludes:
            self._excluded.add(cluster)
        lost_state = left_in_order and not self._excludes
        self.recover(effects, now, f"{cluster} is away", lost_state=self._lost_state or lost_state)

    def cluster_joined(self, effects: Effects, now: Now, cluster: str, held: HeldRun | None) -> None:
        """The agent of a cluster has registered, again or for the first time since this mediator lives."""
        if self.terminal or cluster not in self.clusters:
            return
        self.leaving.discard(cluster)
        self._held.add(cluster)
        # A new graph may have been on its way to it.
        since = self.generation - self.graphs.between
        still_set_up = held is not None and since <= held.generation <= self.generation
        if cluster in self._excluded and not still_set_up and self.info.status in LIVE:
            # The others need not fall back to the last checkpoint for it: it comes in when there is a new one.
            if not self._storing:
                self._returning.add(cluster)
            if not (self._ledger and self._ledger.open):
                self._go_on(effects, now)
            return
        was_away = cluster in self._away
        for waiting in (self._away, self._excluded, self._late):
            waiting.discard(cluster)
        if held is not None and still_set_up:
            self._attempt_floor = max(self._attempt_floor, held.attempt)
        elif self.info.status not in (QUEUED,):
            self._lost_state = True
        reason = f"{cluster} is back" if was_away else f"{cluster} has connected again"
        self.recover(effects, now, reason, self._lost_state)

    def cluster_reset(self, effects: Effects, now: Now, cluster: str, reason: str) -> None:
        """A cluster was rebuilt: nothing that lived on it is left."""
        if not self.terminal and cluster in self.clusters:
            self.recover(effects, now, f"{cluster}: {reason}", lost_state=True)

    def drain(self, effects: Effects, now: Now, cluster: str) -> None:
        """The agent of a cluster wants to leave: make the state durable after the open round, then let it go."""
        if self.terminal or cluster not in self.clusters:
            return
        self.leaving.add(cluster)
        if self.info.status in LIVE and not (self._ledger and self._ledger.open):
            self._go_on(effects, now)
        elif self.info.status not in LIVE:
            self._gone_for(now, [cluster], 0.0)
            if self._excludes:
                self._excluded.add(cluster)
            self.recover(effects, now, f"{cluster} leaves", lost_state=not self._excludes)

    def tick(self, effects: Effects, now: Now) -> None:
        """Check the deadline of what the run waits for."""
        if self.is_queued:
            return self._tick_queued(effects, now)
        if self.terminal or now.monotonic_s < self._deadline_s or self._drop_late(effects, now):
            return
        if self._looking:
            return self.stays(effects, now, "their state did not become durable in time")
        if self.info.status == RECOVERING and self._away and self._may_go_on(self._away):
            self._excluded |= self._away
            return self._go_on(effects, now)
        late = ", ".join(sorted(self._away or self._pending))
        in_round = bool(self._ledger and self._ledger.open) or self.info.status == RECOVERING
        hint = "raise round_deadline_s" if in_round else "see the log of the late agents"
        error = RunError("F002", f"{self._doing()} took too long on {late}", hint=hint)
        self.fail(effects, now, error)

    def rejoin(self, effects: Effects, now: Now) -> None:
        """After a restart of the mediator: wait for all clusters, which tell what they still hold."""
        self._gone_for(now, self.clusters, self._lease_s + GRACE_S)
        self._excluded, self._held = set(), set()
        self._in_vain = self.info.rounds_done + 2
        # Whether anybody did, nobody knows any more.
        self._called = True
        self.recover(effects, now, "the mediator was restarted", lost_state=False)

    # ------------------------------------------------------------ recovery

    def recover(self, effects: Effects, now: Now, reason: str, lost_state: bool) -> None:
        """Leave what the run is doing and come back to it: at once if all clusters are there, else when they are."""
        if self.info.status == QUEUED or self.placement is None:
            return
        unfinished = self.info.status in (RESERVING, RESERVED, ACTIVATING)
        self._lost_state = self._lost_state or lost_state or unfinished or bool(self._returning)
        self._away -= self._returning
        self._excluded &= self._away
        self._late, self._returning = set(), set()
        self._recoveries += self.info.status != RECOVERING
        if self._recoveries > MAX_RECOVERIES:
            error = RunError("F002", f"{MAX_RECOVERIES} recoveries without a new round, the last after: {reason}")
            return self.fail(effects, now, error)
        self._abort_open(effects)
        self.checkpoints.give_up()
        self._pending, self._storing, self._looking = {}, False, False
        self._deadline_s = now.monotonic_s + float(self.config["round_deadline_s"])
        waiting = f"cluster {', '.join(sorted(self._away))} to come back" if self._away else ""
        self.record.status(effects, now, RECOVERING, waiting, text=reason)
        self._go_on(effects, now)

    def _setback(self, effects: Effects, now: Now, error: IcrfError) -> None:
        """Reserving or activating failed: final in a first attempt, or if it is not a death."""
        if self.generation == 1 and self._recoveries == 0 and error.code != "U003":
            return self.fail(effects, now, error)
        if error.code in ("U003", "P003", "L008"):
            return self.recover(effects, now, error.message, lost_state=True)
        self.fail(effects, now, error)

    def _comes_back(self, effects: Effects, now: Now) -> None:
        assert self.placement is not None
        if self._away and not (self._away <= self._excluded and self._may_go_on(self._away)):
            return
        # Whatever is asked next sets its own; an idle run may rest as long as it likes.
        self._deadline_s = NEVER
        if self._lost_state or self._ledger is None or not self._ledger.total_weight:
            self._reserve(effects, now)
            return
        status = RUNNING if self._ledger.round < self._rounds_wanted or self._finishing else IDLE
        if self._stage != "run":
            status = READY
        self.record.status(effects, now, status)
        self._go_on(effects, now)

    # ------------------------------------------------------------ rounds

    def _retry_coarser(self, effects: Effects, now: Now, overflow: Sequence[int]) -> None:
        assert self._ledger is not None and self._ledger.open is not None
        old = self._ledger.open.start
        start = self._ledger.retry_coarser(overflow, now.monotonic_s)
        names = ", ".join(self._summed_name(t) for t in overflow[:4])
        if start is None:
            return self.fail(effects, now, make_error("W021", f"round {old.round}: values of {names} keep growing"))
        text = f"round {old.round}: values of {names} left the exact grid; attempt {start.attempt} uses a coarser one"
        self.record.event(effects, now, "warning", text)
        for cluster in self.clusters:
            effects.send(cluster, AbortAttempt(self.run_id, old.round, old.attempt))
        self._ask_round(effects, now, start)

    def _committed(self, effects: Effects, now: Now, commit: Commit) -> None:
        assert self._ledger is not None and self.placement is not None
        if (error := self._not_repeated(commit)) is not None:
            return self.fail(effects, now, error)
        self._attempt_floor, self._late = 0, set()
        self._quorum.note(commit.round, commit.metrics)
        if commit.round > self.info.rounds_done:
            self._recoveries = 0
            target = self.config.get("target_accuracy")
            # Only the first time: whoever asks for more rounds after that gets them.
            first = not self.info.rounds_to_target
            accuracy = commit.metrics.get("accuracy", -1.0) if commit.consensus_hash else -1.0
            reached = target is not None and accuracy >= target and first
            result = self._keep_graph(effects, commit, self._result(now, commit))
            self.record.committed(effects, now, commit, result, reached)
            self._tell_late(effects, now, commit)
            if reached:
                self._rounds_wanted = commit.round
                self._save_goal(effects)
        # The model of the last round is stored at once, and with it the run is over.
        ends = self._finishing and commit.round >= self._rounds_wanted
        if not ends and self._saves_after(commit.round):
            self._checkpoint(effects)
        self._go_on(effects, now)

    def _go_on(self, effects: Effects, now: Now) -> None:
        """Take the next step towards what is wanted."""
        status, wanted = self.info.status, STAGES.index(self._stage)
        done = self._ledger.round if self._ledger else 0
        if status == RECOVERING:
            self._comes_back(effects, now)
        elif status == RESERVED and wanted >= STAGES.index("activate"):
            self._activate(effects, now)
        elif status in LIVE and (self.leaving - self._away or self._returning):
            self._let_go(effects, now)
        elif status == READY and wanted >= STAGES.index("run"):
            self.record.status(effects, now, RUNNING)
            self._go_on(effects, now)
        elif status in (RUNNING, IDLE) and done < self._rounds_wanted:
            if status == IDLE:
                self.record.status(effects, now, RUNNING)
            if not self._begin_looking(now) and not self._next_round(effects, now):
                self.recover(effects, now, f"round {done + 1} has too few nodes", lost_state=False)
        elif status in (RUNNING, IDLE) and self._finishing:
            self._store(effects, now)
        elif status == RUNNING:
            self.record.status(effects, now, IDLE)

    def _let_go(self, effects: Effects, now: Now) -> None:
        """Clusters want to leave or to come back between two rounds: first the state must be durable."""
        done = self._ledger.round if self._ledger else 0
        if done and done not in self.checkpoints.durable:
            if self.checkpoints.open_round != done:
                self._checkpoint(effects)
            return
        texts = [f"{c} left in order" for c in sorted(self.leaving - self._away)]
        texts += [f"{c} is back" for c in sorted(self._returning)]
        self._gone_for(now, sorted(self.leaving), 0.0)
        if self._excludes:
            self._excluded |= self.leaving
        self.recover(effects, now, ", ".join(texts), lost_state=not self._excludes)
