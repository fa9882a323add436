"""Hosts of tally nodes: what the processes of a simulated cluster hold, and what they do in each phase of a round.

A phase is a function of (manager, run, host, start) that takes no time; the cluster decides when it happens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icrf.errors import InternalError, NodeError, RunError, WeightsError
from icrf.exchange import CONSENSUS, GATHERED, MERGED, MODEL, OF_A_CLUSTER, PARTIAL, UPDATE, Transfer
from icrf.ports import ModelFile, PhaseReport
from icrf.protocol import Activate, Activated, Graph, Relink, StartRound, nodes_of
from icrf.staleness import late_nodes, scaled
from icrf.testing.sim_tally import Tally, Vector, absmax, digest, total
from icrf_agent.host_late import EarlierModels, row_for
from icrf_agent.host_state import VersionedState
from icrf_agent.postings import Posting
from icrf_agent.topology_manager import HybridTopologyManager


class References:
    """The object store: an array is its own reference."""

    def put(self, array: Vector, kind: str) -> Vector:
        return array

    def get(self, reference: Any) -> Vector:
        found: Vector = reference[0] if isinstance(reference, list) else reference
        return found


@dataclass
class SimHost:
    """The process of some nodes: takes one call at a time, may die, comes back empty."""

    nodes: tuple[int, ...]
    life: int = 1
    generation: int = 0
    state: VersionedState[Vector] | None = None
    graph: Graph | None = None
    earlier: EarlierModels = field(default_factory=EarlierModels)
    consensus: tuple[int, Vector] | None = None
    clear_s: float = 0.0

    def die(self) -> None:
        """Everything it held is gone; another life begins."""
        self.life += 1
        self.generation, self.state, self.consensus, self.clear_s = 0, None, None, 0.0


@dataclass
class SimRun:
    """A run on this cluster."""

    activation: Activate
    tally: Tally
    hosts: list[SimHost]
    lives: list[int] = field(default_factory=list)
    position: tuple[int, int] = (0, 0)
    ahead: tuple[int, int] = (0, 0)
    active: bool = False

    def keepers(self, host: SimHost) -> tuple[int, ...]:
        """The nodes of a host whose states rounds start from."""
        return tuple(n for n in host.nodes if n in self.tally.keepers)

    def keeps_state(self, host: SimHost) -> bool:
        return bool(self.keepers(host))

    @property
    def model_host(self) -> SimHost:
        return next(h for h in self.hosts if self.tally.keepers[0] in h.nodes) if self.has_server else self.hosts[0]

    @property
    def has_server(self) -> bool:
        return self.tally.centralized or self.tally.hierarchy is not None

    @property
    def makers(self) -> list[SimHost]:
        """The hosts that make new states."""
        return [host for host in self.hosts if self.keeps_state(host)]


Phase = Callable[[HybridTopologyManager, SimRun, SimHost, StartRound], PhaseReport | None]


# ---------------------------------------------------------------- phases


def publish_model(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> None:
    """Publish the committed model, or those of the groups, to the participants."""
    assert host.state is not None
    tally = run.tally
    if tally.hierarchy:
        for aggregator, row in zip(run.keepers(host), host.state.rebase(start), strict=True):
            manager.publish_many(_posting(start, MODEL, (aggregator,), row, tally.hierarchy.members[aggregator]))
        return
    model = host.state.rebase(start)
    host.earlier.enter(start, host.state, len(model))
    _post_model(manager, run, host, start, model)


def _post_model(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound, model: Vector) -> None:
    tally = run.tally
    recipients = tuple(i for i in tally.chosen(start.round) if i != tally.aggregator)
    sent = host.earlier.sent(start, model)
    manager.publish_many(_posting(start, MODEL, (tally.aggregator,), sent, recipients))


def train(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> PhaseReport:
    """Make the contributions of a host's nodes and publish them."""
    tally = run.tally
    chosen = nodes_of(start.participants) or tally.participants
    local = tuple(n for n in host.nodes if n in chosen)
    overflow: tuple[int, ...] = ()
    late = late_nodes(start.late)
    of_round = {n: late[n].round if n in late else start.round for n in local}
    if tally.hierarchy:
        if local and local[0] == chosen[0] and tally.overflows(start.round, start.grid):
            overflow = (0,)
        else:
            _train_groups(manager, tally, local, start)
    elif tally.centralized:
        if not local:
            return PhaseReport()
        postings = manager.collect(start.run_id, start.round, start.attempt, MODEL)
        if len(postings) != 1:
            raise InternalError("X001", f"round {start.round} has {len(postings)} global models")
        base = array_of(postings[0]).reshape(-1)[: tally.num_nodes + 2]
        made = total([tally.contribution(n, of_round[n], base) for n in local])
        weight = sum(scaled(tally.samples(n), n, late) for n in local)
        if local[0] == chosen[0] and tally.overflows(start.round, start.grid):
            overflow = (0,)
        else:
            manager.publish_many(_posting(start, PARTIAL, local, made, (tally.aggregator,), weight))
    else:
        assert host.state is not None
        rows = host.state.rebase(start)
        updates = [tally.update(n, start.round, rows[k]) for k, n in enumerate(host.nodes)]
        manager.publish_many(_posting(start, UPDATE, host.nodes, np.stack(updates)))
    losses = [tally.loss(n, of_round[n]) for n in local]
    sums = {"train_loss": (sum(n for n, _ in losses), sum(w for _, w in losses))} if losses else {}
    return PhaseReport(nodes=local, overflow=overflow, metric_sums=sums)


def _train_groups(manager: HybridTopologyManager, tally: Tally, local: Sequence[int], start: StartRound) -> None:
    """Publish what the members of groups on a host hand on: a sum per group, or one where the groups are merged."""
    assert tally.hierarchy is not None
    models = {p.senders[0]: array_of(p) for p in manager.collect(start.run_id, start.round, start.attempt, MODEL)}
    everything: list[Vector] = []
    for aggregator, group in tally.hierarchy.members.items():
        members = tuple(n for n in local if n in group)
        if members and aggregator not in models:
            # As on a real host: the room may be that of a later generation, in which nothing was posted yet.
            raise InternalError("X001", f"no model of node {aggregator} in round {start.round}")
        if members:
            made = tally.within(members, start.round, models[aggregator])
            everything += made
            if not start.merge:
                manager.publish_many(_posting(start, PARTIAL, members, total(made), (aggregator,)))
    if start.merge and everything:
        manager.publish_many(_posting(start, CONSENSUS, tuple(local), total(everything)))


def _aggregate_groups(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> PhaseReport:
    """The next state of every group that is kept here, or, at the root, the one of all."""
    tally, at = run.tally, (start.run_id, start.round, start.attempt)
    assert host.state is not None and tally.hierarchy is not None
    if start.merge:
        root, *others = tally.hierarchy.aggregators
        model = total([array_of(p) for p in manager.collect(*at, CONSENSUS)])
        manager.publish_many(_posting(start, MERGED, (root,), model, tuple(others)))
        metrics = {"accuracy": start.round / tally.rounds} if start.evaluate else {}
        return PhaseReport(metrics=metrics, model_hash=digest(model).hex())
    found = manager.collect(*at, PARTIAL)
    rows = [total([array_of(p) for p in found if p.recipients == (a,)]) for a in run.keepers(host)]
    return _stage_groups(host, rows, start)


def install(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> PhaseReport:
    """Take over what all groups were merged into."""
    (posting,) = manager.collect(start.run_id, start.round, start.attempt, MERGED)
    return _stage_groups(host, [run.tally.installed(a, array_of(posting)) for a in run.keepers(host)], start)


def _stage_groups(host: SimHost, rows: Sequence[Vector], start: StartRound) -> PhaseReport:
    assert host.state is not None
    host.state.rebase(start)
    host.state.stage(start, np.stack(rows))
    return PhaseReport(absmax=absmax(rows), state_hashes=b"".join(digest(row) for row in rows))


def aggregate(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> PhaseReport:
    """Merge the partials into the new model, or mix each node's neighbours, in node order."""
    tally = run.tally
    assert host.state is not None and host.graph is not None
    if tally.hierarchy:
        return _aggregate_groups(manager, run, host, start)
    if tally.centralized:
        partials = manager.collect(start.run_id, start.round, start.attempt, PARTIAL)
        weight = sum(p.weight for p in partials)
        if weight != start.total_weight:
            raise InternalError("X001", f"partials add up to weight {weight}, expected {start.total_weight}")
        model = total([host.state.rebase(start), *map(array_of, partials)])
        host.state.stage(start, model)
        if (following := start.expected()) is not None:
            _post_model(manager, run, host, following, model)
        metrics = {"accuracy": start.round / tally.rounds} if start.evaluate else {}
        return PhaseReport(absmax=absmax([model]), metrics=metrics, model_hash=digest(model).hex())
    if 0 in host.nodes and tally.overflows(start.round, start.grid):
        return PhaseReport(overflow=(0,))
    rows: dict[int, Vector] = {}
    for posting in manager.collect(start.run_id, start.round, start.attempt, UPDATE):
        array = array_of(posting).reshape(len(posting.senders), -1)
        rows.update({sender: array[k] for k, sender in enumerate(posting.senders)})
    missing = {j for n in host.nodes for j in (n, *tally.neighbours(host.graph)[n])} - rows.keys()
    if missing:
        raise InternalError("X001", f"updates of nodes {sorted(missing)} did not arrive")
    state = np.stack([tally.mix(n, rows, host.graph) for n in host.nodes])
    if start.evaluate:
        manager.publish_many(_posting(start, CONSENSUS, host.nodes, state.sum(axis=0)))
    if start.adapt and run.activation.rows.gathered:
        manager.publish_many(_posting(start, GATHERED, host.nodes, np.array(tally.told(list(state)), np.int64)))
    host.state.rebase(start)
    host.state.stage(start, state)
    return PhaseReport(absmax=absmax(list(state)), state_hashes=b"".join(digest(row) for row in state))


def evaluate(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> PhaseReport:
    """Make the consensus model."""
    postings = manager.collect(start.run_id, start.round, start.attempt, CONSENSUS)
    model = total([array_of(p) for p in postings])
    host.consensus = (start.round, model)
    return PhaseReport(metrics={"accuracy": start.round / run.tally.rounds}, model_hash=digest(model).hex())


def adapt(manager: HybridTopologyManager, run: SimRun, host: SimHost, start: StartRound) -> PhaseReport:
    """Decide on the graph of the rounds to come."""
    assert host.graph is not None
    postings = manager.collect(start.run_id, start.round, start.attempt, GATHERED)
    told = np.concatenate([np.zeros(0, np.int64), *(array_of(p).reshape(-1) for p in postings)])
    wanted = run.tally.num_nodes * run.activation.rows.gathered
    if len(told) != wanted:
        raise InternalError("X001", f"nodes have told {len(told)} numbers of {wanted}")
    return PhaseReport(graph=run.tally.next_graph(host.graph, start.round, int(told.sum())))


def relink(host: SimHost, order: Relink) -> None:
    """Take over another graph, under a new generation."""
    require_nodes(host)
    host.graph, host.generation = order.graph, order.generation


def posted(manager: HybridTopologyManager, start: StartRound, transfer: Transfer) -> tuple[Posting, Vector]:
    """What a transfer carries."""
    key = (start.run_id, start.round, start.attempt, transfer.kind)
    if transfer.kind in OF_A_CLUSTER:
        posting = manager.cluster_posting(*key, transfer.recipients or None)
        return posting, array_of(posting).reshape(-1)
    for posting in manager.collect(*key):
        if transfer.sender in posting.senders:
            if transfer.kind == MODEL:
                return posting, np.atleast_2d(array_of(posting))[max(0, row_for(start, transfer.recipients))]
            row = posting.senders.index(transfer.sender)
            return posting, array_of(posting).reshape(len(posting.senders), -1)[row]
    raise RunError("F005", f"node {transfer.sender} has posted no {transfer.kind} in round {start.round}")


# ---------------------------------------------------------------- states


def set_up(run: SimRun, host: SimHost, states: Mapping[int, Vector]) -> list[Vector]:
    """Build the nodes of a host, from `states` after the first round; the states that it holds."""
    tally, order = run.tally, run.activation
    host.consensus, host.state = None, None
    held: list[Vector] = []
    if keys := run.keepers(host):
        missing = [n for n in keys if n not in states] if order.restore_round else []
        if missing:
            raise WeightsError("W010", f"the state of node {missing[0]} is missing", place="checkpoint")
        held = [states[n] if order.restore_round else tally.initial() for n in keys]
        host.state = VersionedState(held[0] if tally.centralized else np.stack(held), order.restore_round)
        host.earlier = EarlierModels({-1 - key: state for key, state in states.items() if key < 0})
    host.generation, host.graph = order.generation, order.graph
    return held


def activated(run: SimRun, parts: Sequence[Sequence[Vector]]) -> Activated:
    """What a cluster reports of the states its hosts start from."""
    order, tally = run.activation, run.tally
    held = [row for part in parts for row in part]
    return Activated(
        order.run_id,
        order.generation,
        num_samples=tuple((n, tally.samples(n)) for h in run.hosts for n in h.nodes if n in tally.participants),
        absmax=absmax(held) if held else (),
        state_hashes=b"" if tally.centralized else b"".join(digest(row) for row in held),
        model_hash=digest(held[0]).hex() if held and tally.centralized else "",
    )


def state_rows(run: SimRun, host: SimHost, round_number: int) -> dict[str, list[int]]:
    """A host's part of a committed state, the model of an earlier round r under -1 - r; F006 if it is not here."""
    state = host.state.at(round_number) if host.state else None
    if state is None:
        raise RunError("F006", f"no state of round {round_number}")
    keys = run.keepers(host)
    earlier = {-1 - number: model for number, model in host.earlier.by_round.items()}
    rows = {**dict(zip(keys, np.atleast_2d(state), strict=True)), **earlier}
    return {str(n): [int(v) for v in row] for n, row in rows.items()}


def pack_states(parts: Sequence[Mapping[str, list[int]]], round_number: int) -> bytes:
    """A cluster's part of a committed state as bytes."""
    return json.dumps({"round": round_number, "rows": {n: row for part in parts for n, row in part.items()}}).encode()


def unpack_states(parts: Sequence[bytes], round_number: int) -> dict[int, Vector]:
    """The inverse of :func:`pack_states`, of several clusters; empty where no checkpoint is given."""
    states: dict[int, Vector] = {}
    for packed in map(json.loads, parts):
        if packed["round"] != round_number:
            raise WeightsError("W010", f"checkpoint of round {packed['round']}, not {round_number}", place="checkpoint")
        states.update({int(n): np.array(row, np.int64) for n, row in packed["rows"].items()})
    return states


def model_file(run: SimRun, host: SimHost, round_number: int) -> ModelFile:
    """The global or consensus model of a round; F006 where there is none."""
    if run.has_server:
        # Of a hierarchy the root's, which is the first row of its host.
        state = host.state.at(round_number) if host.state else None
        model = None if state is None else np.atleast_2d(state)[0]
    else:
        model = host.consensus[1] if host.consensus and host.consensus[0] == round_number else None
    if model is None:
        raise RunError("F006", f"no model of round {round_number}")
    return ModelFile(np.asarray(model, np.int64).tobytes(), digest(model).hex())


# ---------------------------------------------------------------- small things


def array_of(posting: Posting) -> Vector:
    """The payload of a posting."""
    found: Vector = posting.reference[0] if isinstance(posting.reference, list) else posting.reference
    return found


def require_nodes(host: SimHost) -> None:
    """U003 for a host that came back empty."""
    if not host.generation:
        raise NodeError("U003", "this host was restarted and holds no nodes", place="host")


def split(nodes: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Contiguous groups whose sizes differ by one at most."""
    base, more = divmod(len(nodes), parts)
    sizes = [base + (k < more) for k in range(parts)]
    return [tuple(nodes[sum(sizes[:k]) : sum(sizes[: k + 1])]) for k in range(parts)]


def _posting(
    start: StartRound,
    kind: str,
    senders: tuple[int, ...],
    array: Vector,
    recipients: tuple[int, ...] | None = None,
    weight: int = 0,
) -> Posting:
    at = (start.run_id, start.generation, start.round, start.attempt)
    return Posting(*at, kind, senders, array, recipients, weight)
