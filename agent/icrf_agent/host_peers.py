"""What a host does in each phase of a round without a server: every host keeps its nodes' states, publishes their
updates, and mixes what their neighbours sent."""

from __future__ import annotations

from typing import Any

import numpy as np

from icrf.errors import WeightsError
from icrf.exchange import CONSENSUS, UPDATE
from icrf.ports import PhaseReport
from icrf.protocol import Activated, StartRound
from icrf.topology import Gossip, mixing_matrix
from icrf.update import weighted_mix
from icrf_agent.checkpoint import pack_rows, unpack_rows
from icrf_agent.host_state import VersionedState
from icrf_agent.host_tools import HostTools, MetricSums, row_hashes

Array = np.ndarray[Any, Any]


class DecentralizedFlow:
    """D-PSGD (Lian et al. 2017): local steps, then x_i = sum_j W_ij y_j over the neighbours and itself.

    With push-sum (a W whose columns only sum to 1) states are the z of :mod:`icrf.topology.gossip`, and the consensus
    model is their mean weighted by mass, which is the mean that is kept.
    """

    def __init__(self, tools: HostTools, restored: bytes = b"") -> None:
        self._t = tools
        t = tools
        self._rows = {index: k for k, index in enumerate(t.nodes.indices)}
        number = t.activation.restore_round
        if number:
            names = [str(i) for i in t.nodes.indices]
            initial = unpack_rows(t.layout, restored, number, names, t.layout.row_size)
        else:
            t.nodes.model.load(t.nodes.initial)
            initial = np.tile(t.nodes.model.row, (len(self._rows), 1))
        self._state = VersionedState(initial, number, recycle=not t.has_last_word)
        self._updates = np.empty_like(initial)
        self._gossip = Gossip(mixing_matrix(t.activation.graph, t.nodes.config.mixing))
        self._needed = {int(j) for i in t.nodes.indices for j in self._gossip.neighbours(i)}
        self._consensus: tuple[int, int, Array] | None = None

    def initial(self) -> Activated:
        t = self._t
        state = self._state.committed
        return Activated(
            t.activation.run_id,
            t.activation.generation,
            absmax=t.absmax(state),
            state_hashes=row_hashes(state),
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
        training = frozenset(t.taking_part(start, tuple(self._rows)))
        for group in t.together.groups(tuple(self._rows)):
            busy = [i for i in group if i in training and t.nodes.get(i).is_train_node]
            ahead = t.together.train({i: t.together.job(i, state[self._rows[i]]) for i in busy})
            for index in group:
                k = self._rows[index]
                t.nodes.model.load(ahead[index].row if index in ahead else state[k])
                if index in busy:
                    t.train_node(start, index, sums, ahead=ahead.get(index))
                    trained.append(index)
                with t.nodes.blamed(index):
                    updates[k] = t.nodes.model.row
                self._finish_update(start, index, state[k], updates[k])
        # What is private stays behind; without any this is no copy.
        sent = np.ascontiguousarray(updates[:, : t.layout.num_parameters])
        t.post(start, UPDATE, tuple(self._rows), sent)
        return PhaseReport(nodes=tuple(sorted(trained)), metric_sums=sums, node_metrics=t.by_node.take(start))

    def aggregate(self, start: StartRound) -> PhaseReport:
        """Mix what the neighbours sent, in node-index order; publish a consensus partial when evaluation is due."""
        t = self._t
        postings = t.collect(start, UPDATE)
        rows = t.rows_of(postings, sorted(self._needed))
        self._state.rebase(start)
        state, size = self._state.spare(), t.layout.num_parameters
        sums: MetricSums = {}
        for index, k in self._rows.items():
            neighbours, weights = self._gossip.row(index, start.round)
            weighted_mix([rows[int(j)] for j in neighbours], weights.tolist(), state[k, :size])
            state[k, size:] = self._updates[k, size:]
            t.last_word(index, state[k])
            if start.evaluate:
                t.nodes.model.load(state[k])
                t.evaluate_node(start, index, sums)
                t.evaluate_own(start, index, sums)
        overflow: set[int] = set()
        if start.evaluate:
            overflow = self._publish_consensus(start, state[:, :size])
        self._state.stage(start, state)
        local = t.activation.assignment[t.nodes.indices[0]]
        crossing = sum(1 for j in self._needed - set(self._rows) if t.activation.assignment[j] == local)
        return PhaseReport(
            overflow=tuple(sorted(overflow)),
            absmax=t.absmax(state),
            state_hashes=row_hashes(state),
            metric_sums=sums,
            node_metrics=t.by_node.take(start),
            bytes_intra_cluster=crossing * state[0, :size].nbytes,
        )

    def _finish_update(self, start: StartRound, index: int, before: Array, update: Array) -> None:
        """Weigh a node's step where masses differ, in place, and look at the outcome."""
        t = self._t
        if self._gossip.push_sum:
            size, mass = t.layout.num_parameters, float(self._gossip.mass(start.round - 1)[index])
            self._weigh_step(before[:size], update[:size], mass)
        bad = t.layout.first_nonfinite(update)
        if bad:
            name = t.nodes.get(index).id
            place = f"{name} on {t.nodes.cluster}"
            raise WeightsError(
                "W020", f"{name} has non-finite values in {bad}", place=place, hint="lower the learning rate"
            )

    @staticmethod
    def _weigh_step(before: Array, update: Array, mass: float) -> None:
        """A local step enters the kept mean with the same weight on every node, whatever its mass is just now."""
        if mass != 1.0:
            step = update.astype(np.float64) - before
            update[:] = before + step / mass

    def _publish_consensus(self, start: StartRound, state: Array) -> set[int]:
        total = self._t.exact_sum(start)
        mass = self._gossip.mass(start.round)
        overflow: set[int] = set()
        for index, k in self._rows.items():
            weighed = state[k].astype(np.float64) * mass[index] if self._gossip.push_sum else state[k]
            overflow.update(total.add(weighed, 1))
        if not overflow:
            self._t.post(start, CONSENSUS, tuple(self._rows), total.sums, weight=total.weight)
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
        return None if state is None else pack_rows({str(i): state[k] for i, k in self._rows.items()}, round_number)

    def install(self, start: StartRound) -> PhaseReport:
        """Nothing: there is no global model."""
        return PhaseReport()

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that can be started from here."""
        return self._state.rounds

    def state_of(self, index: int) -> Array:
        """The node's own newest state."""
        state: Array = self._state.latest[self._rows[index]]
        return state
