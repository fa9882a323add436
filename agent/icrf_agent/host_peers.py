"""What a host does in each phase of a round without a server: every host keeps its nodes' states, publishes their
updates, and mixes what their neighbours sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icrf.codecs import BF16
from icrf.errors import RunError, WeightsError
from icrf.exchange import CONSENSUS, UPDATE
from icrf.learning.training import LocalTerms
from icrf.lossy import to_bfloat16
from icrf.ports import PhaseReport
from icrf.protocol import Activated, Graph, StartRound
from icrf.topology import STATIC, Gossip, mixing_matrix
from icrf.update import weighted_mix
from icrf_agent.checkpoint import pack_rows, unpack_rows
from icrf_agent.host_adaptation import HostAdaptation
from icrf_agent.host_state import VersionedState
from icrf_agent.host_tools import HostTools, MetricSums, blocks_of
from icrf_agent.row_file import Table, like, make_table, read_row

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
        rows, self._size = t.activation.rows, t.layout.num_parameters
        # What a node keeps: its model, and behind that what its optimizer goes on from.
        self._width = t.layout.row_size + rows.client * self._size + rows.client_scalars
        self._state = VersionedState(self._first(restored), t.activation.restore_round, recycle=True, like=like)
        # What training has made of the part of a row that no neighbour sees.
        unshared = [np.zeros(self._width - self._size, t.layout.dtype)] * len(self._rows)
        self._unshared = self._table(unshared)
        # What rounding has taken off the rows that neighbours see; nothing where they see them in full.
        self._rounds = t.nodes.config.inter_cluster_codec == BF16
        left_out = np.zeros(self._size if self._rounds else 0, t.layout.dtype)
        self._left_out = self._table([left_out] * len(self._rows))
        self._trained: frozenset[int] = frozenset()
        self._adaptation = None if t.nodes.config.topology_adaptation_strategy == STATIC else HostAdaptation(t)
        self.relink(t.activation.graph)
        self._consensus: tuple[int, int, Array] | None = None

    def relink(self, graph: Graph) -> None:
        """Mix along this graph from the next round on."""
        t = self._t
        self._gossip = Gossip(mixing_matrix(graph, t.nodes.config.mixing))
        self._needed = {int(j) for i in t.nodes.indices for j in self._gossip.neighbours(i)}
        if self._adaptation is not None:
            self._adaptation.graph = graph

    def _first(self, restored: bytes) -> Table:
        """The rows of all nodes to start from: those of a checkpoint, or the initial model's."""
        t = self._t
        if t.activation.restore_round:
            names = [str(i) for i in t.nodes.indices]
            return self._table(list(unpack_rows(t.layout, restored, t.activation.restore_round, names, self._width)))
        t.nodes.model.load(t.nodes.initial)
        row = np.zeros(self._width, t.layout.dtype)
        row[: t.layout.row_size] = t.nodes.model.row
        return self._table([row] * len(self._rows))

    def _table(self, rows: list[Array]) -> Table:
        return make_table(rows, len(rows[0]), self._t.layout.dtype, not self._t.nodes.all_resident)

    def initial(self) -> Activated:
        """The states to start from."""
        made = _Made(self._t)
        for k in range(len(self._rows)):
            made.add(self._state.committed[k])
        activation = self._t.activation
        return Activated(
            activation.run_id, activation.generation, absmax=made.absmax, state_hashes=b"".join(made.hashes)
        )

    def publish_model(self, start: StartRound) -> None:
        """Nothing: there is no global model."""

    def train(self, start: StartRound) -> PhaseReport:
        """Train this host's nodes from their own states and publish their updates to their neighbours."""
        t = self._t
        state = self._state.rebase(start)
        sums: MetricSums = {}
        trained: list[int] = []
        training = frozenset(t.taking_part(start, tuple(self._rows)))
        blocks = blocks_of(tuple(self._rows), self._size * t.layout.dtype.itemsize)
        for nodes in blocks:
            sent = t.buffer("sent", (len(blocks[0]), self._size))[: len(nodes)]
            for group in t.together.groups(nodes):
                busy = [index for index in group if index in training and t.nodes.trains(index)]
                for index, row in self._trained_rows(start, group, busy, state, sums):
                    shown = to_bfloat16(row[: self._size]) if self._rounds else row[: self._size]
                    sent[self._rows[index] - self._rows[nodes[0]]] = shown
                    if self._rounds:
                        self._left_out[self._rows[index]] = row[: self._size] - shown
                    # What is private stays behind.
                    self._unshared[self._rows[index]] = row[self._size :]
                trained += busy
            t.post(start, UPDATE, nodes, sent)
        self._trained = frozenset(trained)
        return PhaseReport(nodes=tuple(sorted(trained)), metric_sums=sums, node_metrics=t.by_node.take(start))

    def _trained_rows(
        self, start: StartRound, group: Sequence[int], busy: Sequence[int], state: Table, sums: MetricSums
    ) -> Iterator[tuple[int, Array]]:
        """The nodes of a group with their rows, `busy` ones trained; a row is valid until the next group."""
        t, size = self._t, self._t.layout.row_size
        rows = dict(zip(group, t.buffer(f"rows of {len(group)}", (len(group), self._width)), strict=True))
        terms = {}
        for index, row in rows.items():
            read_row(state, self._rows[index], row)
            # What the optimizer goes on from is written in place.
            terms[index] = LocalTerms(optimizer_state=row[size:] if self._width > size else None)
        ahead = t.together.train({i: t.together.job(i, rows[i][:size], terms[i]) for i in busy})
        for index, row in rows.items():
            t.nodes.model.load(ahead[index].row if index in ahead else row[:size])
            if index in busy:
                t.nodes.trainer.begin(terms[index])
                t.train_node(start, index, sums, ahead=ahead.get(index))
                t.nodes.trainer.begin()
            with t.nodes.blamed(index):
                updated = t.nodes.model.row
            self._finish_update(start, index, row[:size], updated)
            row[:size] = updated
            yield index, row

    def aggregate(self, start: StartRound) -> PhaseReport:
        """Mix what the neighbours sent, in node-index order; publish a consensus partial when evaluation is due."""
        t = self._t
        postings = t.collect(start, UPDATE)
        rows = t.rows_of(postings, sorted(self._needed.union(self._rows)))
        before = self._state.rebase(start)
        state, made = self._state.spare(), _Made(t)
        sums: MetricSums = {}
        # Whoever has the last word on a row may keep it.
        may_keep = t.has_last_word
        consensus = _Consensus(t, self._gossip, start) if start.evaluate else None
        told = self._adaptation.telling(start, self._trained) if start.adapt and self._adaptation is not None else None
        for index, k in self._rows.items():
            row = np.empty(self._width, t.layout.dtype) if may_keep else t.buffer("row", (self._width,))
            own, size = row[: t.layout.row_size], self._size
            neighbours, weights = self._gossip.row(index, start.round)
            weighted_mix([rows[int(j)] for j in neighbours], weights.tolist(), row[:size])
            if self._rounds:
                # Nobody has it but the node itself: so the mean of all nodes stays what it was.
                row[:size] += self._left_out[k]
            read_row(self._unshared, k, row[size:])
            t.last_word(index, own)
            if consensus is not None:
                t.nodes.model.load(own)
                t.evaluate_node(start, index, sums)
                t.evaluate_own(start, index, sums)
                consensus.add(index, row[:size])
            if told is not None:
                told.add(index, before[k][:size], rows[index], row[:size])
            made.add(row)
            state[k] = row
        if told is not None:
            told.publish()
        overflow = consensus.publish(tuple(self._rows)) if consensus is not None else ()
        self._state.stage(start, state)
        local = t.activation.assignment[t.nodes.indices[0]]
        crossing = sum(1 for j in self._needed - set(self._rows) if t.activation.assignment[j] == local)
        return PhaseReport(
            overflow=overflow,
            absmax=made.absmax,
            state_hashes=b"".join(made.hashes),
            metric_sums=sums,
            node_metrics=t.by_node.take(start),
            bytes_intra_cluster=crossing * self._size * t.layout.dtype.itemsize,
        )

    def _finish_update(self, start: StartRound, index: int, before: Array, update: Array) -> None:
        """Weigh a node's step where masses differ, in place, and look at the outcome."""
        t = self._t
        if self._gossip.push_sum:
            size, mass = t.layout.num_parameters, float(self._gossip.mass(start.round - 1)[index])
            self._weigh_step(before[:size], update[:size], mass)
        bad = t.layout.first_nonfinite(update)
        if bad:
            name = t.activation.nodes[index].id
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

    def adapt(self, start: StartRound) -> Graph:
        """Decide on the graph of the rounds to come; F005 where graphs stay as they are."""
        if self._adaptation is None:
            raise RunError("F005", "the graph of this federation is static")
        return self._adaptation.decide(start)

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
        state: Array = self._state.latest[self._rows[index]][: self._t.layout.row_size]
        return state


class _Made:
    """What is reported of the states that a phase has made, one row after the other: hashes and largest values."""

    def __init__(self, tools: HostTools) -> None:
        self._layout = tools.layout
        self.hashes: list[bytes] = []
        self.absmax: tuple[float, ...] = ()

    def add(self, row: Array) -> None:
        """Take in a row, the model first."""
        self.hashes.append(hashlib.sha256(np.ascontiguousarray(row).data).digest())
        largest = self._layout.absmax(row[: self._layout.row_size])
        self.absmax = tuple(map(max, self.absmax, largest)) if self.absmax else largest


class _Consensus:
    """The host's part of the mean of all nodes, exact."""

    def __init__(self, tools: HostTools, gossip: Gossip, start: StartRound) -> None:
        self._t, self._start, self._push_sum = tools, start, gossip.push_sum
        self._total = tools.exact_sum(start)
        self._mass = gossip.mass(start.round)
        self._overflow: set[int] = set()

    def add(self, index: int, model: Array) -> None:
        """Count a node's shared parameters, with push-sum by its mass."""
        weighed = model.astype(np.float64) * self._mass[index] if self._push_sum else model
        self._overflow.update(self._total.add(weighed, 1))

    def publish(self, nodes: tuple[int, ...]) -> tuple[int, ...]:
        """Post the sum; the tensors that left the grid, if any: then nothing is posted."""
        if not self._overflow:
            self._t.post(self._start, CONSENSUS, nodes, self._total.sums, weight=self._total.weight)
        return tuple(sorted(self._overflow))
