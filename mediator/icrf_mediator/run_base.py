"""What a run is made of; ``runs.py`` has its life. Pure."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from icrf.errors import IcrfError, make_error
from icrf.ports import Write
from icrf.protocol import (
    FAILED,
    IDLE,
    QUEUED,
    READY,
    RUNNING,
    AbortAttempt,
    Activated,
    Instruction,
    Release,
    RunEvent,
    RunInfo,
    StartRound,
    Submission,
    shared_tensors,
)
from icrf_mediator.checkpoints import CHECKPOINTS, Checkpoints
from icrf_mediator.checks import ReportChecks
from icrf_mediator.effects import Effects, Now
from icrf_mediator.graphs import Graphs
from icrf_mediator.placement import Placement
from icrf_mediator.quorum import Quorum
from icrf_mediator.rounds import RoundLedger
from icrf_mediator.run_record import RunRecord

NEVER = float("inf")
LIVE = frozenset({READY, RUNNING, IDLE})


class RunBase(ABC):
    """What a run is, and the small steps that every part of its life uses.

    Args:
        run_id: identity of the run.
        submission: what was submitted.
        now: time of submission.
        addresses: where the gateways of clusters can be dialled now, by cluster.
        reserve_s: how long clusters may take to reserve.
        activate_s: how long they may take to set up their nodes.
        lease_s: how long a cluster stays owned without a sign of life.
    """

    def __init__(
        self,
        run_id: str,
        submission: Submission,
        now: Now,
        addresses: Callable[[str], str],
        *,
        reserve_s: float = 60.0,
        activate_s: float = 300.0,
        lease_s: float = 20.0,
    ) -> None:
        self.run_id, self.submission = run_id, submission
        self.config = json.loads(submission.config_json)
        self.record = RunRecord(run_id, submission, self.config, now)
        self.placement: Placement | None = None
        # Where it lived before a move by choice, until its nodes are set up elsewhere.
        self._instead_of: Placement | None = None
        self.checkpoints = Checkpoints()
        self.graphs = Graphs(submission.graph)
        # The second is that of the last set-up: other graphs have come since.
        self.generation, self._set_up_generation = 0, 0
        self.leaving: set[str] = set()
        self._addresses, self._reserve_s, self._activate_s = addresses, reserve_s, activate_s
        self._lease_s = lease_s
        self._ledger: RoundLedger | None = None
        self._stage = submission.stage
        self._rounds_wanted = self.info.rounds_planned if submission.stage == "run" else 0
        self._finishing, self._stopping = not submission.keep, False
        self._storing = False
        # What is asked of each cluster and not answered yet.
        self._pending: dict[str, Instruction] = {}
        self._held: set[str] = set()
        self._away: set[str] = set()
        # From when on the nodes of a cluster that is away may go elsewhere.
        self._given_up_s: dict[str, float] = {}
        # Away, and the run does not wait for them; they may be back and wait for the state to be durable.
        self._excluded: set[str] = set()
        self._returning: set[str] = set()
        # Not away, but too late for the open round.
        self._late: set[str] = set()
        # The clusters whose absence was told last.
        self._told_gone: set[str] = set()
        self._lost_state = False
        # Calls to its nodes, and messages: those that are under way, and whether there was any that the newest
        # checkpoint may not have.
        self._open_calls: set[str] = set()
        self._called = False
        self._recoveries = 0
        self._attempt_floor = 0
        # What was handed out to follow the open round, and the round that clusters may have begun on what turned out
        # otherwise.
        self._promised: StartRound | None = None
        self._in_vain = 0
        self._restored_round = 0
        self._parts: dict[str, Activated] = {}
        self._deadline_s = NEVER
        self._opened_wall_s = 0.0
        # Since the last round was decided on; for display only.
        self._mediator_s = 0.0

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

    def holds(self, cluster: str) -> bool:
        """Whether a cluster may still have something of this run."""
        return cluster in self._held

    @property
    def holders(self) -> frozenset[str]:
        """The clusters that may still have something of it."""
        return frozenset(self._held)

    def released(self, cluster: str) -> None:
        """A cluster freed what it held."""
        self._held.discard(cluster)

    def has_left(self, cluster: str) -> bool:
        """Whether a cluster has to release what it may still have of it: the run is over, in line, or elsewhere."""
        return self.terminal or cluster not in self.clusters

    def owes(self, cluster: str) -> None:
        """A cluster that the run has left was told to release what it may have of it."""
        if not self.terminal:
            self._held.add(cluster)

    @property
    def is_activated(self) -> bool:
        """Whether its nodes are live on their hosts."""
        return self.info.status in LIVE

    @property
    def clusters(self) -> tuple[str, ...]:
        """The clusters it is placed on; none while it is queued."""
        return self.placement.clusters if self.placement and self.info.status != QUEUED else ()

    def may_leave(self, cluster: str) -> bool:
        """Whether nothing of this run is lost when `cluster` goes now."""
        return self.terminal or cluster not in self.clusters or (cluster in self._away and cluster in self.leaving)

    def node_index(self, node_id: str) -> int:
        """Index of a node; P012 with known ids when there is none."""
        for index, node in enumerate(self.submission.nodes):
            if node.id == node_id:
                return index
        known = ", ".join(n.id for n in self.submission.nodes[:6])
        raise make_error("P012", f"no node '{node_id}' in {self.info.federation}", allowed=f"{known}, ...")

    def cluster_of(self, node: int) -> str:
        assert self.placement is not None
        return self.placement.cluster_of(node)

    def called(self, call_id: str) -> None:
        """A node is called, or sent a message: what it keeps may be another from now on."""
        self._open_calls.add(call_id)
        self._called = True

    def answered(self, call_id: str) -> None:
        """A call has come to its end."""
        self._open_calls.discard(call_id)

    # ------------------------------------------------------------ small things

    def _summed_name(self, number: int) -> str:
        """What a summed tensor is called: its name in the model, in whichever row."""
        layout, rows = shared_tensors(self.submission.layout), self.submission.rows
        return "scalars" if number >= rows.up * len(layout) else layout[number % len(layout)].name

    def _place(self, placement: Placement) -> None:
        self.placement = placement
        flow, members = self.submission.flow, placement.members()
        coordinator = placement.clusters[placement.coordinator(self.submission)]
        keepers = placement.keepers(self.submission)
        if self._ledger is None:
            by_samples = bool(self.config.get("aggregation_sample_scaling", True))
            self._ledger = RoundLedger(flow, placement.clusters, keepers, coordinator, by_samples=by_samples)
            self._quorum = Quorum(self.submission, self.config, placement.cluster_of, coordinator)
        else:
            self._ledger.move(placement.clusters, keepers, coordinator)
            self._quorum.move(placement.cluster_of, coordinator)
        num_summed = self.submission.rows.num_summed(len(shared_tensors(self.submission.layout)))
        self._checks = ReportChecks(flow, num_summed, members, keepers)

    def _save_goal(self, effects: Effects) -> None:
        goal = {"stage": self._stage, "rounds_wanted": self._rounds_wanted, "finishing": self._finishing}
        goal["stopping"] = self._stopping
        effects.writes.append(Write("goals", (self.run_id,), goal))

    def _ask(self, effects: Effects, now: Now, orders: Mapping[str, Instruction], within_s: float) -> None:
        """Ask clusters for something, with a deadline."""
        self._pending = dict(orders)
        self._deadline_s = now.monotonic_s + within_s
        for cluster, instruction in orders.items():
            effects.send(cluster, instruction)

    def _arrived(self, cluster: str) -> bool:
        """A cluster has answered; True when it was the last."""
        self._pending.pop(cluster, None)
        if not self._pending:
            # Whatever is asked next sets its own; a run that is held between two stages may wait as long as it likes.
            self._deadline_s = NEVER
        return not self._pending

    def _doing(self) -> str:
        if self._ledger and self._ledger.open:
            return f"round {self._ledger.open.start.round}"
        return self.info.status.lower()

    @abstractmethod
    def _go_on(self, effects: Effects, now: Now) -> None:
        """Take the next step towards what is wanted."""

    def fail(self, effects: Effects, now: Now, error: IcrfError) -> None:
        """End the run with an error."""
        self._end(effects, now, FAILED, error)

    def _end(self, effects: Effects, now: Now, status: str, error: IcrfError | None) -> None:
        open_attempt = self._ledger.open if self._ledger else None
        # Clusters that are away are told when they come back: they may hold a reservation that they do not know of.
        self._held |= set(self.clusters) if self.generation else set()
        for cluster in sorted(self._held):
            if open_attempt:
                start = open_attempt.start
                effects.send(cluster, AbortAttempt(self.run_id, start.round, start.attempt))
            effects.send(cluster, Release(self.run_id, self.generation))
        self._deadline_s = NEVER
        effects.deletes.append((self.run_id, CHECKPOINTS))
        self.record.end(effects, now, status, error)
