"""What a host does in each phase of a round of a hierarchy: groups with an aggregator each, and one model for all of
them every so many rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from icrf.errors import InternalError
from icrf.exchange import CONSENSUS, MERGED, MODEL, PARTIAL
from icrf.learning.vectorized import Outcome
from icrf.ports import PhaseReport
from icrf.protocol import AGGREGATED, Activated, StartRound
from icrf.topology import Hierarchy, HybridAdjacencyMatrix
from icrf.update import ExactSum
from icrf_agent.checkpoint import pack_rows, unpack_rows
from icrf_agent.host_state import VersionedState
from icrf_agent.host_tools import HostTools, MetricSums, row_hashes
from icrf_agent.postings import Posting

Array = np.ndarray[Any, Any]


class HierarchicalFlow:
    """HierFAVG (Liu et al. 2020): federated averaging within groups, and over all of them in rounds that merge.

    A group's model is kept by the host of its aggregator. In a round within the groups it becomes the mean of the
    group's members; in a merging round the root makes the mean of all members of all groups out of one sum, exactly as
    without groups, and every aggregator takes it over within the round.

    Args:
        restored: the models of this host's aggregators in the round to start from; empty: the initial.

    Raises:
        WeightsError: W010, W020 for a state that does not fit.
    """

    def __init__(self, tools: HostTools, restored: bytes = b"") -> None:
        self._t = t = tools
        adjacency = HybridAdjacencyMatrix.from_graph(t.activation.graph)
        self._hierarchy = Hierarchy.of(adjacency, [node.role for node in t.activation.nodes])
        here = frozenset(t.nodes.indices)
        local = {a: tuple(i for i in members if i in here) for a, members in self._hierarchy.members.items()}
        # This host's members of each group that has any here.
        self._groups = {aggregator: members for aggregator, members in local.items() if members}
        kept = [a for a in self._hierarchy.aggregators if a in here]
        self._rows = {aggregator: k for k, aggregator in enumerate(kept)}
        self._learned = [part for tensor, part in t.layout.places if tensor.rule == AGGREGATED]
        self._seen = dict.fromkeys(self._groups, t.nodes.initial)
        self._state: VersionedState[Array] | None = None
        if kept:
            number = t.activation.restore_round
            initial = np.tile(t.nodes.initial, (len(kept), 1))
            if number:
                names = [str(aggregator) for aggregator in kept]
                initial = unpack_rows(t.layout, restored, number, names, t.layout.num_parameters)
            self._state = VersionedState(initial, number, recycle=not t.has_last_word)

    def initial(self) -> Activated:
        """The state to start from, as far as this host holds it."""
        run_id, generation = self._t.activation.run_id, self._t.activation.generation
        if self._state is None:
            return Activated(run_id, generation)
        state = self._state.committed
        return Activated(run_id, generation, absmax=self._t.absmax(state), state_hashes=row_hashes(state))

    def publish_model(self, start: StartRound) -> None:
        """Every aggregator here publishes the committed model of its group to the members."""
        state = self._kept().rebase(start)
        for aggregator, k in self._rows.items():
            self._t.post(start, MODEL, (aggregator,), state[k], recipients=self._hierarchy.members[aggregator])

    # ------------------------------------------------------------ members

    def train(self, start: StartRound) -> PhaseReport:
        """Train this host's members from their groups' models; publish a sum per group, or one of all of them."""
        t = self._t
        postings = {posting.senders[0]: posting for posting in t.collect(start, MODEL)}
        missing = [t.activation.nodes[a].id for a in self._groups if a not in postings]
        if missing:
            raise InternalError("X001", f"no model of {', '.join(missing[:5])} in round {start.round}")
        sums: MetricSums = {}
        overflow: set[int] = set()
        trained: list[int] = []
        total = t.exact_sum(start)
        for aggregator, members in self._groups.items():
            self._seen[aggregator] = t.references.get(postings[aggregator].reference)
            for group in t.together.groups(members):
                ahead = t.together.train({i: t.together.job(i, self._seen[aggregator]) for i in group})
                for i in group:
                    overflow.update(self._add(start, i, self._seen[aggregator], total, sums, ahead.get(i)))
            trained += members
            if not start.merge and not overflow:
                self._publish(start, PARTIAL, members, total, recipients=(aggregator,))
                total.reset(start.grid, start.total_weight)
        if start.merge and trained and not overflow:
            self._publish(start, CONSENSUS, trained, total)
        used = [postings[aggregator] for aggregator in self._groups]
        return PhaseReport(
            nodes=tuple(sorted(trained)),
            overflow=tuple(sorted(overflow)),
            metric_sums=sums,
            node_metrics=t.by_node.take(start),
            bytes_intra_cluster=t.foreign_bytes(used, t.nodes.initial.nbytes),
        )

    def _add(
        self,
        start: StartRound,
        index: int,
        seen: Array,
        total: ExactSum,
        sums: MetricSums,
        ahead: Outcome | None,
    ) -> tuple[int, ...]:
        """Train one member from its group's model unless it has been trained ahead, and add it to the sum; the tensors
        that left their bound."""
        t = self._t
        t.nodes.model.load(seen)
        t.evaluate_node(start, index, sums)
        trained = t.train_node(start, index, sums, ahead=ahead)
        t.clip(index, seen, trained, self._learned)
        return t.add_to(total, index, trained, t.weight(index))

    def _publish(self, start: StartRound, kind: str, senders: Sequence[int], total: ExactSum, **more: Any) -> None:
        self._t.post(start, kind, senders, total.sums, weight=total.weight, **more)

    # ------------------------------------------------------------ aggregators

    def aggregate(self, start: StartRound) -> PhaseReport:
        """Make the next model of every group whose aggregator is here, or, at the root, the one for all groups."""
        return self._merge_all(start) if start.merge else self._merge_groups(start)

    def _merge_groups(self, start: StartRound) -> PhaseReport:
        t, kept = self._t, self._kept()
        kept.rebase(start)
        state = kept.spare()
        sums: MetricSums = {}
        used: list[Posting] = []
        found = t.collect(start, PARTIAL)
        for aggregator, k in self._rows.items():
            postings = [posting for posting in found if posting.recipients == (aggregator,)]
            self._require_all(aggregator, postings)
            total = t.merge(start, postings, sum(posting.weight for posting in postings))
            total.mean(t.layout.dtype, out=state[k])
            t.last_word(aggregator, state[k])
            if start.evaluate:
                t.nodes.model.load(state[k])
                metrics = t.nodes.measure(aggregator, "evaluate", "test")
                t.count(start, aggregator, "", metrics, total.weight, sums)
            used += postings
        kept.stage(start, state)
        return self._made(start, state, sums, t.foreign_bytes(used, 8 * t.layout.num_parameters))

    def _merge_all(self, start: StartRound) -> PhaseReport:
        t, root = self._t, self._hierarchy.root
        postings = t.collect(start, CONSENSUS)
        model = t.merge(start, postings, start.total_weight).mean(t.layout.dtype)
        t.last_word(root, model)
        metrics: dict[str, float] = {}
        if start.evaluate:
            t.nodes.model.load(model)
            metrics = t.nodes.measure(root, "evaluate", "test")
        others = self._hierarchy.aggregators[1:]
        t.post(start, MERGED, (root,), model, recipients=others)
        return PhaseReport(
            metrics=metrics,
            model_hash=t.layout.model_sha256(model),
            bytes_intra_cluster=t.foreign_bytes(postings, 8 * t.layout.num_parameters),
        )

    def install(self, start: StartRound) -> PhaseReport:
        """Every aggregator here takes over the model for all groups."""
        t, kept = self._t, self._kept()
        kept.rebase(start)
        postings = t.collect(start, MERGED)
        if len(postings) != 1:
            raise InternalError("X001", f"round {start.round} has {len(postings)} global models")
        state = kept.spare()
        state[:] = t.references.get(postings[0].reference)
        kept.stage(start, state)
        return self._made(start, state, {}, t.foreign_bytes(postings, t.nodes.initial.nbytes))

    def evaluate(self, start: StartRound) -> PhaseReport:
        """Nothing: the aggregators have evaluated already."""
        return PhaseReport()

    def _require_all(self, aggregator: int, postings: Sequence[Posting]) -> None:
        """Every member of a group is in its sum, once."""
        there = sorted(node for posting in postings for node in posting.senders)
        if there != list(self._hierarchy.members[aggregator]):
            name = self._t.activation.nodes[aggregator].id
            raise InternalError("X001", f"{len(there)} members of the group of {name} have contributed to its sum")

    def _made(self, start: StartRound, state: Array, sums: MetricSums, moved: int) -> PhaseReport:
        return PhaseReport(
            absmax=self._t.absmax(state),
            metric_sums=sums,
            node_metrics=self._t.by_node.take(start),
            state_hashes=row_hashes(state),
            bytes_intra_cluster=moved,
        )

    # ------------------------------------------------------------ between rounds

    def model_at(self, round_number: int) -> Array | None:
        """The root's model after a committed round: the one for all groups if the round has merged them."""
        state = self._state.at(round_number) if self._state else None
        row = self._rows.get(self._hierarchy.root)
        return None if state is None or row is None else state[row]

    def checkpoint(self, round_number: int) -> bytes | None:
        """The models of this host's groups after a committed round, where they are still here."""
        state = self._state.at(round_number) if self._state else None
        return None if state is None else pack_rows({str(a): state[k] for a, k in self._rows.items()}, round_number)

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that can be started from here; empty if this host keeps no state."""
        return self._state.rounds if self._state else ()

    def state_of(self, index: int) -> Array:
        """What a node sees between rounds: the newest model of its group that this host has."""
        if self._state is not None and index in self._rows:
            state: Array = self._state.latest[self._rows[index]]
            return state
        return self._seen.get(self._hierarchy.group_of.get(index, -1), self._t.nodes.initial)

    def _kept(self) -> VersionedState[Array]:
        assert self._state is not None
        return self._state
