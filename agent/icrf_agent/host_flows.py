"""What a host does in each phase of a round, for the two flows.

Centralized: every host trains its nodes from the one global model and publishes an exact partial sum; the host of
the aggregator merges all partials into the next global model. Decentralized: every host keeps its nodes' states,
publishes their updates, and mixes what their neighbours sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icrf.errors import InternalError, NodeError, WeightsError
from icrf.exchange import CONSENSUS, MODEL, PARTIAL, UPDATE
from icrf.federation.node import FederatedNode
from icrf.learning.layout import Layout
from icrf.ports import PhaseReport
from icrf.protocol import Activate, Activated, StartRound
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf.topology.mixing import MIXINGS, mixing_row
from icrf.update import ExactSum, exact_metric, weighted_mix
from icrf_agent.checkpoint import pack_model, pack_nodes, unpack_model, unpack_nodes
from icrf_agent.host_nodes import HostNodes
from icrf_agent.host_state import VersionedState
from icrf_agent.node_metrics import NodeMetrics
from icrf_agent.topology_manager import HybridTopologyManager, Posting, References

Array = np.ndarray[Any, Any]
MetricSums = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class HostTools:
    """What both flows work with.

    Attributes:
        by_node: what each node reports.
        kept: buffers for the life of the host: the first touch of a large buffer's pages takes longer than the sum.
    """

    activation: Activate
    nodes: HostNodes
    layout: Layout
    manager: HybridTopologyManager
    references: References
    by_node: NodeMetrics
    kept: dict[str, Any] = field(default_factory=dict)

    def posting(self, start: StartRound, kind: str, senders: Sequence[int], array: Array, **more: Any) -> Posting:
        """Put an array into the object store and describe it."""
        return Posting(
            start.run_id,
            start.generation,
            start.round,
            start.attempt,
            kind,
            tuple(senders),
            self.references.put(array),
            **more,
        )

    def collect(self, start: StartRound, kind: str) -> list[Posting]:
        """What was posted in this attempt."""
        return self.manager.collect(start.run_id, start.round, start.attempt, kind)

    def foreign_bytes(self, postings: Sequence[Posting], row_bytes: int) -> int:
        """Bytes of rows that hosts of the same cluster made elsewhere."""
        mine, here = set(self.nodes.indices), self.activation.assignment
        cluster = here[self.nodes.indices[0]]
        rows = 0
        for posting in postings:
            local = [n for n in posting.senders if here[n] == cluster]
            if local and not mine.issuperset(local):
                rows += 1 if posting.kind in (MODEL, PARTIAL, CONSENSUS) else len(local)
        return rows * row_bytes

    def exact_sum(self, start: StartRound) -> ExactSum:
        """The host's one sum, emptied, on the attempt's grid; its last use is over."""
        total: ExactSum | None = self.kept.get("sum")
        if total is None:
            total = self.kept["sum"] = ExactSum(self.layout.sizes, start.grid, start.total_weight, self.layout.names)
        total.reset(start.grid, start.total_weight)
        return total

    @property
    def has_last_word(self) -> bool:
        """Whether any node of this host looks at new states itself."""
        return any(type(self.nodes.get(i)).aggregate is not FederatedNode.aggregate for i in self.nodes.indices)

    def merge(self, start: StartRound, postings: Sequence[Posting], expected_weight: int) -> ExactSum:
        """Merge partials; every participant must be in, once."""
        total = self.exact_sum(start)
        for posting in postings:
            array = self.references.get(posting.reference)
            total.merge(
                ExactSum.from_array(
                    array, posting.weight, self.layout.sizes, start.grid, start.total_weight, self.layout.names
                )
            )
        if total.weight != expected_weight:
            raise InternalError("X001", f"partials add up to weight {total.weight}, expected {expected_weight}")
        return total

    def train_node(self, index: int, sums: MetricSums) -> Array:
        """Train one node on the model that is loaded, and count its metrics; the live flat parameters."""
        metrics = self.nodes.measure(index, "train")
        weight = self.nodes.weight(index)
        for name, value in metrics.items():
            old = sums.get(f"train_{name}", (0, 0))
            with self.nodes.blamed(index):
                part = exact_metric(value, weight)
            sums[f"train_{name}"] = (old[0] + part, old[1] + weight)
        self.by_node.add(index, {f"train_{name}": value for name, value in metrics.items()})
        with self.nodes.blamed(index):
            return self.nodes.model.flat

    def last_word(self, index: int, state: Array) -> None:
        """Settle a node's new state, and let its own `aggregate` change it, where its class has one; in place."""
        self.layout.settle(state)
        node = self.nodes.get(index)
        if type(node).aggregate is FederatedNode.aggregate:
            return
        self.nodes.model.load(state)
        shared = state[: self.layout.num_parameters]
        changed = self.nodes.call(index, "aggregate", shared)
        place = f"{node.id} on {self.nodes.cluster}, aggregate"
        if not isinstance(changed, np.ndarray):
            kind = type(changed).__name__
            raise NodeError("U002", f"{node.id}.aggregate returned {kind}", place=place, allowed="a NumPy array")
        with self.nodes.blamed(index):
            self.layout.check(changed, size=len(shared))
        bad = self.layout.first_nonfinite(changed)
        if bad:
            raise WeightsError("W020", f"{node.id}.aggregate made non-finite values in {bad}", place=place)
        np.copyto(shared, changed)
        self.layout.settle(shared)


class CentralizedFlow:
    """FedAvg through one aggregator; see the module's docstring."""

    def __init__(self, tools: HostTools, restored: bytes = b"") -> None:
        self._t = tools
        roles = [n.role.split("-") for n in tools.activation.nodes]
        self._aggregator = next(i for i, words in enumerate(roles) if "aggregate" in words)
        self._all_participants = tuple(i for i, words in enumerate(roles) if "train" in words)
        self._participants = tuple(i for i in tools.nodes.indices if i in set(self._all_participants))
        self._holds_model = self._aggregator in tools.nodes.indices
        flat, number = tools.nodes.initial, tools.activation.restore_round
        if self._holds_model and number:
            flat = unpack_model(tools.layout, restored, number)
        recycle = not tools.has_last_word
        self._state = VersionedState(flat, number, recycle=recycle) if self._holds_model else None
        self._seen: Array = flat

    def initial(self) -> Activated:
        """The state to start from, as far as this host holds it."""
        t = self._t
        if self._state is None:
            return Activated(t.activation.run_id, t.activation.generation)
        flat = self._state.committed
        return Activated(
            t.activation.run_id,
            t.activation.generation,
            absmax=t.layout.absmax(flat),
            model_hash=t.layout.model_sha256(flat),
        )

    def publish_model(self, start: StartRound) -> None:
        """Aggregator: publish the committed global model to all participants."""
        assert self._state is not None
        model = self._state.rebase(start)
        recipients = tuple(i for i in self._all_participants if i != self._aggregator)
        posting = self._t.posting(start, MODEL, (self._aggregator,), model, recipients=recipients)
        self._t.manager.publish_many(posting)

    def train(self, start: StartRound) -> PhaseReport:
        """Train this host's participants from the global model and publish their exact partial."""
        t = self._t
        if not self._participants:
            return PhaseReport()
        postings = t.collect(start, MODEL)
        if len(postings) != 1:
            raise InternalError("X001", f"round {start.round} has {len(postings)} global models")
        self._seen = t.references.get(postings[0].reference)
        total = t.exact_sum(start)
        sums: MetricSums = {}
        overflow: set[int] = set()
        for index in self._participants:
            t.nodes.get(index).context.model.load(self._seen)
            flat = t.train_node(index, sums)
            with t.nodes.blamed(index):
                overflow.update(total.add(flat, t.nodes.weight(index)))
        if not overflow:
            posting = t.posting(
                start, PARTIAL, self._participants, total.sums, recipients=(self._aggregator,), weight=total.weight
            )
            t.manager.publish_many(posting)
        return PhaseReport(
            nodes=self._participants,
            overflow=tuple(sorted(overflow)),
            metric_sums=sums,
            node_metrics=t.by_node.take(start),
            bytes_intra_cluster=t.foreign_bytes(postings, self._seen.nbytes),
        )

    def aggregate(self, start: StartRound) -> PhaseReport:
        """Aggregator: merge all partials into the new global model, and evaluate it when due."""
        if self._state is None:
            return PhaseReport()
        t = self._t
        postings = t.collect(start, PARTIAL)
        total = t.merge(start, postings, start.total_weight)
        self._state.rebase(start)
        model = total.mean(t.layout.dtype, out=self._state.spare())
        t.last_word(self._aggregator, model)
        self._state.stage(start, model)
        self._seen = model
        metrics: dict[str, float] = {}
        if start.evaluate:
            t.nodes.model.load(model)
            metrics = t.nodes.measure(self._aggregator, "evaluate", "test")
        return PhaseReport(
            absmax=t.layout.absmax(model),
            metrics=metrics,
            model_hash=t.layout.model_sha256(model),
            bytes_intra_cluster=t.foreign_bytes(postings, 8 * t.layout.num_parameters),
        )

    def evaluate(self, start: StartRound) -> PhaseReport:
        """Nothing: the aggregator has evaluated already."""
        return PhaseReport()

    def model_at(self, round_number: int) -> Array | None:
        """The committed global model of a round, where this host holds it."""
        return self._state.at(round_number) if self._state else None

    def checkpoint(self, round_number: int) -> bytes | None:
        """The model of a committed round as a checkpoint, where this host holds it."""
        flat = self.model_at(round_number)
        return None if flat is None else pack_model(self._t.layout, flat, round_number)

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that can be started from here; empty if this host keeps no state."""
        return self._state.rounds if self._state else ()

    def state_of(self, index: int) -> Array:
        """What a node sees between rounds: the newest global model this host has."""
        return self._state.latest if self._state and index == self._aggregator else self._seen


class DecentralizedFlow:
    """D-PSGD (Lian et al. 2017): local steps, then x_i = sum_j W_ij y_j over the neighbours and itself."""

    def __init__(self, tools: HostTools, restored: bytes = b"") -> None:
        self._t = tools
        t = tools
        self._rows = {index: k for k, index in enumerate(t.nodes.indices)}
        number = t.activation.restore_round
        if number:
            initial = unpack_nodes(t.layout, restored, number, t.nodes.indices)
        else:
            t.nodes.model.load(t.nodes.initial)
            initial = np.tile(t.nodes.model.row, (len(self._rows), 1))
        self._state = VersionedState(initial, number, recycle=not t.has_last_word)
        self._updates = np.empty_like(initial)
        adjacency = HybridAdjacencyMatrix.from_graph(t.activation.graph)
        weights = MIXINGS.get(t.nodes.config.mixing)(adjacency)
        self._mixing = {i: mixing_row(weights, i) for i in t.nodes.indices}
        self._consensus: tuple[int, int, Array] | None = None

    def initial(self) -> Activated:
        t = self._t
        state = self._state.committed
        return Activated(
            t.activation.run_id,
            t.activation.generation,
            absmax=self._absmax(state),
            state_hashes=b"".join(self._digest(row) for row in state),
        )

    def publish_model(self, start: StartRound) -> None:
        """Nothing: there is no global model."""

    def train(self, start: StartRound) -> PhaseReport:
        """Train this host's nodes from their own states and publish their updates to their neighbours."""
        t = self._t
        state = self._state.rebase(start)
        updates = self._updates
        sums: MetricSums = {}
        trained = []
        for index, k in self._rows.items():
            node = t.nodes.get(index)
            t.nodes.model.load(state[k])
            if node.is_train_node:
                t.train_node(index, sums)
                trained.append(index)
            with t.nodes.blamed(index):
                updates[k] = t.nodes.model.row
            bad = t.layout.first_nonfinite(updates[k])
            if bad:
                place = f"{node.id} on {t.nodes.cluster}"
                raise WeightsError(
                    "W020", f"{node.id} has non-finite values in {bad}", place=place, hint="lower the learning rate"
                )
        # What is private stays behind; without any this is no copy.
        sent = np.ascontiguousarray(updates[:, : t.layout.num_parameters])
        t.manager.publish_many(t.posting(start, UPDATE, tuple(self._rows), sent))
        return PhaseReport(nodes=tuple(trained), metric_sums=sums, node_metrics=t.by_node.take(start))

    def aggregate(self, start: StartRound) -> PhaseReport:
        """Mix what the neighbours sent, in node-index order; publish a consensus partial when evaluation is due."""
        t = self._t
        postings = t.collect(start, UPDATE)
        rows = self._neighbour_rows(postings)
        self._state.rebase(start)
        state, size = self._state.spare(), t.layout.num_parameters
        metrics: MetricSums = {}
        for index, k in self._rows.items():
            neighbours, weights = self._mixing[index]
            weighted_mix([rows[int(j)] for j in neighbours], [float(w) for w in weights], state[k, :size])
            state[k, size:] = self._updates[k, size:]
            t.last_word(index, state[k])
            if start.evaluate and t.layout.private:
                self._evaluate_own(index, state[k], metrics)
        overflow: set[int] = set()
        if start.evaluate:
            overflow = self._publish_consensus(start, state[:, :size])
        self._state.stage(start, state)
        needed = {int(j) for neighbours, _ in self._mixing.values() for j in neighbours} - set(self._rows)
        local = t.activation.assignment[t.nodes.indices[0]]
        crossing = sum(1 for j in needed if t.activation.assignment[j] == local)
        return PhaseReport(
            overflow=tuple(sorted(overflow)),
            absmax=self._absmax(state),
            state_hashes=b"".join(self._digest(row) for row in state),
            metric_sums=metrics,
            bytes_intra_cluster=crossing * state[0, :size].nbytes,
        )

    def _evaluate_own(self, index: int, row: Array, sums: MetricSums) -> None:
        """Where models are private in part, a consensus is no model: each node evaluates its own, and all count one."""
        self._t.nodes.model.load(row)
        for name, value in self._t.nodes.measure(index, "evaluate", "test").items():
            old = sums.get(name, (0, 0))
            with self._t.nodes.blamed(index):
                sums[name] = (old[0] + exact_metric(value, 1), old[1] + 1)

    def _neighbour_rows(self, postings: Sequence[Posting]) -> dict[int, Array]:
        needed = {int(j) for neighbours, _ in self._mixing.values() for j in neighbours}
        rows: dict[int, Array] = {}
        for posting in postings:
            if needed.isdisjoint(posting.senders):
                continue
            array = self._t.references.get(posting.reference).reshape(len(posting.senders), -1)
            rows.update({sender: array[k] for k, sender in enumerate(posting.senders) if sender in needed})
        missing = [self._t.activation.nodes[j].id for j in sorted(needed - set(rows))]
        if missing:
            raise InternalError("X001", f"updates of {', '.join(missing[:5])} did not arrive")
        return rows

    def _publish_consensus(self, start: StartRound, state: Array) -> set[int]:
        total = self._t.exact_sum(start)
        overflow = {t for row in state for t in total.add(row, 1)}
        if not overflow:
            posting = self._t.posting(start, CONSENSUS, tuple(self._rows), total.sums, weight=total.weight)
            self._t.manager.publish_many(posting)
        return overflow

    def evaluate(self, start: StartRound) -> PhaseReport:
        """Merge the consensus partials of all clusters and evaluate the mean of all nodes."""
        t = self._t
        postings = t.collect(start, CONSENSUS)
        model = t.merge(start, postings, len(t.activation.nodes)).mean(t.layout.dtype)
        t.layout.settle(model)
        self._consensus = (start.round, start.attempt, model)
        metrics: dict[str, float] = {}
        if not t.layout.private:
            t.nodes.model.load(model)
            metrics = t.nodes.measure(t.nodes.indices[0], "evaluate", "test")
        return PhaseReport(
            metrics=metrics,
            model_hash=t.layout.model_sha256(model),
            bytes_intra_cluster=t.foreign_bytes(postings, 8 * t.layout.num_parameters),
        )

    def model_at(self, round_number: int) -> Array | None:
        """The consensus model of a round, where this host made one."""
        return self._consensus[2] if self._consensus and self._consensus[0] == round_number else None

    def checkpoint(self, round_number: int) -> bytes | None:
        """The states of this host's nodes after a committed round, where they are still here."""
        state = self._state.at(round_number)
        return None if state is None else pack_nodes({i: state[k] for i, k in self._rows.items()}, round_number)

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that can be started from here."""
        return self._state.rounds

    def state_of(self, index: int) -> Array:
        """The node's own newest state."""
        state: Array = self._state.latest[self._rows[index]]
        return state

    def _absmax(self, state: Array) -> tuple[float, ...]:
        rows = [self._t.layout.absmax(row) for row in state]
        return tuple(max(column) for column in zip(*rows, strict=True))

    @staticmethod
    def _digest(row: Array) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(row).data).digest()


Flow = CentralizedFlow | DecentralizedFlow
