"""The rounds of a run: opened with the participants that are there, repeated without those that are late. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from icrf.errors import IcrfError, RunError
from icrf.ports import Write
from icrf.protocol import (
    CENTRALIZED,
    HIERARCHICAL,
    RUNNING,
    AbortAttempt,
    Graph,
    NextRound,
    Relink,
    RoundProfile,
    RoundReport,
    RoundResult,
    SaveCheckpoint,
    StartRound,
    StoreModel,
    bitmap,
    nodes_of,
)
from icrf.staleness import IN_TIME
from icrf.topology import STATIC, HybridAdjacencyMatrix, changed_edges
from icrf_mediator.checkpoints import KEPT
from icrf_mediator.checks import check_graph
from icrf_mediator.effects import Effects, Now
from icrf_mediator.graphs import graph_differs, graph_row
from icrf_mediator.placement import Placement
from icrf_mediator.rounds import Commit, differs
from icrf_mediator.run_queue import RunQueue


class RunRounds(RunQueue):
    """What a run asks of its clusters once their nodes are live."""

    # ------------------------------------------------------------ out of the journal

    def load_goal(self, row: Mapping[str, Any]) -> None:
        """How far the run was to go."""
        self._stage, self._rounds_wanted = str(row["stage"]), int(row["rounds_wanted"])
        self._finishing, self._stopping = bool(row["finishing"]), bool(row.get("stopping"))

    def load_placement(self, generation: int, placement: Placement, instead_of: Placement | None = None) -> None:
        """Where it lived, and before that, if its nodes were about to move by choice."""
        self.generation = self._set_up_generation = generation
        self._instead_of = instead_of
        self._place(placement)

    def load_progress(
        self,
        activations: Sequence[Mapping[str, Any]],
        commits: Sequence[tuple[int, str, tuple[float, ...], bool, bool]],
    ) -> None:
        """What it had reached: the initial state; of every commit in order round, hash, maxima, whether it made a
        global or consensus model, and whether it was evaluated."""
        assert self._ledger is not None
        for row in activations:
            self._ledger.samples = {int(node): int(count) for node, count in row.get("samples", ())}
            if int(row["round"]) == 0:
                self._ledger.begin([row["absmax"]], str(row["head_hash"]), int(row["total_weight"]))
        for commit in commits:
            self._ledger.remember(*commit)

    def load_participants(self, number: int, participants: str, late: str) -> None:
        """Out of the journal, in hexadecimal, where it was not the rule that decided: who takes part in a round, and
        who does not because of being late."""
        self._quorum.decide(number, bytes.fromhex(participants), nodes_of(bytes.fromhex(late)))

    def load_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Out of the journal, in order: what a round has measured."""
        self._quorum.note(number, metrics)

    def load_members(self, first: int, nodes: str) -> None:
        """Out of the journal: who may take part from a round on, in hexadecimal."""
        self._quorum.change(first, nodes_of(bytes.fromhex(nodes)))

    def load_graphs(
        self, decided: Mapping[int, Graph], activations: Mapping[int, int], relinks: Mapping[int, int]
    ) -> None:
        """Out of the journal: graphs by the round that decided on them, and by generation the round that nodes were
        set up after, or whose graph they were to be linked by."""
        for number in sorted(decided):
            self.graphs.decide(number, decided[number])
        self.graphs.set_up(activations.get(self.generation, 0))
        newest = max(relinks, default=0)
        if newest > self.generation:
            self.generation = newest
            self.graphs.was_asked(relinks[newest])
        self._forget_graphs()

    # ------------------------------------------------------------ who takes part

    def change_nodes(self, effects: Effects, now: Now, add: Sequence[str], remove: Sequence[str]) -> None:
        """Other nodes may take part from the next round on that is not open yet.

        Raises:
            RunError: F005 if the run is queued or over, or cannot go on with these nodes.
            RoutingError: P012 no such node.
        """
        ledger = self._ledger
        if self.terminal or ledger is None:
            raise RunError("F005", f"run {self.run_id[:8]} is {self.info.status}: its nodes cannot be changed now")
        added, removed = ({self.node_index(name) for name in names} for names in (add, remove))
        settled = ledger.open is not None or self._quorum.is_decided(ledger.round + 1)
        first = max(self.info.rounds_done, ledger.round + settled) + 1
        before = self._quorum.members(first)
        nodes = tuple(sorted((set(before) | added) - removed))
        self._quorum.require_possible(nodes)
        if nodes == before:
            return
        self._quorum.change(first, nodes)
        row = {"nodes": bitmap(nodes, len(self.submission.nodes)).hex()}
        effects.writes.append(Write("members", (self.run_id, first), row))
        text = f"from round {first} on {len(nodes)} nodes may take part"
        self.record.event(effects, now, "status", text)

    @property
    def _gone(self) -> set[str]:
        """The clusters that the next attempt is opened without."""
        return self._away | self._late

    def _can_do_without(self, gone: Collection[str]) -> bool:
        """Whether what comes next is possible without these clusters."""
        ledger = self._ledger
        if not gone or ledger is None or ledger.coordinator in gone:
            return not gone
        number = ledger.round + 1
        if number > self._rounds_wanted:
            # What is left needs the coordinator only; but a run that may go on later waits for all it will need.
            return self._stopping or self._quorum.exists
        return self._participants(number, gone) is not None

    @property
    def _excludes(self) -> bool:
        """Whether a lost cluster is done without at once."""
        return bool(self.config.get("on_cluster_loss") == "exclude")

    def _may_go_on(self, gone: set[str]) -> bool:
        """Whether the run can leave RECOVERING without these clusters: no state was lost, and enough nodes are left."""
        if self._lost_state or self._ledger is None or not self._ledger.total_weight:
            return False
        return self._can_do_without(gone)

    def _participants(self, number: int, gone: Collection[str]) -> bytes | None:
        assert self._ledger is not None
        return self._quorum.without(number, gone, fixed=bool(self._ledger.recorded(number)))

    def _decide(self, effects: Effects, now: Now, number: int, participants: bytes) -> None:
        """Write down who takes part where it is not who was chosen."""
        chosen = self._quorum.chosen(number)
        if participants == chosen:
            return
        self._quorum.decide(number, participants, self._quorum.owing(number, participants, self._late - self._away))
        gone = sorted(self._gone)
        row = {"participants": participants.hex(), "without": gone}
        if missed := self._quorum.lateness.missed(number):
            row["late"] = bitmap(missed, len(self.submission.nodes)).hex()
        effects.writes.append(Write("participants", (self.run_id, number), row))
        if self._told_gone != self._gone:
            # Once, not in every round until they are back.
            self._told_gone = self._gone
            there, all_of_them = self._quorum.count(participants), self._quorum.count(chosen)
            text = f"round {number} goes on without {', '.join(gone)}: {there} of {all_of_them} nodes take part"
            self.record.event(effects, now, "warning", text)

    def _drop_late(self, effects: Effects, now: Now) -> bool:
        """The deadline of an attempt has passed: another one without the late clusters, if it can do without them."""
        ledger = self._ledger
        if self.info.status != RUNNING or ledger is None or ledger.open is None:
            return False
        # The coordinator has to wait for the others; it is late itself only where it is the only one.
        late = self._pending.keys() - {ledger.coordinator}
        if not late or not self._can_do_without(self._gone | late):
            return False
        self._late |= late
        self._abort_open(effects)
        return self._next_round(effects, now)

    @property
    def _fate_of_late(self) -> str:
        return "counts in a later one" if self._quorum.lateness.weighs else "is dropped"

    def _tell_late(self, effects: Effects, now: Now, commit: Commit) -> None:
        """Say which late updates a new round has brought in, and which will not come any more."""
        for late in commit.late:
            nodes, age = len(nodes_of(late.nodes)), commit.round - late.round
            text = f"round {commit.round} has late updates of {nodes} nodes, of round {late.round}"
            self.record.event(effects, now, "warning", f"{text}: {age} behind, weight x {late.factor / IN_TIME:.3f}")
        for cluster, debt in sorted(self._quorum.lateness.given_up(commit.round).items()):
            text = f"{cluster} is too late: its updates of round {debt.round} are dropped"
            self.record.event(effects, now, "warning", text)

    def _abort_open(self, effects: Effects) -> None:
        """Void the open attempt, if there is one."""
        if self._ledger is None or self._ledger.open is None:
            return
        start, self._ledger.open = self._ledger.open.start, None
        if start.ahead is not None:
            self._in_vain = start.round + 1
        self._attempt_floor = max(self._attempt_floor, start.attempt)
        for cluster in self.clusters:
            effects.send(cluster, AbortAttempt(self.run_id, start.round, start.attempt))

    # ------------------------------------------------------------ rounds

    def _next_round(self, effects: Effects, now: Now) -> bool:
        """Open the next round, or the next attempt of the one that was open; False if too few can take part."""
        assert self._ledger is not None
        number = self._ledger.round + 1
        participants = self._participants(number, self._gone)
        if participants is None:
            return False
        self._told_gone &= self._gone
        self._decide(effects, now, number, participants)
        if self.graphs.is_due(number - 1):
            self._relink(effects, now, number - 1)
            return True
        draft = self._draft(number, participants)
        start = self._ledger.open_round(self._numbered(draft), now.monotonic_s, self._gone)
        self._opened_wall_s = now.wall_s
        self._ask_round(effects, now, start)
        return True

    def _draft(self, number: int, participants: bytes) -> StartRound:
        """What a round asks for, but for the state that it starts from."""
        assert self._ledger is not None
        nodes, lateness = frozenset(self._quorum.nodes(participants)), self._quorum.lateness
        late = lateness.late(number, nodes)
        return StartRound(
            run_id=self.run_id,
            generation=self.generation,
            round=number,
            attempt=1,
            parent_hash="",
            grid=(),
            total_weight=self._ledger.weight_in(participants, late),
            evaluate=self._evaluates(number),
            participants=participants,
            merge=self._merges(number),
            late=late,
            kept=lateness.kept(number, nodes),
            adapt=self._adapts(number),
            profile=self.submission.profile,
        )

    def _numbered(self, draft: StartRound) -> StartRound:
        """A draft with the number of its attempt, and with what is expected to come after the round.

        Where a cluster may have begun the round as something else, this is another attempt. A round that is tried
        again hands out nothing ahead: something has come in between already.
        """
        promised, attempt = self._promised, self._attempt_floor + 1
        if promised is not None and promised.round == draft.round and promised != draft:
            attempt = max(attempt, 2)
        if draft.round == self._in_vain:
            attempt = max(attempt, 2)
        following = self._promised = self._expected_after(draft.round) if attempt == 1 else None
        if following is None:
            return replace(draft, attempt=attempt)
        ahead = NextRound(following.total_weight, following.evaluate, following.participants)
        return replace(draft, ahead=ahead)

    def _expected_after(self, number: int) -> StartRound | None:
        """What will be asked for after a round unless something comes in between; None where something will or may, or
        where a cluster that has begun with it could not go back."""
        assert self._ledger is not None
        submission, config = self.submission, self.config
        if submission.flow != CENTRALIZED or submission.rows.anybody_keeps or self._quorum.lateness.weighs:
            return None
        may_be_the_last = config.get("target_accuracy") is not None and self._evaluates(number)
        depends = may_be_the_last or config.get("wave_condition") or submission.keep
        in_between = self._gone or self.leaving or self._returning or self._saves_after(number)
        in_between = in_between or self._may_move_after(number)
        if number >= self._rounds_wanted or depends or in_between:
            return None
        return self._draft(number + 1, self._quorum.chosen(number + 1))

    def _take_back(self) -> None:
        """Something comes between a round and what it has announced."""
        promised, self._promised = self._promised, None
        if promised is not None:
            self._in_vain = promised.round

    def _saves_after(self, number: int) -> bool:
        """Whether a checkpoint is due after a round."""
        return self.checkpoints.due(number, int(self.config.get("checkpoint_every") or 0))

    def _may_move_after(self, number: int) -> bool:
        """Whether another assignment is looked for once a round is committed."""
        period = int(self.config.get("clustering_period") or 0)
        return period > 0 and number > 0 and number % period == 0

    def _evaluates(self, number: int) -> bool:
        """Whether a round is evaluated: every so many are, and the last one.

        Nodes may go by what they measure: a round that was committed before does what it did then.
        """
        assert self._ledger is not None
        if self._ledger.recorded(number):
            return self._ledger.was_evaluated(number)
        every = int(self.config["evaluate_every"])
        return number >= self._rounds_wanted or (every > 0 and number % every == 0)

    def _merges(self, number: int) -> bool:
        """Whether a round of a hierarchy ends with one model for all groups: every so many do, and the last one.

        A round that was committed before does what it did then, whichever was to be the last at that time.
        """
        assert self._ledger is not None
        if self.submission.flow != HIERARCHICAL:
            return False
        if self._ledger.recorded(number):
            return self._ledger.made_model(number)
        return number >= self._rounds_wanted or number % int(self.config["global_every"]) == 0

    # ------------------------------------------------------------ graphs

    def _adapts(self, number: int) -> bool:
        """Whether a round decides on the graph of those after it, the last one too: it may be the last for now only."""
        if self.config.get("topology_adaptation_strategy", STATIC) == STATIC:
            return False
        return number % int(self.config["adaptation_period"]) == 0

    def _check_graph(self, cluster: str, report: RoundReport) -> None:
        """Raise P001 or T0xx unless a report of the open attempt has the graph that it should have, or none."""
        assert self._ledger is not None and self._ledger.open is not None
        decides = self._ledger.open.start.adapt and cluster == self._ledger.coordinator
        check_graph(cluster, report, decides, self.graphs.after(self._ledger.round), self.config)

    def _not_repeated(self, commit: Commit) -> IcrfError | None:
        """What is wrong with a round that was committed before and has another outcome now; None if it has none."""
        assert self._ledger is not None
        known = self._ledger.recorded(commit.round)
        if known != commit.model_hash:
            return differs(commit.round, known, commit.model_hash)
        if commit.round <= self.info.rounds_done and self.graphs.differs(commit.round, commit.graph):
            return graph_differs(commit.round)
        return None

    def _keep_graph(self, effects: Effects, commit: Commit, result: RoundResult) -> RoundResult:
        """Journal the graph that a new round has ended with, where it is another; the result says what changed."""
        before = self.graphs.after(commit.round - 1)
        if commit.graph is None or commit.graph == before:
            return result
        self.graphs.decide(commit.round, commit.graph)
        effects.writes.append(Write("graphs", (self.run_id, commit.round), graph_row(commit.graph)))
        matrices = [HybridAdjacencyMatrix.from_graph(graph) for graph in (before, commit.graph)]
        added, removed = changed_edges(*matrices)
        return replace(result, edges_added=added, edges_removed=removed)

    def _forget_graphs(self) -> None:
        """Drop the graphs of rounds that lie before the oldest checkpoint that is kept."""
        if len(self.checkpoints.durable) >= KEPT:
            self.graphs.forget(min(self.checkpoints.durable))

    def _relink(self, effects: Effects, now: Now, number: int) -> None:
        """Have all clusters take over the graph after a round, under a new generation, before the next one is opened.

        Asked again, after a recovery or by another mediator, it is the same generation: some may have it already.
        """
        if self.graphs.ask(number):
            self.generation += 1
            effects.writes.append(Write("relinks", (self.run_id, self.generation), {"round": number}))
        order = Relink(self.run_id, self.generation, self.graphs.after(number))
        self.record.waits(effects, now, f"the graph after round {number} on {', '.join(self.clusters)}", quiet=True)
        self._ask(effects, now, dict.fromkeys(self.clusters, order), float(self.config["round_deadline_s"]))

    # ------------------------------------------------------------ the end

    def _last_round(self) -> int:
        """The round after which the run can end soonest with a model."""
        ledger, done = self._ledger, self.info.rounds_done
        start = ledger.open.start if ledger and ledger.open else None
        last = max(done, start.round if start else done)
        opened = start is not None and start.round == last and start.merge
        merged = opened or (ledger is not None and ledger.made_model(last))
        return last if self.submission.flow != HIERARCHICAL or merged or not last else last + 1

    def _ask_round(self, effects: Effects, now: Now, start: StartRound) -> None:
        assert self._ledger is not None and self._ledger.open is not None
        orders = dict.fromkeys(self._ledger.open.clusters, start)
        self._ask(effects, now, orders, float(self.config["round_deadline_s"]))

    def _result(self, now: Now, commit: Commit) -> RoundResult:
        """A round that has just been committed, as users see it."""
        ids = [node.id for node in self.submission.nodes] if commit.late else []
        result = commit.result(self.generation, max(0.0, now.wall_s - self._opened_wall_s), ids)
        if not self.submission.profile:
            return result
        working_s = now.monotonic_s - commit.opened_s
        handled_s, self._mediator_s = self._mediator_s, 0.0
        profile = RoundProfile(working_s, *self.record.preparing.take(), commit.profiles, handled_s)
        return replace(result, profile=profile)

    def handled(self, seconds: float) -> None:
        """The mediator was busy for so long with what a cluster reported of a round."""
        self._mediator_s += seconds

    def commit_took(self, number: int, seconds: float) -> None:
        """The commit of a round took so long to become durable; what was decided with it was told only then."""
        self.record.commit_took(number, seconds)
        if self._ledger is not None and self._ledger.open is not None:
            self._ledger.open.opened_s += seconds

    def _checkpoint(self, effects: Effects) -> None:
        assert self._ledger is not None and self.placement is not None
        self._take_back()
        # Agents do several things at once: what is under way may come before it or after.
        self._called = bool(self._open_calls)
        clusters = self.placement.stateful(self.submission)
        self.checkpoints.begin(self._ledger.round, clusters, self._set_up_generation, self.placement)
        for cluster in clusters:
            effects.send(cluster, SaveCheckpoint(self.run_id, self.generation, self._ledger.round))

    def _store(self, effects: Effects, now: Now) -> None:
        assert self._ledger is not None
        if self._storing:
            return
        self._storing = True
        self._take_back()
        coordinator = self._ledger.coordinator
        self.record.waits(effects, now, f"the model from {coordinator}", quiet=True)
        order = StoreModel(self.run_id, self.generation, self._ledger.round)
        self._ask(effects, now, {coordinator: order}, self._activate_s)
