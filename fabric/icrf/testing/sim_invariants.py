"""What must hold in every history, checked while it happens. The names I1, I4, ... are those of docs/reliability.md.

The checker sees only what crosses a boundary: what becomes durable, what is said, what clusters take in, what users are
told. It shares no code with what it checks, and knows what a fault-free run commits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icrf.errors import IcrfError
from icrf.ports import PayloadHeader, Write
from icrf.protocol import (
    COMPLETED,
    TERMINAL,
    AbortAttempt,
    Activate,
    Goodbye,
    Heartbeat,
    Register,
    Relink,
    Report,
    RoundReport,
    RunEvent,
    StartRound,
    nodes_of,
)
from icrf.testing.sim_tally import Tally
from icrf.testing.sim_world import World
from icrf_mediator.blobs import MemoryBlobs
from icrf_mediator.effects import Effects
from icrf_mediator.graphs import graph_of
from icrf_mediator.mediator import FederationMediator


@dataclass
class _Facts:
    """What is durable of one run."""

    tally: Tally | None = None
    status: str = ""
    generation: int = 0
    clusters: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()
    heads: list[str] = field(default_factory=list)
    without: dict[int, set[str]] = field(default_factory=dict)
    events: list[Mapping[str, Any]] = field(default_factory=list)
    watched: int = 0
    cancelled: bool = False


@dataclass
class _Owner:
    incarnation: str
    agent_id: str
    until_s: float


class Checker:
    """The invariants of one simulation.

    Args:
        world: told when one does not hold.
        lease_s: how long a registration or a heartbeat keeps a cluster.
    """

    def __init__(self, world: World, lease_s: float) -> None:
        self._world, self._lease_s = world, lease_s
        self._tallies: dict[str, Tally] = {}
        self._runs: dict[str, _Facts] = {}
        self._owners: dict[str, _Owner] = {}
        self._reports: set[tuple[str, int, int, int, str]] = set()
        self._aborted: set[tuple[str, int, int, int]] = set()
        self._started: dict[tuple[str, int, int], int] = {}
        self._here: dict[tuple[str, str], tuple[int, tuple[int, int]]] = {}
        self.blobs = MemoryBlobs()

    def know(self, tally: Tally) -> None:
        """A federation that will be submitted."""
        self._tallies[tally.submission.client_request_id] = tally

    def require(self, holds: bool, text: str) -> None:
        """Fail the seed unless `holds`."""
        if not holds:
            self._world.fail(text)

    # ------------------------------------------------------------ ownership (I4)

    def registered(self, register: Register, refusal: IcrfError | None, now_s: float) -> None:
        """The mediator has answered a registration; before that it ends leases that ran out."""
        self.ticked(now_s)
        owner = self._owners.get(register.cluster)
        if refusal is not None:
            return
        free = owner is None or owner.agent_id == register.agent_id or owner.until_s <= now_s
        self.require(free, f"I4: {register.cluster} was given to {register.incarnation} while {owner} held it")
        self._owners[register.cluster] = _Owner(register.incarnation, register.agent_id, now_s + self._lease_s)

    def ticked(self, now_s: float) -> None:
        """Leases that ran out end at a tick, or at a registration."""
        self._owners = {name: owner for name, owner in self._owners.items() if owner.until_s > now_s}

    def reported(self, cluster: str, incarnation: str, report: Report, effects: Effects) -> None:
        """The mediator has decided about a report."""
        owner = self._owners.get(cluster)
        if owner is None or owner.incarnation != incarnation:
            heard = bool(effects.writes or effects.events)
            return self.require(not heard, f"I4: {incarnation} does not own {cluster} and was heard: {report}")
        if isinstance(report, Heartbeat):
            owner.until_s = self._world.now_s + self._lease_s
        elif isinstance(report, Goodbye):
            del self._owners[cluster]
        elif isinstance(report, RoundReport) and not report.error_json and not report.overflow:
            self._reports.add((report.run_id, report.generation, report.round, report.attempt, cluster))

    # ------------------------------------------------------------ the journal

    def durable(self, effects: Effects) -> None:
        """These writes were applied."""
        for write in effects.writes:
            facts = self._runs.setdefault(str(write.key[0]), _Facts())
            handle = getattr(self, f"_on_{write.table}", None)
            if handle is not None:
                handle(facts, write)

    def _on_submissions(self, facts: _Facts, write: Write) -> None:
        facts.tally = self._tallies[str(write.row["client_request_id"])]
        facts.heads = [facts.tally.expected(0).head]

    def _on_runs(self, facts: _Facts, write: Write) -> None:
        status = str(write.row["status"])
        self.require(facts.status not in TERMINAL, f"I16: run {write.key[0]} went from {facts.status} to {status}")
        facts.status = status
        if status == COMPLETED:
            done, planned = len(facts.heads) - 1, int(write.row["rounds_planned"])
            self.require(done == planned, f"I16: COMPLETED with {done} of {planned} rounds")
            self._check_model(facts, str(write.key[0]), str(write.row["model_sha256"]))

    def _on_assignments(self, facts: _Facts, write: Write) -> None:
        generation = int(write.key[1])
        self.require(generation > facts.generation, f"I4: generation {generation} after {facts.generation}")
        facts.generation, facts.clusters = generation, tuple(write.row["clusters"])
        assert facts.tally is not None
        facts.tally.place(write.row["assignment"])
        homes = tuple(facts.clusters[k] for k in write.row["assignment"])
        config = facts.tally.config
        may_move = config["on_cluster_loss"] == "reassign" or config.get("clustering_period")
        self.require(bool(may_move) or facts.homes in ((), homes), f"I4: nodes moved in generation {generation}")
        for node, pinned in config.get("placement", {}).items():
            home = homes[[n.id for n in facts.tally.submission.nodes].index(node)]
            self.require(home == pinned, f"I4: {node}, pinned to {pinned}, lives on {home}")
        facts.homes = homes

    def _on_relinks(self, facts: _Facts, write: Write) -> None:
        generation = int(write.key[1])
        self.require(generation > facts.generation, f"I4: generation {generation} after {facts.generation}")
        facts.generation = generation

    def _on_graphs(self, facts: _Facts, write: Write) -> None:
        number = int(write.key[1])
        assert facts.tally is not None
        same = graph_of(write.row) == facts.tally.graph_after(number)
        self.require(same, f"I1: round {number} decided on another graph than without faults")

    def _on_attempts(self, facts: _Facts, write: Write) -> None:
        run_id, number, attempt, cluster = write.key
        key = (str(run_id), facts.generation, int(number), int(attempt), str(cluster))
        self.require(facts.status not in TERMINAL, f"I6: a report was taken after {facts.status}: {key}")
        self.require(key in self._reports, f"I6: a report of another generation was taken: {key}")

    def _on_commits(self, facts: _Facts, write: Write) -> None:
        run_id, number, row = str(write.key[0]), int(write.key[1]), write.row
        tally = facts.tally
        assert tally is not None
        self.require(facts.status not in TERMINAL, f"I6: round {number} was committed after {facts.status}")
        self.require(number == len(facts.heads), f"I7: round {number} was committed after {len(facts.heads) - 1}")
        self.require(row["parent_sha256"] == facts.heads[-1], f"I7: parent of round {number} is another state")
        attempt = (facts.generation, number, int(row["attempt"]))
        self.require(row["generation"] == facts.generation, f"I6: round {number} of a fenced generation")
        self.require((run_id, *attempt) not in self._aborted, f"I6: aborted attempt {attempt} was committed")
        for cluster in set(facts.clusters) - facts.without.get(number, set()):
            here = (run_id, *attempt, cluster) in self._reports
            self.require(here, f"I6: round {number} was committed without {cluster}'s report of attempt {attempt}")
        self.require(row["participants_bitmap"] == tally.bitmap(number).hex(), f"I1: participants of round {number}")
        self.require(
            row["model_sha256"] == tally.expected(number).head,
            f"I1: round {number} has another state than without faults",
        )
        late = {tally.submission.nodes[node].id: age for node, age in tally.ages(number).items()}
        self.require(row["staleness"] == late, f"I1: late in round {number}: {row['staleness']}, not {late}")
        loss = row["metrics"].get("train_loss")
        self.require(loss == tally.expected_loss(number), f"I1: loss of round {number} is {loss}")
        facts.heads.append(str(row["model_sha256"]))

    def _on_participants(self, facts: _Facts, write: Write) -> None:
        number, tally = int(write.key[1]), facts.tally
        assert tally is not None
        found = int.from_bytes(bytes.fromhex(str(write.row["participants"])), "little")
        nodes = [i for i in range(tally.num_nodes) if found >> i & 1]
        self.require(number == len(facts.heads), f"I7: participants of round {number} after {len(facts.heads) - 1}")
        self.require(set(nodes) <= set(tally.chosen(number)), f"I1: strangers take part in round {number}: {nodes}")
        self.require(len(nodes) >= tally.config["min_nodes"], f"I1: only {nodes} take part in round {number}")
        missed = nodes_of(bytes.fromhex(str(write.row.get("late", ""))))
        self.require(tally.weighs or not missed, f"I1: {missed} are late in round {number}")
        self.require(not set(missed) & set(nodes), f"I1: late nodes take part in round {number}: {nodes}, {missed}")
        facts.without.setdefault(number, set()).update(write.row["without"])
        tally.decide(number, nodes, missed)

    def _on_checkpoints(self, facts: _Facts, write: Write) -> None:
        for artifact in write.row["artifacts"].values():
            self._read(str(write.key[0]), str(artifact))

    def _on_events(self, facts: _Facts, write: Write) -> None:
        seq = int(write.key[1])
        self.require(seq == len(facts.events) + 1, f"I5: event {seq} was written after {len(facts.events)}")
        facts.events.append(write.row)

    def _check_model(self, facts: _Facts, run_id: str, sha256: str) -> None:
        tally = facts.tally
        assert tally is not None
        model = np.frombuffer(self._read(run_id, "model.safetensors"), np.int64)
        wanted = tally.expected(tally.rounds)
        if tally.centralized or tally.hierarchy:
            wrong = {i: int(model[i]) for i in tally.participants if model[i] != tally.times(i)}
            self.require(not wrong, f"I1: in {tally.rounds} rounds these nodes were counted otherwise: {wrong}")
        self.require(bool((model == wanted.model).all()), "I8: the final model is another one than without faults")

    def _read(self, run_id: str, artifact: str) -> bytes:
        try:
            return b"".join(self.blobs.read(run_id, artifact))
        except IcrfError as error:
            self._world.fail(f"I9: the journal names a blob that does not exist: {error}")
            raise

    # ------------------------------------------------------------ what is said

    def answered(self, effects: Effects) -> None:
        """These instructions were sent."""
        # Two clusters that are lost at once make two attempts; who takes part is decided for the last.
        asked = [order for _, order in effects.sends if isinstance(order, StartRound)]
        last = {order.run_id: order.attempt for order in sorted(asked, key=lambda order: order.attempt)}
        for _, instruction in effects.sends:
            if isinstance(instruction, AbortAttempt):
                position = (instruction.run_id, instruction.round, instruction.attempt)
                if position in self._started:
                    self._aborted.add((instruction.run_id, self._started[position], *position[1:]))
            elif isinstance(instruction, StartRound):
                facts, number = self._runs[instruction.run_id], instruction.round
                self._started[instruction.run_id, number, instruction.attempt] = instruction.generation
                self.require(number <= len(facts.heads), f"I7: round {number} starts after {len(facts.heads) - 1}")
                self.require(instruction.parent_hash == facts.heads[number - 1], f"I7: parent of round {number}")
                self.require(instruction.generation == facts.generation, f"I6: round {number} of a fenced generation")
                weight = facts.tally.weight(number) if facts.tally and facts.tally.centralized else 0
                if instruction.attempt == last[instruction.run_id]:
                    self.require(weight in (0, instruction.total_weight), f"I1: round {number} does not weigh {weight}")

    def restarted(self, core: FederationMediator) -> None:
        """Another life of the mediator has read the journal."""
        self._owners = {}
        for run_id, facts in self._runs.items():
            self._agrees(core, run_id, facts)

    def _agrees(self, core: FederationMediator, run_id: str, facts: _Facts) -> None:
        try:
            info = core.get(run_id)
        except IcrfError as error:
            return self._world.fail(f"I5: run {run_id} is gone: {error}")
        self.require(info.status == facts.status, f"I16: {info.status} is shown, {facts.status} is durable")
        done = max(0, len(facts.heads) - 1)
        self.require(info.rounds_done == done, f"I16: {info.rounds_done} rounds are shown, {done} durable")
        seen = len(core.events(run_id)[1] or ())
        self.require(seen == len(facts.events), f"I5: {seen} events are shown, {len(facts.events)} durable")

    # ------------------------------------------------------------ what users see (I5)

    def submitted(self, run_id: str) -> None:
        """The user was told that a run is accepted."""
        self.require(run_id in self._runs, f"I5: run {run_id} was acknowledged and is not durable")

    def cancelled(self, run_id: str, status: str) -> None:
        """The user was told that a run is cancelled, or had ended."""
        self.require(status in TERMINAL, f"I6: cancelled, and it is {status}")
        self.require(self._runs[run_id].status == status, f"I5: {status} was acknowledged and is not durable")

    def watched(self, run_id: str, event: RunEvent) -> None:
        """A watcher was shown an event."""
        facts = self._runs[run_id]
        facts.watched += 1
        self.require(event.seq == facts.watched, f"I5: a watcher saw event {event.seq} after {facts.watched - 1}")
        self.require(event.seq <= len(facts.events), f"I5: event {event.seq} was shown and is not durable")
        row = facts.events[event.seq - 1]
        same = (row["kind"], row["text"], row["status"]) == (event.kind, event.text, event.status)
        self.require(same, f"I5: event {event.seq} was shown otherwise than it is durable")

    # ------------------------------------------------------------ clusters (I6)

    def activating(self, cluster: str, order: Activate) -> None:
        """A cluster sets up a run under a generation."""
        generation, _ = self._here.get((cluster, order.run_id), (0, (0, 0)))
        self.require(order.generation >= generation, f"I4: {cluster} goes back to generation {order.generation}")
        self._here[cluster, order.run_id] = (order.generation, (0, 0))

    def relinking(self, cluster: str, order: Relink) -> None:
        """A cluster links the nodes of a run anew, under a new generation."""
        generation, position = self._here[cluster, order.run_id]
        self.require(order.generation >= generation, f"I4: {cluster} goes back to generation {order.generation}")
        self._here[cluster, order.run_id] = (order.generation, position)

    def began(self, cluster: str, start: StartRound) -> None:
        """A cluster begins an attempt."""
        generation, position = self._here[cluster, start.run_id]
        self.require(start.generation == generation, f"I6: {cluster} begins a round of generation {start.generation}")
        self._here[cluster, start.run_id] = (generation, max(position, (start.round, start.attempt)))

    def took_in(self, cluster: str, header: PayloadHeader) -> None:
        """A cluster accepted a payload."""
        generation, position = self._here.get((cluster, header.run_id), (0, (0, 0)))
        self.require(header.generation == generation, f"I2: {cluster} at generation {generation} accepted {header}")
        fresh = (header.round, header.attempt) >= position
        self.require(fresh, f"I2: {cluster} at {position} accepted {header}")

    # ------------------------------------------------------------ the end

    def ended(self, core: FederationMediator, cancelled: set[str]) -> dict[str, str]:
        """All runs have ended; their statuses by request id."""
        found: dict[str, str] = {}
        for run_id, facts in sorted(self._runs.items()):
            assert facts.tally is not None
            self._agrees(core, run_id, facts)
            info, request = core.get(run_id), facts.tally.submission.client_request_id
            # One whose pins fit no cluster when its turn comes, before it was ever placed, ends with that.
            impossible = bool(facts.tally.config.get("placement")) and facts.generation == 0
            wanted = info.status == COMPLETED or request in cancelled or impossible
            self.require(
                wanted and info.status in TERMINAL, f"I12: run {run_id} ended {info.status}: {info.error_json}"
            )
            found[request] = info.status
        return found
