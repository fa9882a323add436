"""The life of one run, as a state machine: events in, effects out. Pure.

::

    QUEUED ─ start ─> RESERVING ─> RESERVED ─> ACTIVATING ─> READY ─> RUNNING ─┬─> IDLE (kept) ─ finish ─┐
                          │            │            │          │         │     └──────────────────────────┴─> COMPLETED
                          └────────────┴────────────┴──────────┴─────────┴─> FAILED, CANCELLED

A run stops in RESERVED and READY when it was submitted with a stage, and goes on when asked to `advance`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from icrf.errors import AgentError, IcrfError, InternalError, RunError, make_error
from icrf.ports import Write
from icrf.protocol import (
    ACTIVATING,
    CANCELLED,
    CENTRALIZED,
    COMPLETED,
    FAILED,
    IDLE,
    QUEUED,
    READY,
    RESERVED,
    RESERVING,
    RUNNING,
    STAGES,
    AbortAttempt,
    Activate,
    Activated,
    Fingerprint,
    Instruction,
    ModelStored,
    PeerAddress,
    Plan,
    Release,
    Reserve,
    Reserved,
    Resources,
    RoundReport,
    RoundResult,
    RunEvent,
    RunInfo,
    StartRound,
    StoreModel,
    Submission,
)
from icrf_mediator.checks import ReportChecks, error_of
from icrf_mediator.effects import Effects, Now
from icrf_mediator.rounds import Commit, RoundLedger
from icrf_mediator.run_record import RunRecord

MODEL_ARTIFACT = "model.safetensors"


class RunMachine:
    """One run from submission to its end.

    Args:
        run_id: identity of the run.
        submission: what was submitted.
        now: time of submission.
        reserve_s: how long clusters may take to reserve.
        activate_s: how long they may take to set up their nodes.
    """

    def __init__(
        self, run_id: str, submission: Submission, now: Now, *, reserve_s: float = 60.0, activate_s: float = 300.0
    ) -> None:
        self.run_id = run_id
        self.submission = submission
        self.config = json.loads(submission.config_json)
        self._reserve_s = reserve_s
        self._activate_s = activate_s
        self.record = RunRecord(run_id, submission, self.config, now)
        self.generation = 0
        self.plan: Plan | None = None
        self.ledger: RoundLedger | None = None
        self._stage = submission.stage
        self._rounds_wanted = self.info.rounds_planned if submission.stage == "run" else 0
        self._finishing = not submission.keep
        self._storing = False
        self._assignment: tuple[int, ...] = ()
        self._peers: tuple[PeerAddress, ...] = ()
        self._resources: dict[str, Resources] = {}
        # What is asked of each cluster and not answered yet.
        self._pending: dict[str, Instruction] = {}
        self._held: set[str] = set()
        self._samples: dict[int, int] = {}
        self._absmax: dict[str, tuple[float, ...]] = {}
        self._hashes: dict[str, bytes] = {}
        self._model_hash = ""
        self._deadline_s = float("inf")
        self._opened_wall_s = 0.0

    # ------------------------------------------------------------ what it is

    @property
    def info(self) -> RunInfo:
        """The run as users see it."""
        return self.record.info

    @property
    def events(self) -> list[RunEvent]:
        """Everything that happened so far; the live list."""
        return self.record.events

    @property
    def terminal(self) -> bool:
        return self.record.terminal

    @property
    def ended(self) -> bool:
        """Terminal, and every cluster has released what it held."""
        return self.terminal and not self._held

    @property
    def is_activated(self) -> bool:
        """Whether its nodes are live on their hosts."""
        return self.info.status in (READY, RUNNING, IDLE)

    def holds(self, cluster: str) -> bool:
        """Whether a cluster may still have something of this run."""
        return cluster in self._held

    @property
    def slots(self) -> dict[str, int]:
        return dict(self.plan.slots) if self.plan else {}

    @property
    def _clusters(self) -> tuple[str, ...]:
        assert self.plan is not None
        return self.plan.clusters

    def cluster_of(self, node: int) -> str:
        return self._clusters[self._assignment[node]]

    def node_index(self, node_id: str) -> int:
        """Index of a node; P012 with the known ids when there is none."""
        for index, node in enumerate(self.submission.nodes):
            if node.id == node_id:
                return index
        known = ", ".join(n.id for n in self.submission.nodes[:6])
        raise make_error("P012", f"no node '{node_id}' in {self.info.federation}", allowed=f"{known}, ...")

    # ------------------------------------------------------------ events from the SDK

    def submitted(self, effects: Effects, now: Now) -> None:
        """Journal the submission."""
        effects.writes.append(Write("submissions", (self.run_id,), asdict(self.submission)))
        self.record.status(effects, now, QUEUED)

    def queued(self, effects: Effects, now: Now, waiting_for: str) -> None:
        """Say what a queued run waits for, once per reason."""
        self.record.waits(effects, now, waiting_for)

    def start(
        self,
        effects: Effects,
        now: Now,
        *,
        plan: Plan,
        assignment: tuple[int, ...],
        peers: tuple[PeerAddress, ...],
        resources: dict[str, Resources],
        fingerprints: dict[str, Fingerprint],
    ) -> None:
        """Leave the queue: reserve on every cluster that the assignment names."""
        self.generation += 1
        self.plan, self._assignment, self._peers, self._resources = plan, assignment, peers, resources
        members: dict[str, list[int]] = {c: [] for c in plan.clusters}
        for node, position in enumerate(assignment):
            members[plan.clusters[position]].append(node)
        nodes_by_cluster = {c: tuple(nodes) for c, nodes in members.items()}
        coordinator = plan.clusters[self._coordinator()]
        self.ledger = RoundLedger(self.submission.flow, plan.clusters, nodes_by_cluster, coordinator)
        self._checks = ReportChecks(self.submission.flow, len(self.submission.layout), nodes_by_cluster, coordinator)
        effects.writes.append(
            Write(
                "assignments",
                (self.run_id, self.generation),
                {"clusters": list(plan.clusters), "assignment": list(assignment), "plan": asdict(plan)},
            )
        )
        self.record.change(clusters=plan.clusters)
        self._held = set(plan.clusters)
        self.record.status(effects, now, RESERVING, f"reservations on {', '.join(plan.clusters)}")
        self.record.fingerprints(effects, now, self.config.get("determinism", ""), fingerprints)
        orders: dict[str, Instruction] = {
            cluster: Reserve(
                self.run_id,
                self.generation,
                self.info.federation,
                plan.slots[cluster],
                resources[cluster],
                self.config["placement_group_strategy"],
                self._reserve_s,
            )
            for cluster in plan.clusters
        }
        self._ask(effects, now, orders, self._reserve_s + 30.0)

    def _coordinator(self) -> int:
        if self.submission.flow == CENTRALIZED:
            for node, spec in enumerate(self.submission.nodes):
                if "aggregate" in spec.role.split("-"):
                    return self._assignment[node]
        return self._assignment[0]

    def advance(self, effects: Effects, now: Now, stage: str, rounds: int) -> None:
        """Go on to `stage`; for ``run``, `rounds` is the total to reach (0: as configured). Repeating is harmless."""
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
        if self.info.status != RUNNING:
            self._go_on(effects, now)

    def finish(self, effects: Effects, now: Now) -> None:
        """End a kept run in order: now when idle, else after its rounds."""
        if self.terminal:
            return
        self._finishing = True
        if self.info.status == IDLE:
            self._go_on(effects, now)
        elif self.info.status != RUNNING:
            self._end(effects, now, CANCELLED, RunError("F003", "finished before its first round"))

    def cancel(self, effects: Effects, now: Now) -> None:
        """End the run whatever it is doing; nothing of it is accepted afterwards."""
        if not self.terminal:
            self._end(effects, now, CANCELLED, RunError("F003", f"run {self.run_id[:8]} was cancelled"))

    # ------------------------------------------------------------ events from agents and the clock

    def reserved(self, effects: Effects, now: Now, cluster: str, report: Reserved) -> None:
        """One cluster's reservation; all or nothing."""
        if self.info.status != RESERVING or report.generation != self.generation or cluster not in self._pending:
            return
        if report.error_json:
            return self.fail(effects, now, error_of(cluster, report.error_json))
        if self._arrived(cluster):
            self.record.status(effects, now, RESERVED)
            self._go_on(effects, now)

    def activated(self, effects: Effects, now: Now, cluster: str, report: Activated) -> None:
        """One cluster has set up its nodes."""
        if self.info.status != ACTIVATING or report.generation != self.generation or cluster not in self._pending:
            return
        if report.error_json:
            return self.fail(effects, now, error_of(cluster, report.error_json))
        self._checks.activated(cluster, report)
        self._samples.update(report.num_samples)
        self._absmax[cluster] = report.absmax
        self._hashes[cluster] = report.state_hashes
        self._model_hash = report.model_hash or self._model_hash
        if self._arrived(cluster):
            self._ready(effects, now)

    def _ready(self, effects: Effects, now: Now) -> None:
        assert self.ledger is not None
        trains = [i for i, n in enumerate(self.submission.nodes) if "train" in n.role.split("-")]
        missing = [self.submission.nodes[i].id for i in trains if self._samples.get(i, 0) < 1]
        if missing:
            error = InternalError("X001", f"no sample count for {', '.join(missing[:5])}")
            return self.fail(effects, now, error)
        if self.submission.flow == CENTRALIZED:
            head = self._model_hash
        else:
            head = RoundLedger.root(self.ledger.leaves(self._hashes))
        self.ledger.begin(list(self._absmax.values()), head, sum(self._samples[i] for i in trains))
        self.record.status(effects, now, READY)
        self._go_on(effects, now)

    def round_report(self, effects: Effects, now: Now, cluster: str, report: RoundReport) -> None:
        """One cluster's part of an attempt; stale ones are dropped."""
        ledger = self.ledger
        if self.info.status != RUNNING or ledger is None or report.generation != self.generation:
            return
        if not ledger.accepts(report) or cluster not in ledger.clusters:
            return
        if report.error_json:
            return self.fail(effects, now, error_of(cluster, report.error_json))
        self._checks.round_report(cluster, report)
        if report.overflow:
            return self._retry(effects, now, report.overflow)
        self.record.attempt(effects, cluster, report)
        commit = ledger.collect(cluster, report)
        self._arrived(cluster)
        if commit:
            self._committed(effects, now, commit)
        else:
            self.record.waits(effects, now, f"round {report.round} on {', '.join(sorted(self._pending))}", quiet=True)

    def _retry(self, effects: Effects, now: Now, overflow: tuple[int, ...]) -> None:
        assert self.ledger is not None and self.ledger.open is not None
        old = self.ledger.open.start
        start = self.ledger.retry_coarser(overflow, now.monotonic_s)
        names = ", ".join(self.submission.layout[t].name for t in overflow[:4])
        if start is None:
            error = make_error("W021", f"round {old.round}: values of {names} keep growing")
            return self.fail(effects, now, error)
        self.record.event(
            effects,
            now,
            "warning",
            f"round {old.round}: values of {names} left the exact grid; attempt {start.attempt} uses a coarser one",
        )
        for cluster in self._clusters:
            effects.send(cluster, AbortAttempt(self.run_id, old.round, old.attempt))
        self._ask_round(effects, now, start)

    def _committed(self, effects: Effects, now: Now, commit: Commit) -> None:
        result = RoundResult(
            number=commit.round,
            attempt=commit.attempt,
            generation=self.generation,
            wall_s=max(0.0, now.wall_s - self._opened_wall_s),
            train_s=commit.train_s,
            exchange_s=commit.exchange_s,
            commit_s=0.0,
            metrics=commit.metrics,
            bytes_inter_cluster=commit.bytes_inter_cluster,
            bytes_intra_cluster=commit.bytes_intra_cluster,
            participants=commit.num_participants,
            model_sha256=commit.model_hash,
            parent_sha256=commit.parent_hash,
            consensus_sha256=commit.consensus_hash,
            bytes_by_cluster=commit.bytes_by_cluster,
        )
        target = self.config.get("target_accuracy")
        # Only the first time: whoever asks for more rounds after that gets them.
        reached = (
            target is not None and commit.metrics.get("accuracy", -1.0) >= target and not self.info.rounds_to_target
        )
        self.record.committed(effects, now, commit, result, reached)
        if reached:
            self._rounds_wanted = commit.round
        self._go_on(effects, now)

    def model_stored(self, effects: Effects, now: Now, cluster: str, report: ModelStored) -> None:
        """The final model is in the blob store: the run is complete."""
        asked = self._pending.get(cluster) if self._storing else None
        if self.terminal or asked != StoreModel(report.run_id, report.generation, report.round):
            return
        if report.error_json:
            return self.fail(effects, now, error_of(cluster, report.error_json))
        self.record.change(model_sha256=report.sha256)
        self._end(effects, now, COMPLETED, None)

    def released(self, effects: Effects, now: Now, cluster: str) -> bool:
        """A cluster freed what it held; True when it was the last one."""
        self._held.discard(cluster)
        return self.ended

    def reconnected(self, effects: Effects, cluster: str) -> None:
        """An agent is back on a new stream: say again what it may have missed, as far as an agent may repeat it."""
        asked = self._pending.get(cluster)
        if self.terminal and cluster in self._held:
            effects.send(cluster, Release(self.run_id, self.generation))
        elif not self.terminal and isinstance(asked, StartRound | StoreModel):
            effects.send(cluster, asked)

    def cluster_lost(self, effects: Effects, now: Now, cluster: str) -> None:
        """The lease of a cluster ran out."""
        self._held.discard(cluster)
        if not self.terminal and self.plan and cluster in self.plan.clusters and self.info.status != QUEUED:
            error = AgentError(
                "A003",
                f"cluster {cluster} was lost in {self._doing()}",
                hint="start its fabric-agent again and submit once more",
            )
            self.fail(effects, now, error)

    def warned(self, effects: Effects, now: Now, text: str) -> None:
        """Pass on what an agent wants the user to see."""
        if not self.terminal:
            self.record.event(effects, now, "warning", text)

    def tick(self, effects: Effects, now: Now) -> None:
        """Check the deadline of what the run waits for."""
        if self.terminal or now.monotonic_s < self._deadline_s:
            return
        late = ", ".join(sorted(self._pending))
        hint = "raise round_deadline_s" if self.ledger and self.ledger.open else "see the log of the late agents"
        error = RunError("F002", f"{self._doing()} took too long on {late}", hint=hint)
        self.fail(effects, now, error)

    def fail(self, effects: Effects, now: Now, error: IcrfError) -> None:
        """End the run with an error."""
        self._end(effects, now, FAILED, error)

    # ------------------------------------------------------------ inside

    def _go_on(self, effects: Effects, now: Now) -> None:
        status, wanted = self.info.status, STAGES.index(self._stage)
        if status == RESERVED and wanted >= STAGES.index("activate"):
            self._activate(effects, now)
        elif status == READY and wanted >= STAGES.index("run"):
            self.record.status(effects, now, RUNNING)
            self._next_round(effects, now)
        elif status in (RUNNING, IDLE) and self.info.rounds_done < self._rounds_wanted:
            if status == IDLE:
                self.record.status(effects, now, RUNNING)
            self._next_round(effects, now)
        elif status in (RUNNING, IDLE) and self._finishing:
            self._store(effects, now)
        elif status == RUNNING:
            self.record.status(effects, now, IDLE)

    def _activate(self, effects: Effects, now: Now) -> None:
        self.record.status(effects, now, ACTIVATING, f"nodes to be set up on {', '.join(self._clusters)}")
        orders: dict[str, Instruction] = {
            cluster: Activate(
                run_id=self.run_id,
                generation=self.generation,
                federation=self.info.federation,
                config_json=self.submission.config_json,
                flow=self.submission.flow,
                nodes=self.submission.nodes,
                graph=self.submission.graph,
                layout=self.submission.layout,
                clusters=self._clusters,
                assignment=self._assignment,
                coordinator=self._coordinator(),
                peers=self._peers,
                num_slots=self.slots[cluster],
                code_path=self.submission.code_path,
            )
            for cluster in self._clusters
        }
        self._ask(effects, now, orders, self._activate_s)

    def _next_round(self, effects: Effects, now: Now) -> None:
        assert self.ledger is not None
        number = self.ledger.round + 1
        every = int(self.config["evaluate_every"])
        evaluate = number == self._rounds_wanted or (every > 0 and number % every == 0)
        start = self.ledger.open_round(self.run_id, self.generation, evaluate, now.monotonic_s)
        self._opened_wall_s = now.wall_s
        self._ask_round(effects, now, start)

    def _ask_round(self, effects: Effects, now: Now, start: StartRound) -> None:
        self._ask(effects, now, dict.fromkeys(self._clusters, start), float(self.config["round_deadline_s"]))

    def _store(self, effects: Effects, now: Now) -> None:
        assert self.ledger is not None
        if self._storing:
            return
        self._storing = True
        coordinator = self.ledger.coordinator
        self.record.waits(effects, now, f"the model from {coordinator}", quiet=True)
        order = StoreModel(self.run_id, self.generation, self.ledger.round)
        self._ask(effects, now, {coordinator: order}, self._activate_s)

    def _end(self, effects: Effects, now: Now, status: str, error: IcrfError | None) -> None:
        open_attempt = self.ledger.open if self.ledger else None
        for cluster in sorted(self._held):
            if open_attempt:
                start = open_attempt.start
                effects.send(cluster, AbortAttempt(self.run_id, start.round, start.attempt))
            effects.send(cluster, Release(self.run_id, self.generation))
        self._deadline_s = float("inf")
        self.record.end(effects, now, status, error)

    def _ask(self, effects: Effects, now: Now, orders: Mapping[str, Instruction], within_s: float) -> None:
        self._pending = dict(orders)
        self._deadline_s = now.monotonic_s + within_s
        for cluster, instruction in orders.items():
            effects.send(cluster, instruction)

    def _arrived(self, cluster: str) -> bool:
        self._pending.pop(cluster, None)
        if not self._pending:
            # Whatever is asked next sets its own; a run that is held between two stages may wait as long as it likes.
            self._deadline_s = float("inf")
        return not self._pending

    def _doing(self) -> str:
        if self.ledger and self.ledger.open:
            return f"round {self.ledger.open.start.round}"
        return self.info.status.lower()
